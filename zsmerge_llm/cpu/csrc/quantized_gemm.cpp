// GEMM of many rows (a prefill chunk) with int4 or int8 weights. Needs simd.cpp and quantization.cpp.
//
// Inputs are quantized to int8: vpdpbusd does four products per lane, twice as many as vdpbf16ps. int4 weights are
// requantized to int8 with one scale per block of inputs, 64 outputs (a panel) at a time: applying a scale every 32
// inputs would cost more than this rounding loses. Up to RESIDUAL_MAX_ROWS rows also multiply the residual that int8
// leaves (int16 precision in total): short inputs such as questions are sensitive, and their time goes into unpacking
// anyway. With AMX, bfloat16 tiles are faster, so this file is left out.

#if HAS_VNNI && !defined(__AMX_BF16__)
#define HAS_INT8_GEMM 1
#else
#define HAS_INT8_GEMM 0
#endif

#if HAS_INT8_GEMM

constexpr int64_t TILE_M = 6, TILE_N = 2;  // register tile: rows, and vectors of 16 outputs
constexpr int64_t STRIP_M = 8 * TILE_M;    // rows multiplied with a panel at a time
constexpr int64_t PANEL_VECTORS = PACK_WIDTH / LANES;
constexpr int64_t MAX_SPAN = 64;           // most inputs that share a scale (a span)
constexpr int64_t BLOCK_SPANS = 8;         // spans that share a weight scale (a block); its panel fits in L1
constexpr int64_t RESIDUAL_MAX_ROWS = 64;  // up to so many rows, the residual is multiplied too

// Input rows of one call: codes in [-127, 127], one scale per span. Plane 1, if any, holds the residual of plane 0.
// Rows are padded to whole strips.
struct QuantizedRows {
  int64_t M, K, span, spans, blocks, planes;
  Tensor memory[2];
  int8_t* codes;          // [M, planes, K]
  float *scale, *offset;  // [M, planes, spans]; [M, planes, blocks]: minus the +128 offset's contribution
};

// Inputs per span: the largest multiple of `group` up to MAX_SPAN that divides K.
int64_t choose_span(int64_t K, int64_t group) {
  int64_t span = std::max(group, std::min(MAX_SPAN, K) / group * group);
  while (K % span != 0) span -= group;
  return span;
}

// residual = x - scale * codes.
void subtract_codes(const BFloat16* x, const int8_t* codes, float scale, int64_t size, BFloat16* residual) {
  for (int64_t k = 0; k < size; ++k) residual[k] = static_cast<float>(x[k]) - static_cast<float>(codes[k]) * scale;
}

QuantizedRows quantize_rows(const Tensor& x, int64_t span) {
  const int64_t M = x.size(0), K = x.size(1), padded_rows = (M + STRIP_M - 1) / STRIP_M * STRIP_M, spans = K / span;
  const int64_t blocks = (spans + BLOCK_SPANS - 1) / BLOCK_SPANS, planes = M <= RESIDUAL_MAX_ROWS ? 2 : 1;
  Tensor code_memory = at::empty({padded_rows * planes * K}, x.options().dtype(at::kChar));
  Tensor scale_memory = at::zeros({padded_rows * planes * (spans + blocks)}, x.options().dtype(at::kFloat));
  auto* first = scale_memory.data_ptr<float>();
  const QuantizedRows rows{M, K, span, spans, blocks, planes, {code_memory, scale_memory},
                           code_memory.data_ptr<int8_t>(), first, first + padded_rows * planes * spans};
  const auto* inputs = x.const_data_ptr<BFloat16>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    std::vector<BFloat16> residual(K);
    for (int64_t row = begin * planes; row < end * planes; ++row) {
      const bool second = row % planes == 1;
      const BFloat16* from = second ? residual.data() : inputs + row / planes * K;
      int8_t* codes = rows.codes + row * K;
      float *scale = rows.scale + row * spans, *offset = rows.offset + row * blocks;
      for (int64_t s = 0, k = 0; s < spans; ++s, k += span) {
        scale[s] = quantize_group(from + k, span, codes + k);
        offset[s / BLOCK_SPANS] -= 128 * dequantized_sum(codes + k, span, scale[s]);
        if (planes > 1 && !second) subtract_codes(from + k, codes + k, scale[s], span, residual.data() + k);
      }
    }
  });
  return rows;
}

