// Many rows, those of a chunk that is read, times a matrix of 4 or 8 bits. Behind vectors.cpp and rounding.cpp.
//
// Inputs are rounded to 8 bits: four products and their sum are one instruction then, twice as many as in bfloat16.
// Weights of 4 bits become 8 bits with one scale for a block of inputs, 64 outputs at a time: scales for each 32 inputs
// cost more than that rounding does harm. Few rows, a question, are easily misunderstood: what rounding leaves of them is
// multiplied too; most of their time goes into unpacking anyway. Where there is AMX, products of bfloat16 are faster.

#if INT16_PRODUCTS && !defined(__AMX_BF16__)
#define PACKED_PRODUCTS 1
#else
#define PACKED_PRODUCTS 0
#endif

#if PACKED_PRODUCTS

constexpr int64_t TALL = 6, WIDE = 2;  // rows and parts of a panel whose sums stay in registers
constexpr int64_t STRIP = 8 * TALL;    // rows worked on before the next
constexpr int64_t PARTS = PACKED / LANES;
constexpr int64_t WIDEST = 64;         // inputs with one scale, at most
constexpr int64_t SPANS = 8;           // of such inputs, whose weights have one scale and stay in the nearest cache
constexpr int64_t SHORT = 64;          // rows of which nothing is left out, at most

// The rows of one call: codes from -127 to 127 for [-1, 1] times their scale, one for each `span` inputs. A second layer
// holds what the first leaves. There is room for whole strips.
struct Chunk {
  int64_t M, K, span, spans, blocks, layers;
  Tensor memory[2];
  int8_t* codes;        // [M, layers, K]
  float *scale, *less;  // [M, layers, spans], [M, layers, blocks]: what 128 more in each weight comes to, negative
};

// The inputs with one scale: as many as divide all, whole groups of weights.
int64_t widest(int64_t K, int64_t group) {
  int64_t span = std::max(group, std::min(WIDEST, K) / group * group);
  while (K % span != 0) span -= group;
  return span;
}

// What rounding to codes leaves.
void subtract(const BFloat16* x, const int8_t* codes, float scale, int64_t size, BFloat16* rest) {
  for (int64_t k = 0; k < size; ++k) rest[k] = static_cast<float>(x[k]) - static_cast<float>(codes[k]) * scale;
}

Chunk rounded(const Tensor& x, int64_t span) {
  const int64_t M = x.size(0), K = x.size(1), rows = (M + STRIP - 1) / STRIP * STRIP, spans = K / span;
  const int64_t blocks = (spans + SPANS - 1) / SPANS, layers = M <= SHORT ? 2 : 1;
  Tensor bytes_of = at::empty({rows * layers * K}, x.options().dtype(at::kChar));
  Tensor numbers = at::zeros({rows * layers * (spans + blocks)}, x.options().dtype(at::kFloat));
  auto* first = numbers.data_ptr<float>();
  const Chunk chunk{M, K, span, spans, blocks, layers, {bytes_of, numbers},
                    bytes_of.data_ptr<int8_t>(), first, first + rows * layers * spans};
  const auto* inputs = x.const_data_ptr<BFloat16>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    std::vector<BFloat16> rest(K);
    for (int64_t row = begin * layers; row < end * layers; ++row) {
      const bool second = row % layers == 1;
      const BFloat16* from = second ? rest.data() : inputs + row / layers * K;
      int8_t* codes = chunk.codes + row * K;
      float *scale = chunk.scale + row * spans, *less = chunk.less + row * blocks;
      for (int64_t s = 0, k = 0; s < spans; ++s, k += span) {
        scale[s] = round_group(from + k, span, codes + k);
        less[s / SPANS] -= 128 * sum_of(codes + k, span, scale[s]);
        if (layers > 1 && !second) subtract(from + k, codes + k, scale[s], span, rest.data() + k);
      }
    }
  });
  return chunk;
}

// 64 outputs of a matrix, as the products take them: codes from 1 to 255, which are 128 more.
struct Panel {
  explicit Panel(const Chunk& chunk) : codes(chunk.K * PACKED), scale(chunk.blocks * PACKED), out(STRIP * PACKED) {}
  std::vector<uint8_t> codes;  // [K / 4, 64, 4]
  std::vector<float> scale;    // [blocks, 64]
  std::vector<float> out;      // [STRIP, 64]
};

// A weight of 4 bits is (scale * code + zero) / 256 in 8 bits, all of them without a sign: of 16 outputs, each twice.
struct Wider {
  __m512i scale, zero;
};

inline __m512i twice(floats x) {
  const words whole = (words)nearest(x) & 0xffffu;
  return (__m512i)(whole | (whole << 16));
}

