// What a decode step spends its time on, for the few rows of one or two conversations on a CPU: matrices times rows, and
// attention to cache slots. Both are bound by reading memory once.
//
// Vectors are an extension that GCC and Clang share, so the code is one for all processors. Sums are float32, and what
// comes out does not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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
constexpr int64_t AHEAD = 4096;   // bytes of packed weights asked for before they are needed
constexpr float NEVER = -1e30f;   // a logit that weighs nothing, and can be subtracted from itself

typedef float floats __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef _Float16 halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

template <typename V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
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

// ---- matrices times a few rows ------------------------------------------------------------------------------------

// Some outputs' weights [R, K] times arranged float [M, K] -> out[r * M + m]. Several at once, because each sum waits for
// itself.
template <typename W, int M, int R>
inline void dot(const W* weight, const float* x, int64_t K, float* out) {
  floats acc[R][M][2] = {};
  int64_t k = 0;
  for (; k + PAIR <= K; k += PAIR)
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weight + (r + R) * K + k, 0, 2);  // of the next lines
      const Pair w = widen(weight + r * K + k);
      UNROLL for (int m = 0; m < M; ++m) {
        acc[r][m][0] += w.a * load<floats>(x + m * K + k);
        acc[r][m][1] += w.b * load<floats>(x + m * K + k + LANES);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float total = sum(acc[r][m][0] + acc[r][m][1]);
      for (int64_t rest = k; rest < K; ++rest) total += static_cast<float>(weight[r * K + rest]) * x[m * K + rest];
      out[r * M + m] = total;
    }
}

// The rows of one call, in the form that its matrices need.
struct Rows {
  int64_t M, K;              // all vectors have room for some more rows, of zeros
  std::vector<float> plain;  // [M, K], arranged
  std::vector<BFloat16> same;  // [M, K] as they are, for weights of bfloat16 where two products and their sum are one
                               // instruction: with several rows, float32 would keep the processor busy for longer
  // As int16, each `group` inputs with a scale of their own: for weights of 8 and 4 bits as good as float32, and two
  // products and their sum are one instruction.
  std::vector<int16_t> codes;        // [M, K]
  std::vector<float> scale, sum_of;  // [M, groups]
  int64_t group, groups;
};

inline ints nearest(floats x) { return (ints)(x + 12582912.0f) - 0x4b400000; }

// Two vectors of `widen` as int16, in the order they came in.
template <typename T>
inline void narrow(ints a, ints b, int16_t* to) {
  const shorts pair[2] = {__builtin_convertvector(a, shorts), __builtin_convertvector(b, shorts)};
  std::memcpy(to, pair, sizeof(pair));
}
template <>
inline void narrow<BFloat16>(ints a, ints b, int16_t* to) {
  const words both = ((words)a & 0xffffu) | ((words)b << 16);
  std::memcpy(to, &both, sizeof(both));
}

template <typename T>
void round_group(const T* x, int64_t size, int16_t* codes, float* scale, float* sum_of) {
  floats most = {}, total = {};
  int64_t k = 0;
  for (; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    total += pair.a + pair.b;
    for (const floats v : {pair.a, -pair.a, pair.b, -pair.b}) most = v > most ? v : most;
  }
  float largest = 1e-30f, all_in_all = sum(total);
  for (int64_t l = 0; l < LANES; ++l) largest = std::max(largest, most[l]);
  for (int64_t rest = k; rest < size; ++rest) {
    largest = std::max(largest, std::abs(static_cast<float>(x[rest])));
    all_in_all += static_cast<float>(x[rest]);
  }
  const float factor = 32767.0f / largest;
  for (k = 0; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    narrow<T>(nearest(pair.a * factor), nearest(pair.b * factor), codes + k);
  }
  for (; k < size; ++k) codes[k] = static_cast<int16_t>(std::nearbyint(static_cast<float>(x[k]) * factor));
  *scale = largest / 32767.0f;
  *sum_of = all_in_all;
}

