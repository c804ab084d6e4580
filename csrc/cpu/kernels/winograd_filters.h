// Filters as Winograd's convolution multiplies by them.
#pragma once

#include <algorithm>

#include "cpu/kernels/conv2d_driver.h"
#include "cpu/kernels/winograd_blocks.h"

namespace convext::cpu {

// Cuts `lanes` lanes into panels of two vectors, and one where one is left.
template <class Body>
void for_panels(int64_t lanes, int lanes_of_vector, const Body& body) {
  for (int64_t lane = 0; lane < lanes;) {
    const int vectors = lanes - lane >= 2 * lanes_of_vector ? 2 : 1;
    body(lane, vectors);
    lane += vectors * lanes_of_vector;
  }
}

// A chain of a sum over k channels: equal ones, but for vectors' sake in whole sixteens.
inline int64_t channel_chain(int64_t k, int64_t most) {
  return std::max<int64_t>(1, k <= most ? k : round_up(chain_length(k, most), 16));
}
template <class Body>
void for_chains(int64_t k, int64_t chain, const Body& body) {
  for (int64_t first = 0; first < k; first += chain) body(first, std::min(chain, k - first));
}

// The transformed filters of all groups: planes of panels [panel][k][lanes of the panel], where k
// counts what products sum over. A few are transformed once, before all else, and shared; of many,
// which no cache would hold, each item transforms those that it needs next: for some lanes and a
// chain of k, it lays them out as a matrix, and from that transforms a row of planes at a time.
template <class T>
class WinogradFilters {
 public:
  WinogradFilters(const Conv2dCall& call, int size, int64_t chain, Arena& arena)
      : isa_(call.isa->of<T>()),
        forward_(call.pass == Conv2dPass::forward),
        size_(size),
        groups_(call.problem.groups),
        bank_(filter_bank(call)),
        weight_(call.weight) {
    const int64_t n = size + 2;
    k = forward_ ? bank_.channels : bank_.filters;
    ld = round_up(forward_ ? bank_.filters : bank_.channels, isa_.lanes);
    chain_ = chain;
    many = n * n * bank_.filters * bank_.channels > kMany;
    range = std::clamp<int64_t>(ld, 1, kRange);
    plane_stride = (many ? std::min(k, chain) * range : k * ld) + kGap;
    slots_ = slot_count(call, groups_ * ceil_div(ld, range));
    planes_ = arena.take<T>(many ? 0 : groups_ * n * n * plane_stride);
    matrix_size_ = std::min(k, chain) * bank_.taps * range;
    matrices_ = arena.take<T>(many ? 0 : slots_ * matrix_size_);
    converted_ = arena.take<T>(scratch_size<T>(call.dtype, groups_ * bank_.size()));
  }

  // What a slot needs that multiplies by many.
  struct Scratch {
    Scratch(const WinogradFilters& f, Arena& arena)
        : matrix(arena.take<T>(f.many ? f.matrix_size_ : 0)),
          planes(arena.take<T>(f.many ? (f.size_ + 2) * f.plane_stride : 0)) {}
    T *matrix, *planes;
  };

  void prepare() {
    if (size_of(bank_.dtype) != int64_t(sizeof(T))) {
      run_slots(std::min(slots_, groups_), groups_, [&](int64_t, int64_t group) {
        const int64_t offset = group * bank_.size();
        isa_.load(bank_.dtype, weight_, offset, converted_ + offset, bank_.size());
      });
      weight_ = converted_;
    }
    if (many) return;
    const int64_t ranges = ceil_div(ld, range), n = size_ + 2;
    run_slots(slots_, groups_ * ranges, [&](int64_t slot, int64_t item) {
      const int64_t group = item / ranges, lane = item % ranges * range;
      T* matrix = matrices_ + slot * matrix_size_;
      for_chains(k, chain_, [&](int64_t first, int64_t terms) {
        lay_out(group, lane, first, terms, matrix);
        transform(lane, terms, kAllRows, matrix, planes_ + group * n * n * plane_stride + lane * k,
                  k, first);
      });
    });
  }

