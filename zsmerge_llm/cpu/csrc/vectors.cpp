// What a decode step spends its time on, for the few rows of one or two conversations on a CPU: matrices times rows, and
// attention to cache slots. Both are bound by reading memory once.
//
// Vectors are an extension that GCC and Clang share, so the code is one for all processors. Sums are float32, and what
// comes out does not depend on the number of threads. The files of this folder are one source, in the order that
// kernels.py says.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INT16_PRODUCTS 1
#else
#define INT16_PRODUCTS 0
#endif
#if defined(__AVX512BF16__)
#define BFLOAT16_PRODUCTS 1
#else
#define BFLOAT16_PRODUCTS 0
#endif

// Sums must stay in registers.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t PAIR = 2 * LANES;
constexpr int MOST = 8;           // rows that share one reading of a matrix
constexpr int64_t BLOCK = 256;    // slots that one thread attends to at a time
constexpr int64_t PACKED = 64;    // outputs that stand together in a packed matrix of 4 bits
constexpr int64_t VOCABULARY = 1 << 15;  // outputs from which on a matrix is taken for the output layer
constexpr int64_t AHEAD = 4096;   // bytes of packed weights asked for before they are needed
constexpr float NEVER = -1e30f;   // a logit that weighs nothing, and can be subtracted from itself

typedef float floats __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef int16_t shorts32 __attribute__((vector_size(64)));
typedef int8_t bytes32 __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef _Float16 halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

template <typename V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// Each thread takes the next of all items from `next`, -1 behind the last: one that is slowed down takes fewer.
template <typename F>
void by_turns(int64_t items, const F& work) {
  std::atomic<int64_t> taken = 0;
  const auto next = [&] {
    const int64_t item = taken++;
    return item < items ? item : -1;
  };
  at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t, int64_t) { work(next); });
}

inline void store(floats value, float* to) { std::memcpy(to, &value, sizeof(value)); }
inline floats all(float value) { return floats{} + value; }

// 32 numbers as two vectors, in the order that costs least.
struct Pair {
  floats a, b;
};

inline Pair widen(const float* from) { return {load<floats>(from), load<floats>(from + LANES)}; }
inline Pair widen(const BFloat16* from) {  // the even ones and the odd ones
  const words both = load<words>(from);
  return {(floats)(both << 16), (floats)(both & 0xffff0000u)};
}
#if defined(__AVX512F__)  // GCC 12 takes other conversions apart
inline Pair widen(const Half* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {(floats)_mm512_cvtph_ps(_mm512_castsi512_si256(both)),
          (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}
inline floats widen16(const int8_t* from) {
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
#else
inline Pair widen(const Half* from) {
  return {__builtin_convertvector(load<halves>(from), floats), __builtin_convertvector(load<halves>(from + LANES), floats)};
}
inline floats widen16(const int8_t* from) { return __builtin_convertvector(load<bytes>(from), floats); }
#endif

// Of 16 outputs, standing by turns.
inline Pair scales_and_zeros(const BFloat16* from) { return widen(from); }
template <typename T>
inline Pair scales_and_zeros(const T* from) {
  float scale[LANES], zero[LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    scale[i] = static_cast<float>(from[2 * i]);
    zero[i] = static_cast<float>(from[2 * i + 1]);
  }
  return {load<floats>(scale), load<floats>(zero)};
}

inline Pair widen(const int8_t* from) { return {widen16(from), widen16(from + LANES)}; }

// [size] -> float32 in the order of `widen`; what fills no pair stays in place.
template <typename T>
inline void arrange(const T* from, int64_t size, float factor, float* to) {
  int64_t i = 0;
  for (; i + PAIR <= size; i += PAIR) {
    const Pair pair = widen(from + i);
    store(pair.a * factor, to + i);
    store(pair.b * factor, to + i + LANES);
  }
  for (; i < size; ++i) to[i] = static_cast<float>(from[i]) * factor;
}

template <typename T>
void restore(float*, int64_t) {}
template <>
void restore<BFloat16>(float* x, int64_t size) {
  for (float pair[PAIR]; size >= PAIR; size -= PAIR, x += PAIR) {
    for (int64_t i = 0; i < LANES; ++i) pair[2 * i] = x[i], pair[2 * i + 1] = x[LANES + i];
    std::memcpy(x, pair, sizeof(pair));
  }
}

inline float sum(floats v) {
  floats8 half[2];
  floats4 quarter[2];
  std::memcpy(half, &v, sizeof(v));
  const floats8 eight = half[0] + half[1];
  std::memcpy(quarter, &eight, sizeof(eight));
  const floats4 four = quarter[0] + quarter[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of 16 vectors, in their order.
inline floats sums(const floats* v) {
  floats eight[8], four[4], two[2];
  UNROLL for (int i = 0; i < 8; ++i)
    eight[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  UNROLL for (int i = 0; i < 4; ++i)
    four[i] = __builtin_shufflevector(eight[i], eight[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
              __builtin_shufflevector(eight[i], eight[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  UNROLL for (int i = 0; i < 2; ++i)
    two[i] = __builtin_shufflevector(four[i], four[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
             __builtin_shufflevector(four[i], four[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(two[0], two[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(two[0], two[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

inline float highest(floats v) {
  floats8 half[2];
  floats4 quarter[2];
  std::memcpy(half, &v, sizeof(v));
  const floats8 eight = half[0] > half[1] ? half[0] : half[1];
  std::memcpy(quarter, &eight, sizeof(eight));
  const floats4 four = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  return std::max(std::max(NEVER, std::max(four[0], four[2])), std::max(four[1], four[3]));
}

// e^x for x <= 0, to a few units in the last place; 0 below e^-80.
inline floats exponential(floats x) {
  const ints counts = x > -80.0f;
  x = x > -80.0f ? x : all(-80.0f);
  const floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the rounded integer
  const floats power = shifted - 12582912.0f;
  const floats r = x - power * 0.693359375f + power * 2.12194440e-4f;
  floats y = all(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  y = y * r * r + r + 1.0f;
  const ints scaled = (ints)y + (((ints)shifted - 0x4b400000) << 23);
  return (floats)(scaled & counts);
}

inline floats capped(floats logit, float cap) {  // cap tanh(l / cap)
  const floats size = logit < 0.0f ? -logit : logit;
  const floats small = exponential(size * (-2.0f / cap));
  const floats bent = (1.0f - small) / (1.0f + small) * cap;
  return logit < 0.0f ? -bent : bent;
}
