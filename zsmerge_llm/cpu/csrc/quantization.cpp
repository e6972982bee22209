// Integer codes of inputs and weights. Inputs are quantized symmetrically, one scale per group. Needs simd.cpp.

// Round to nearest even; |x| < 2^22.
inline i32v round_to_int(f32v x) { return (i32v)(x + 12582912.0f) - 0x4b400000; }

// Two int32 vectors in the order of `widen<T>` -> 2 * LANES codes in memory order.
template <typename T>
inline void narrow(i32v a, i32v b, int16_t* to) {
  const i16_half pair[2] = {__builtin_convertvector(a, i16_half), __builtin_convertvector(b, i16_half)};
  std::memcpy(to, pair, sizeof(pair));
}
template <>
inline void narrow<BFloat16>(i32v a, i32v b, int16_t* to) {
  const u32v merged = ((u32v)a & 0xffffu) | ((u32v)b << 16);
  std::memcpy(to, &merged, sizeof(merged));
}

template <typename T>
inline void narrow(i32v a, i32v b, int8_t* to) {
  int16_t wide[PAIR];
  narrow<T>(a, b, wide);
  const i8_half narrowed = __builtin_convertvector(load<i16v>(wide), i8_half);
  std::memcpy(to, &narrowed, sizeof(narrowed));
}

// Quantize x [size] to codes [size]; returns the scale: x ≈ scale * code.
template <typename T, typename C>
float quantize_group(const T* x, int64_t size, C* codes) {
  constexpr float MAX_CODE = std::numeric_limits<C>::max();
  f32v max = {};
  int64_t k = 0;
  for (; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    for (const f32v v : {pair.a, -pair.a, pair.b, -pair.b}) max = v > max ? v : max;
  }
  float absmax = std::max(1e-30f, hmax(max));
  for (int64_t tail = k; tail < size; ++tail) absmax = std::max(absmax, std::abs(static_cast<float>(x[tail])));
  const float factor = MAX_CODE / absmax;
  for (k = 0; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    narrow<T>(round_to_int(pair.a * factor), round_to_int(pair.b * factor), codes + k);
  }
  for (; k < size; ++k) codes[k] = static_cast<C>(std::nearbyint(static_cast<float>(x[k]) * factor));
  return absmax / MAX_CODE;
}

// Sum of the dequantized codes. Unsigned weight codes carry an offset; this sum times the offset corrects a dot product
// for it, including the rounding error of the inputs.
template <typename C>
float dequantized_sum(const C* codes, int64_t size, float scale) {
  return scale * static_cast<float>(std::accumulate(codes, codes + size, 0));
}

#if HAS_VNNI
// Byte shuffle of torch's int4 packing, where a byte holds outputs n and n + 32 of one input: gathers STEP inputs of
// each of 16 outputs (0 to 15, or 16 to 31 if upper) into one 32-bit lane.
template <int STEP>
inline __m512i int4_shuffle(int upper) {
  alignas(64) uint8_t index[64];
  for (int i = 0; i < 64; ++i) index[i] = i / 4 + upper * LANES + i % 4 * STEP / 4 * 32;
  return _mm512_load_si512(index);
}
#endif
