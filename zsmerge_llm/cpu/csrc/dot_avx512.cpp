// Dot products on AVX-512: int8 and packed int4 weights with VNNI, bfloat16 with vdpbf16ps. Needs dot.cpp.

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
  f32v y[M][4] = {};
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
        const f32v zero = scale_zero.b - scale_zero.a * 8.0f;
        for (int m = 0; m < M; ++m) {
          const int64_t at = (row + m) * input.num_groups + g;
          y[m][j] += scale_zero.a * input.scale[at] * (f32v)_mm512_cvtepi32_ps(acc[m][i]) + zero * input.code_sum[at];
        }
      }
    }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) store(y[m][j], out + (row + m) * PACK_WIDTH + j * LANES);
}

struct Int4Panel {};  // nothing is unpacked for a GEMV

// A block times all rows of the input -> out [M, 64].
template <typename T, int M>
void multiply_int4(const Int4Block<T>& block, const GemvInput& input, Int4Panel&, float* out) {
  constexpr int ROWS_AT_ONCE = M > 5 ? M / 2 : M;  // larger M would spill accumulators
  const auto multiply = [&](const auto* x) {
    for (int64_t row = 0; row < M; row += ROWS_AT_ONCE)
      dot_w4<T, ROWS_AT_ONCE>(block.codes, block.scales_zeros, block.N, input, x, row, out);
  };
  input.i8.empty() ? multiply(input.i16.data()) : multiply(input.i8.data());
}

// int8 weights, int16 inputs (vpdpwssd): weights [R, K] -> out[r * M + m].
template <int M, int R>
inline void dot_w8a16(const int8_t* weight, const GemvInput& input, float* out) {
  f32v y[R][M] = {};
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
        y[r][m] += (f32v)_mm512_cvtepi32_ps(acc[r][m]) * input.scale[m * input.num_groups + g];
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
    for (int m = 0; m < M; ++m) out[r * M + m] = hsum((f32v)acc[r][m]);
}
#endif
