// Matrices times a few rows. Behind vectors.cpp.

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
  // As integers, each `group` inputs with a scale of their own. In 16 bits, for weights of 8 and 4 bits as good as
  // float32, two products and their sum are one instruction; in 8 bits, four. Only one of the two is filled.
  std::vector<int16_t> codes;        // [M, K]
  std::vector<int8_t> short_codes;   // [M, K]
  std::vector<float> scale, sum_of;  // [M, groups]
  std::vector<float> less;           // [M]: what 128 in place of each weight comes to
  int64_t group, groups;
};

// Whether inputs of 8 bits do. Beside weights of 4 bits they are not noticed. Weights of 8 bits are there to be exact; but
// what an output layer rounds, no other layer makes larger, and several rows keep the processor busy there.
template <typename T>
bool shortens(const Tensor& weight, int64_t rows, int64_t group) {
  if (sizeof(T) > 2) return false;
  return weight.scalar_type() == at::kByte ? group % 4 == 0 : rows > 1 && weight.size(0) >= VOCABULARY;
}

template <typename T>
Rows prepared(const Tensor& given, int64_t room, const Tensor& weight, at::TensorList scales) {
  const Tensor x = given.contiguous();
  const T* from = x.const_data_ptr<T>();
  Rows rows{.M = x.size(0), .K = x.size(1), .group = 128, .groups = 0};
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
    rows.scale.resize(room * rows.groups);
    rows.sum_of.resize(room * rows.groups);
    rows.less.resize(room);
    const auto round_all = [&](auto& codes) {
      codes.resize(room * rows.K);
      for (int64_t i = 0; i < rows.M * rows.groups; ++i) {
        const int64_t start = i % rows.groups * rows.group, at = i / rows.groups * rows.K + start;
        const int64_t size = std::min(rows.group, rows.K - start);
        rows.scale[i] = round_group(from + at, size, codes.data() + at);
        rows.sum_of[i] = sum_of(codes.data() + at, size, rows.scale[i]);
        rows.less[i / rows.groups] += 128 * rows.sum_of[i];
      }
    };
    if (shortens<T>(weight, room, rows.group))
      round_all(rows.short_codes);
    else
      round_all(rows.codes);
  }
  return rows;
}

#if INT16_PRODUCTS
inline __m512i product(__m512i sums, __m512i weights, __m512i inputs, int16_t) {
  return _mm512_dpwssd_epi32(sums, weights, inputs);
}
inline __m512i product(__m512i sums, __m512i weights, __m512i inputs, int8_t) {
  return _mm512_dpbusd_epi32(sums, weights, inputs);
}

// 64 outputs of a packed matrix times rows [row, row + M) of codes x [.., K], two of 16 bits or four of 8 at a time: a byte
// holds the outputs n and n + 32 of one input. ranges points at this block's first scale in [G, N, 2]; out [.., 64].
template <typename T, int M, typename C>
inline void dot4(const uint8_t* codes, const T* ranges, int64_t N, const Rows& rows, const C* x, int64_t row, float* out) {
  constexpr int STEP = 4 / sizeof(C);
  alignas(64) uint8_t order[2][64];  // the bytes of STEP inputs: for one output behind each other
  for (int i = 0; i < 64; ++i)
    for (int upper = 0; upper < 2; ++upper) order[upper][i] = i / 4 + upper * LANES + i % 4 / sizeof(C) * 32;
  const __m512i orders[2] = {_mm512_load_si512(order[0]), _mm512_load_si512(order[1])};
  const __m512i low = _mm512_set1_epi8(15);
  constexpr int TIMES = M > 2 ? 2 : 1, EACH = 2 / TIMES;  // the sums of many rows fit into the registers in two halves
  floats y[M][4] = {};
  for (int64_t g = 0; g < rows.groups; ++g, codes += rows.group / 2 * PACKED)
    UNROLL for (int half = 0; half < TIMES; ++half) {
      __m512i acc[M][2 * EACH];
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 2 * EACH; ++i) acc[m][i] = _mm512_setzero_si512();
      for (int64_t k = 0; k < rows.group; k += STEP) {
        const uint8_t* from = codes + k / 2 * PACKED;
        if (half == 0)
          for (int64_t next = 0; next < STEP * PACKED / 2; next += 64) __builtin_prefetch(from + AHEAD + next, 0, 2);
        __m512i w[2 * EACH];
        UNROLL for (int i = 0; i < EACH; ++i) {
          const __m512i first = _mm512_loadu_si512(from), which = orders[half * EACH + i];
          __m512i a;
          if constexpr (STEP == 2)  // each with a 0
            a = _mm512_maskz_permutexvar_epi8(0x5555555555555555, which, first);
          else
            a = _mm512_permutex2var_epi8(first, which, _mm512_loadu_si512(from + 64));
          w[i] = _mm512_and_si512(a, low);
          w[EACH + i] = _mm512_and_si512(_mm512_srli_epi16(a, 4), low);
        }
        UNROLL for (int m = 0; m < M; ++m) {
          const __m512i inputs = _mm512_set1_epi32(load<int32_t>(x + (row + m) * rows.K + g * rows.group + k));
          UNROLL for (int i = 0; i < 2 * EACH; ++i) acc[m][i] = product(acc[m][i], w[i], inputs, C());
        }
      }
      for (int i = 0; i < 2 * EACH; ++i) {
        const int j = i / EACH * 2 + half * EACH + i % EACH;
        const Pair range = scales_and_zeros(ranges + (g * N + j * LANES) * 2);
        const floats zero = range.b - range.a * 8.0f;
        for (int m = 0; m < M; ++m) {
          const int64_t at = (row + m) * rows.groups + g;
          y[m][j] += range.a * rows.scale[at] * (floats)_mm512_cvtepi32_ps(acc[m][i]) + zero * rows.sum_of[at];
        }
      }
    }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) store(y[m][j], out + (row + m) * PACKED + j * LANES);
}

