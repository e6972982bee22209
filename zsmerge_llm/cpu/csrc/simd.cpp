// CPU kernels for decode steps and prefill chunks of one or a few conversations: GEMV, GEMM with int4/int8 weights, and
// attention over cache slots. Decoding is bound by memory bandwidth, so every weight and slot is read once per step.
//
// Vectors use the GCC/Clang vector extension, so one source serves all processors; intrinsics appear only where the
// compiler falls short. Accumulation is float32, and no result depends on the number of threads. Block and tile sizes
// were measured on AVX-512 (docs/research/kernels). native.py concatenates the files of this folder.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)  // else shorter: vectors of several registers would be spilled all the time
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#define HAS_AVX2 1
#else
#define HAS_AVX2 0
#endif
#define HAS_INTEGER_PRODUCTS (HAS_VNNI || HAS_AVX2)
#if defined(__AVX512BF16__)
#define HAS_AVX512_BF16 1
#else
#define HAS_AVX512_BF16 0
#endif

// Keeps small accumulator arrays in registers.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;

constexpr bool WIDE = VECTOR_BYTES == 64;       // AVX-512: twice as many registers, too
constexpr int64_t LANES = VECTOR_BYTES / 4;
constexpr int64_t PAIR = 2 * LANES;
constexpr int MAX_ROWS = 8;                    // rows of a GEMV that share one pass over the weights
constexpr int64_t SLOT_BLOCK = 256;            // slots per task of decode attention
constexpr int64_t PACK_WIDTH = WIDE ? 64 : 32;  // outputs interleaved in one block of a packed int4 matrix
constexpr int64_t PREFETCH_BYTES = 4096;       // distance of software prefetch in packed weights
constexpr float MASKED = -1e30f;               // masked logit; finite, so that MASKED - MASKED is 0, not NaN

// A vector of LANES values, its halves and quarters, and what is as long in memory.
typedef float f32v __attribute__((vector_size(VECTOR_BYTES)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32v __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t i16_half __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int16_t i16v __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t i8_half __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int8_t i8_quarter __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef uint32_t u32v __attribute__((vector_size(VECTOR_BYTES)));
typedef _Float16 f16_half __attribute__((vector_size(VECTOR_BYTES / 2)));

template <typename V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// Dynamic scheduling: each thread calls work(next), and next() returns the next of `items` indices, -1 after the last.
template <typename F>
void dynamic_for(int64_t items, const F& work) {
  std::atomic<int64_t> counter = 0;
  const auto next = [&] {
    const int64_t item = counter++;
    return item < items ? item : -1;
  };
  at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t, int64_t) { work(next); });
}

inline void store(f32v value, float* to) { std::memcpy(to, &value, sizeof(value)); }
inline f32v splat(float value) { return f32v{} + value; }

// Round to nearest even, as PyTorch does, but in code that compilers make vectors of.
template <typename T>
inline T round_to(float x) {
  return static_cast<T>(x);
}
template <>
inline BFloat16 round_to<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return BFloat16(x == x ? static_cast<uint16_t>(rounded) : 0x7fc0, BFloat16::from_bits());
}

// 2 * LANES values as two vectors, in the cheapest order for their type (bfloat16: even and odd elements).
struct Pair {
  f32v a, b;
};

