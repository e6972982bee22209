// GEMV for up to MAX_ROWS rows: weights in the input's dtype, int8 or packed int4. Needs simd.cpp, quantization.cpp.

// weights [R, K] times interleaved float32 x [M, K] -> out[r * M + m]. R outputs at once hide the latency of each
// accumulator.
template <typename W, int M, int R>
inline void dot(const W* weight, const float* x, int64_t K, float* out) {
  f32x16 acc[R][M][2] = {};
  int64_t k = 0;
  for (; k + PAIR <= K; k += PAIR)
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weight + (r + R) * K + k, 0, 2);  // next R weight rows
      const Pair w = widen(weight + r * K + k);
      UNROLL for (int m = 0; m < M; ++m) {
        acc[r][m][0] += w.a * load<f32x16>(x + m * K + k);
        acc[r][m][1] += w.b * load<f32x16>(x + m * K + k + LANES);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float total = hsum(acc[r][m][0] + acc[r][m][1]);
      for (int64_t rest = k; rest < K; ++rest)  // fma: compilers would contract it for some M only
        total = std::fma(static_cast<float>(weight[r * K + rest]), x[m * K + rest], total);
      out[r * M + m] = total;
    }
}

// Input rows of one call in the format that the weights need.
struct GemvInput {
  int64_t M, K;                // buffers hold zero rows up to the compiled M
  std::vector<float> f32;      // [M, K], interleaved float32
  std::vector<BFloat16> bf16;  // [M, K], for vdpbf16ps: with several rows float32 FMAs would be compute-bound, and one sums alike
  // Integer codes with one scale per `group_size` inputs; only one of the two is filled. int16 (vpdpwssd, 2 products
  // per lane) is as exact as float32 beside 8- and 4-bit weights; int8 (vpdpbusd) does 4 products per lane.
  std::vector<int16_t> i16;              // [M, K]
  std::vector<int8_t> i8;                // [M, K]
  std::vector<float> scale, code_sum;    // [M, groups]
  int64_t group_size, num_groups;
};

template <typename T>
GemvInput prepare_input(const Tensor& rows, int64_t padded_rows, const Tensor& weight, at::TensorList scales) {
  const Tensor x = rows.contiguous();
  const T* from = x.const_data_ptr<T>();
  GemvInput input{.M = x.size(0), .K = x.size(1), .group_size = 128, .num_groups = 0};
  if (HAS_AVX512_BF16 && weight.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16) {
    const auto* source = x.const_data_ptr<BFloat16>();
    input.bf16.assign(source, source + input.M * input.K);
    input.bf16.resize(padded_rows * input.K);
  } else if (weight.scalar_type() == x.scalar_type()) {
    input.f32.resize(padded_rows * input.K);
    for (int64_t m = 0; m < input.M; ++m) interleave(from + m * input.K, input.K, 1.0f, input.f32.data() + m * input.K);
  } else if (!HAS_VNNI) {
    input.f32.assign(from, from + input.M * input.K);
    input.f32.resize(padded_rows * input.K);
  } else {
    if (weight.scalar_type() == at::kByte) input.group_size = input.K / scales[0].size(0);
    input.num_groups = (input.K + input.group_size - 1) / input.group_size;
    input.scale.resize(padded_rows * input.num_groups);
    input.code_sum.resize(padded_rows * input.num_groups);
    const auto quantize_all = [&](auto& codes) {
      codes.resize(padded_rows * input.K);
      for (int64_t i = 0; i < input.M * input.num_groups; ++i) {
        const int64_t start = i % input.num_groups * input.group_size, at = i / input.num_groups * input.K + start;
        const int64_t size = std::min(input.group_size, input.K - start);
        input.scale[i] = quantize_group(from + at, size, codes.data() + at);
        input.code_sum[i] = dequantized_sum(codes.data() + at, size, input.scale[i]);
      }
    };
    // Beside int4 weights int8 inputs make no difference; int8 weights are meant to be exact.
    if (sizeof(T) == 2 && weight.scalar_type() == at::kByte && input.group_size % 4 == 0)
      quantize_all(input.i8);
    else
      quantize_all(input.i16);
  }
  return input;
}

