// Attention to slots. Behind matrices.cpp.

struct Slots {  // of one layer: [B, H, P, D], and [B, H, P]
  Tensor keys, values, count, score, accumulated, position;
};

struct How {
  double scaling, alpha, softcap;  // softcap 0: none
  int64_t window;                  // 0: none
};

// A row that is not `present` (null: all are) gets an empty slot.
template <typename T>
void write(const Slots& slots, const Tensor& key, const Tensor& value, const int32_t* now, at::IntArrayRef fills,
           const int64_t* present) {
  const int64_t B = key.size(0), H = key.size(1), count = key.size(2), P = slots.keys.size(2);
  const int64_t D = key.size(3), E = value.size(3);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < count; ++t) {
        const int64_t at = (b * H + h) * P + fills[b] + t;
        std::memcpy(slots.keys.data_ptr<T>() + at * D,
                    key.const_data_ptr<T>() + b * key.stride(0) + h * key.stride(1) + t * key.stride(2), D * sizeof(T));
        std::memcpy(slots.values.data_ptr<T>() + at * E,
                    value.const_data_ptr<T>() + b * value.stride(0) + h * value.stride(1) + t * value.stride(2),
                    E * sizeof(T));
        slots.count.data_ptr<float>()[at] = present == nullptr || present[b] ? 1 : 0;
        slots.score.data_ptr<float>()[at] = 0;
        slots.accumulated.data_ptr<float>()[at] = 0;
        slots.position.data_ptr<int32_t>()[at] = now[b * count + t];
      }
}

// What is added to the logits of `size` slots for one query: Eq. 8's alpha log(count), or never.
void bias_of(const float* count, const int32_t* position, int32_t now, int64_t size, int64_t visible, const How& how,
             float* out) {
  for (int64_t c = 0; c < size; ++c) {
    const bool hidden = c >= visible || count[c] == 0 || (how.window > 0 && now - position[c] >= how.window);
    out[c] = hidden ? NEVER : count[c] == 1 ? 0.0f : static_cast<float>(how.alpha * std::log(count[c]));
  }
  for (int64_t c = size; c < (size + LANES - 1) / LANES * LANES; ++c) out[c] = NEVER;
}

// Values [size, E] weighted by weights [Q, BLOCK], P pairs of vectors from column e on -> arranged float [Q, each].
template <typename T, int Q, int P>
inline void mix(const T* values, const float* weights, int64_t size, int64_t E, int64_t each, float* out) {
  floats acc[Q][P][2] = {};
  for (int64_t c = 0; c < size; ++c)
    UNROLL for (int i = 0; i < P; ++i) {
      const Pair value = widen(values + c * E + i * PAIR);
      UNROLL for (int q = 0; q < Q; ++q) {
        acc[q][i][0] += value.a * weights[q * BLOCK + c];
        acc[q][i][1] += value.b * weights[q * BLOCK + c];
      }
    }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) {
      store(acc[q][i][0], out + q * each + i * PAIR);
      store(acc[q][i][1], out + q * each + i * PAIR + LANES);
    }
}

// Products [size], times `scaling`, and their bias -> e^(logit - largest), in place. Returns the largest and the sum.
inline std::pair<float, float> softened(float* logits, const float* bias, int64_t size, float scaling, float cap) {
  const int64_t padded = (size + LANES - 1) / LANES * LANES;
  floats most = all(NEVER), total = {};
  for (int64_t c = 0; c < padded; c += LANES) {
    floats logit = load<floats>(logits + c) * scaling;
    logit = (cap > 0 ? capped(logit, cap) : logit) + load<floats>(bias + c);
    store(logit, logits + c);
    most = logit > most ? logit : most;
  }
  const float largest = highest(most);
  for (int64_t c = 0; c < padded; c += LANES) {
    const floats weight = exponential(load<floats>(logits + c) - largest);
    total += weight;
    store(weight, logits + c);
  }
  return {largest, sum(total)};
}