template <typename T>
Rows prepared(const Tensor& given, int64_t room, const Tensor& weight, at::TensorList scales) {
  const Tensor x = given.contiguous();
  const T* from = x.const_data_ptr<T>();
  Rows rows{x.size(0), x.size(1), {}, {}, {}, {}, {}, 128, 0};
  if (BFLOAT16_PRODUCTS && room > 1 && weight.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16) {
    const auto* whole = x.const_data_ptr<BFloat16>();
    rows.same.assign(whole, whole + rows.M * rows.K);
    rows.same.resize(room * rows.K);
  } else if (weight.scalar_type() == x.scalar_type()) {
    rows.plain.resize(room * rows.K);
    for (int64_t m = 0; m < rows.M; ++m) arrange(from + m * rows.K, rows.K, 1.0f, rows.plain.data() + m * rows.K);
  } else if (!INT16_PRODUCTS) {
    rows.plain.assign(from, from + rows.M * rows.K);
    rows.plain.resize(room * rows.K);
  } else {
    if (weight.scalar_type() == at::kByte) rows.group = rows.K / scales[0].size(0);
    rows.groups = (rows.K + rows.group - 1) / rows.group;
    rows.codes.resize(room * rows.K);
    rows.scale.resize(room * rows.groups);
    rows.sum_of.resize(room * rows.groups);
    for (int64_t i = 0; i < rows.M * rows.groups; ++i) {
      const int64_t start = i % rows.groups * rows.group, at = i / rows.groups * rows.K + start;
      round_group(from + at, std::min(rows.group, rows.K - start), rows.codes.data() + at, &rows.scale[i],
                  &rows.sum_of[i]);
    }
  }
  return rows;
}

#if INT16_PRODUCTS
// 64 outputs of a packed matrix: a byte holds the outputs n and n + 32 of one input. ranges points at this block's first
// scale in [G, N, 2]; out [M, 64].
template <typename T, int M>
inline void dot4(const uint8_t* codes, const T* ranges, int64_t N, const Rows& rows, float* out) {
  alignas(64) uint8_t order[2][64];  // the bytes of two inputs: for one output behind each other, each with a 0
  for (int i = 0; i < 64; ++i)
    for (int upper = 0; upper < 2; ++upper) order[upper][i] = i / 4 + upper * LANES + (i % 4 == 2 ? 32 : 0);
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]), low = _mm512_set1_epi16(15);
  floats y[M][4] = {};
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m512i acc[M][4];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < 4; ++j) acc[m][j] = _mm512_setzero_si512();
    for (int64_t k = g * rows.group; k < (g + 1) * rows.group; k += 2, codes += PACKED) {
      __builtin_prefetch(codes + AHEAD, 0, 2);
      const __m512i both = _mm512_loadu_si512(codes);
      const __m512i a = _mm512_maskz_permutexvar_epi8(0x5555555555555555, first, both);
      const __m512i b = _mm512_maskz_permutexvar_epi8(0x5555555555555555, second, both);
      const __m512i w[4] = {_mm512_and_si512(a, low), _mm512_and_si512(b, low), _mm512_srli_epi16(a, 4),
                            _mm512_srli_epi16(b, 4)};
      UNROLL for (int m = 0; m < M; ++m) {
        const __m512i x = _mm512_set1_epi32(load<int32_t>(rows.codes.data() + m * rows.K + k));
        UNROLL for (int j = 0; j < 4; ++j) acc[m][j] = _mm512_dpwssd_epi32(acc[m][j], w[j], x);
      }
    }
    for (int j = 0; j < 4; ++j) {
      const Pair range = scales_and_zeros(ranges + (g * N + j * LANES) * 2);
      const floats zero = range.b - range.a * 8.0f;
      for (int m = 0; m < M; ++m) {
        const int64_t at = m * rows.groups + g;
        y[m][j] += range.a * rows.scale[at] * (floats)_mm512_cvtepi32_ps(acc[m][j]) + zero * rows.sum_of[at];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) store(y[m][j], out + m * PACKED + j * LANES);
}

// As `dot`, for weights of 8 bits.
template <int M, int R>
inline void dot8(const int8_t* weight, const Rows& rows, float* out) {
  floats y[R][M] = {};
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m512i acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_si512();
    const int64_t end = std::min((g + 1) * rows.group, rows.K);
    for (int64_t k = g * rows.group; k < end; k += PAIR) {
      const __mmask32 there = end - k >= PAIR ? ~0u : (1u << (end - k)) - 1;
      UNROLL for (int r = 0; r < R; ++r) {
        __builtin_prefetch(weight + (r + R) * rows.K + k, 0, 2);
        const __m512i w = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, weight + r * rows.K + k));
        UNROLL for (int m = 0; m < M; ++m)
          acc[r][m] = _mm512_dpwssd_epi32(acc[r][m], w, _mm512_maskz_loadu_epi16(there, rows.codes.data() + m * rows.K + k));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) y[r][m] += (floats)_mm512_cvtepi32_ps(acc[r][m]) * rows.scale[m * rows.groups + g];
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = sum(y[r][m]);
}
#endif

