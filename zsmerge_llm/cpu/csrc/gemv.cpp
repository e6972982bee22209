// GEMV for up to MAX_ROWS rows: weights in the input's dtype, int8 or packed int4. On AVX2 for any number of rows in
// half precision. Needs dot.cpp, dot_avx512.cpp, dot_avx2.cpp, int4_avx2.cpp, float_chunk.cpp.

template <int M, int R>
inline void dot_rows(const int8_t* weight, const GemvInput& input, float* out) {
#if HAS_INTEGER_PRODUCTS
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
  constexpr bool bytes = WIDE && sizeof(W) == 1;
  constexpr int R = bf16_dot ? (M == 1 ? 8 : M == 2 ? 6 : M <= 5 ? 4 : 3) : M == 1 || (M == 2 && bytes) ? 4 : M == 2 ? 2 : 1;
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

// y + bias -> PACK_WIDTH outputs.
template <typename T>
inline void store_block(const float* y, const T* bias, T* out) {
  if (bias == nullptr)
    for (int64_t j = 0; j < PACK_WIDTH; ++j) out[j] = round_to<T>(y[j]);
  else
    for (int64_t j = 0; j < PACK_WIDTH; ++j) out[j] = round_to<T>(y[j] + static_cast<float>(bias[j]));
}

#if HAS_INTEGER_PRODUCTS
template <typename T>
inline Int4Block<T> int4_block(const Tensor& weight, const Tensor& scale, const GemvInput& input, int64_t n) {
  return {weight.const_data_ptr<uint8_t>() + n * input.K / 2, scale.const_data_ptr<T>() + n * 2, weight.size(0)};
}

template <typename T, int M>
void int4_outputs(const Tensor& weight, const Tensor& scale, const T* bias, const GemvInput& input, int64_t first,
                  int64_t last, T* out) {
  float y[M * PACK_WIDTH];
  Int4Panel panel;
  for (int64_t n = first; n < last; n += PACK_WIDTH) {
    multiply_int4<T, M>(int4_block<T>(weight, scale, input, n), input, panel, y);
    for (int64_t m = 0; m < input.M; ++m)
      store_block(y + m * PACK_WIDTH, bias == nullptr ? nullptr : bias + n, out + m * weight.size(0) + n);
  }
}
#endif

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
#if HAS_INTEGER_PRODUCTS
    int4_outputs<T, M>(weight, *scale, bias_data, input, first, last, out);
#else
    TORCH_CHECK(false, "zsmerge::gemv takes int4 weights where zsmerge::int4_pack_width() is not 0");
#endif
  }
}

template <typename T, int M>
void gemv_matrices(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                   std::vector<Tensor>& out) {
  const GemvInput input = prepare_input<T>(x, M, weights[0], scales);
  std::vector<int64_t> ends;  // running total of pieces of PACK_WIDTH outputs over all matrices
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

#if HAS_AVX2
// Many rows times an int4 matrix. A block of outputs is unpacked once for all rows; each row is computed as if it were
// alone.
template <typename T>
void int4_chunk(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor* bias, Tensor& out) {
  const int64_t M = x.size(0), N = weight.size(0), num_tiles = (M + MAX_ROWS - 1) / MAX_ROWS;
  std::vector<Tensor> rows;
  for (int64_t first = 0; first < M; first += MAX_ROWS) rows.push_back(x.slice(0, first, std::min(M, first + MAX_ROWS)));
  std::vector<GemvInput> tiles(num_tiles);
  at::parallel_for(0, num_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      tiles[tile] = prepare_input<T>(rows[tile], MAX_ROWS, weight, scale);
  });
  T* to = out.data_ptr<T>();
  const T* bias_data = bias == nullptr ? nullptr : bias->const_data_ptr<T>();
  dynamic_for(N / PACK_WIDTH, [&](const auto& next) {
    Int4Panel panel;
    float y[MAX_ROWS * PACK_WIDTH];
    for (int64_t index = next(); index >= 0; index = next()) {
      const int64_t n = index * PACK_WIDTH;
      const Int4Block<T> block = int4_block<T>(weight, scale, tiles[0], n);
      const bool bytes = !tiles[0].i8.empty();
      if (bytes) unpack_block(block, tiles[0], panel);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        if (bytes)
          multiply_rows<MAX_ROWS>(panel, tiles[tile], y);
        else
          multiply_int4<T, MAX_ROWS>(block, tiles[tile], panel, y);
        const T* addend = bias == nullptr ? nullptr : bias_data + n;
        for (int64_t m = 0; m < tiles[tile].M; ++m)
          store_block(y + m * PACK_WIDTH, addend, to + (tile * MAX_ROWS + m) * N + n);
      }
    }
  });
}

template <typename T>
void gemv_chunk(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                std::vector<Tensor>& out) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor *scale = scales.empty() ? nullptr : &scales[i], *bias = biases.empty() ? nullptr : &biases[i];
    switch (weights[i].scalar_type()) {
      case at::kByte: int4_chunk<T>(x, weights[i], *scale, bias, out[i]); break;
      case at::kChar: float_chunk<T, int8_t>(x, weights[i], scale, bias, out[i]); break;
      default: float_chunk<T, T>(x, weights[i], nullptr, bias, out[i]);
    }
  }
}
#endif

// Rounds M up to a compiled value (1, 2, 5, 8); missing rows are zeros.
template <typename T>
void gemv_dispatch(const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList biases,
                   std::vector<Tensor>& out) {
  const int64_t count = x.size(0);
#if HAS_AVX2
  if constexpr (sizeof(T) == 2)
    if (count > MAX_ROWS) return gemv_chunk<T>(x, weights, scales, biases, out);
#endif
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

// x [M, K] times matrices that share it -> [M, N] each, + bias [N]. M <= MAX_ROWS, or any in half precision on AVX2.
// operands: all matrices, then all scales if there are any, then all biases if there are any: one list, since
// AOTInductor passes no empty ones. A matrix is [N, K] in x's dtype; int8 [N, K] with scales [N]; or uint8 [N, K / 2]
// in torch's int4 packing with scales and zeros [G, N, 2].
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
