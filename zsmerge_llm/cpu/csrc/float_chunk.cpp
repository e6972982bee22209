// Many rows (a chunk) times a matrix in half precision or int8 on AVX2, computed in float32. PyTorch would need a
// float32 copy of the matrix, and its products of a few dozen rows leave a second thread idle. Needs simd.cpp.

#if HAS_AVX2

constexpr int64_t PANEL_OUTPUTS = 2 * LANES;  // outputs that are converted at a time
constexpr int TILE_ROWS = 6;                  // rows whose sums fit in the registers

inline f32v widen_lanes(const BFloat16* from) {
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
inline f32v widen_lanes(const Half* from) { return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline f32v widen_lanes(const int8_t* from) { return load_i8(from); }

// Transpose 8 x 8 floats in place.
inline void transpose_8x8(f32v* v) {
  __m256 pairs[8], fours[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int part = 0; part < 2; ++part) {
      fours[i + 2 * part] = _mm256_shuffle_ps(pairs[i + part], pairs[i + part + 2], 0x44);
      fours[i + 2 * part + 1] = _mm256_shuffle_ps(pairs[i + part], pairs[i + part + 2], 0xee);
    }
  UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = (f32v)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = (f32v)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

// Rows [count <= 16, K] of a matrix -> panel [K, 16]; missing rows are zeros.
template <typename W>
void unpack_panel(const W* weight, int64_t count, int64_t K, float* panel) {
  for (int64_t first = 0; first < PANEL_OUTPUTS; first += LANES) {
    const int64_t rows = std::clamp<int64_t>(count - first, 0, LANES);
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
      f32v v[LANES] = {};
      for (int64_t i = 0; i < rows; ++i) v[i] = widen_lanes(weight + (first + i) * K + k);
      transpose_8x8(v);
      for (int64_t i = 0; i < LANES; ++i) store(v[i], panel + (k + i) * PANEL_OUTPUTS + first);
    }
    for (; k < K; ++k)
      for (int64_t i = 0; i < LANES; ++i)
        panel[k * PANEL_OUTPUTS + first + i] = i < rows ? static_cast<float>(weight[(first + i) * K + k]) : 0.0f;
  }
}

// Rows x [R, K] times a panel -> out [R, 16].
template <int R>
void multiply_tile(const float* panel, const float* x, int64_t K, float* out) {
  f32v acc[R][2] = {};
  for (int64_t k = 0; k < K; ++k, ++x, panel += PANEL_OUTPUTS) {
    const f32v w[2] = {load<f32v>(panel), load<f32v>(panel + LANES)};
    UNROLL for (int r = 0; r < R; ++r) {
      const f32v input = (f32v)_mm256_broadcast_ss(x + r * K);
      UNROLL for (int i = 0; i < 2; ++i) acc[r][i] += w[i] * input;
    }
  }
  // Unrolled, since else GCC would keep the sums in memory.
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < 2; ++i) store(acc[r][i], out + r * PANEL_OUTPUTS + i * LANES);
}

// x [M, K] -> float32 [M, K], and zeros up to a whole tile.
template <typename T>
std::vector<float> widen_rows(const Tensor& x) {
  const int64_t M = x.size(0), K = x.size(1);
  std::vector<float> rows((M + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * K);
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    int64_t i = begin * K;
    for (; i + LANES <= end * K; i += LANES) store(widen_lanes(from + i), rows.data() + i);
    for (; i < end * K; ++i) rows[i] = static_cast<float>(from[i]);
  });
  return rows;
}

template <typename T, typename W>
void float_chunk(const Tensor& x, const Tensor& weight, const Tensor* scale, const Tensor* bias, Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const std::vector<float> rows = widen_rows<T>(x.contiguous());
  const T* scales = scale == nullptr ? nullptr : scale->const_data_ptr<T>();
  const T* biases = bias == nullptr ? nullptr : bias->const_data_ptr<T>();
  const W* matrix = weight.const_data_ptr<W>();
  T* to = out.data_ptr<T>();
  dynamic_for((N + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS, [&](const auto& next) {
    std::vector<float> panel(K * PANEL_OUTPUTS);
    float y[TILE_ROWS * PANEL_OUTPUTS], factor[PANEL_OUTPUTS], addend[PANEL_OUTPUTS];
    for (int64_t index = next(); index >= 0; index = next()) {
      const int64_t n = index * PANEL_OUTPUTS, count = std::min(PANEL_OUTPUTS, N - n);
      unpack_panel(matrix + n * K, count, K, panel.data());
      for (int64_t j = 0; j < count; ++j) {
        factor[j] = scales == nullptr ? 1.0f : static_cast<float>(scales[n + j]);
        addend[j] = biases == nullptr ? 0.0f : static_cast<float>(biases[n + j]);
      }
      for (int64_t m = 0; m < M; m += TILE_ROWS) {
        const int64_t left = std::min<int64_t>(TILE_ROWS, M - m);
        (left > TILE_ROWS / 2 ? multiply_tile<TILE_ROWS> : multiply_tile<TILE_ROWS / 2>)(panel.data(),
                                                                                        rows.data() + m * K, K, y);
        for (int64_t r = 0; r < left; ++r)
          for (int64_t j = 0; j < count; ++j)
            to[(m + r) * N + n + j] = round_to<T>(y[r * PANEL_OUTPUTS + j] * factor[j] + addend[j]);
      }
    }
  });
}
#endif