inline __m512i widened(__m512i codes, const Wider& by) {
  const __m512i upper = _mm512_set1_epi16(-256);
  const __m512i even = _mm512_mullo_epi16(_mm512_andnot_si512(upper, codes), by.scale);
  const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), by.scale);
  return _mm512_or_si512(_mm512_srli_epi16(_mm512_add_epi16(even, by.zero), 8),
                         _mm512_and_si512(_mm512_add_epi16(odd, by.zero), upper));
}

// What 8 bits are to be times: for inputs of 16 outputs, in groups whose scales and zeros stand N apart.
floats common(const BFloat16* ranges, int64_t N, int64_t groups) {
  floats most = {};
  for (int64_t g = 0; g < groups; ++g) {
    const Pair range = widen(ranges + g * N * 2);
    for (const floats end : {range.b - range.a * 8.0f, range.b + range.a * 7.0f}) {
      const floats size = end < 0.0f ? -end : end;
      most = size > most ? size : most;
    }
  }
  return (most > 1e-30f ? most : all(1e-30f)) / 127.0f;
}

// Of 4 bits as torch packs them, with scales and zeros [G, N, 2], of which this panel's come first.
void unpack(const uint8_t* packed, const BFloat16* ranges, int64_t N, int64_t group, const Chunk& chunk, Panel& panel) {
  alignas(64) uint8_t order[2][64];  // a byte holds the outputs n and n + 32: the bytes of four inputs behind each other
  for (int i = 0; i < 64; ++i)
    for (int upper = 0; upper < 2; ++upper) order[upper][i] = i / 4 + upper * LANES + i % 4 * 32;
  const __m512i low = _mm512_set1_epi8(15);
  auto* to = reinterpret_cast<__m512i*>(panel.codes.data());
  const int64_t groups = chunk.K / group, together = SPANS * chunk.span / group;
  for (int64_t first = 0; first < groups; first += together) {
    const int64_t last = std::min(groups, first + together);
    floats scale[PARTS];
    for (int64_t part = 0; part < PARTS; ++part) {
      scale[part] = common(ranges + first * N * 2 + part * PAIR, N, last - first);
      store(scale[part], panel.scale.data() + first / together * PACKED + part * LANES);
    }
    for (int64_t g = first; g < last; ++g) {
      Wider by[PARTS];
      for (int64_t part = 0; part < PARTS; ++part) {
        const Pair range = widen(ranges + g * N * 2 + part * PAIR);
        const floats factor = 256.0f / scale[part];
        constexpr float MORE = 128.0f * 256.0f + 128.0f;  // 128 steps, and a half to round
        by[part] = {twice(range.a * factor), twice((range.b - range.a * 8.0f) * factor + MORE)};
      }
      for (int64_t k = 0; k < group; k += 4, packed += 2 * PACKED, to += PARTS) {
        const __m512i upper = _mm512_loadu_si512(packed), lower = _mm512_loadu_si512(packed + 64);
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_permutex2var_epi8(upper, _mm512_load_si512(order[half]), lower);
          _mm512_storeu_si512(to + half, widened(_mm512_and_si512(both, low), by[half]));
          const __m512i later = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
          _mm512_storeu_si512(to + 2 + half, widened(later, by[2 + half]));
        }
      }
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
  const __m512i more = _mm512_set1_epi8(-128);
  for (int64_t part = 0; part < PARTS; ++part)
    for (int64_t k = 0; k < chunk.K; k += 64) {
      const int64_t size = std::min<int64_t>(64, chunk.K - k);
      const __mmask64 there = size == 64 ? ~0ull : (1ull << size) - 1;
      words v[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        v[i] = (words)_mm512_xor_si512(more, _mm512_maskz_loadu_epi8(there, lines + (part * LANES + i) * chunk.K + k));
      transpose(v);
      for (int64_t i = 0; i < size / 4; ++i)
        _mm512_storeu_si512(panel.codes.data() + (k + 4 * i) * PACKED + part * 64, (__m512i)v[i]);
    }
  for (int64_t i = 0; i < chunk.blocks * PACKED; ++i) panel.scale[i] = scale[i % PACKED];
}

// Inputs of one block and layer, of rows [row, row + TALL), times some parts of a panel: added to out [TALL, 64]. On its
// own, for inside another function GCC moves the sums out of their registers.
[[gnu::noinline]] void multiply_tile(const Chunk& chunk, const Panel& panel, int64_t row, int64_t layer, int64_t block,
                                     int64_t part, float* out) {
  const int64_t stride = chunk.layers * chunk.K, line = row * chunk.layers + layer, start = block * SPANS;
  const int8_t* x = chunk.codes + line * chunk.K + start * chunk.span;
  const float* scale = chunk.scale + line * chunk.spans;
  const float* less = chunk.less + line * chunk.blocks + block;
  const uint8_t* w = panel.codes.data() + start * chunk.span * PACKED + part * 64;
  floats y[TALL][WIDE];
  UNROLL for (int r = 0; r < TALL; ++r)
    UNROLL for (int p = 0; p < WIDE; ++p) y[r][p] = all(less[r * chunk.layers * chunk.blocks]);
  for (int64_t s = start; s < std::min(chunk.spans, start + SPANS); ++s) {
    __m512i acc[TALL][WIDE];
    UNROLL for (int r = 0; r < TALL; ++r) UNROLL for (int p = 0; p < WIDE; ++p) acc[r][p] = _mm512_setzero_si512();
    for (int64_t k = 0; k < chunk.span; k += 4, x += 4, w += 4 * PACKED) {
      __m512i codes[WIDE];
      UNROLL for (int p = 0; p < WIDE; ++p) codes[p] = _mm512_loadu_si512(w + p * 64);
      UNROLL for (int r = 0; r < TALL; ++r) {
        const __m512i inputs = _mm512_set1_epi32(load<int32_t>(x + r * stride));
        UNROLL for (int p = 0; p < WIDE; ++p)  // so it does with those of the intrinsic
          asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][p]) : "v"(codes[p]), "v"(inputs));
      }
    }
    UNROLL for (int r = 0; r < TALL; ++r) {
      const floats times = all(scale[r * chunk.layers * chunk.spans + s]);
      UNROLL for (int p = 0; p < WIDE; ++p) y[r][p] += (floats)_mm512_cvtepi32_ps(acc[r][p]) * times;
    }
  }
  UNROLL for (int p = 0; p < WIDE; ++p) {
    const floats times = load<floats>(panel.scale.data() + block * PACKED + (part + p) * LANES);
    UNROLL for (int r = 0; r < TALL; ++r) {
      float* to = out + r * PACKED + (part + p) * LANES;
      store(load<floats>(to) + y[r][p] * times, to);
    }
  }
}