// Q queries, arranged [Q, D], to `size` slots: for each the largest logit, the sum of e^(logit - largest), and the
// values weighted so, arranged [E]. biases [Q] points at a line of [BLOCK] for each.
template <typename T, int Q>
void attend(const float* queries, const T* keys, const T* values, const float* const* biases, int64_t size, int64_t D,
            int64_t E, float scaling, float cap, float* results) {
  constexpr int R = 4;
  alignas(64) float logits[Q * BLOCK] = {};
  float some[R * Q];
  int64_t c = 0;
  for (; c + R <= size; c += R) {
    for (int64_t e = 0; e < R * E; e += PAIR) __builtin_prefetch(values + c * E + e);  // needed next
    dot<T, Q, R>(keys + c * D, queries, D, some);
    UNROLL for (int q = 0; q < Q; ++q)
      UNROLL for (int r = 0; r < R; ++r) logits[q * BLOCK + c + r] = some[r * Q + q];
  }
  for (; c < size; ++c) {
    dot<T, Q, 1>(keys + c * D, queries, D, some);
    for (int q = 0; q < Q; ++q) logits[q * BLOCK + c] = some[q];
  }
  const int64_t each = E + 2;
  for (int q = 0; q < Q; ++q)
    std::tie(results[q * each], results[q * each + 1]) = softened(logits + q * BLOCK, biases[q], size, scaling, cap);
  int64_t e = 0;
  for (; e + 2 * PAIR <= E; e += 2 * PAIR) mix<T, Q, 2>(values + e, logits, size, E, each, results + 2 + e);
  for (; e + PAIR <= E; e += PAIR) mix<T, Q, 1>(values + e, logits, size, E, each, results + 2 + e);
  for (; e < E; ++e)
    for (int q = 0; q < Q; ++q) {
      float total = 0;
      for (c = 0; c < size; ++c) total += static_cast<float>(values[c * E + e]) * logits[q * BLOCK + c];
      results[q * each + 2 + e] = total;
    }
}

#if BFLOAT16_PRODUCTS
// As `mix`, two slots at a time, whose weights are rounded to bfloat16 and stand beside each other: [Q, BLOCK].
template <int Q, int P>
inline void mix_pairs(const BFloat16* values, const BFloat16* weights, int64_t size, int64_t E, int64_t each, float* out) {
  __m512 acc[Q][P][2];
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) acc[q][i][0] = acc[q][i][1] = _mm512_setzero_ps();
  for (int64_t c = 0; c < size; c += 2) {
    const BFloat16 *one = values + c * E, *other = c + 1 < size ? one + E : one;  // what is not there weighs nothing
    UNROLL for (int i = 0; i < P; ++i) {
      const __m512i a = _mm512_loadu_si512(one + i * PAIR), b = _mm512_loadu_si512(other + i * PAIR);
      const __m512bh lower = (__m512bh)_mm512_unpacklo_epi16(a, b), upper = (__m512bh)_mm512_unpackhi_epi16(a, b);
      UNROLL for (int q = 0; q < Q; ++q) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(load<int32_t>(weights + q * BLOCK + c));
        acc[q][i][0] = _mm512_dpbf16_ps(acc[q][i][0], lower, weight);
        acc[q][i][1] = _mm512_dpbf16_ps(acc[q][i][1], upper, weight);
      }
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) {  // in the order of `widen`
      const floats a = (floats)acc[q][i][0], b = (floats)acc[q][i][1];
      float* to = out + q * each + i * PAIR;
      store(__builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), to);
      store(__builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31), to + LANES);
    }
}

// As `attend`, for queries of bfloat16 as they are, where two products and their sum are one instruction. Needs E to be
// a multiple of PAIR.
template <int Q>
void attend_pairs(const BFloat16* queries, const BFloat16* keys, const BFloat16* values, const float* const* biases,
                  int64_t size, int64_t D, int64_t E, float scaling, float cap, float* results) {
  constexpr int R = 4;
  alignas(64) float logits[Q * BLOCK];
  alignas(64) BFloat16 weights[Q * BLOCK];
  for (int64_t c = 0; c < size; c += R) {
    __m512 acc[4][R];
    for (int q = 0; q < 4; ++q)
      for (int r = 0; r < R; ++r) acc[q][r] = _mm512_setzero_ps();
    for (int64_t e = 0; e < R * E; e += PAIR) __builtin_prefetch(values + c * E + e);  // needed next
    for (int64_t d = 0; d < D; d += PAIR) {
      const __mmask32 there = D - d >= PAIR ? ~0u : (1u << (D - d)) - 1;
      __m512bh key[R];
      UNROLL for (int r = 0; r < R; ++r)  // beyond the last: again the last, which is hidden there
        key[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, keys + std::min(c + r, size - 1) * D + d);
      UNROLL for (int q = 0; q < Q; ++q) {
        const __m512bh query = (__m512bh)_mm512_maskz_loadu_epi16(there, queries + q * D + d);
        UNROLL for (int r = 0; r < R; ++r) acc[q][r] = _mm512_dpbf16_ps(acc[q][r], key[r], query);
      }
    }
    const floats products = sums((const floats*)acc);
    std::memcpy(logits + c, &products, sizeof(floats4));
    UNROLL for (int q = 1; q < Q; ++q)
      std::memcpy(logits + q * BLOCK + c, (const float*)&products + q * R, sizeof(floats4));
  }
  const int64_t each = E + 2, padded = (size + PAIR - 1) / PAIR * PAIR;
  for (int q = 0; q < Q; ++q) {
    float* line = logits + q * BLOCK;
    for (int64_t c = (size + R - 1) / R * R; c < padded; ++c) line[c] = 0;
    std::tie(results[q * each], results[q * each + 1]) = softened(line, biases[q], size, scaling, cap);
    for (int64_t c = (size + LANES - 1) / LANES * LANES; c < padded; ++c) line[c] = 0;
    for (int64_t c = 0; c < padded; c += PAIR) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(line + c + LANES), _mm512_load_ps(line + c));
      std::memcpy(weights + q * BLOCK + c, &both, sizeof(both));
    }
  }
  int64_t e = 0;
  for (; e + 2 * PAIR <= E; e += 2 * PAIR) mix_pairs<Q, 2>(values + e, weights, size, E, each, results + 2 + e);
  for (; e < E; e += PAIR) mix_pairs<Q, 1>(values + e, weights, size, E, each, results + 2 + e);
}
#endif

