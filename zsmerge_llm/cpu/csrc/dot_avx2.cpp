// Dot products of int8 weights on AVX2, with the same results as in dot_avx512.cpp but for the order of sums. Needs
// dot.cpp.

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
#endif