// To the nearest bfloat16, of two the even one.
inline void shorten(floats x, BFloat16* to) {
  const words bits = (words)x;
  const shorts upper = __builtin_convertvector((ints)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16), shorts);
  std::memcpy(to, &upper, sizeof(upper));
}

// Rows from `start` on times a panel, + its biases if there are any: into out [M, N].
void multiply_strip(const Chunk& chunk, Panel& panel, int64_t start, int64_t N, BFloat16* out, const BFloat16* bias) {
  const int64_t end = std::min(chunk.M, start + STRIP);
  std::fill(panel.out.begin(), panel.out.end(), 0.0f);
  for (int64_t block = 0; block < chunk.blocks; ++block)
    for (int64_t part = 0; part < PARTS; part += WIDE)
      for (int64_t row = start; row < end; row += TALL)
        for (int64_t layer = 0; layer < chunk.layers; ++layer)
          multiply_tile(chunk, panel, row, layer, block, part, panel.out.data() + (row - start) * PACKED);
  float more[PACKED] = {};
  if (bias != nullptr) std::copy(bias, bias + PACKED, more);
  for (int64_t m = start; m < end; ++m)
    for (int64_t n = 0; n < PACKED; n += LANES)
      shorten(load<floats>(panel.out.data() + (m - start) * PACKED + n) + load<floats>(more + n), out + m * N + n);
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
  const int64_t group = packed ? K / ranges.size(0) : 4;
  const Chunk chunk = rounded(x, widest(K, group));
  Tensor out = at::empty({M, N}, x.options());
  auto* to = out.data_ptr<BFloat16>();
  const auto* scales = ranges.const_data_ptr<BFloat16>();
  const auto* more = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  const int64_t blocks = N / PACKED, strips = (M + STRIP - 1) / STRIP;
  const int64_t pieces = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, (strips + 3) / 4);
  by_turns(blocks * pieces, [&](const auto& next) {
    Panel panel(chunk);
    int64_t held = -1;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t first = item / pieces * PACKED, piece = item % pieces;
      if (first != held) {
        held = first;
        if (packed)
          unpack(weight.const_data_ptr<uint8_t>() + first * K / 2, scales + first * 2, N, group, chunk, panel);
        else
          unpack(weight.const_data_ptr<int8_t>() + first * K, scales + first, chunk, panel);
      }
      for (int64_t strip = strips * piece / pieces; strip < strips * (piece + 1) / pieces; ++strip)
        multiply_strip(chunk, panel, strip * STRIP, N, to + first, more == nullptr ? nullptr : more + first);
    }
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
