#include "system/cache.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <string>

#ifdef __APPLE__
#include <sys/sysctl.h>
#elif !defined(_WIN32)
#include <unistd.h>
#endif

#include "system/file.h"

namespace batchnorm {
namespace {

// Of a small processor, for systems that do not say.
constexpr int64_t kSmallCache = int64_t{4} << 20;

int64_t ask_system() {
  int64_t bytes = 0;
#ifdef __APPLE__
  for (const char* name : {"hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"}) {
    int64_t found = 0;
    size_t size = sizeof found;
    if (sysctlbyname(name, &found, &size, nullptr, 0) == 0) bytes = std::max(bytes, found);
  }
#else
  // "32768K". The C library, where it knows, can mean all caches of that level of a processor of
  // several dies together, of which a core has but one.
  for (int index = 0; bytes <= 0 && index < 8; ++index) {
    const std::string level =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(7 - index);
    bytes = std::atoll(contents_of(level + "/size").c_str()) << 10;
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (bytes <= 0) {
    bytes = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
  }
#endif
#endif
  return bytes > 0 ? bytes : kSmallCache;
}

// 0 until the system has been asked. (No static variable of a function: see parallel.h, fork().)
std::atomic<int64_t> cache_bytes{0};

}  // namespace

int64_t last_level_cache_bytes() {
  const int64_t bytes = cache_bytes;
  if (bytes > 0) return bytes;
  int64_t unknown = 0;
  cache_bytes.compare_exchange_strong(unknown, ask_system());
  return cache_bytes;
}

void set_last_level_cache_bytes(int64_t bytes) { cache_bytes = std::max<int64_t>(bytes, 1); }

}  // namespace batchnorm
