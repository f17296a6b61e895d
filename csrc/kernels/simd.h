// A pack: as many floats or doubles as one vector register holds, on the compiler's vector types.
//
// Storage types are float, double, Half and Bfloat; arithmetic is in F = float or double.
// Everything has internal linkage, since this header is compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "stages/batch_norm.h"

// For the bodies of hot loops. Where one is called and not inlined, its captures live in memory,
// and are loaded again after every store.
#define BATCHNORM_INLINE __attribute__((always_inline))
#define BATCHNORM_NOINLINE __attribute__((noinline))

namespace batchnorm {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// body(arithmetic type, element type), both as values.
template <class Body>
inline void with_types(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float(), float());
    case Dtype::float64:
      return body(double(), double());
    case Dtype::float16:
      return body(float(), Half());
    case Dtype::bfloat16:
      return body(float(), Bfloat());
  }
}

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

template <class F>
constexpr int kLanes = kRegisterBytes / sizeof(F);
template <class F>
using Pack = Vector<F, kLanes<F>>;
template <class F>
using Bits = Vector<std::conditional_t<sizeof(F) == 4, int32_t, int64_t>, kLanes<F>>;

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_bytes(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// ---- float16, where the processor has no instruction for it

template <int N>
inline Vector<float, N> widen_half(Vector<uint16_t, N> half) {
  using U = Vector<uint32_t, N>;
  const U h = __builtin_convertvector(half, U);
  const U magnitude = (h & 0x7fffu) << 13;
  const U normal = magnitude + (112u << 23);  // the exponents' biases differ by 112
  // Of a subnormal, an integer: a caller that flushes subnormal floats does not mean halves.
  using V = Vector<float, N>;
  const U subnormal =
      as<U>(__builtin_convertvector(as<Vector<int32_t, N>>(h & 0x3ffu), V) * 0x1p-24f);
  const U is_subnormal = U((h & 0x7c00u) == 0), is_special = U((h & 0x7c00u) == 0x7c00u);
  U bits = (is_subnormal & subnormal) | (~is_subnormal & normal);
  bits = (is_special & (magnitude | 0x7f800000u)) | (~is_special & bits);
  return as<V>(bits | (h & 0x8000u) << 16);
}

template <int N>
inline Vector<uint16_t, N> narrow_half(Vector<float, N> f) {
  using U = Vector<uint32_t, N>;
  using V = Vector<float, N>;
  const U u = as<U>(f);
  const U magnitude = u & 0x7fffffffu;
  const U nan = U(magnitude > 0x7f800000u);
  const U overflow = U(magnitude >= 0x477ff000u);  // 65520 and above round to infinity
  const U tiny = U(magnitude < 0x38800000u);       // below 2^-14: a subnormal half
  // Adding 0.5 lets the float adder round to a multiple of 2^-24, the subnormal spacing.
  const U subnormal = as<U>(as<V>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U h = (tiny & subnormal) | (~tiny & normal);
  h = (overflow & 0x7c00u) | (~overflow & h);
  h = (nan & 0x7e00u) | (~nan & h);
  return __builtin_convertvector(h | ((u >> 16) & 0x8000u), Vector<uint16_t, N>);
}

// ---- load and store, in packs of F whatever the storage type

template <int N>
inline Vector<float, N> load_floats(const float* from) {
  return load_bytes<Vector<float, N>>(from);
}
template <int N>
inline Vector<float, N> load_floats(const Bfloat* from) {
  // A compiler may widen in several steps where there is an instruction that does it in one.
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i bits = _mm512_zextsi256_si512(load_bytes<__m256i>(from));
    constexpr Vector<uint16_t, 32> kHalf = {0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,
                                            5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
                                            11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    const auto wide = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, as<__m512i>(kHalf), bits);
    return as<Vector<float, N>>(wide);
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i twice = _mm256_broadcastsi128_si256(load_bytes<__m128i>(from));
    constexpr Vector<int8_t, 32> kHalf = {-1, -1, 0,  1,  -1, -1, 2,  3,  -1, -1, 4,
                                          5,  -1, -1, 6,  7,  -1, -1, 8,  9,  -1, -1,
                                          10, 11, -1, -1, 12, 13, -1, -1, 14, 15};
    return as<Vector<float, N>>(_mm256_shuffle_epi8(twice, as<__m256i>(kHalf)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (N == 4) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return as<Vector<float, N>>(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
  }
#endif
  const auto bits = load_bytes<Vector<uint16_t, N>>(from);
  return as<Vector<float, N>>(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
}
template <int N>
inline Vector<float, N> load_floats(const Half* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return as<Vector<float, N>>(_mm512_cvtph_ps(load_bytes<__m256i>(from)));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return as<Vector<float, N>>(_mm256_cvtph_ps(load_bytes<__m128i>(from)));
#endif
  return widen_half<N>(load_bytes<Vector<uint16_t, N>>(from));
}

template <class F, class T>
inline Pack<F> load(const T* from) {
  if constexpr (std::is_same_v<F, T>) {
    return load_bytes<Pack<F>>(from);
  } else if constexpr (std::is_same_v<F, float>) {
    return load_floats<kLanes<float>>(from);
  } else {
    return __builtin_convertvector(load_floats<kLanes<double>>(from), Pack<double>);
  }
}

inline void store(float* to, Pack<float> v) { std::memcpy(to, &v, sizeof v); }
inline void store(double* to, Pack<double> v) { std::memcpy(to, &v, sizeof v); }
inline void store(Bfloat* to, Pack<float> v) {
  using U = Vector<uint32_t, kLanes<float>>;
  const U u = as<U>(v);
  // To nearest, ties to even. A NaN stays one, as it has nothing in its lower half: it is an
  // element or a `coefficient`, or what arithmetic makes of these.
  const U rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(__AVX512F__)
  // One instruction instead of a shift and a narrowing.
  constexpr Vector<uint16_t, 32> kOdd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const auto words = _mm512_permutexvar_epi16(as<__m512i>(kOdd), as<__m512i>(rounded));
  const auto bits = _mm512_castsi512_si256(words);
#elif defined(__AVX2__)
  constexpr Vector<int8_t, 32> kOdd = {2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15,
                                       2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15};
  const __m256i words = _mm256_shuffle_epi8(as<__m256i>(rounded), as<__m256i>(kOdd));
  const auto bits = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
#else
  const Bits<float> upper = as<Bits<float>>(rounded) >> 16;
#if defined(__SSE2__)
  const auto bits =
      as<Vector<int64_t, 2>>(_mm_packs_epi32(as<__m128i>(upper), as<__m128i>(upper)))[0];
#else
  const auto bits = __builtin_convertvector(upper, Vector<int16_t, kLanes<float>>);
#endif
#endif
  std::memcpy(to, &bits, sizeof bits);
}
inline void store(Half* to, Pack<float> v) {
#if defined(__AVX512F__)
  const auto bits = _mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  const auto bits = _mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const auto bits = narrow_half<kLanes<float>>(v);
#endif
  std::memcpy(to, &bits, sizeof bits);
}

template <class F>
inline Pack<F> select(Bits<F> mask, Pack<F> yes, Pack<F> no) {
  return as<Pack<F>>((mask & as<Bits<F>>(yes)) | (~mask & as<Bits<F>>(no)));
}

// All bits set in the first `count` lanes.
template <class F>
inline Bits<F> first_lanes(int count) {
  Bits<F> lane;
  for (int i = 0; i < kLanes<F>; ++i) lane[i] = i;
  return Bits<F>(lane < count);
}

// Copies fewer elements than a pack has, without a call.
template <class F, class T>
inline BATCHNORM_INLINE void copy_few(T* to, const T* from, int count) {
  for (int n = kLanes<F> / 2; n > 0; n /= 2) {
    if (!(count & n)) continue;
    std::memcpy(to, from, n * sizeof(T));
    to += n;
    from += n;
  }
}

// Up to 7 elements of two bytes, and 0 beyond them. Not by a copy, which the load of a pack from it
// would wait for.
template <class T>
inline BATCHNORM_INLINE Vector<uint64_t, 2> load_few(const T* from, int count) {
  static_assert(sizeof(T) == 2);
  const T* const last = from + (count & 4);
  uint64_t first = 0, rest = 0;
  if (count & 1) rest = load_bytes<uint16_t>(last + (count & 2));
  if (count & 2) rest = rest << 32 | load_bytes<uint32_t>(last);
  if (count & 4) first = load_bytes<uint64_t>(from);
  const bool are_four = count & 4;
  return Vector<uint64_t, 2>{are_four ? first : rest, are_four ? rest : 0};
}

// The first `count` elements, the other lanes 0: for the end of a row.
template <class F, class T>
inline BATCHNORM_INLINE Pack<F> load(const T* from, int count) {
  if (count == kLanes<F>) return load<F>(from);
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<T, float> && std::is_same_v<F, float>) {
    return as<Pack<F>>(_mm512_maskz_loadu_ps(mask, from));
  }
  if constexpr (sizeof(T) == 2 && std::is_same_v<F, float>) {
    const __m256i elements = _mm256_maskz_loadu_epi16(mask, from);
    return load<F>(reinterpret_cast<const T*>(&elements));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<F, float>) {
    return as<Pack<F>>(_mm256_maskload_ps(from, as<__m256i>(first_lanes<F>(count))));
  }
#endif
  constexpr bool kLowestFirst = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  if constexpr (sizeof(T) == 2 && kLanes<F> <= 8 && kLowestFirst) {
    const Vector<uint64_t, 2> elements = load_few(from, count);
    return load<F>(reinterpret_cast<const T*>(&elements));
  }
  T buffer[kLanes<F>] = {};
  copy_few<F>(buffer, from, count);
  return load<F>(buffer);
}
// The other lanes as those of `rest`.
template <class F, class T>
inline BATCHNORM_INLINE Pack<F> load(const T* from, int count, Pack<F> rest) {
  if (count == kLanes<F>) return load<F>(from);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<F, float>) {
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    return as<Pack<F>>(_mm512_mask_loadu_ps(as<__m512>(rest), mask, from));
  }
#endif
  return select<F>(first_lanes<F>(count), load<F>(from, count), rest);
}
template <class F, class T>
inline BATCHNORM_INLINE void store(T* to, Pack<F> v, int count) {
  if (count == kLanes<F>) return store(to, v);
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<T, float> && std::is_same_v<F, float>) {
    return _mm512_mask_storeu_ps(to, mask, as<__m512>(v));
  }
  if constexpr (sizeof(T) == 2 && std::is_same_v<F, float>) {
    T buffer[kLanes<F>];
    store(buffer, v);
    return _mm256_mask_storeu_epi16(to, mask, load_bytes<__m256i>(buffer));
  }
#endif
  T buffer[kLanes<F>];
  store(buffer, v);
  copy_few<F>(to, buffer, count);
}

// ---- around the caches

// Asks for a cache line in advance, into the second-level cache: the first-level one has room for
// fewer that are on their way.
template <class T>
inline BATCHNORM_INLINE void fetch(const T* from) {
  __builtin_prefetch(from, 0, 2);
}

// Stores a pack of whole, aligned storage without reading its cache lines first or keeping them.
template <class T, class V>
inline BATCHNORM_INLINE void store_past_cache(T* to, V v) {
#if defined(__SSE2__)
  constexpr int kBytes = sizeof(T) * (sizeof(V) / sizeof(v[0]));
  alignas(kBytes) T buffer[kBytes / sizeof(T)];
  store(buffer, v);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_bytes<__m512i>(buffer));
  }
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_bytes<__m256i>(buffer));
  }