#if HAS_VNNI
inline __m512i multiply_accumulate(__m512i sums, __m512i weights, __m512i inputs, int16_t) {
  return _mm512_dpwssd_epi32(sums, weights, inputs);
}
inline __m512i multiply_accumulate(__m512i sums, __m512i weights, __m512i inputs, int8_t) {
  return _mm512_dpbusd_epi32(sums, weights, inputs);
}

// 64 outputs of a packed int4 matrix times rows [row, row + M) of codes x [.., K]. A byte holds outputs n and n + 32 of
// one input; vpermb gathers STEP inputs of one output into each 32-bit lane. scales_zeros points at this block's first
// entry in [G, N, 2]; out [.., 64].
template <typename T, int M, typename C>
inline void dot_w4(const uint8_t* codes, const T* scales_zeros, int64_t N, const GemvInput& input, const C* x,
                   int64_t row, float* out) {
  constexpr int STEP = 4 / sizeof(C);
  const __m512i shuffles[2] = {int4_shuffle<STEP>(0), int4_shuffle<STEP>(1)}, low = _mm512_set1_epi8(15);
  constexpr int PASSES = M > 2 ? 2 : 1, PER_PASS = 2 / PASSES;  // two passes: else many rows' accumulators would spill
  f32x16 y[M][4] = {};
  for (int64_t g = 0; g < input.num_groups; ++g, codes += input.group_size / 2 * PACK_WIDTH)
    UNROLL for (int half = 0; half < PASSES; ++half) {
      __m512i acc[M][2 * PER_PASS];
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 2 * PER_PASS; ++i) acc[m][i] = _mm512_setzero_si512();
      for (int64_t k = 0; k < input.group_size; k += STEP) {
        const uint8_t* from = codes + k / 2 * PACK_WIDTH;
        if (half == 0)
          for (int64_t next = 0; next < STEP * PACK_WIDTH / 2; next += 64)
            __builtin_prefetch(from + PREFETCH_BYTES + next, 0, 2);
        __m512i w[2 * PER_PASS];
        UNROLL for (int i = 0; i < PER_PASS; ++i) {
          const __m512i first = _mm512_loadu_si512(from), shuffle = shuffles[half * PER_PASS + i];
          __m512i a;
          if constexpr (STEP == 2)  // zero-extend bytes to int16
            a = _mm512_maskz_permutexvar_epi8(0x5555555555555555, shuffle, first);
          else
            a = _mm512_permutex2var_epi8(first, shuffle, _mm512_loadu_si512(from + 64));
          w[i] = _mm512_and_si512(a, low);
          w[PER_PASS + i] = _mm512_and_si512(_mm512_srli_epi16(a, 4), low);
        }
        UNROLL for (int m = 0; m < M; ++m) {
          const __m512i inputs = _mm512_set1_epi32(load<int32_t>(x + (row + m) * input.K + g * input.group_size + k));
          UNROLL for (int i = 0; i < 2 * PER_PASS; ++i) acc[m][i] = multiply_accumulate(acc[m][i], w[i], inputs, C());
        }
      }
      for (int i = 0; i < 2 * PER_PASS; ++i) {
        const int j = i / PER_PASS * 2 + half * PER_PASS + i % PER_PASS;
        const Pair scale_zero = load_scales_zeros(scales_zeros + (g * N + j * LANES) * 2);
        const f32x16 zero = scale_zero.b - scale_zero.a * 8.0f;
        for (int m = 0; m < M; ++m) {
          const int64_t at = (row + m) * input.num_groups + g;
          y[m][j] += scale_zero.a * input.scale[at] * (f32x16)_mm512_cvtepi32_ps(acc[m][i]) + zero * input.code_sum[at];
        }
      }
    }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) store(y[m][j], out + (row + m) * PACK_WIDTH + j * LANES);
}