// As `dot8`, where the rows have short codes. The instruction takes weights without a sign, so each is 128 larger.
template <int M, int R>
inline void dot8_short(const int8_t* weight, const Rows& rows, float* out) {
  static_assert(R * M <= LANES);
  constexpr int S = std::min(R, M <= 2 ? 4 : M <= 5 ? 2 : 1);  // outputs at once, whose sums stay in registers
  const __m512i raise = _mm512_set1_epi8(-128);
  floats all_of[LANES] = {};
  for (int first = 0; first < R; first += S) {
    floats y[S][M] = {};
    for (int64_t g = 0; g < rows.groups; ++g) {
      __m512i acc[S][M];
      for (int r = 0; r < S; ++r)
        for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_si512();
      const int64_t end = std::min((g + 1) * rows.group, rows.K);
      for (int64_t k = g * rows.group; k < end; k += 64) {
        const __mmask64 there = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
        __m512i w[S];
        UNROLL for (int r = 0; r < S; ++r) {
          const int8_t* from = weight + (first + r) * rows.K + k;
          __builtin_prefetch(from + R * rows.K, 0, 2);
          w[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, from), raise);
        }
        UNROLL for (int m = 0; m < M; ++m) {
          const __m512i x = _mm512_maskz_loadu_epi8(there, rows.short_codes.data() + m * rows.K + k);
          UNROLL for (int r = 0; r < S; ++r) acc[r][m] = _mm512_dpbusd_epi32(acc[r][m], w[r], x);
        }
      }
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < S; ++r) y[r][m] += (floats)_mm512_cvtepi32_ps(acc[r][m]) * rows.scale[m * rows.groups + g];
    }
    for (int r = 0; r < S; ++r)
      for (int m = 0; m < M; ++m) all_of[(first + r) * M + m] = y[r][m];
  }
  const floats total = sums(all_of);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = total[r * M + m] - rows.less[m];
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

template <int M, int R, bool SHORT>
inline void multiply(const int8_t* weight, const Rows& rows, float* out) {
#if INT16_PRODUCTS
  if constexpr (SHORT)
    dot8_short<M, R>(weight, rows, out);
  else
    dot8<M, R>(weight, rows, out);
#else
  dot<int8_t, M, R>(weight, rows.plain.data(), rows.K, out);
#endif
}
template <int M, int R, bool SHORT, typename W>
inline void multiply(const W* weight, const Rows& rows, float* out) {
#if BFLOAT16_PRODUCTS
  if constexpr (M > 1 && std::is_same_v<W, BFloat16>) return dot16<M, R>(weight, rows.same.data(), rows.K, out);
#endif
  dot<W, M, R>(weight, rows.plain.data(), rows.K, out);
}

// Outputs [first, last) of a matrix with one line of weights for each. finish(n, y) takes y [M] of output n.
template <int M, bool SHORT, typename W, typename F>
void by_lines(const W* weight, const Rows& rows, int64_t first, int64_t last, F finish) {
  constexpr bool packs = BFLOAT16_PRODUCTS && std::is_same_v<W, BFloat16>;
  constexpr int R = M == 1 ? 4 : packs ? (M == 2 ? 6 : M <= 5 ? 4 : 3) : SHORT ? (M == 2 ? 4 : 2) : M == 2 ? 2 : 1;
  float y[R * M];
  int64_t n = first;
  for (; n + R <= last; n += R) {
    multiply<M, R, SHORT>(weight + n * rows.K, rows, y);
    for (int r = 0; r < R; ++r) finish(n + r, y + r * M);
  }
  for (; n < last; ++n) {
    multiply<M, 1, SHORT>(weight + n * rows.K, rows, y);
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
    const auto scaled = [&](int64_t n, const float* y) { finish(n, static_cast<float>(factors[n]), y); };
    const auto by = rows.short_codes.empty() ? by_lines<M, false, int8_t, decltype(scaled)>
                                             : by_lines<M, true, int8_t, decltype(scaled)>;
    by(weight.const_data_ptr<int8_t>(), rows, first, last, scaled);
  } else if (weight.scalar_type() != at::kByte) {
    by_lines<M, false>(weight.const_data_ptr<T>(), rows, first, last, [&](int64_t n, const float* y) { finish(n, 1.0f, y); });
  } else {
#if INT16_PRODUCTS
    float y[M * PACKED], one[M];
    for (int64_t n = first; n < last; n += PACKED) {
      const auto times = [&](const auto* x) {
        constexpr int SOME = M > 5 ? M / 2 : M;  // more do not fit into the registers
        for (int64_t row = 0; row < M; row += SOME)
          dot4<T, SOME>(weight.const_data_ptr<uint8_t>() + n * rows.K / 2, scale->const_data_ptr<T>() + n * 2, N, rows, x,
                        row, y);
      };
      rows.short_codes.empty() ? times(rows.codes.data()) : times(rows.short_codes.data());
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