#endif
  if constexpr (kBytes == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_bytes<__m128i>(buffer));
  }
#endif
  store(to, v);
}

// Stores past the cache become visible to other threads in order with those that follow.
inline void order_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A pack of storage of which a part has been given: where the other comes next, as from a row that
// follows in memory, all of it goes past the cache, which half of a line can't.
template <class F, class T>
class OpenPack {
 public:
  static constexpr uintptr_t kBytes = sizeof(T) * kLanes<F>;

  OpenPack() = default;
  OpenPack(const OpenPack&) = delete;
  ~OpenPack() { close(); }

  // v, of n elements that lie in one aligned pack of storage.
  BATCHNORM_NOINLINE void put(T* to, Pack<F> v, int n) {
    if (to != end_ || place(to) == 0) {
      close();
      begin_ = to;
    }
    store<F>(storage_ + place(to), v, n);
    end_ = to + n;
    if (place(to) + n < kLanes<F>) return;
    if (place(begin_) != 0) return close();
    store_past_cache(begin_, load<F>(storage_));
    begin_ = end_ = nullptr;
  }
  void close() {
    copy_few<F>(begin_, storage_ + place(begin_), static_cast<int>(end_ - begin_));
    begin_ = end_ = nullptr;
  }

 private:
  static int place(T* to) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(to) % kBytes / sizeof(T));
  }
  alignas(kBytes) T storage_[kLanes<F>];
  T* begin_ = nullptr;  // of what is in `storage_`, and not yet written
  T* end_ = nullptr;
};