// 64 outputs in the layout of vpdpbusd: unsigned codes 1 to 255 (signed code + 128), four inputs per 32-bit lane.
struct Panel {
  explicit Panel(const QuantizedRows& rows)
      : codes(rows.K * PACK_WIDTH), scale(rows.blocks * PACK_WIDTH), out(STRIP_M * PACK_WIDTH) {}
  std::vector<uint8_t> codes;  // [K / 4, 64, 4]
  std::vector<float> scale;    // [blocks, 64]
  std::vector<float> out;      // [STRIP_M, 64]
};

// int4 -> unsigned int8 as (scale * code + zero) / 256 in 16-bit arithmetic. Each of 16 outputs fills two 16-bit lanes.
struct Requantizer {
  __m512i scale, zero;
};

inline __m512i duplicate_u16(f32v x) {
  const u32v whole = (u32v)round_to_int(x) & 0xffffu;
  return (__m512i)(whole | (whole << 16));
}

inline __m512i requantize(__m512i codes, const Requantizer& requantizer) {
  const __m512i upper = _mm512_set1_epi16(-256);
  const __m512i even = _mm512_mullo_epi16(_mm512_andnot_si512(upper, codes), requantizer.scale);
  const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), requantizer.scale);
  return _mm512_or_si512(_mm512_srli_epi16(_mm512_add_epi16(even, requantizer.zero), 8),
                         _mm512_and_si512(_mm512_add_epi16(odd, requantizer.zero), upper));
}

// int8 scale of 16 outputs: absmax over `groups` groups, whose [N, 2] scales and zeros are N * 2 apart, / 127.
f32v panel_scale(const BFloat16* scales_zeros, int64_t N, int64_t groups) {
  f32v absmax = {};
  for (int64_t g = 0; g < groups; ++g) {
    const Pair scale_zero = widen(scales_zeros + g * N * 2);
    for (const f32v end : {scale_zero.b - scale_zero.a * 8.0f, scale_zero.b + scale_zero.a * 7.0f}) {
      const f32v size = end < 0.0f ? -end : end;
      absmax = size > absmax ? size : absmax;
    }
  }
  return (absmax > 1e-30f ? absmax : splat(1e-30f)) / 127.0f;
}

// Panel from torch's int4 packing: a byte holds outputs n and n + 32. scales_zeros [G, N, 2] starts at this panel.
void unpack_panel(const uint8_t* packed, const BFloat16* scales_zeros, int64_t N, int64_t group,
                  const QuantizedRows& rows, Panel& panel) {
  const __m512i shuffles[2] = {int4_shuffle<4>(0), int4_shuffle<4>(1)}, low = _mm512_set1_epi8(15);
  auto* to = reinterpret_cast<__m512i*>(panel.codes.data());
  const int64_t groups = rows.K / group, groups_per_block = BLOCK_SPANS * rows.span / group;
  for (int64_t first = 0; first < groups; first += groups_per_block) {
    const int64_t last = std::min(groups, first + groups_per_block);
    f32v scale[PANEL_VECTORS];
    for (int64_t part = 0; part < PANEL_VECTORS; ++part) {
      scale[part] = panel_scale(scales_zeros + first * N * 2 + part * PAIR, N, last - first);
      store(scale[part], panel.scale.data() + first / groups_per_block * PACK_WIDTH + part * LANES);
    }
    for (int64_t g = first; g < last; ++g) {
      Requantizer requantizer[PANEL_VECTORS];
      for (int64_t part = 0; part < PANEL_VECTORS; ++part) {
        const Pair scale_zero = widen(scales_zeros + g * N * 2 + part * PAIR);
        const f32v factor = 256.0f / scale[part];
        constexpr float OFFSET = (128 + 0.5f) * 256;  // +128 makes codes unsigned, +0.5 rounds; in units of 1 / 256
        requantizer[part] = {duplicate_u16(scale_zero.a * factor),
                             duplicate_u16((scale_zero.b - scale_zero.a * 8.0f) * factor + OFFSET)};
      }
      for (int64_t k = 0; k < group; k += 4, packed += 2 * PACK_WIDTH, to += PANEL_VECTORS) {
        const __m512i upper = _mm512_loadu_si512(packed), lower = _mm512_loadu_si512(packed + 64);
        for (int half = 0; half < 2; ++half) {
          const __m512i pair = _mm512_permutex2var_epi8(upper, shuffles[half], lower);
          _mm512_storeu_si512(to + half, requantize(_mm512_and_si512(pair, low), requantizer[half]));
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
          _mm512_storeu_si512(to + 2 + half, requantize(high, requantizer[2 + half]));
        }
      }
    }
  }
}