#if BFLOAT16_PRODUCTS
// As `dot`, for weights of bfloat16 and several rows of it.
template <int M, int R>
inline void dot16(const BFloat16* weight, const BFloat16* x, int64_t K, float* out) {
  __m512 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += PAIR) {
    const __mmask32 there = K - k >= PAIR ? ~0u : (1u << (K - k)) - 1;
    __m512bh w[R];
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weight + (r + R) * K + k, 0, 2);  // of the next lines
      w[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, weight + r * K + k);
    }
    UNROLL for (int m = 0; m < M; ++m) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(there, x + m * K + k);
      UNROLL for (int r = 0; r < R; ++r) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], w[r], row);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = sum((floats)acc[r][m]);
}
#endif

template <int M, int R>
inline void multiply(const int8_t* weight, const Rows& rows, float* out) {
#if INT16_PRODUCTS
  dot8<M, R>(weight, rows, out);
#else
  dot<int8_t, M, R>(weight, rows.plain.data(), rows.K, out);
#endif
}
template <int M, int R, typename W>
inline void multiply(const W* weight, const Rows& rows, float* out) {
#if BFLOAT16_PRODUCTS
  if constexpr (M > 1 && std::is_same_v<W, BFloat16>) return dot16<M, R>(weight, rows.same.data(), rows.K, out);
#endif
  dot<W, M, R>(weight, rows.plain.data(), rows.K, out);
}

// Outputs [first, last) of a matrix with one line of weights for each. finish(n, y) takes y [M] of output n.
template <int M, typename W, typename F>
void by_lines(const W* weight, const Rows& rows, int64_t first, int64_t last, F finish) {
  constexpr bool packs = BFLOAT16_PRODUCTS && std::is_same_v<W, BFloat16>;
  constexpr int R = M == 1 ? 4 : packs ? (M == 2 ? 6 : M <= 5 ? 4 : 3) : M == 2 ? 2 : 1;
  float y[R * M];
  int64_t n = first;
  for (; n + R <= last; n += R) {
    multiply<M, R>(weight + n * rows.K, rows, y);
    for (int r = 0; r < R; ++r) finish(n + r, y + r * M);
  }
  for (; n < last; ++n) {
    multiply<M, 1>(weight + n * rows.K, rows, y);
    finish(n, y);
  }
}

template <typename T, int M>
void some_outputs(const Tensor& weight, const Tensor* scale, const Tensor* bias, const Rows& rows, int64_t first,
                  int64_t last, T* out) {
  const int64_t N = weight.size(0);
  const T* more = bias == nullptr ? nullptr : bias->const_data_ptr<T>();
  const auto finish = [&](int64_t n, float factor, const float* y) {
    for (int m = 0; m < rows.M; ++m)
      out[m * N + n] = static_cast<T>(y[m] * factor + (more == nullptr ? 0.0f : static_cast<float>(more[n])));
  };
  if (weight.scalar_type() == at::kChar) {
    const T* factors = scale->const_data_ptr<T>();
    by_lines<M>(weight.const_data_ptr<int8_t>(), rows, first, last,
                [&](int64_t n, const float* y) { finish(n, static_cast<float>(factors[n]), y); });
  } else if (weight.scalar_type() != at::kByte) {
    by_lines<M>(weight.const_data_ptr<T>(), rows, first, last, [&](int64_t n, const float* y) { finish(n, 1.0f, y); });
  } else {
#if INT16_PRODUCTS
    float y[M * PACKED], one[M];
    for (int64_t n = first; n < last; n += PACKED) {
      dot4<T, M>(weight.const_data_ptr<uint8_t>() + n * rows.K / 2, scale->const_data_ptr<T>() + n * 2, N, rows,
                 y);
      for (int64_t j = 0; j < PACKED; ++j) {
        for (int m = 0; m < M; ++m) one[m] = y[m * PACKED + j];
        finish(n + j, 1.0f, one);
      }
    }
#else
    TORCH_CHECK(false, "zsmerge::rows takes 4 bits where zsmerge::packed() says so");
#endif
  }
}