  // To be called before planes() for other lanes or other k.
  void choose(int64_t group, int64_t lane, int64_t first, int64_t terms, const Scratch& s) const {
    if (many) lay_out(group, lane, first, terms, s.matrix);
  }

  // The planes of a row, from their panel of `lane` on.
  const T* planes(int64_t group, int64_t lane, int64_t terms, int row, const Scratch& s) const {
    const int64_t n = size_ + 2;
    if (!many) return planes_ + (group * n + row) * n * plane_stride + lane * k;
    transform(lane, terms, row, s.matrix, s.planes, terms, 0);
    return s.planes;
  }
  // Where in such a plane the chosen k of the panel begin that is `lane` lanes further on.
  int64_t panel(int64_t lane, int64_t width, int64_t first, int64_t terms) const {
    return many ? lane * terms : lane * k + first * width;
  }

  bool many;
  int64_t k, ld, range, plane_stride;

 private:
  // Elements of transformed filters above which they are not kept.
  static constexpr int64_t kMany = int64_t(1) << 20;
  // Lanes at a time: what is laid out and a row of planes stay in a cache of 1 MiB.
  static constexpr int64_t kRange = 64;

  // matrix[k * taps + tap][range] of the filters of a group.
  void lay_out(int64_t group, int64_t lane, int64_t first, int64_t terms, T* matrix) const {
    const T* bank = static_cast<const T*>(weight_) + group * bank_.size();
    const int64_t taps = bank_.taps, channels = bank_.channels, filter = channels * taps;
    const bool nchw = bank_.layout == Layout::nchw;
    const int64_t lanes =
        std::min(range, (forward_ ? bank_.filters : channels) - lane);  // that are there
    if (lanes < std::min(range, ld - lane)) std::fill_n(matrix, terms * taps * range, T(0));
    if (forward_) {
      const T* from = bank + lane * filter;
      if (nchw) {
        isa_.transpose(from + first * taps, filter, matrix, range, lanes, terms * taps);
      } else {
        for (int64_t i = 0; i < lanes; i += 16) {  // filters lie pages apart
          for (int64_t tap = 0; tap < taps; ++tap) {
            isa_.transpose(from + i * filter + tap * channels + first, filter,
                           matrix + tap * range + i, taps * range, std::min<int64_t>(16, lanes - i),
                           terms);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < terms; ++i, matrix += taps * range) {
        const T* from = bank + (first + i) * filter;
        if (nchw) {
          isa_.transpose(from + lane * taps, taps, matrix, range, lanes, taps);
        } else {
          for (int64_t tap = 0; tap < taps; ++tap) {
            const T* row = from + tap * channels + lane;
            // Short runs, far apart: asked for a filter ahead.
            for (int64_t l = 0; l < lanes; l += 64 / sizeof(T))
              __builtin_prefetch(row + filter + l);
            std::copy_n(row, lanes, matrix + tap * range);
          }
        }
      }
    }
  }

  // To the places of panels that hold `extent` k each, of which these are those from `first` on.
  void transform(int64_t lane, int64_t terms, int row, const T* matrix, T* planes, int64_t extent,
                 int64_t first) const {
    const int64_t taps = bank_.taps;
    for_panels(std::min(range, ld - lane), isa_.lanes, [&](int64_t at, int vectors) {
      const int64_t width = vectors * isa_.lanes;
      // Going backward, they are turned by 180 degrees.
      const T* from = matrix + at + (forward_ ? 0 : (taps - 1) * range);
      isa_.winograd({WinogradMap::filter,
                     size_,
                     {nullptr, from, forward_ ? range : -range, taps * range},
                     {nullptr, planes + at * extent + first * width, plane_stride, width},
                     nullptr,
                     terms,
                     width,
                     row,
                     false,
                     0});
    });
  }

  const VectorKernels<T>& isa_;
  bool forward_;
  int size_;
  int64_t groups_;
  FilterBank bank_;
  const void* weight_;
  int64_t chain_, slots_, matrix_size_;
  T *planes_, *matrices_, *converted_;
};

}  // namespace convext::cpu
