// Dot products of float rows, and the inputs of a GEMV in the format that its weights need. Needs simd.cpp,
// quantization.cpp.

// weights [R, K] times interleaved float32 x [M, K] -> out[r * M + m]. R outputs at once hide the latency of each
// accumulator.
template <typename W, int M, int R>
inline void dot(const W* weight, const float* x, int64_t K, float* out) {
  f32v acc[R][M][2] = {};
  int64_t k = 0;
  for (; k + PAIR <= K; k += PAIR)
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weight + (r + R) * K + k, 0, 2);  // next R weight rows
      const Pair w = widen(weight + r * K + k);
      UNROLL for (int m = 0; m < M; ++m) {
        acc[r][m][0] += w.a * load<f32v>(x + m * K + k);
        acc[r][m][1] += w.b * load<f32v>(x + m * K + k + LANES);
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

// PACK_WIDTH outputs of a packed int4 matrix. scales_zeros points at their first entry in [G, N, 2].
template <typename T>
struct Int4Block {
  const uint8_t* codes;
  const T* scales_zeros;
  int64_t N;
};

// Input rows of one call in the format that the weights need.
struct GemvInput {
  int64_t M, K;                // buffers hold zero rows up to the compiled M
  std::vector<float> f32;      // [M, K], interleaved float32
  std::vector<BFloat16> bf16;  // [M, K], for vdpbf16ps: with several rows float32 FMAs would be compute-bound, and one sums alike
  // Integer codes with one scale per `group_size` inputs; only one of the two is filled. int16 (vpdpwssd or vpmaddwd, 2
  // products per lane) is as exact as float32 beside 8- and 4-bit weights; int8 (vpdpbusd or vpmaddubsw) does 4.
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
  } else if (!HAS_INTEGER_PRODUCTS) {
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
