// A bounded store of what is costly to make again: the values used last, for any thread.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace convext::cpu {

// Guards every store, never for long. A process may be forked while some thread holds it: the child
// finds it free (recently_used.cpp).
std::mutex& store_mutex();

struct StoreSize {
  size_t values;
  int64_t bytes;
};

// Key has operator== and hash(). Values are shared, so that one dropped lives on where it's in use.
template <class Key, class Value>
class RecentlyUsed {
 public:
  RecentlyUsed(size_t most_values, int64_t most_bytes)
      : most_values_(most_values), most_bytes_(most_bytes) {}

  // Null where there is none.
  std::shared_ptr<Value> find(const Key& key) {
    const std::lock_guard lock(store_mutex());
    const auto found = places_.find(key);
    if (found == places_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found->second);
    found->second->last_find = ++finds_;
    return found->second->value;
  }

  // Whether so many bytes more fit without dropping what is in use. Where a cycle of calls needs
  // more than there is room for, to drop the oldest for the newest would leave nothing to be found.
  bool has_room(int64_t bytes) const {
    constexpr int64_t kInUse = 1024;  // finds ago
    const std::lock_guard lock(store_mutex());
    int64_t over = bytes_ + bytes - most_bytes_;
    for (auto oldest = entries_.rbegin(); over > 0; ++oldest) {
      if (oldest == entries_.rend() || finds_ - oldest->last_find < kInUse) return false;
      over -= oldest->bytes;
    }
    return true;
  }

  // Takes the place of what `key` had. `bytes` is what the value holds.
  void insert(const Key& key, std::shared_ptr<Value> value, int64_t bytes) {
    if (bytes > most_bytes_) return;
    const std::lock_guard lock(store_mutex());
    const auto found = places_.find(key);
    if (found != places_.end()) drop(found->second);
    entries_.push_front({key, std::move(value), bytes, finds_});
    places_[key] = entries_.begin();
    bytes_ += bytes;
    while (entries_.size() > most_values_ || bytes_ > most_bytes_) drop(std::prev(entries_.end()));
  }

  StoreSize size() const {
    const std::lock_guard lock(store_mutex());
    return {entries_.size(), bytes_};
  }

 private:
  struct Entry {
    Key key;
    std::shared_ptr<Value> value;
    int64_t bytes, last_find;
  };
  using Place = typename std::list<Entry>::iterator;
  struct Hash {
    size_t operator()(const Key& key) const { return key.hash(); }
  };

  void drop(Place place) {
    bytes_ -= place->bytes;
    places_.erase(place->key);
    entries_.erase(place);
  }

  size_t most_values_;
  int64_t most_bytes_, bytes_ = 0, finds_ = 0;
  std::list<Entry> entries_;  // the one used last in front
  std::unordered_map<Key, Place, Hash> places_;
};

}  // namespace convext::cpu