// Transpose 16 x 16 words in place (four butterfly steps).
inline void transpose_16x16(u32v* v) {
  UNROLL for (int step = 1; step < LANES; step *= 2) {
    u32v low, high;
    for (uint32_t i = 0; i < LANES; ++i) {
      low[i] = i & step ? i + LANES - step : i;
      high[i] = i & step ? i + LANES : i + step;
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const __m512i a = (__m512i)v[i], b = (__m512i)v[i + step];
      v[i] = (u32v)_mm512_permutex2var_epi32(a, (__m512i)low, b);
      v[i + step] = (u32v)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
  }
}

// Panel from int8 rows [64, K] with one scale each.
void unpack_panel(const int8_t* weight, const BFloat16* scale, const QuantizedRows& rows, Panel& panel) {
  const __m512i offset = _mm512_set1_epi8(-128);
  for (int64_t part = 0; part < PANEL_VECTORS; ++part) {
    const int8_t* row = weight + part * LANES * rows.K;
    for (int64_t k = 0; k < rows.K; k += 64) {
      const int64_t size = std::min<int64_t>(64, rows.K - k);
      const __mmask64 mask = size == 64 ? ~0ull : (1ull << size) - 1;
      u32v v[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        v[i] = (u32v)_mm512_xor_si512(offset, _mm512_maskz_loadu_epi8(mask, row + i * rows.K + k));
      transpose_16x16(v);
      for (int64_t i = 0; i < size / 4; ++i)
        _mm512_storeu_si512(panel.codes.data() + (k + 4 * i) * PACK_WIDTH + part * 64, (__m512i)v[i]);
    }
  }
  for (int64_t i = 0; i < rows.blocks * PACK_WIDTH; ++i) panel.scale[i] = scale[i % PACK_WIDTH];
}

// One block and plane of rows [row, row + TILE_M) times TILE_N vectors of a panel, added to out [TILE_M, 64]. noinline:
// when inlined, GCC spills the accumulators.
[[gnu::noinline]] void multiply_tile(const QuantizedRows& rows, const Panel& panel, int64_t row, int64_t plane,
                                     int64_t block, int64_t part, float* out) {
  const int64_t stride = rows.planes * rows.K, plane_row = row * rows.planes + plane, start = block * BLOCK_SPANS;
  const int8_t* x = rows.codes + plane_row * rows.K + start * rows.span;
  const float* scale = rows.scale + plane_row * rows.spans;
  const float* offset = rows.offset + plane_row * rows.blocks + block;
  const uint8_t* w = panel.codes.data() + start * rows.span * PACK_WIDTH + part * 64;
  f32v y[TILE_M][TILE_N];
  UNROLL for (int r = 0; r < TILE_M; ++r)
    UNROLL for (int p = 0; p < TILE_N; ++p) y[r][p] = splat(offset[r * rows.planes * rows.blocks]);
  for (int64_t s = start; s < std::min(rows.spans, start + BLOCK_SPANS); ++s) {
    __m512i acc[TILE_M][TILE_N];
    UNROLL for (int r = 0; r < TILE_M; ++r) UNROLL for (int p = 0; p < TILE_N; ++p) acc[r][p] = _mm512_setzero_si512();
    for (int64_t k = 0; k < rows.span; k += 4, x += 4, w += 4 * PACK_WIDTH) {
      __m512i codes[TILE_N];
      UNROLL for (int p = 0; p < TILE_N; ++p) codes[p] = _mm512_loadu_si512(w + p * 64);
      UNROLL for (int r = 0; r < TILE_M; ++r) {
        const __m512i inputs = _mm512_set1_epi32(load<int32_t>(x + r * stride));
        UNROLL for (int p = 0; p < TILE_N; ++p)  // asm: GCC also spills around the intrinsic
            asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][p]) : "v"(codes[p]), "v"(inputs));
      }
    }
    UNROLL for (int r = 0; r < TILE_M; ++r) {
      const f32v factor = splat(scale[r * rows.planes * rows.spans + s]);
      UNROLL for (int p = 0; p < TILE_N; ++p) y[r][p] += (f32v)_mm512_cvtepi32_ps(acc[r][p]) * factor;
    }
  }
  UNROLL for (int p = 0; p < TILE_N; ++p) {
    const f32v factor = load<f32v>(panel.scale.data() + block * PACK_WIDTH + (part + p) * LANES);
    UNROLL for (int r = 0; r < TILE_M; ++r) {
      float* to = out + r * PACK_WIDTH + (part + p) * LANES;
      store(load<f32v>(to) + y[r][p] * factor, to);
    }
  }
}

// Store as bfloat16, rounding to nearest even.
inline void store_bf16(f32v x, BFloat16* to) {
  const u32v bits = (u32v)x;
  const i16_half upper = __builtin_convertvector((i32v)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16), i16_half);
  std::memcpy(to, &upper, sizeof(upper));
}