template <typename T, int M>
void all_outputs(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                 std::vector<Tensor>& out) {
  const Rows rows = prepared<T>(x, M, weights[0], scales);
  std::vector<int64_t> ends;  // in pieces of 64 outputs, over all matrices
  for (const Tensor& weight : weights)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (weight.size(0) + PACKED - 1) / PACKED);
  at::parallel_for(0, ends.back(), std::max<int64_t>(1, 65536 / (PACKED * rows.K)), [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1], N = weights[i].size(0);
      const int64_t first = std::max(begin, start), last = std::min(end, ends[i]);
      if (first < last)
        some_outputs<T, M>(weights[i], scales.empty() ? nullptr : &scales[i], biases.empty() ? nullptr : &biases[i],
                           rows, (first - start) * PACKED, std::min(N, (last - start) * PACKED), out[i].data_ptr<T>());
    }
  });
}

// M is rounded up to a number that is compiled; rows that are not there are zeros.
template <typename T>
void for_rows(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
              std::vector<Tensor>& out) {
  const int64_t count = x.size(0);
  TORCH_CHECK(count > 0 && count <= MOST, "zsmerge::rows is for 1 to ", MOST, " rows, not ", count);
  if (count == 1) return all_outputs<T, 1>(x, weights, scales, biases, out);
  if (count == 2) return all_outputs<T, 2>(x, weights, scales, biases, out);
  if (count <= 5) return all_outputs<T, 5>(x, weights, scales, biases, out);
  all_outputs<T, MOST>(x, weights, scales, biases, out);
}

void rows_into(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
               std::vector<Tensor>& out) {
  switch (x.scalar_type()) {
    case at::kBFloat16: for_rows<BFloat16>(x, weights, scales, biases, out); break;
    case at::kHalf: for_rows<Half>(x, weights, scales, biases, out); break;
    case at::kFloat: for_rows<float>(x, weights, scales, biases, out); break;
    default: TORCH_CHECK(false, "zsmerge::rows knows bfloat16, float16 and float32, not ", x.scalar_type());
  }
}

// x [M, K] times several matrices that share it -> [M, N] each, + bias [N]. A matrix is [N, K] in x's dtype, int8 [N, K]
// with scale [N], or uint8 [N, K / 2] packed by torch for AVX-512 with scales and zeros [G, N, 2].
std::vector<Tensor> rows(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases) {
  std::vector<Tensor> out;
  for (const Tensor& weight : weights) {
    const int64_t inputs = weight.scalar_type() == at::kByte ? 2 * weight.size(1) : weight.size(1);
    TORCH_CHECK(weight.is_contiguous() && inputs == x.size(1), "zsmerge::rows takes contiguous matrices [N, K]");
  }
  for (const Tensor& weight : weights) out.push_back(at::empty({x.size(0), weight.size(0)}, x.options()));
  rows_into(x, weights, scales, biases, out);
  return out;
}

// ---- attention to slots -------------------------------------------------------------------------------------------

struct Slots {  // of one layer: [B, H, P, D], and [B, H, P]
  Tensor keys, values, count, score, guess, position;
};

struct How {
  double scaling, alpha, softcap;  // softcap 0: none
  int64_t window;                  // 0: none
};

// A row that is not `present` (null: all are) gets an empty slot.
template <typename T>
void write(const Slots& slots, const Tensor& key, const Tensor& value, const int32_t* now, at::IntArrayRef fills,
           const int64_t* present) {
  const int64_t B = key.size(0), H = key.size(1), count = key.size(2), P = slots.keys.size(2);
  const int64_t D = key.size(3), E = value.size(3);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < count; ++t) {
        const int64_t at = (b * H + h) * P + fills[b] + t;
        std::memcpy(slots.keys.data_ptr<T>() + at * D,
                    key.const_data_ptr<T>() + b * key.stride(0) + h * key.stride(1) + t * key.stride(2), D * sizeof(T));
        std::memcpy(slots.values.data_ptr<T>() + at * E,
                    value.const_data_ptr<T>() + b * value.stride(0) + h * value.stride(1) + t * value.stride(2),
                    E * sizeof(T));
        slots.count.data_ptr<float>()[at] = present == nullptr || present[b] ? 1 : 0;
        slots.score.data_ptr<float>()[at] = 0;
        slots.guess.data_ptr<float>()[at] = 0;
        slots.position.data_ptr<int32_t>()[at] = now[b * count + t];
      }
}

