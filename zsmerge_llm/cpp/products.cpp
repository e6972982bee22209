// Many rows, those of a chunk that is read, times a matrix of 4 or 8 bits. Behind vectors.cpp and rounding.cpp.
//
// Inputs are rounded to 8 bits, as beside a few rows (matrices.cpp): four products and their sum are one instruction then,
// twice as many as in bfloat16, and nothing is dequantised. Where there is AMX, products of bfloat16 are faster.

#if INT16_PRODUCTS && BFLOAT16_PRODUCTS && !defined(__AMX_BF16__)
#define PACKED_PRODUCTS 1
#else
#define PACKED_PRODUCTS 0
#endif

#if PACKED_PRODUCTS

constexpr int64_t TALL = 5;           // rows whose sums stay in registers
constexpr int64_t STRIP = 8 * TALL;   // rows whose share of the zeros is one product
constexpr int64_t PARTS = PACKED / LANES;
constexpr int64_t WIDEST = 256;       // inputs with one scale, at most

// The rows of one call: codes from 1 to 255 for [-1, 1] times their scale, one for each `span` inputs. Padded to whole
// strips with zeros.
struct Chunk {
  int64_t M, K, groups, group, span, pairs;  // pairs: of groups, where the weights have zeros
  std::vector<uint8_t> codes;                // [M, K]
  std::vector<float> scale;                  // [M, K / span]
  std::vector<BFloat16> sums;                // [M, 2 * pairs]: of a group's inputs
};

// Codes of a group: adds 128 to each and returns what their sum was.
int64_t lift(uint8_t* codes, int64_t size) {
  const __m512i higher = _mm512_set1_epi8(-128);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += 64) {
    const __mmask64 there = size - k >= 64 ? ~0ull : (1ull << (size - k)) - 1;
    const __m512i lifted = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, codes + k), higher);
    _mm512_mask_storeu_epi8(codes + k, there, lifted);
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_mov_epi8(there, lifted), _mm512_setzero_si512()));
  }
  return _mm512_reduce_add_epi64(sums) - 128 * size;
}

// `each`: groups that share a scale. zeros: whether the weights have some.
Chunk rounded(const Tensor& x, int64_t groups, int64_t each, bool zeros) {
  const int64_t M = x.size(0), K = x.size(1), group = K / groups, rows = (M + STRIP - 1) / STRIP * STRIP;
  const int64_t span = group * each, spans = K / span, pairs = zeros ? (groups + 1) / 2 : 0;
  Chunk chunk{M, K, groups, group, span, pairs, std::vector<uint8_t>(rows * K), std::vector<float>(rows * spans),
              std::vector<BFloat16>(rows * pairs * 2)};
  const auto* from = x.const_data_ptr<BFloat16>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t s = 0; s < spans; ++s) {
        uint8_t* codes = chunk.codes.data() + m * K + s * span;
        const float scale = round_group(from + m * K + s * span, span, reinterpret_cast<int8_t*>(codes));
        chunk.scale[m * spans + s] = scale;
        for (int64_t g = 0; g < each; ++g) {
          const int64_t sum = lift(codes + g * group, group);
          if (zeros) chunk.sums[m * 2 * pairs + s * each + g] = scale * sum;
        }
      }
  });
  return chunk;
}

// 64 outputs of a matrix, as the products take them.
struct Panel {
  explicit Panel(const Chunk& chunk)
      : codes(chunk.K * PACKED), less(chunk.groups * PACKED), scale(chunk.groups * PACKED),
        zeros(2 * chunk.pairs * PACKED), out(STRIP * PACKED) {}
  std::vector<int8_t> codes;      // [K / 4, 64, 4]
  std::vector<int32_t> less;      // [groups, 64]: what 128 in place of each input comes to, negative
  std::vector<float> scale;       // [groups, 64]
  std::vector<BFloat16> zeros;    // [pairs, 64, 2]
  std::vector<float> out;         // [STRIP, 64]
};

