// Packed int4 matrices on AVX2, 32 outputs (a block) at a time. A byte holds outputs n and n + 16 of one input. Needs
// dot.cpp.
//
// Products of codes and int8 inputs (vpmaddubsw) sum up exactly in int16 over 32 inputs: 16 products of at most
// 15 * 127. Each row is computed as if it were alone, whatever code takes it.

#if HAS_AVX2

constexpr int64_t EXACT = 32;

// A block with a byte for each code: [K / 4][4] vectors of 8 outputs times 4 inputs. Weight = scale * code + zero, in
// [G][4] vectors of 8 outputs.
struct Int4Panel {
  std::vector<__m256i> codes;
  std::vector<f32v> scale, zero;
};

inline __m256i join_lanes(__m128i lower, __m128i upper) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lower), upper, 1);
}

inline void prefetch_group(const uint8_t* codes, int64_t group_size) {
  for (int64_t next = 0; next < group_size / 2 * PACK_WIDTH; next += 64)
    __builtin_prefetch(codes + PREFETCH_BYTES + next, 0, 2);
}

// Scales (a) and zeros (b) of outputs [8 * part, 8 * part + 8) in one group.
template <typename T>
inline Pair group_scales(const Int4Block<T>& block, int64_t group, int64_t part) {
  const Pair scale_zero = load_scales_zeros(block.scales_zeros + (group * block.N + part * LANES) * 2);
  return {scale_zero.a, scale_zero.b - scale_zero.a * 8.0f};
}

// Add one group of one row to y. fma: compilers would contract it differently from case to case.
inline f32v add_group(f32v y, Pair scale_zero, const GemvInput& input, int64_t row, int64_t group, __m256i sums) {
  const int64_t at = row * input.num_groups + group;
  const __m256 zero = _mm256_fmadd_ps((__m256)scale_zero.b, _mm256_set1_ps(input.code_sum[at]), (__m256)y);
  return (f32v)_mm256_fmadd_ps((__m256)(scale_zero.a * input.scale[at]), _mm256_cvtepi32_ps(sums), zero);
}

// -- one or two rows of int8 codes: straight from the packing ---------------------------------------------------------

// 8 int32 sums of the two lanes of 8 int16 each.
inline __m256i add_lanes(__m256i sums) {
  return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums)),
                          _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums, 1)));
}

template <typename T, int M>
void multiply_block(const Int4Block<T>& block, const GemvInput& input, float* out) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i spread = _mm256_setr_epi16(0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0100,  //
                                           0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302, 0x0302);
  f32v y[M][4] = {};
  const auto* from = (const __m128i*)block.codes;
  const int8_t* x = input.i8.data();
  for (int64_t g = 0; g < input.num_groups; ++g) {
    prefetch_group((const uint8_t*)from, input.group_size);
    __m256i sums[M][4] = {};
    for (int64_t left = input.group_size; left > 0; left -= EXACT) {
      __m256i acc[M][4] = {};
      // Not unrolled: GCC would do all multiplications first, and spill them.
      _Pragma("GCC unroll 1") for (const int8_t* end = x + std::min(left, EXACT); x < end; x += 4, from += 4) {
        // The lower lane takes inputs k and k + 1, the upper one k + 2 and k + 3.
        const __m256i even = join_lanes(_mm_loadu_si128(from), _mm_loadu_si128(from + 2));
        const __m256i odd = join_lanes(_mm_loadu_si128(from + 1), _mm_loadu_si128(from + 3));
        const __m256i both[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
        UNROLL for (int m = 0; m < M; ++m) {
          const __m256i inputs = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(x + m * input.K)), spread);
          UNROLL for (int j = 0; j < 4; ++j) {
            const __m256i w = _mm256_and_si256(j < 2 ? both[j] : _mm256_srli_epi16(both[j - 2], 4), low);
            acc[m][j] = _mm256_add_epi16(acc[m][j], _mm256_maddubs_epi16(w, inputs));
          }
        }
      }
      UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int j = 0; j < 4; ++j) sums[m][j] = _mm256_add_epi32(sums[m][j], add_lanes(acc[m][j]));
    }
    UNROLL for (int j = 0; j < 4; ++j) {
      const Pair scale_zero = group_scales(block, g, j);
      UNROLL for (int m = 0; m < M; ++m) y[m][j] = add_group(y[m][j], scale_zero, input, m, g, sums[m][j]);
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < 4; ++j) store(y[m][j], out + m * PACK_WIDTH + j * LANES);
}

// -- more rows of int8 codes: a block is unpacked first ---------------------------------------------------------------

