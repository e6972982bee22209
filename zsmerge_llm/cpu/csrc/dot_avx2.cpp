// Dot products on AVX2, with the same results as those of dot_avx512.cpp but for the order of sums. Needs dot.cpp.

#if HAS_AVX2

// int8 weights, int16 inputs (vpmaddwd): weights [R, K] -> out[r * M + m].
template <int M, int R>
inline void dot_w8a16(const int8_t* weight, const GemvInput& input, float* out) {
  constexpr int64_t STEP = 16;
  f32v y[R][M] = {};
  for (int64_t g = 0; g < input.num_groups; ++g) {
    __m256i acc[R][M] = {};
    const int64_t end = std::min((g + 1) * input.group_size, input.K);
    const auto add = [&](int r, int m, const int8_t* w, const int16_t* x) {
      const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
      acc[r][m] = _mm256_add_epi32(acc[r][m], _mm256_madd_epi16(weights, _mm256_loadu_si256((const __m256i*)x)));
    };
    int64_t k = g * input.group_size;
    for (; k + STEP <= end; k += STEP)
      UNROLL for (int r = 0; r < R; ++r) {
        __builtin_prefetch(weight + (r + R) * input.K + k, 0, 2);
        UNROLL for (int m = 0; m < M; ++m) add(r, m, weight + r * input.K + k, input.i16.data() + m * input.K + k);
      }
    if (k < end)
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
          int8_t w[STEP] = {};
          int16_t x[STEP] = {};
          std::copy_n(weight + r * input.K + k, end - k, w);
          std::copy_n(input.i16.data() + m * input.K + k, end - k, x);
          add(r, m, w, x);
        }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        y[r][m] += (f32v)_mm256_cvtepi32_ps(acc[r][m]) * input.scale[m * input.num_groups + g];
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = hsum(y[r][m]);
}

// Sums of products of one group's codes [inputs, 16 bytes] with rows of int8 codes (vpmaddubsw), four inputs at a time.
// A byte holds two outputs; half: the lower or upper 8 bytes. sums [M][2]: of the outputs in low and in high nibbles.
template <int M>
inline void add_products(const uint8_t* codes, int half, const int8_t* x, int64_t stride, int64_t size,
                         __m256i (&sums)[M][2]) {
  constexpr int64_t EXACT = 32;  // inputs whose sums fit int16: 8 times 2 * 15 * 127
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i spread = _mm256_setr_epi16(0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100,  //
                                           0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302);
  for (int64_t start = 0; start < size; start += EXACT) {
    __m256i acc[M][2] = {};
    const int64_t end = std::min(start + EXACT, size);
    for (int64_t k = start; k < end; k += 4) {
      // The lower lane takes inputs k and k + 1, the upper one k + 2 and k + 3.
      const auto* from = (const __m128i*)codes + k;
      const __m256i even = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from)), _mm_loadu_si128(from + 2), 1);
      const __m256i odd =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from + 1)), _mm_loadu_si128(from + 3), 1);
      const __m256i both = half == 0 ? _mm256_unpacklo_epi8(even, odd) : _mm256_unpackhi_epi8(even, odd);
      const __m256i w[2] = {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
      UNROLL for (int m = 0; m < M; ++m) {
        const __m256i inputs = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(x + m * stride + k)), spread);
        UNROLL for (int i = 0; i < 2; ++i)
            acc[m][i] = _mm256_add_epi16(acc[m][i], _mm256_maddubs_epi16(w[i], inputs));
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i)
        for (const __m128i lane : {_mm256_castsi256_si128(acc[m][i]), _mm256_extracti128_si256(acc[m][i], 1)})
          sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_cvtepi16_epi32(lane));
  }
}

// The same with int16 codes (vpmaddwd), two inputs at a time.
template <int M>
inline void add_products(const uint8_t* codes, int half, const int16_t* x, int64_t stride, int64_t size,
                         __m256i (&sums)[M][2]) {
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t k = 0; k < size; k += 2) {
    const __m128i even = _mm_loadu_si128((const __m128i*)codes + k), odd = _mm_loadu_si128((const __m128i*)codes + k + 1);
    const __m128i both = half == 0 ? _mm_unpacklo_epi8(even, odd) : _mm_unpackhi_epi8(even, odd);
    const __m256i w[2] = {_mm256_cvtepu8_epi16(_mm_and_si128(both, low)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), low))};
    UNROLL for (int m = 0; m < M; ++m) {
      const __m256i inputs = _mm256_set1_epi32(load<int32_t>(x + m * stride + k));
      UNROLL for (int i = 0; i < 2; ++i)
          sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(w[i], inputs));
    }
  }
}

// 32 outputs of a packed int4 matrix times rows [row, row + M) of codes x [.., K]. A byte holds outputs n and n + 16 of
// one input. scales_zeros points at this block's first entry in [G, N, 2]; out [.., 32].
template <typename T, int M, typename C>
inline void dot_w4(const uint8_t* codes, const T* scales_zeros, int64_t N, const GemvInput& input, const C* x,
                   int64_t row, float* out) {
  f32v y[M][4] = {};
  for (int64_t g = 0; g < input.num_groups; ++g, codes += input.group_size / 2 * PACK_WIDTH) {
    for (int64_t next = 0; next < input.group_size / 2 * PACK_WIDTH; next += 64)
      __builtin_prefetch(codes + PREFETCH_BYTES + next, 0, 2);
    UNROLL for (int half = 0; half < 2; ++half) {  // two passes: else accumulators would spill
      __m256i sums[M][2] = {};
      add_products<M>(codes, half, x + row * input.K + g * input.group_size, input.K, input.group_size, sums);
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * i + half;
        const Pair scale_zero = load_scales_zeros(scales_zeros + (g * N + j * LANES) * 2);
        const f32v zero = scale_zero.b - scale_zero.a * 8.0f;
        for (int m = 0; m < M; ++m) {
          const int64_t at = (row + m) * input.num_groups + g;
          y[m][j] += scale_zero.a * input.scale[at] * (f32v)_mm256_cvtepi32_ps(sums[m][i]) + zero * input.code_sum[at];
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) store(y[m][j], out + (row + m) * PACK_WIDTH + j * LANES);
}
#endif