// Of 4 bits as torch packs them: codes from -8 to 7.
void unpack(const uint8_t* packed, const BFloat16* ranges, int64_t N, const Chunk& chunk, Panel& panel) {
  alignas(64) uint8_t order[2][64];  // a byte holds the outputs n and n + 32: the bytes of four inputs behind each other
  for (int i = 0; i < 64; ++i)
    for (int upper = 0; upper < 2; ++upper) order[upper][i] = i / 4 + upper * LANES + i % 4 * 32;
  const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), ones = _mm512_set1_epi8(1);
  auto* to = reinterpret_cast<__m512i*>(panel.codes.data());
  for (int64_t g = 0; g < chunk.groups; ++g) {
    __m512i sums[PARTS] = {};
    for (int64_t k = 0; k < chunk.group; k += 4, packed += 2 * PACKED, to += PARTS) {
      const __m512i first = _mm512_loadu_si512(packed), second = _mm512_loadu_si512(packed + 64);
      for (int half = 0; half < 2; ++half) {
        const __m512i both = _mm512_permutex2var_epi8(first, _mm512_load_si512(order[half]), second);
        const __m512i w[2] = {_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16(both, 4), low)};
        for (int upper = 0; upper < 2; ++upper) {
          const __m512i code = _mm512_sub_epi8(w[upper], eight);
          _mm512_storeu_si512(to + 2 * upper + half, code);
          sums[2 * upper + half] = _mm512_dpbusd_epi32(sums[2 * upper + half], ones, code);
        }
      }
    }
    for (int64_t part = 0; part < PARTS; ++part) {
      const int64_t n = g * PACKED + part * LANES;
      const Pair range = widen(ranges + (g * N + part * LANES) * 2);
      _mm512_storeu_si512(panel.less.data() + n, _mm512_slli_epi32(_mm512_sub_epi32(__m512i{}, sums[part]), 7));
      store(range.a, panel.scale.data() + n);
      for (int64_t i = 0; i < LANES; ++i) panel.zeros[(g / 2 * PACKED + part * LANES + i) * 2 + g % 2] = range.b[i];
    }
  }
}

// Columns of a block of 16 x 16 words become its rows.
inline void transpose(words* v) {
  UNROLL for (int step = 1; step < LANES; step *= 2) {
    words low, high;
    for (uint32_t i = 0; i < LANES; ++i) {
      low[i] = i & step ? i + LANES - step : i;
      high[i] = i & step ? i + LANES : i + step;
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const __m512i a = (__m512i)v[i], b = (__m512i)v[i + step];
      v[i] = (words)_mm512_permutex2var_epi32(a, (__m512i)low, b);
      v[i + step] = (words)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
  }
}

// Of 8 bits: lines [64, K], each with a scale.
void unpack(const int8_t* lines, const BFloat16* scale, const Chunk& chunk, Panel& panel) {
  for (int64_t part = 0; part < PARTS; ++part)
    for (int64_t k = 0; k < chunk.K; k += 64) {
      const int64_t size = std::min<int64_t>(64, chunk.K - k);
      const __mmask64 there = size == 64 ? ~0ull : (1ull << size) - 1;
      words v[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        v[i] = (words)_mm512_maskz_loadu_epi8(there, lines + (part * LANES + i) * chunk.K + k);
      transpose(v);
      for (int64_t i = 0; i < size / 4; ++i)
        _mm512_storeu_si512(panel.codes.data() + (k + 4 * i) * PACKED + part * 64, (__m512i)v[i]);
    }
  const __m512i ones = _mm512_set1_epi8(1);
  const int8_t* codes = panel.codes.data();
  for (int64_t g = 0; g < chunk.groups; ++g) {
    __m512i sums[PARTS] = {};
    for (int64_t k = 0; k < chunk.group; k += 4)
      UNROLL for (int part = 0; part < PARTS; ++part, codes += 64)
        sums[part] = _mm512_dpbusd_epi32(sums[part], ones, _mm512_loadu_si512(codes));
    for (int64_t part = 0; part < PARTS; ++part)
      _mm512_storeu_si512(panel.less.data() + g * PACKED + part * LANES,
                          _mm512_slli_epi32(_mm512_sub_epi32(__m512i{}, sums[part]), 7));
    for (int64_t n = 0; n < PACKED; ++n) panel.scale[g * PACKED + n] = scale[n];
  }
}

// Inputs of one span, of rows [row, row + TALL), times a panel: added to out [TALL, 64].
void multiply_tile(const Chunk& chunk, const Panel& panel, int64_t row, int64_t s, float* out) {
  const uint8_t* x = chunk.codes.data() + row * chunk.K + s * chunk.span;
  const int8_t* w = panel.codes.data() + s * chunk.span * PACKED;
  const int64_t K = chunk.K, each = chunk.span / chunk.group, steps = chunk.group / 4;
  floats together[TALL][PARTS] = {};
  for (int64_t g = s * each; g < (s + 1) * each; ++g) {
    __m512i acc[TALL][PARTS];
    UNROLL for (int part = 0; part < PARTS; ++part)
      UNROLL for (int r = 0; r < TALL; ++r) acc[r][part] = _mm512_loadu_si512(panel.less.data() + g * PACKED + part * LANES);
    for (int64_t k = 0; k < steps; ++k, x += 4, w += 4 * PACKED) {
      __m512i codes[PARTS];
      UNROLL for (int part = 0; part < PARTS; ++part) codes[part] = _mm512_loadu_si512(w + part * 64);
      UNROLL for (int r = 0; r < TALL; ++r) {
        const __m512i inputs = _mm512_set1_epi32(load<int32_t>(x + r * K));
        UNROLL for (int part = 0; part < PARTS; ++part)  // GCC moves the sums of the intrinsic out of their registers
          asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][part]) : "v"(inputs), "v"(codes[part]));
      }
    }
    UNROLL for (int part = 0; part < PARTS; ++part) {
      const floats scale = load<floats>(panel.scale.data() + g * PACKED + part * LANES);
      UNROLL for (int r = 0; r < TALL; ++r) together[r][part] += (floats)_mm512_cvtepi32_ps(acc[r][part]) * scale;
    }
  }
  UNROLL for (int r = 0; r < TALL; ++r) {
    const float scale = chunk.scale[(row + r) * (K / chunk.span) + s];
    UNROLL for (int part = 0; part < PARTS; ++part) {
      float* to = out + r * PACKED + part * LANES;
      store(load<floats>(to) + together[r][part] * scale, to);
    }
  }
}