// Writes a row of storage, in packs.
template <class F, class T>
class Writer {
 public:
  Writer(T* to, bool past_cache, OpenPack<F, T>& open)
      : to_(to), past_cache_(past_cache), open_(open) {}
  // Where the packs of another Writer are aligned, so that only what is aligned alike goes past the
  // cache.
  Writer(T* to, const Writer& beside, OpenPack<F, T>& open)
      : to_(to), past_cache_(beside.past_cache_), open_(open) {
    const auto address = [](T* p) { return reinterpret_cast<uintptr_t>(p); };
    if ((address(to) - address(beside.to_)) % kBytes != 0) past_cache_ = false;
  }
  // How many elements come before the first aligned pack; 0 where it does not matter.
  int64_t before_alignment(int64_t n) const {
    if (!past_cache_) return 0;
    const int64_t before = (-reinterpret_cast<uintptr_t>(to_) % kBytes) / sizeof(T);
    return before < n ? before : n;
  }
  BATCHNORM_INLINE void put(int64_t i, Pack<F> v, int n) const {
    if (!past_cache_) {
      store<F>(to_ + i, v, n);
    } else if (n == kLanes<F>) {
      store_past_cache(to_ + i, v);
    } else {
      open_.put(to_ + i, v, n);
    }
  }