// int8 weights, int16 inputs (vpdpwssd): weights [R, K] -> out[r * M + m].
template <int M, int R>
inline void dot_w8a16(const int8_t* weight, const GemvInput& input, float* out) {
  f32x16 y[R][M] = {};
  for (int64_t g = 0; g < input.num_groups; ++g) {
    __m512i acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_si512();
    const int64_t end = std::min((g + 1) * input.group_size, input.K);
    for (int64_t k = g * input.group_size; k < end; k += PAIR) {
      const __mmask32 mask = end - k >= PAIR ? ~0u : (1u << (end - k)) - 1;
      UNROLL for (int r = 0; r < R; ++r) {
        __builtin_prefetch(weight + (r + R) * input.K + k, 0, 2);
        const __m512i w = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, weight + r * input.K + k));
        UNROLL for (int m = 0; m < M; ++m) acc[r][m] =
            _mm512_dpwssd_epi32(acc[r][m], w, _mm512_maskz_loadu_epi16(mask, input.i16.data() + m * input.K + k));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        y[r][m] += (f32x16)_mm512_cvtepi32_ps(acc[r][m]) * input.scale[m * input.num_groups + g];
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = hsum(y[r][m]);
}
#endif

#if HAS_AVX512_BF16
// bfloat16 weights and rows (vdpbf16ps): weights [R, K] -> out[r * M + m].
template <int M, int R>
inline void dot_bf16(const BFloat16* weight, const BFloat16* x, int64_t K, float* out) {
  __m512 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += PAIR) {
    const __mmask32 mask = K - k >= PAIR ? ~0u : (1u << (K - k)) - 1;
    __m512bh w[R];
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weight + (r + R) * K + k, 0, 2);  // next R weight rows
      w[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight + r * K + k);
    }
    UNROLL for (int m = 0; m < M; ++m) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * K + k);
      UNROLL for (int r = 0; r < R; ++r) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], w[r], row);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = hsum((f32x16)acc[r][m]);
}
#endif

template <int M, int R>
inline void dot_rows(const int8_t* weight, const GemvInput& input, float* out) {
#if HAS_VNNI
  dot_w8a16<M, R>(weight, input, out);
#else
  dot<int8_t, M, R>(weight, input.f32.data(), input.K, out);
#endif
}
template <int M, int R, typename W>
inline void dot_rows(const W* weight, const GemvInput& input, float* out) {
#if HAS_AVX512_BF16
  if constexpr (std::is_same_v<W, BFloat16>) return dot_bf16<M, R>(weight, input.bf16.data(), input.K, out);
#endif
  dot<W, M, R>(weight, input.f32.data(), input.K, out);
}

// Outputs [first, last) of a row-major matrix [N, K]; finish(n, y) receives y [M] of output n.
template <int M, typename W, typename F>
void for_each_output(const W* weight, const GemvInput& input, int64_t first, int64_t last, F finish) {
  constexpr bool bf16_dot = HAS_AVX512_BF16 && std::is_same_v<W, BFloat16>;
  constexpr int R = bf16_dot ? (M == 1 ? 8 : M == 2 ? 6 : M <= 5 ? 4 : 3) : M == 1 || (M == 2 && sizeof(W) == 1) ? 4 : M == 2 ? 2 : 1;
  float y[R * M];
  int64_t n = first;
  for (; n + R <= last; n += R) {
    dot_rows<M, R>(weight + n * input.K, input, y);
    for (int r = 0; r < R; ++r) finish(n + r, y + r * M);
  }
  for (; n < last; ++n) {
    dot_rows<M, 1>(weight + n * input.K, input, y);
    finish(n, y);
  }
}