// What is added to the logits of `size` slots for one query: Eq. 8's alpha log(count), or never.
void bias_of(const float* count, const int32_t* position, int32_t now, int64_t size, int64_t visible, const How& how,
             float* out) {
  for (int64_t c = 0; c < size; ++c) {
    const bool hidden = c >= visible || count[c] == 0 || (how.window > 0 && now - position[c] >= how.window);
    out[c] = hidden ? NEVER : count[c] == 1 ? 0.0f : static_cast<float>(how.alpha * std::log(count[c]));
  }
  for (int64_t c = size; c < (size + LANES - 1) / LANES * LANES; ++c) out[c] = NEVER;
}

// Values [size, E] weighted by weights [Q, BLOCK], P pairs of vectors from column e on -> arranged float [Q, each].
template <typename T, int Q, int P>
inline void mix(const T* values, const float* weights, int64_t size, int64_t E, int64_t each, float* out) {
  floats acc[Q][P][2] = {};
  for (int64_t c = 0; c < size; ++c)
    UNROLL for (int i = 0; i < P; ++i) {
      const Pair value = widen(values + c * E + i * PAIR);
      UNROLL for (int q = 0; q < Q; ++q) {
        acc[q][i][0] += value.a * weights[q * BLOCK + c];
        acc[q][i][1] += value.b * weights[q * BLOCK + c];
      }
    }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) {
      store(acc[q][i][0], out + q * each + i * PAIR);
      store(acc[q][i][1], out + q * each + i * PAIR + LANES);
    }
}

inline floats capped(floats logit, float cap) {  // cap tanh(l / cap)
  const floats size = logit < 0.0f ? -logit : logit;
  const floats small = exponential(size * (-2.0f / cap));
  const floats bent = (1.0f - small) / (1.0f + small) * cap;
  return logit < 0.0f ? -bent : bent;
}

// Logits [size] and their bias -> e^(logit - largest), in place. Returns the largest and the sum.
inline std::pair<float, float> softened(float* logits, const float* bias, int64_t size, float cap) {
  const int64_t padded = (size + LANES - 1) / LANES * LANES;
  floats most = all(NEVER), total = {};
  for (int64_t c = 0; c < padded; c += LANES) {
    floats logit = load<floats>(logits + c);
    logit = (cap > 0 ? capped(logit, cap) : logit) + load<floats>(bias + c);
    store(logit, logits + c);
    most = logit > most ? logit : most;
  }
  float largest = NEVER;
  for (int64_t l = 0; l < LANES; ++l) largest = std::max(largest, most[l]);
  for (int64_t c = 0; c < padded; c += LANES) {
    const floats weight = exponential(load<floats>(logits + c) - largest);
    total += weight;
    store(weight, logits + c);
  }
  return {largest, sum(total)};
}

// Q queries, arranged [Q, D], to `size` slots: for each the largest logit, the sum of e^(logit - largest), and the
// values weighted so, arranged [E]. biases [Q] points at a line of [BLOCK] for each.
template <typename T, int Q>
void attend(const float* queries, const T* keys, const T* values, const float* const* biases, int64_t size, int64_t D,
            int64_t E, float cap, float* results) {
  constexpr int R = 4;
  alignas(64) float logits[Q * BLOCK] = {};
  float some[R * Q];
  int64_t c = 0;
  for (; c + R <= size; c += R) {
    for (int64_t e = 0; e < R * E; e += PAIR) __builtin_prefetch(values + c * E + e);  // needed next
    dot<T, Q, R>(keys + c * D, queries, D, some);
    UNROLL for (int q = 0; q < Q; ++q)
      UNROLL for (int r = 0; r < R; ++r) logits[q * BLOCK + c + r] = some[r * Q + q];
  }
  for (; c < size; ++c) {
    dot<T, Q, 1>(keys + c * D, queries, D, some);
    for (int q = 0; q < Q; ++q) logits[q * BLOCK + c] = some[q];
  }
  const int64_t each = E + 2;
  for (int q = 0; q < Q; ++q)
    std::tie(results[q * each], results[q * each + 1]) = softened(logits + q * BLOCK, biases[q], size, cap);
  int64_t e = 0;
  for (; e + 2 * PAIR <= E; e += 2 * PAIR) mix<T, Q, 2>(values + e, logits, size, E, each, results + 2 + e);
  for (; e + PAIR <= E; e += PAIR) mix<T, Q, 1>(values + e, logits, size, E, each, results + 2 + e);
  for (; e < E; ++e)
    for (int q = 0; q < Q; ++q) {
      float total = 0;
      for (c = 0; c < size; ++c) total += static_cast<float>(values[c * E + e]) * logits[q * BLOCK + c];
      results[q * each + 2 + e] = total;
    }
}