inline Pair widen(const float* from) { return {load<f32v>(from), load<f32v>(from + LANES)}; }
inline Pair widen(const BFloat16* from) {  // even elements, odd elements
  const u32v both = load<u32v>(from);
  return {(f32v)(both << 16), (f32v)(both & 0xffff0000u)};
}
#if defined(__AVX512F__)  // GCC 12 scalarises __builtin_convertvector for these types
inline Pair widen(const Half* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {(f32v)_mm512_cvtph_ps(_mm512_castsi512_si256(both)),
          (f32v)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}
inline f32v load_i8(const int8_t* from) {
  return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
#elif HAS_AVX2
inline Pair widen(const Half* from) {
  const auto* halves = (const __m128i*)from;
  return {(f32v)_mm256_cvtph_ps(_mm_loadu_si128(halves)), (f32v)_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline f32v load_i8(const int8_t* from) {
  return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
#else
inline Pair widen(const Half* from) {
  return {__builtin_convertvector(load<f16_half>(from), f32v),
          __builtin_convertvector(load<f16_half>(from + LANES), f32v)};
}
inline f32v load_i8(const int8_t* from) { return __builtin_convertvector(load<i8_quarter>(from), f32v); }
#endif

// Scales (a) and zeros (b) of LANES outputs from interleaved [LANES, 2].
inline Pair load_scales_zeros(const BFloat16* from) { return widen(from); }
template <typename T>
inline Pair load_scales_zeros(const T* from) {
  float scale[LANES], zero[LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    scale[i] = static_cast<float>(from[2 * i]);
    zero[i] = static_cast<float>(from[2 * i + 1]);
  }
  return {load<f32v>(scale), load<f32v>(zero)};
}

inline Pair widen(const int8_t* from) { return {load_i8(from), load_i8(from + LANES)}; }

// [size] -> factor * x as float32, in the element order of `widen`; a tail below PAIR keeps its order.
template <typename T>
inline void interleave(const T* from, int64_t size, float factor, float* to) {
  int64_t i = 0;
  for (; i + PAIR <= size; i += PAIR) {
    const Pair pair = widen(from + i);
    store(pair.a * factor, to + i);
    store(pair.b * factor, to + i + LANES);
  }
  for (; i < size; ++i) to[i] = static_cast<float>(from[i]) * factor;
}

// Inverse of `interleave`, in place: needed for bfloat16 only.
template <typename T>
void deinterleave(float*, int64_t) {}
template <>
void deinterleave<BFloat16>(float* x, int64_t size) {
  for (float pair[PAIR]; size >= PAIR; size -= PAIR, x += PAIR) {
    for (int64_t i = 0; i < LANES; ++i) pair[2 * i] = x[i], pair[2 * i + 1] = x[LANES + i];
    std::memcpy(x, pair, sizeof(pair));
  }
}

inline float hsum(f32v v) {
#if VECTOR_BYTES == 64
  f32x8 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const f32x8 eight = halves[0] + halves[1];
#else
  const f32x8 eight = v;
#endif
  f32x4 quarters[2];
  std::memcpy(quarters, &eight, sizeof(eight));
  const f32x4 four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

#if HAS_AVX512_BF16
// Horizontal sums of 16 vectors, in their order: a transposing tree of adds.
inline f32v hsum16(const f32v* v) {
  f32v eight[8], four[4], two[2];
  UNROLL for (int i = 0; i < 8; ++i) eight[i] =
      __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  UNROLL for (int i = 0; i < 4; ++i) four[i] =
      __builtin_shufflevector(eight[i], eight[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
      __builtin_shufflevector(eight[i], eight[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  UNROLL for (int i = 0; i < 2; ++i) two[i] =
      __builtin_shufflevector(four[i], four[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
      __builtin_shufflevector(four[i], four[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(two[0], two[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(two[0], two[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

#endif

inline float hmax(f32v v) {
#if VECTOR_BYTES == 64
  f32x8 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const f32x8 eight = halves[0] > halves[1] ? halves[0] : halves[1];
#else
  const f32x8 eight = v;
#endif
  f32x4 quarters[2];
  std::memcpy(quarters, &eight, sizeof(eight));
  const f32x4 four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  return std::max(std::max(MASKED, std::max(four[0], four[2])), std::max(four[1], four[3]));
}

// e^x for x <= 0 within a few ulp (Cephes expf polynomial); 0 below x = -80.
inline f32v exp_nonpositive(f32v x) {
  const i32v in_range = x > -80.0f;
  x = x > -80.0f ? x : splat(-80.0f);
  const f32v shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 leaves the rounded integer in the low bits
  const f32v power = shifted - 12582912.0f;
  const f32v r = x - power * 0.693359375f + power * 2.12194440e-4f;
  f32v y = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  y = y * r * r + r + 1.0f;
  const i32v scaled = (i32v)y + (((i32v)shifted - 0x4b400000) << 23);
  return (f32v)(scaled & in_range);
}

inline f32v softcapped(f32v logit, float cap) {  // cap * tanh(logit / cap)
  const f32v size = logit < 0.0f ? -logit : logit;
  const f32v small = exp_nonpositive(size * (-2.0f / cap));
  const f32v squashed = (1.0f - small) / (1.0f + small) * cap;
  return logit < 0.0f ? -squashed : squashed;
}