template <typename T, int M>
void gemv_outputs(const Tensor& weight, const Tensor* scale, const Tensor* bias, const GemvInput& input, int64_t first,
                  int64_t last, T* out) {
  const int64_t N = weight.size(0);
  const T* bias_data = bias == nullptr ? nullptr : bias->const_data_ptr<T>();
  const auto finish = [&](int64_t n, float factor, const float* y) {
    for (int m = 0; m < input.M; ++m)
      out[m * N + n] = static_cast<T>(y[m] * factor + (bias_data == nullptr ? 0.0f : static_cast<float>(bias_data[n])));
  };
  if (weight.scalar_type() == at::kChar) {
    const T* factors = scale->const_data_ptr<T>();
    const auto scaled = [&](int64_t n, const float* y) { finish(n, static_cast<float>(factors[n]), y); };
    for_each_output<M>(weight.const_data_ptr<int8_t>(), input, first, last, scaled);
  } else if (weight.scalar_type() != at::kByte) {
    for_each_output<M>(weight.const_data_ptr<T>(), input, first, last,
                       [&](int64_t n, const float* y) { finish(n, 1.0f, y); });
  } else {
#if HAS_VNNI
    float y[M * PACK_WIDTH], one[M];
    for (int64_t n = first; n < last; n += PACK_WIDTH) {
      const auto multiply = [&](const auto* x) {
        constexpr int ROWS_AT_ONCE = M > 5 ? M / 2 : M;  // larger M would spill accumulators
        for (int64_t row = 0; row < M; row += ROWS_AT_ONCE)
          dot_w4<T, ROWS_AT_ONCE>(weight.const_data_ptr<uint8_t>() + n * input.K / 2,
                                  scale->const_data_ptr<T>() + n * 2, N, input, x, row, y);
      };
      input.i8.empty() ? multiply(input.i16.data()) : multiply(input.i8.data());
      for (int64_t j = 0; j < PACK_WIDTH; ++j) {
        for (int m = 0; m < M; ++m) one[m] = y[m * PACK_WIDTH + j];
        finish(n + j, 1.0f, one);
      }
    }
#else
    TORCH_CHECK(false, "zsmerge::gemv takes int4 weights where zsmerge::has_int4_products() is true");
#endif
  }
}

template <typename T, int M>
void gemv_matrices(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                   std::vector<Tensor>& out) {
  const GemvInput input = prepare_input<T>(x, M, weights[0], scales);
  std::vector<int64_t> ends;  // running total of 64-output pieces over all matrices
  for (const Tensor& weight : weights)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (weight.size(0) + PACK_WIDTH - 1) / PACK_WIDTH);
  const int64_t grain = std::max<int64_t>(1, 65536 / (PACK_WIDTH * input.K));
  at::parallel_for(0, ends.back(), grain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1], N = weights[i].size(0);
      const int64_t first = std::max(begin, start), last = std::min(end, ends[i]);
      const Tensor *scale = scales.empty() ? nullptr : &scales[i], *bias = biases.empty() ? nullptr : &biases[i];
      if (first < last)
        gemv_outputs<T, M>(weights[i], scale, bias, input, (first - start) * PACK_WIDTH,
                           std::min(N, (last - start) * PACK_WIDTH), out[i].data_ptr<T>());
    }
  });
}

// Rounds M up to a compiled value (1, 2, 5, 8); missing rows are zeros.
template <typename T>
void gemv_dispatch(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                   std::vector<Tensor>& out) {
  const int64_t count = x.size(0);
  TORCH_CHECK(count > 0 && count <= MAX_ROWS, "zsmerge::gemv is for 1 to ", MAX_ROWS, " rows, not ", count);
  if (count == 1) return gemv_matrices<T, 1>(x, weights, scales, biases, out);
  if (count == 2) return gemv_matrices<T, 2>(x, weights, scales, biases, out);
  if (count <= 5) return gemv_matrices<T, 5>(x, weights, scales, biases, out);
  gemv_matrices<T, MAX_ROWS>(x, weights, scales, biases, out);
}