template <typename T>
void attend_all(const Tensor& query, const Slots& slots, const int32_t* now, at::IntArrayRef fills, const How& how,
                const float* sinks, Tensor& out) {
  const int64_t B = query.size(0), heads = query.size(1), count = query.size(2), D = query.size(3);
  const int64_t H = slots.keys.size(1), P = slots.keys.size(2), E = slots.values.size(3), G = heads / H;
  const int64_t asking = G * count, most = *std::max_element(fills.begin(), fills.end()) + count;
  const int64_t blocks = (most + BLOCK - 1) / BLOCK, each = E + 2;
  std::vector<float> wide(B * heads * count * D), parts(B * H * blocks * asking * each);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < count; ++t) {
        const T* from = query.const_data_ptr<T>() + b * query.stride(0) + h * query.stride(1) + t * query.stride(2);
        arrange(from, D, static_cast<float>(how.scaling), wide.data() + ((b * heads + h) * count + t) * D);
      }
  const float cap = static_cast<float>(how.softcap);
  at::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> bias(count * BLOCK);
    std::vector<const float*> biases(asking);
    for (int64_t q = 0; q < asking; ++q) biases[q] = bias.data() + q % count * BLOCK;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, row = item / blocks, b = row / H, start = block * BLOCK;
      const int64_t size = std::min(BLOCK, fills[b] + count - start), at = row * P + start;
      float* results = parts.data() + item * asking * each;
      if (size <= 0) {
        for (int64_t q = 0; q < asking; ++q) results[q * each] = NEVER;
        continue;
      }
      for (int64_t t = 0; t < count; ++t)
        bias_of(slots.count.const_data_ptr<float>() + at, slots.position.const_data_ptr<int32_t>() + at,
                now[b * count + t], size, fills[b] + t + 1 - start, how, bias.data() + t * BLOCK);
      const T *keys = slots.keys.const_data_ptr<T>() + at * D, *values = slots.values.const_data_ptr<T>() + at * E;
      for (int64_t q = 0; q < asking;) {
        const float* asks = wide.data() + (row * asking + q) * D;
        const int64_t left = asking - q;
        const auto some = left >= 4 ? attend<T, 4> : left == 3 ? attend<T, 3> : left == 2 ? attend<T, 2> : attend<T, 1>;
        some(asks, keys, values, biases.data() + q, size, D, E, cap, results + q * each);
        q += std::min<int64_t>(left, 4);
      }
    }
  });
  T* to = out.data_ptr<T>();
  std::vector<float> mixed(E);
  for (int64_t row = 0; row < B * H; ++row)
    for (int64_t q = 0; q < asking; ++q, to += E) {
      const float* first = parts.data() + (row * blocks * asking + q) * each;
      const float sink = sinks == nullptr ? NEVER : sinks[(row % H) * G + q / count];
      float largest = sink, total = 0;
      for (int64_t block = 0; block < blocks; ++block) largest = std::max(largest, first[block * asking * each]);
      if (sinks != nullptr) total += std::exp(sink - largest);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* part = first + block * asking * each;
        const float factor = std::exp(part[0] - largest);
        if (factor == 0) continue;
        total += factor * part[1];
        for (int64_t e = 0; e < E; ++e) mixed[e] += factor * part[2 + e];
      }
      restore<T>(mixed.data(), E);
      for (int64_t e = 0; e < E; ++e) to[e] = static_cast<T>(mixed[e] / total);
    }
}

