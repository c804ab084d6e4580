#include "cpu/recently_used.h"

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

namespace convext::cpu {

std::mutex& store_mutex() {
  // Never destroyed: threads may outlive static objects.
  static std::mutex& mutex = []() -> std::mutex& {
    static std::mutex* made = new std::mutex;
#if __has_include(<pthread.h>)
    pthread_atfork([] { made->lock(); }, [] { made->unlock(); }, [] { made->unlock(); });
#endif
    return *made;
  }();
  return mutex;
}

}  // namespace convext::cpu