template <typename T>
void attend_all(const Tensor& query, const Slots& slots, const int32_t* now, at::IntArrayRef fills, const How& how,
                const float* sinks, Tensor& out) {
  const int64_t B = query.size(0), heads = query.size(1), count = query.size(2), D = query.size(3);
  const int64_t H = slots.keys.size(1), P = slots.keys.size(2), E = slots.values.size(3), G = heads / H;
  const int64_t asking = G * count, most = *std::max_element(fills.begin(), fills.end()) + count;
  const int64_t blocks = (most + BLOCK - 1) / BLOCK, each = E + 2;
  constexpr bool packs = BFLOAT16_PRODUCTS && std::is_same_v<T, BFloat16>;
  const bool pairs = packs && E % PAIR == 0;
  std::vector<float> wide(pairs ? 0 : B * heads * count * D), parts(B * H * blocks * asking * each);
  std::vector<T> same(pairs ? B * heads * count * D : 0);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < count; ++t) {
        const T* from = query.const_data_ptr<T>() + b * query.stride(0) + h * query.stride(1) + t * query.stride(2);
        const int64_t at = ((b * heads + h) * count + t) * D;
        if (pairs)
          std::memcpy(same.data() + at, from, D * sizeof(T));
        else
          arrange(from, D, 1.0f, wide.data() + at);
      }
  const float scaling = static_cast<float>(how.scaling), cap = static_cast<float>(how.softcap);
  at::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> bias(count * BLOCK);
    std::vector<const float*> biases(asking);
    for (int64_t q = 0; q < asking; ++q) biases[q] = bias.data() + q % count * BLOCK;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, row = item / blocks, b = row / H, start = block * BLOCK;
      const int64_t size = std::min(BLOCK, fills[b] + count - start), at = row * P + start;
      float* results = parts.data() + item * asking * each;
      if (size <= 0) {
        for (int64_t q = 0; q < asking; ++q) results[q * each] = NEVER;
        continue;
      }
      for (int64_t t = 0; t < count; ++t)
        bias_of(slots.count.const_data_ptr<float>() + at, slots.position.const_data_ptr<int32_t>() + at,
                now[b * count + t], size, fills[b] + t + 1 - start, how, bias.data() + t * BLOCK);
      const T *keys = slots.keys.const_data_ptr<T>() + at * D, *values = slots.values.const_data_ptr<T>() + at * E;
      for (int64_t q = 0; q < asking;) {
        const int64_t left = asking - q, asks = (row * asking + q) * D;
        const auto some = [&](auto number) {
          constexpr int Q = number();
#if BFLOAT16_PRODUCTS
          if constexpr (packs)
            if (pairs)
              return attend_pairs<Q>(same.data() + asks, keys, values, biases.data() + q, size, D, E, scaling, cap,
                                     results + q * each);
#endif
          attend<T, Q>(wide.data() + asks, keys, values, biases.data() + q, size, D, E, scaling, cap, results + q * each);
        };
        switch (left) {
          case 1: some(std::integral_constant<int, 1>()); break;
          case 2: some(std::integral_constant<int, 2>()); break;
          case 3: some(std::integral_constant<int, 3>()); break;
          default: some(std::integral_constant<int, 4>());
        }
        q += std::min<int64_t>(left, 4);
      }
    }
  });
  T* to = out.data_ptr<T>();
  std::vector<float> mixed(E);
  for (int64_t row = 0; row < B * H; ++row)
    for (int64_t q = 0; q < asking; ++q, to += E) {
      const float* first = parts.data() + (row * blocks * asking + q) * each;
      const float sink = sinks == nullptr ? NEVER : sinks[(row % H) * G + q / count];
      float largest = sink, total = 0;
      for (int64_t block = 0; block < blocks; ++block) largest = std::max(largest, first[block * asking * each]);
      if (sinks != nullptr) total += std::exp(sink - largest);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* part = first + block * asking * each;
        const float factor = std::exp(part[0] - largest);
        if (factor == 0) continue;
        total += factor * part[1];
        for (int64_t e = 0; e < E; ++e) mixed[e] += factor * part[2 + e];
      }
      restore<T>(mixed.data(), E);
      for (int64_t e = 0; e < E; ++e) to[e] = static_cast<T>(mixed[e] / total);
    }
}