 private:
  static constexpr uintptr_t kBytes = OpenPack<F, T>::kBytes;
  T* to_;
  bool past_cache_;
  OpenPack<F, T>& open_;
};

// body(i, count) for packs at i = 0, kLanes, ...: `count` is kLanes, a constant, but for the last.
// The first pack has `before` elements, unless that is 0.
template <class F, class Body>
inline BATCHNORM_INLINE void for_packs(int64_t before, int64_t n, const Body& body) {
  if (before > 0) body(0, static_cast<int>(before));
  int64_t i = before;
  for (; i + kLanes<F> <= n; i += kLanes<F>) body(i, kLanes<F>);
  if (i < n) body(i, static_cast<int>(n - i));
}
template <class F, class Body>
inline BATCHNORM_INLINE void for_packs(int64_t n, const Body& body) {
  for_packs<F>(0, n, body);
}

// put(i, value(i, count), count) for the packs of for_packs. Two are read before they are written:
// where x and y are in a cache, reads and writes that take turns cost up to twice the time.
template <class F, class Value, class Put>
inline BATCHNORM_INLINE void map_packs(int64_t before, int64_t n, const Value& value,
                                       const Put& put) {
  const auto one = [&](int64_t i, int count) BATCHNORM_INLINE { put(i, value(i, count), count); };
  if (before > 0) one(0, static_cast<int>(before));
  int64_t i = before;
  for (; i + 2 * kLanes<F> <= n; i += 2 * kLanes<F>) {
    const Pack<F> first = value(i, kLanes<F>);
    const Pack<F> second = value(i + kLanes<F>, kLanes<F>);
    put(i, first, kLanes<F>);
    put(i + kLanes<F>, second, kLanes<F>);
  }
  if (i + kLanes<F> <= n) {
    one(i, kLanes<F>);
    i += kLanes<F>;
  }
  if (i < n) one(i, static_cast<int>(n - i));
}