// The tokens of a pass enter the slots behind each row's `fills`, and look at the slots and at each other, the later at
// the earlier. query [B, Hq, T, D], key and value [B, H, T, D]; now int32 [B, T], their positions; sinks float [Hq].
// out [B, Hq, T, D].
void look_into(const Tensor& query, const Tensor& key, const Tensor& value, const Slots& slots, const Tensor& now,
               at::IntArrayRef fills, const int64_t* present, const How& how, const std::optional<Tensor>& sinks,
               Tensor& out) {
  for (const Tensor& each : {slots.keys, slots.values, slots.count, slots.score, slots.guess, slots.position})
    TORCH_CHECK(each.is_contiguous() && each.size(0) == query.size(0) && each.size(2) == slots.keys.size(2),
                "zsmerge::look writes to contiguous slots of as many rows as there are queries");
  for (const int64_t fill : fills)
    TORCH_CHECK(fill >= 0 && fill + key.size(2) <= slots.keys.size(2), "zsmerge::look: no room behind slot ", fill);
  const Tensor when = now.contiguous();
  const Tensor column = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const float* learned = sinks ? column.const_data_ptr<float>() : nullptr;
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    write<T>(slots, key, value, when.const_data_ptr<int32_t>(), fills, present);
    attend_all<T>(query, slots, when.const_data_ptr<int32_t>(), fills, how, learned, out);
  };
  switch (query.scalar_type()) {
    case at::kBFloat16: run(BFloat16()); break;
    case at::kHalf: run(Half()); break;
    case at::kFloat: run(0.0f); break;
    default: TORCH_CHECK(false, "zsmerge::look knows bfloat16, float16 and float32, not ", query.scalar_type());
  }
}

Tensor look(const Tensor& query, const Tensor& key, const Tensor& value, Tensor keys, Tensor values, Tensor count,
            Tensor score, Tensor guess, Tensor position, const Tensor& now, at::IntArrayRef fills, double scaling, double alpha,
            double softcap, int64_t window, const std::optional<Tensor>& sinks) {
  Tensor out = at::empty({query.size(0), query.size(1), query.size(2), values.size(3)}, query.options());
  const Slots slots{keys, values, count, score, guess, position};
  look_into(query, key, value, slots, now, fills, nullptr, {scaling, alpha, softcap, window}, sinks, out);
  return out;
}

// The newest queries [B, Hq, T, D] and their positions [B, T] push the oldest out of queries [B, Hq, W, D] and asked
// [B, W], in the rows that are `present` (null: all).
void remember_present(Tensor queries, Tensor asked, const Tensor& newest, const Tensor& now, const int64_t* present) {
  const int64_t heads = queries.size(1), W = queries.size(2), count = newest.size(2);
  const int64_t line = queries.size(3) * queries.element_size(), size = newest.element_size();
  const Tensor when = now.contiguous();
  for (int64_t b = 0; b < queries.size(0); ++b) {
    if (present != nullptr && !present[b]) continue;
    for (int64_t h = 0; h < heads; ++h) {
      char* to = static_cast<char*>(queries.data_ptr()) + (b * heads + h) * W * line;
      std::memmove(to, to + count * line, (W - count) * line);
      const char* from =
          static_cast<const char*>(newest.const_data_ptr()) + (b * newest.stride(0) + h * newest.stride(1)) * size;
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(to + (W - count + t) * line, from + t * newest.stride(2) * size, line);
    }
    int32_t* at = asked.data_ptr<int32_t>() + b * W;
    std::memmove(at, at + count, (W - count) * sizeof(int32_t));
    std::memcpy(at + W - count, when.const_data_ptr<int32_t>() + b * count, count * sizeof(int32_t));
  }
}

void remember(Tensor queries, Tensor asked, const Tensor& newest, const Tensor& now) {
  remember_present(queries, asked, newest, now, nullptr);
}

// ---- a step that was recorded -------------------------------------------------------------------------------------

constexpr size_t MOST_DATA = 32;  // that a compiled function may be given

template <size_t N, size_t... I>
void call(void* function, void* const* data, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(std::enable_if_t<(I < N), void*>...)>(function)(data[I]...);
}
template <size_t N = 1>
void call(void* function, const std::vector<void*>& data) {
  if constexpr (N <= MOST_DATA) {
    if (data.size() == N) return call<N>(function, data.data(), std::make_index_sequence<N>());
    call<N + 1>(function, data);
  }
}