// Rows [start, start + STRIP_M) times a panel, + bias [64] or null -> out [M, N].
void multiply_strip(const QuantizedRows& rows, Panel& panel, int64_t start, int64_t N, BFloat16* out,
                    const BFloat16* bias) {
  const int64_t end = std::min(rows.M, start + STRIP_M);
  std::fill(panel.out.begin(), panel.out.end(), 0.0f);
  for (int64_t block = 0; block < rows.blocks; ++block)
    for (int64_t part = 0; part < PANEL_VECTORS; part += TILE_N)
      for (int64_t row = start; row < end; row += TILE_M)
        for (int64_t plane = 0; plane < rows.planes; ++plane)
          multiply_tile(rows, panel, row, plane, block, part, panel.out.data() + (row - start) * PACK_WIDTH);
  float panel_bias[PACK_WIDTH] = {};
  if (bias != nullptr) std::copy(bias, bias + PACK_WIDTH, panel_bias);
  for (int64_t m = start; m < end; ++m)
    for (int64_t n = 0; n < PACK_WIDTH; n += LANES)
      store_bf16(load<f32v>(panel.out.data() + (m - start) * PACK_WIDTH + n) + load<f32v>(panel_bias + n),
                 out + m * N + n);
}

// x bfloat16 [M, K] times a matrix, + bias [N] -> [M, N]. uint8 [N, K / 2] in torch's int4 packing with scales and
// zeros [G, N, 2], or int8 [N, K] with scales [N].
Tensor quantized_gemm(const Tensor& x, const Tensor& weight, const Tensor& scales_zeros,
                      const std::optional<Tensor>& bias) {
  const bool is_int4 = weight.scalar_type() == at::kByte;
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && scales_zeros.dim() == (is_int4 ? 3 : 1) &&
                  scales_zeros.size(0) > 0 && is_dense(x, at::kBFloat16, x.sizes()) &&
                  is_dense(weight, is_int4 ? at::kByte : at::kChar, weight.sizes()),
              "zsmerge::quantized_gemm takes contiguous rows of bfloat16 and a matrix of int4 or int8");
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1), G = scales_zeros.size(0);
  TORCH_CHECK(M > 0 && N > 0 && K > 0 && (is_int4 ? 2 : 1) * weight.size(1) == K && N % PACK_WIDTH == 0 &&
                  K % (is_int4 ? 4 * G : 4) == 0 &&
                  (is_int4 ? is_dense(scales_zeros, at::kBFloat16, {G, N, 2})
                           : is_dense(scales_zeros, at::kBFloat16, {N})) &&
                  (!bias || is_dense(*bias, at::kBFloat16, {N})),
              "zsmerge::quantized_gemm: these shapes do not match");
  const int64_t group = is_int4 ? K / scales_zeros.size(0) : 4;
  const QuantizedRows rows = quantize_rows(x, choose_span(K, group));
  Tensor out = at::empty({M, N}, x.options());
  auto* to = out.data_ptr<BFloat16>();
  const auto* scales = scales_zeros.const_data_ptr<BFloat16>();
  const auto* bias_data = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  const int64_t blocks = N / PACK_WIDTH, strips = (M + STRIP_M - 1) / STRIP_M;
  const int64_t splits = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, (strips + 3) / 4);
  dynamic_for(blocks * splits, [&](const auto& next) {
    Panel panel(rows);
    int64_t unpacked = -1;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t first = item / splits * PACK_WIDTH, split = item % splits;
      if (first != unpacked) {
        unpacked = first;
        if (is_int4)
          unpack_panel(weight.const_data_ptr<uint8_t>() + first * K / 2, scales + first * 2, N, group, rows, panel);
        else
          unpack_panel(weight.const_data_ptr<int8_t>() + first * K, scales + first, rows, panel);
      }
      for (int64_t strip = strips * split / splits; strip < strips * (split + 1) / splits; ++strip)
        multiply_strip(rows, panel, strip * STRIP_M, N, to + first, bias_data == nullptr ? nullptr : bias_data + first);
    }
  });
  return out;
}

#else

Tensor quantized_gemm(const Tensor& x, const Tensor&, const Tensor&, const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::quantized_gemm works where zsmerge::has_int8_products() is true");
  return x;
}

#endif

bool has_int8_products() { return HAS_INT8_GEMM; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("has_int8_products() -> bool", &has_int8_products);
  library.def("quantized_gemm(Tensor x, Tensor weight, Tensor scales_zeros, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) { library.impl("quantized_gemm", &quantized_gemm); }