// The tokens of a pass enter the slots behind each row's `fills`, and look at the slots and at each other, the later at
// the earlier. query [B, Hq, T, D], key and value [B, H, T, D]; now int32 [B, T], their positions; sinks float [Hq].
// out [B, Hq, T, D].
void look_into(const Tensor& query, const Tensor& key, const Tensor& value, const Slots& slots, const Tensor& now,
               at::IntArrayRef fills, const int64_t* present, const How& how, const std::optional<Tensor>& sinks,
               Tensor& out) {
  for (const Tensor& each : {slots.keys, slots.values, slots.count, slots.score, slots.accumulated, slots.position})
    TORCH_CHECK(each.is_contiguous() && each.size(0) == query.size(0) && each.size(2) == slots.keys.size(2),
                "zsmerge::look writes to contiguous slots of as many rows as there are queries");
  for (const int64_t fill : fills)
    TORCH_CHECK(fill >= 0 && fill + key.size(2) <= slots.keys.size(2), "zsmerge::look: no room behind slot ", fill);
  const Tensor when = now.contiguous();
  const Tensor column = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const float* learned = sinks ? column.const_data_ptr<float>() : nullptr;
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    write<T>(slots, key, value, when.const_data_ptr<int32_t>(), fills, present);
    attend_all<T>(query, slots, when.const_data_ptr<int32_t>(), fills, how, learned, out);
  };
  switch (query.scalar_type()) {
    case at::kBFloat16: run(BFloat16()); break;
    case at::kHalf: run(Half()); break;
    case at::kFloat: run(0.0f); break;
    default: TORCH_CHECK(false, "zsmerge::look knows bfloat16, float16 and float32, not ", query.scalar_type());
  }
}

Tensor look(const Tensor& query, const Tensor& key, const Tensor& value, Tensor keys, Tensor values, Tensor count,
            Tensor score, Tensor accumulated, Tensor position, const Tensor& now, at::IntArrayRef fills, double scaling, double alpha,
            double softcap, int64_t window, const std::optional<Tensor>& sinks) {
  Tensor out = at::empty({query.size(0), query.size(1), query.size(2), values.size(3)}, query.options());
  const Slots slots{keys, values, count, score, accumulated, position};
  look_into(query, key, value, slots, now, fills, nullptr, {scaling, alpha, softcap, window}, sinks, out);
  return out;
}

// The newest queries [B, Hq, T, D] and their positions [B, T] push the oldest out of queries [B, Hq, W, D] and asked
// [B, W], in the rows that are `present` (null: all).
void remember_present(Tensor queries, Tensor asked, const Tensor& newest, const Tensor& now, const int64_t* present) {
  const int64_t heads = queries.size(1), W = queries.size(2), count = newest.size(2);
  const int64_t line = queries.size(3) * queries.element_size(), size = newest.element_size();
  const Tensor when = now.contiguous();
  for (int64_t b = 0; b < queries.size(0); ++b) {
    if (present != nullptr && !present[b]) continue;
    for (int64_t h = 0; h < heads; ++h) {
      char* to = static_cast<char*>(queries.data_ptr()) + (b * heads + h) * W * line;
      std::memmove(to, to + count * line, (W - count) * line);
      const char* from =
          static_cast<const char*>(newest.const_data_ptr()) + (b * newest.stride(0) + h * newest.stride(1)) * size;
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(to + (W - count + t) * line, from + t * newest.stride(2) * size, line);
    }
    int32_t* at = asked.data_ptr<int32_t>() + b * W;
    std::memmove(at, at + count, (W - count) * sizeof(int32_t));
    std::memcpy(at + W - count, when.const_data_ptr<int32_t>() + b * count, count * sizeof(int32_t));
  }
}

void remember(Tensor queries, Tensor asked, const Tensor& newest, const Tensor& now) {
  remember_present(queries, asked, newest, now, nullptr);
}