// What the layers of a model do in one step, in order, always on the same memory: run without Python in between.
struct Program : torch::CustomClassHolder {
  struct Code {
    void* function;
    std::vector<void*> data;
  };
  struct Product {
    Tensor x;
    std::vector<Tensor> weights, scales, biases, out;
  };
  struct Attention {
    Tensor query, key, value, out;
    double scaling, softcap;
    int64_t window;
    std::optional<Tensor> sinks;
  };
  std::vector<std::variant<Code, Product, Attention>> parts;

  int64_t size() { return parts.size(); }

  // A compiled function of some tensors, by its address.
  void add_code(int64_t function, std::vector<Tensor> data) {
    TORCH_CHECK(!data.empty() && data.size() <= MOST_DATA, "zsmerge::Program: a function of ", data.size(), " tensors");
    Code code{reinterpret_cast<void*>(function), {}};
    for (const Tensor& each : data) code.data.push_back(const_cast<void*>(each.const_data_ptr()));
    parts.emplace_back(std::move(code));
  }

  void add_rows(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> biases,
                std::vector<Tensor> out) {
    parts.emplace_back(Product{x, std::move(weights), std::move(scales), std::move(biases), std::move(out)});
  }

  void add_look(Tensor query, Tensor key, Tensor value, Tensor out, double scaling, double softcap, int64_t window,
                std::optional<Tensor> sinks) {
    parts.emplace_back(Attention{query, key, value, out, scaling, softcap, window, sinks});
  }

  // Parts [first, last). Of each layer that attends in them: the eight tensors of its slots and of the queries that it
  // remembers, its rows' fills, its alpha, and whether it remembers these queries. now int32 [rows, T]: a program may
  // have been recorded for more rows, of which the first are used, and of these the ones that are present.
  void run(int64_t first, int64_t last, std::vector<Tensor> slots, std::vector<int64_t> fills,
           std::vector<double> alphas, std::vector<int64_t> remembering, std::vector<int64_t> present, Tensor now) {
    const int64_t rows = now.size(0);
    TORCH_CHECK(static_cast<int64_t>(present.size()) == rows && fills.size() == alphas.size() * rows &&
                    slots.size() == 8 * alphas.size() && remembering.size() == alphas.size(),
                "zsmerge::Program: lists that do not fit to ", rows, " rows");
    size_t layer = 0;
    for (int64_t i = first; i < last; ++i) {
      auto& part = parts.at(i);
      if (const auto* code = std::get_if<Code>(&part)) {
        call(code->function, code->data);
      } else if (auto* product = std::get_if<Product>(&part)) {
        rows_into(product->x, product->weights, product->scales, product->biases, product->out);
      } else {
        const auto& look = std::get<Attention>(part);
        const Tensor* own = &slots.at(8 * layer + 7) - 7;
        const Tensor query = look.query.narrow(0, 0, rows);
        Tensor out = look.out.narrow(0, 0, rows);
        look_into(query, look.key.narrow(0, 0, rows), look.value.narrow(0, 0, rows),
                  {own[0], own[1], own[2], own[3], own[4], own[5]}, now,
                  at::IntArrayRef(fills.data() + layer * rows, rows), present.data(),
                  {look.scaling, alphas[layer], look.softcap, look.window}, look.sinks, out);
        if (remembering[layer]) remember_present(own[6], own[7], query, now, present.data());
        ++layer;
      }
    }
  }
};

// Whether `rows` takes weights of 4 bits here.
bool packed() { return INT16_PRODUCTS; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("packed() -> bool", &packed);
  library.def("rows(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases) -> Tensor[]");
  library.def(
      "look(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) count, "
      "Tensor(d!) score, Tensor(e!) guess, Tensor(f!) position, Tensor now, int[] fills, float scaling, float alpha, float softcap, "
      "int window, Tensor? sinks) -> Tensor");
  library.def("remember(Tensor(a!) queries, Tensor(b!) asked, Tensor newest, Tensor now) -> ()");
  library.class_<Program>("Program")
      .def(torch::init<>())
      .def("size", &Program::size)
      .def("add_code", &Program::add_code)
      .def("add_rows", &Program::add_rows)
      .def("add_look", &Program::add_look)
      .def("run", &Program::run);
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("rows", &rows);
  library.impl("look", &look);
  library.impl("remember", &remember);
}

}  // namespace
