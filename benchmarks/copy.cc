// The unit of the benchmarks: a copy, on as many threads and by the same pool or team. measure.py
// compiles it, together with csrc/system/parallel.cc.
#include <cstdint>
#include <cstring>

#include "system/parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
using Register = __m512i;
void stream(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<Register*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
using Register = __m256i;
void stream(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<Register*>(to),
                      _mm256_loadu_si256(reinterpret_cast<const Register*>(from)));
}
#elif defined(__SSE2__)
using Register = __m128i;
void stream(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<Register*>(to),
                   _mm_loadu_si128(reinterpret_cast<const Register*>(from)));
}
#endif

// Past the cache, where the processor can.
void copy_streaming(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kBytes = sizeof(Register);
  for (; bytes > 0 && reinterpret_cast<uintptr_t>(to) % kBytes != 0; --bytes) *to++ = *from++;
  for (; bytes >= 4 * kBytes; bytes -= 4 * kBytes, to += 4 * kBytes, from += 4 * kBytes) {
    for (int k = 0; k < 4; ++k) stream(to + k * kBytes, from + k * kBytes);
  }
  _mm_sfence();
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace

extern "C" void copy(char* to, const char* from, int64_t bytes, int threads, int streaming,
                     batchnorm::Team team) {
  batchnorm::set_num_threads(threads);
  const auto copy_part = [&](int task) {
    const int64_t begin = bytes / threads * task;
    const int64_t end = task + 1 == threads ? bytes : bytes / threads * (task + 1);
    if (streaming) {
      copy_streaming(to + begin, from + begin, end - begin);
    } else {
      std::memcpy(to + begin, from + begin, end - begin);
    }
  };
  batchnorm::parallel_for(threads, copy_part, team);
}