// ---- arithmetic

// As an arithmetic type. A NaN may come with any bits, which rounding to bfloat16 could carry into
// its sign: it becomes that of arithmetic.
template <class F>
inline F coefficient(double value) {
  return std::isnan(value) ? std::numeric_limits<F>::quiet_NaN() : static_cast<F>(value);
}

template <class F>
inline Pack<F> all(F value) {
  return value - Pack<F>{};
}

// In double. By halves, of which compilers make instructions on registers.
template <int N>
inline BATCHNORM_INLINE double sum_of_lanes(const Vector<double, N>& v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    using HalfOf = Vector<double, N / 2>;
    return sum_of_lanes<N / 2>(load_bytes<HalfOf>(&v) +
                               load_bytes<HalfOf>(reinterpret_cast<const double*>(&v) + N / 2));
  }
}
template <class F>
inline double horizontal_sum(Pack<F> v) {
  return sum_of_lanes<kLanes<F>>(__builtin_convertvector(v, Vector<double, kLanes<F>>));
}

// The limit or v, whichever is larger (smaller); v where it is NaN, which the instructions return
// where it is their second operand.
template <class F>
inline Pack<F> at_least(F limit, Pack<F> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_max_ps(all(limit), v);
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) return _mm256_max_ps(all(limit), v);
#elif defined(__SSE2__)
  if constexpr (sizeof(F) == 4) return _mm_max_ps(all(limit), v);
#endif
  return select<F>(Bits<F>(v < limit), all(limit), v);
}
template <class F>
inline Pack<F> at_most(F limit, Pack<F> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_min_ps(all(limit), v);
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) return _mm256_min_ps(all(limit), v);
#elif defined(__SSE2__)
  if constexpr (sizeof(F) == 4) return _mm_min_ps(all(limit), v);
#endif
  return select<F>(Bits<F>(v > limit), all(limit), v);
}

// exp(x) is finite and normal for |x| <= kMostExponent.
template <class F>
constexpr F kMostExponent = sizeof(F) == 4 ? 87 : 700;

// exp within those limits, to about one unit in the last place: x = n ln 2 + r, |r| <= ln 2 / 2,
// and of e^r the polynomial of degree 6 whose largest relative error, 4e-9, is least.
inline Pack<float> exponential(Pack<float> x) {
  // Adding it rounds to an integer, n + 127, in the lowest bits: the exponent of 2^n.
  const Pack<float> shift = all(0x1.8p23f + 127);
  const Pack<float> shifted = x * 0x1.715476p+0f + shift;
  const Pack<float> n = shifted - shift;
  const Pack<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Pack<float> e = all(0x1.6b799p-10f);
  e = e * r + 0x1.123060p-7f;
  e = e * r + 0x1.55567ep-5f;
  e = e * r + 0x1.5554a2p-3f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * as<Pack<float>>(as<Bits<float>>(shifted) << 23);
}
// (Not inlined: the loops around it would keep its lanes apart, and need much of the stack.)
__attribute__((noinline)) inline Pack<double> exponential(Pack<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace batchnorm