template <typename T>
void unpack_block(const Int4Block<T>& block, const GemvInput& input, Int4Panel& panel) {
  panel.codes.resize(input.K);
  panel.scale.resize(input.num_groups * 4);
  panel.zero.resize(input.num_groups * 4);
  const __m256i low = _mm256_set1_epi8(15);
  const auto* from = (const __m128i*)block.codes;
  for (__m256i* to = panel.codes.data(); to < panel.codes.data() + input.K; from += 4, to += 4) {
    __builtin_prefetch((const uint8_t*)from + PREFETCH_BYTES, 0, 2);
    __m128i x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128(from + i);
    // Outputs 0 to 7 and 8 to 15, with those 16 further on in the upper half of each byte: inputs 0 and 1, 2 and 3.
    const __m128i pairs[2][2] = {{_mm_unpacklo_epi8(x[0], x[1]), _mm_unpacklo_epi8(x[2], x[3])},
                                 {_mm_unpackhi_epi8(x[0], x[1]), _mm_unpackhi_epi8(x[2], x[3])}};
    for (int i = 0; i < 2; ++i) {
      const __m256i both = join_lanes(_mm_unpacklo_epi16(pairs[i][0], pairs[i][1]),
                                      _mm_unpackhi_epi16(pairs[i][0], pairs[i][1]));
      to[i] = _mm256_and_si256(both, low);
      to[2 + i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    }
  }
  for (int64_t g = 0; g < input.num_groups; ++g)
    for (int64_t j = 0; j < 4; ++j) {
      const Pair scale_zero = group_scales(block, g, j);
      panel.scale[g * 4 + j] = scale_zero.a;
      panel.zero[g * 4 + j] = scale_zero.b;
    }
}

// Rows [row, row + R) times a panel -> out [.., 32].
template <int R>
void multiply_panel(const Int4Panel& panel, const GemvInput& input, int64_t row, float* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  f32v y[R][4] = {};
  const __m256i* w = panel.codes.data();
  const int8_t* x = input.i8.data() + row * input.K;
  for (int64_t g = 0; g < input.num_groups; ++g) {
    __m256i sums[R][4] = {};
    for (int64_t left = input.group_size; left > 0; left -= EXACT) {
      __m256i acc[R][4] = {};
      // Not unrolled: GCC would do all multiplications first, and spill them.
      _Pragma("GCC unroll 1") for (const int8_t* end = x + std::min(left, EXACT); x < end; x += 4, w += 4)
          UNROLL for (int r = 0; r < R; ++r) {
        const __m256i inputs = _mm256_set1_epi32(load<int32_t>(x + r * input.K));
        UNROLL for (int j = 0; j < 4; ++j)
            acc[r][j] = _mm256_add_epi16(acc[r][j], _mm256_maddubs_epi16(w[j], inputs));
      }
      UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int j = 0; j < 4; ++j)
            sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(acc[r][j], ones));
    }
    UNROLL for (int j = 0; j < 4; ++j) {
      const Pair scale_zero = {panel.scale[g * 4 + j], panel.zero[g * 4 + j]};
      UNROLL for (int r = 0; r < R; ++r) y[r][j] = add_group(y[r][j], scale_zero, input, row + r, g, sums[r][j]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int j = 0; j < 4; ++j) store(y[r][j], out + (row + r) * PACK_WIDTH + j * LANES);
}

template <int M>
void multiply_rows(const Int4Panel& panel, const GemvInput& input, float* out) {
  for (int64_t row = 0; row + 2 <= M; row += 2) multiply_panel<2>(panel, input, row, out);
  if constexpr (M % 2 != 0) multiply_panel<1>(panel, input, M - 1, out);
}

// -- rows of int16 codes (vpmaddwd), two inputs at a time -------------------------------------------------------------

template <typename T, int M>
void multiply_wide_block(const Int4Block<T>& block, const GemvInput& input, int64_t row, float* out) {
  const __m128i low = _mm_set1_epi8(15);
  const auto* codes = (const __m128i*)block.codes;
  f32v y[M][4] = {};
  for (int64_t g = 0; g < input.num_groups; ++g, codes += input.group_size) {
    prefetch_group((const uint8_t*)codes, input.group_size);
    const int16_t* x = input.i16.data() + row * input.K + g * input.group_size;
    UNROLL for (int half = 0; half < 2; ++half) {  // two passes: else accumulators would spill
      __m256i sums[M][2] = {};
      for (int64_t k = 0; k < input.group_size; k += 2) {
        const __m128i even = _mm_loadu_si128(codes + k), odd = _mm_loadu_si128(codes + k + 1);
        const __m128i both = half == 0 ? _mm_unpacklo_epi8(even, odd) : _mm_unpackhi_epi8(even, odd);
        const __m256i w[2] = {_mm256_cvtepu8_epi16(_mm_and_si128(both, low)),
                              _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), low))};
        UNROLL for (int m = 0; m < M; ++m) {
          const __m256i inputs = _mm256_set1_epi32(load<int32_t>(x + m * input.K + k));
          UNROLL for (int i = 0; i < 2; ++i)
              sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(w[i], inputs));
        }
      }
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * i + half;
        const Pair scale_zero = group_scales(block, g, j);
        for (int m = 0; m < M; ++m) y[m][j] = add_group(y[m][j], scale_zero, input, row + m, g, sums[m][i]);
      }
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < 4; ++j) store(y[m][j], out + (row + m) * PACK_WIDTH + j * LANES);
}

// A block times all rows of the input -> out [M, 32].
template <typename T, int M>
void multiply_int4(const Int4Block<T>& block, const GemvInput& input, Int4Panel& panel, float* out) {
  if (input.i8.empty()) {
    constexpr int ROWS_AT_ONCE = M > 5 ? M / 2 : M;  // larger M would spill accumulators
    for (int64_t row = 0; row < M; row += ROWS_AT_ONCE) multiply_wide_block<T, ROWS_AT_ONCE>(block, input, row, out);
  } else if constexpr (M <= 2) {
    multiply_block<T, M>(block, input, out);
  } else {
    unpack_block(block, input, panel);
    multiply_rows<M>(panel, input, out);
  }
}
#endif
