// Inputs as integers, a group of them with a scale of its own. Behind vectors.cpp.

inline ints nearest(floats x) { return (ints)(x + 12582912.0f) - 0x4b400000; }

// Two vectors of `widen` as int16, in the order they came in.
template <typename T>
inline void narrow(ints a, ints b, int16_t* to) {
  const shorts pair[2] = {__builtin_convertvector(a, shorts), __builtin_convertvector(b, shorts)};
  std::memcpy(to, pair, sizeof(pair));
}
template <>
inline void narrow<BFloat16>(ints a, ints b, int16_t* to) {
  const words both = ((words)a & 0xffffu) | ((words)b << 16);
  std::memcpy(to, &both, sizeof(both));
}

template <typename T>
inline void narrow(ints a, ints b, int8_t* to) {
  int16_t wide[PAIR];
  narrow<T>(a, b, wide);
  const bytes32 all_of = __builtin_convertvector(load<shorts32>(wide), bytes32);
  std::memcpy(to, &all_of, sizeof(all_of));
}

// The scale of a group: inputs are about their codes times it.
template <typename T, typename C>
float round_group(const T* x, int64_t size, C* codes) {
  constexpr float TOP = std::numeric_limits<C>::max();
  floats most = {};
  int64_t k = 0;
  for (; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    for (const floats v : {pair.a, -pair.a, pair.b, -pair.b}) most = v > most ? v : most;
  }
  float largest = std::max(1e-30f, highest(most));
  for (int64_t rest = k; rest < size; ++rest) largest = std::max(largest, std::abs(static_cast<float>(x[rest])));
  const float factor = TOP / largest;
  for (k = 0; k + PAIR <= size; k += PAIR) {
    const Pair pair = widen(x + k);
    narrow<T>(nearest(pair.a * factor), nearest(pair.b * factor), codes + k);
  }
  for (; k < size; ++k) codes[k] = static_cast<C>(std::nearbyint(static_cast<float>(x[k]) * factor));
  return largest / TOP;
}

// Of what the codes stand for: beside codes of weights from 0 to 15, what rounding adds would else count for the mean of
// these too.
template <typename C>
float sum_of(const C* codes, int64_t size, float scale) {
  return scale * static_cast<float>(std::accumulate(codes, codes + size, 0));
}