// Rows from `start` on times a panel, + its biases if there are any: into out [M, N].
void multiply_strip(const Chunk& chunk, Panel& panel, int64_t start, int64_t N, BFloat16* out, const BFloat16* bias) {
  const int64_t zeros = 2 * chunk.pairs, end = std::min(chunk.M, start + STRIP);
  if (zeros > 0)
    at::native::cpublas::brgemm(STRIP, PACKED, zeros, zeros, PACKED, PACKED, false, chunk.sums.data() + start * zeros,
                                panel.zeros.data(), panel.out.data());
  else
    std::fill(panel.out.begin(), panel.out.end(), 0.0f);
  for (int64_t s = 0; s < chunk.K / chunk.span; ++s)  // whose codes stay in the nearest cache
    for (int64_t row = start; row < end; row += TALL)
      multiply_tile(chunk, panel, row, s, panel.out.data() + (row - start) * PACKED);
  for (int64_t m = start; m < end; ++m)
    for (int64_t n = 0; n < PACKED; ++n)
      out[m * N + n] = panel.out[(m - start) * PACKED + n] + (bias == nullptr ? 0.0f : static_cast<float>(bias[n]));
}

// The inputs with one scale where the weights ask for none: as many as divide all, whole steps of 4.
int64_t widest(int64_t K) {
  int64_t span = std::min(WIDEST, K);
  while (K % span != 0 || span % 4 != 0) --span;
  return span;
}

// x bfloat16 [M, K] times a matrix, + bias [N] -> [M, N]. uint8 [N, K / 2] is packed by torch, with scales and zeros
// [G, N, 2]; int8 [N, K] has scales [N].
Tensor many(const Tensor& x, const Tensor& weight, const Tensor& ranges, const std::optional<Tensor>& bias) {
  const bool packed = weight.scalar_type() == at::kByte;
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && ranges.scalar_type() == at::kBFloat16 && x.is_contiguous() &&
                  weight.is_contiguous() && ranges.is_contiguous(),
              "zsmerge::many takes contiguous rows and scales of bfloat16");
  TORCH_CHECK((packed ? 2 : 1) * weight.size(1) == K && N % PACKED == 0 && K % (packed ? 4 * ranges.size(0) : 4) == 0,
              "zsmerge::many: these shapes do not match");
  const int64_t G = packed ? ranges.size(0) : K / widest(K);
  const Chunk chunk = rounded(x, G, !packed ? 1 : G % 4 == 0 ? 4 : G % 2 == 0 ? 2 : 1, packed);
  Tensor out = at::empty({M, N}, x.options());
  auto* to = out.data_ptr<BFloat16>();
  const auto* scales = ranges.const_data_ptr<BFloat16>();
  const auto* more = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  const int64_t blocks = N / PACKED, strips = (M + STRIP - 1) / STRIP;
  const int64_t pieces = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, (strips + 3) / 4);
  at::parallel_for(0, blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    Panel panel(chunk);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / pieces * PACKED, piece = item % pieces;
      if (item == begin || piece == 0) {
        if (packed)
          unpack(weight.const_data_ptr<uint8_t>() + first * K / 2, scales + first * 2, N, chunk, panel);
        else
          unpack(weight.const_data_ptr<int8_t>() + first * K, scales + first, chunk, panel);
      }
      for (int64_t strip = strips * piece / pieces; strip < strips * (piece + 1) / pieces; ++strip)
        multiply_strip(chunk, panel, strip * STRIP, N, to + first, more == nullptr ? nullptr : more + first);
    }
    at::native::cpublas::brgemm_release();
  });
  return out;
}

#else

Tensor many(const Tensor& x, const Tensor&, const Tensor&, const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::many works where zsmerge::reads_packed() says so");
  return x;
}

#endif

bool reads_packed() { return PACKED_PRODUCTS; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("reads_packed() -> bool", &reads_packed);
  library.def("many(Tensor x, Tensor weight, Tensor ranges, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) { library.impl("many", &many); }