void gemv_out(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
              std::vector<Tensor>& out) {
  switch (x.scalar_type()) {
    case at::kBFloat16: gemv_dispatch<BFloat16>(x, weights, scales, biases, out); break;
    case at::kHalf: gemv_dispatch<Half>(x, weights, scales, biases, out); break;
    case at::kFloat: gemv_dispatch<float>(x, weights, scales, biases, out); break;
    default: TORCH_CHECK(false, "zsmerge::gemv knows bfloat16, float16 and float32, not ", x.scalar_type());
  }
}

// Check everything that `gemv_outputs` addresses memory by. first: the first of the matrices, all of one kind.
void check_matrix(const Tensor& x, const Tensor& weight, const Tensor& first, const Tensor* scale, const Tensor* bias) {
  const at::ScalarType kind = weight.scalar_type();
  const bool is_int4 = kind == at::kByte;
  TORCH_CHECK(weight.dim() == 2 && is_dense(weight, first.scalar_type(), weight.sizes()) &&
                  (is_int4 || kind == at::kChar || kind == x.scalar_type()) &&
                  (is_int4 ? 2 : 1) * weight.size(1) == x.size(1),
              "zsmerge::gemv takes contiguous matrices [N, K] of one kind");
  const int64_t N = weight.size(0), G = is_int4 && scale->dim() == 3 ? scale->size(0) : 0;
  TORCH_CHECK(!is_int4 || (N % PACK_WIDTH == 0 && G > 0 && x.size(1) % (2 * G) == 0 &&
                           is_dense(*scale, x.scalar_type(), {G, N, 2})),
              "zsmerge::gemv takes int4 matrices with scales and zeros [G, N, 2]");
  TORCH_CHECK(is_int4 || scale == nullptr || is_dense(*scale, x.scalar_type(), {N}), "zsmerge::gemv takes scales [N]");
  TORCH_CHECK(bias == nullptr || is_dense(*bias, x.scalar_type(), {N}), "zsmerge::gemv takes biases [N]");
}

// x [M, K] times matrices that share it -> [M, N] each, + bias [N]. operands: all matrices, then all scales if there are
// any, then all biases if there are any: one list, since AOTInductor passes no empty ones. A matrix is [N, K] in x's
// dtype; int8 [N, K] with scales [N]; or uint8 [N, K / 2] in torch's AVX-512 int4 packing with scales and zeros
// [G, N, 2].
std::vector<Tensor> gemv(const Tensor& x, at::TensorList operands, int64_t num_matrices) {
  const size_t count = num_matrices;
  TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.size(1) > 0 && num_matrices > 0 && operands.size() >= count &&
                  operands.size() % count == 0,
              "zsmerge::gemv takes rows [M, K], and as many scales and biases as matrices");
  const at::TensorList weights = operands.slice(0, count);
  const bool scaled = !weights[0].is_floating_point();
  TORCH_CHECK(operands.size() == count * (1 + scaled) || operands.size() == count * (2 + scaled),
              "zsmerge::gemv takes scales for integers only");
  const at::TensorList scales = operands.slice(count, scaled ? count : 0), biases = operands.slice(count * (1 + scaled));
  std::vector<Tensor> out;
  for (size_t i = 0; i < count; ++i)
    check_matrix(x, weights[i], weights[0], scales.empty() ? nullptr : &scales[i],
                 biases.empty() ? nullptr : &biases[i]);
  for (const Tensor& scale : scales)
    TORCH_CHECK(weights[0].scalar_type() != at::kByte || scale.size(0) == scales[0].size(0),
                "zsmerge::gemv takes int4 matrices of one group size");
  for (const Tensor& weight : weights) out.push_back(at::empty({x.size(0), weight.size(0)}, x.options()));
  gemv_out(x, weights, scales, biases, out);
  return out;
}
