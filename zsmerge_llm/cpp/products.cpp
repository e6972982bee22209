// Many rows, those of a chunk that is read, times a matrix of 4 bits. Behind vectors.cpp and rounding.cpp.
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

// The rows of one call: codes from 1 to 255 for [-1, 1] times their scale, one for each `span` inputs. Padded to whole
// strips with zeros.
struct Chunk {
  int64_t M, K, groups, group, span, pairs;  // pairs: of groups
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

Chunk rounded(const Tensor& x, int64_t groups) {
  const int64_t M = x.size(0), K = x.size(1), group = K / groups, rows = (M + STRIP - 1) / STRIP * STRIP;
  const int64_t each = groups % 4 == 0 ? 4 : groups % 2 == 0 ? 2 : 1, span = group * each, spans = K / span;
  Chunk chunk{M, K, groups, group, span, (groups + 1) / 2, std::vector<uint8_t>(rows * K),
              std::vector<float>(rows * spans), std::vector<BFloat16>(rows * (groups + 1) / 2 * 2)};
  const auto* from = x.const_data_ptr<BFloat16>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t s = 0; s < spans; ++s) {
        uint8_t* codes = chunk.codes.data() + m * K + s * span;
        const float scale = round_group(from + m * K + s * span, span, reinterpret_cast<int8_t*>(codes));
        chunk.scale[m * spans + s] = scale;
        for (int64_t g = 0; g < each; ++g)
          chunk.sums[m * 2 * chunk.pairs + s * each + g] = scale * lift(codes + g * group, group);
      }
  });
  return chunk;
}

// 64 outputs of a packed matrix, as the products take them: codes from -8 to 7.
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

// x bfloat16 [M, K] times a matrix packed by torch, uint8 [N, K / 2] with scales and zeros [G, N, 2], + bias [N] -> [M, N].
Tensor many(const Tensor& x, const Tensor& weight, const Tensor& ranges, const std::optional<Tensor>& bias) {
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1), G = ranges.size(0);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && ranges.scalar_type() == at::kBFloat16 && x.is_contiguous() &&
                  weight.is_contiguous() && ranges.is_contiguous(),
              "zsmerge::many takes contiguous rows and scales of bfloat16");
  TORCH_CHECK(2 * weight.size(1) == K && N % PACKED == 0 && K % (4 * G) == 0, "zsmerge::many: these shapes do not match");
  const Chunk chunk = rounded(x, G);
  Tensor out = at::empty({M, N}, x.options());
  auto* to = out.data_ptr<BFloat16>();
  const auto* more = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  const int64_t blocks = N / PACKED, strips = (M + STRIP - 1) / STRIP;
  const int64_t pieces = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, (strips + 3) / 4);
  at::parallel_for(0, blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    Panel panel(chunk);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / pieces * PACKED, piece = item % pieces;
      if (item == begin || piece == 0)
        unpack(weight.const_data_ptr<uint8_t>() + first * K / 2, ranges.const_data_ptr<BFloat16>() + first * 2, N, chunk,
               panel);
      for (int64_t strip = strips * piece / pieces; strip < strips * (piece + 1) / pieces; ++strip) {
        at::native::cpublas::brgemm(STRIP, PACKED, 2 * chunk.pairs, 2 * chunk.pairs, PACKED, PACKED, false,
                                    chunk.sums.data() + strip * STRIP * 2 * chunk.pairs, panel.zeros.data(),
                                    panel.out.data());
        const int64_t start = strip * STRIP, end = std::min(M, start + STRIP);
        for (int64_t s = 0; s < K / chunk.span; ++s)  // whose codes stay in the nearest cache
          for (int64_t row = start; row < end; row += TALL)
            multiply_tile(chunk, panel, row, s, panel.out.data() + (row - start) * PACKED);
        for (int64_t m = start; m < end; ++m)
          for (int64_t n = 0; n < PACKED; ++n)
            to[m * N + first + n] =
                panel.out[(m - start) * PACKED + n] + (more == nullptr ? 0.0f : static_cast<float>(more[first + n]));
      }
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
