// Attention of decode steps over cache slots. Needs gemv.cpp.

struct Slots {  // of one layer: keys [B, H, P, D], values [B, H, P, E], the others [B, H, P]
  Tensor keys, values, multiplicity, score, cumulative_attention, position;
};

struct AttentionParams {
  double scaling, alpha, softcap;  // softcap 0: none
  int64_t window;                  // sliding window in tokens; 0: none
};

// Append new tokens to each row's slots. Rows that are not active get empty slots, of multiplicity 0.
template <typename T>
void append_tokens(const Slots& slots, const Tensor& key, const Tensor& value, const int32_t* token_position,
                   at::IntArrayRef num_filled, const int64_t* active) {
  const int64_t B = key.size(0), H = key.size(1), num_tokens = key.size(2), P = slots.keys.size(2);
  const int64_t D = key.size(3), E = value.size(3);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int64_t at = (b * H + h) * P + num_filled[b] + t;
        std::memcpy(slots.keys.data_ptr<T>() + at * D,
                    key.const_data_ptr<T>() + b * key.stride(0) + h * key.stride(1) + t * key.stride(2), D * sizeof(T));
        std::memcpy(slots.values.data_ptr<T>() + at * E,
                    value.const_data_ptr<T>() + b * value.stride(0) + h * value.stride(1) + t * value.stride(2),
                    E * sizeof(T));
        slots.multiplicity.data_ptr<float>()[at] = active[b] ? 1 : 0;
        slots.score.data_ptr<float>()[at] = 0;
        slots.cumulative_attention.data_ptr<float>()[at] = 0;
        slots.position.data_ptr<int32_t>()[at] = token_position[b * num_tokens + t];
      }
}

// Additive bias of `size` slots for one query: alpha * log(multiplicity) (ZSMerge, Eq. 8), or MASKED.
void slot_bias(const float* multiplicity, const int32_t* slot_position, int32_t query_position, int64_t size,
               int64_t visible, const AttentionParams& params, float* out) {
  for (int64_t c = 0; c < size; ++c) {
    const bool masked = c >= visible || multiplicity[c] == 0 ||
                        (params.window > 0 && query_position - slot_position[c] >= params.window);
    const float count = multiplicity[c];
    out[c] = masked ? MASKED : count == 1 ? 0.0f : static_cast<float>(params.alpha * std::log(count));
  }
  for (int64_t c = size; c < (size + LANES - 1) / LANES * LANES; ++c) out[c] = MASKED;
}

// P pairs of columns of values [size, E], weighted by weights [Q, SLOT_BLOCK] -> interleaved float32 out [Q, stride].
template <typename T, int Q, int P>
inline void weighted_sum(const T* values, const float* weights, int64_t size, int64_t E, int64_t stride, float* out) {
  f32v acc[Q][P][2] = {};
  for (int64_t c = 0; c < size; ++c)
    UNROLL for (int i = 0; i < P; ++i) {
      const Pair value = widen(values + c * E + i * PAIR);
      UNROLL for (int q = 0; q < Q; ++q) {
        acc[q][i][0] += value.a * weights[q * SLOT_BLOCK + c];
        acc[q][i][1] += value.b * weights[q * SLOT_BLOCK + c];
      }
    }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) {
      store(acc[q][i][0], out + q * stride + i * PAIR);
      store(acc[q][i][1], out + q * stride + i * PAIR + LANES);
    }
}

// One block of a softmax, in place: dot products [size] -> exp(logit - max) with logit = scaling * dot, capped, + bias.
// Returns the maximum and the sum.
inline std::pair<float, float> softmax_inplace(float* logits, const float* bias, int64_t size, float scaling,
                                               float cap) {
  const int64_t padded = (size + LANES - 1) / LANES * LANES;
  f32v lane_max = splat(MASKED), total = {};
  for (int64_t c = 0; c < padded; c += LANES) {
    f32v logit = load<f32v>(logits + c) * scaling;
    logit = (cap > 0 ? softcapped(logit, cap) : logit) + load<f32v>(bias + c);
    store(logit, logits + c);
    lane_max = logit > lane_max ? logit : lane_max;
  }
  const float max = hmax(lane_max);
  for (int64_t c = 0; c < padded; c += LANES) {
    const f32v weight = exp_nonpositive(load<f32v>(logits + c) - max);
    total += weight;
    store(weight, logits + c);
  }
  return {max, hsum(total)};
}

// Flash-decoding partial of Q queries over one block of slots. queries: interleaved float32 [Q, D]; biases [Q] point at
// [SLOT_BLOCK] each; results [Q, E + 2]: maximum logit, sum of exp(logit - max), weighted values (interleaved).
template <typename T, int Q>
void attend_block(const float* queries, const T* keys, const T* values, const float* const* biases, int64_t size,
                  int64_t D, int64_t E, float scaling, float cap, float* results) {
  constexpr int R = WIDE ? 4 : 4 / Q;
  alignas(64) float logits[Q * SLOT_BLOCK] = {};
  float dots[R * Q];
  int64_t c = 0;
  for (; c + R <= size; c += R) {
    for (int64_t e = 0; e < R * E; e += PAIR) __builtin_prefetch(values + c * E + e);  // read after the keys
    dot<T, Q, R>(keys + c * D, queries, D, dots);
    UNROLL for (int q = 0; q < Q; ++q)
      UNROLL for (int r = 0; r < R; ++r) logits[q * SLOT_BLOCK + c + r] = dots[r * Q + q];
  }
  for (; c < size; ++c) {
    dot<T, Q, 1>(keys + c * D, queries, D, dots);
    for (int q = 0; q < Q; ++q) logits[q * SLOT_BLOCK + c] = dots[q];
  }
  const int64_t stride = E + 2;
  for (int q = 0; q < Q; ++q)
    std::tie(results[q * stride], results[q * stride + 1]) =
        softmax_inplace(logits + q * SLOT_BLOCK, biases[q], size, scaling, cap);
  int64_t e = 0;
  if constexpr (WIDE || Q <= 2)  // as many accumulators as there are registers for
    for (; e + 2 * PAIR <= E; e += 2 * PAIR)
      weighted_sum<T, Q, 2>(values + e, logits, size, E, stride, results + 2 + e);
  for (; e + PAIR <= E; e += PAIR) weighted_sum<T, Q, 1>(values + e, logits, size, E, stride, results + 2 + e);
  for (; e < E; ++e)
    for (int q = 0; q < Q; ++q) {
      float total = 0;
      for (c = 0; c < size; ++c)  // fma: compilers would contract it for some Q only
        total = std::fma(static_cast<float>(values[c * E + e]), logits[q * SLOT_BLOCK + c], total);
      results[q * stride + 2 + e] = total;
    }
}

#if HAS_AVX512_BF16
// As `weighted_sum` with vdpbf16ps: two slots at a time, their rows interleaved element by element. weights are
// bfloat16 [Q, SLOT_BLOCK].
template <int Q, int P>
inline void weighted_sum_bf16(const BFloat16* values, const BFloat16* weights, int64_t size, int64_t E, int64_t stride,
                              float* out) {
  __m512 acc[Q][P][2];
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) acc[q][i][0] = acc[q][i][1] = _mm512_setzero_ps();
  for (int64_t c = 0; c < size; c += 2) {
    const BFloat16 *even = values + c * E, *odd = c + 1 < size ? even + E : even;  // the missing slot has weight 0
    UNROLL for (int i = 0; i < P; ++i) {
      const __m512i a = _mm512_loadu_si512(even + i * PAIR), b = _mm512_loadu_si512(odd + i * PAIR);
      const __m512bh lower = (__m512bh)_mm512_unpacklo_epi16(a, b), upper = (__m512bh)_mm512_unpackhi_epi16(a, b);
      UNROLL for (int q = 0; q < Q; ++q) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(load<int32_t>(weights + q * SLOT_BLOCK + c));
        acc[q][i][0] = _mm512_dpbf16_ps(acc[q][i][0], lower, weight);
        acc[q][i][1] = _mm512_dpbf16_ps(acc[q][i][1], upper, weight);
      }
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < P; ++i) {  // into the element order of `widen`
      const f32v a = (f32v)acc[q][i][0], b = (f32v)acc[q][i][1];
      float* to = out + q * stride + i * PAIR;
      store(__builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), to);
      store(__builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31), to + LANES);
    }
}

// As `attend_block` with vdpbf16ps, for bfloat16 queries [Q, D]. E must be a multiple of PAIR.
template <int Q>
void attend_block_bf16(const BFloat16* queries, const BFloat16* keys, const BFloat16* values,
                       const float* const* biases, int64_t size, int64_t D, int64_t E, float scaling, float cap,
                       float* results) {
  constexpr int R = 4;
  alignas(64) float logits[Q * SLOT_BLOCK];
  alignas(64) BFloat16 weights[Q * SLOT_BLOCK];
  for (int64_t c = 0; c < size; c += R) {
    __m512 acc[4][R];
    for (int q = 0; q < 4; ++q)
      for (int r = 0; r < R; ++r) acc[q][r] = _mm512_setzero_ps();
    for (int64_t e = 0; e < R * E; e += PAIR) __builtin_prefetch(values + c * E + e);  // read after the keys
    for (int64_t d = 0; d < D; d += PAIR) {
      const __mmask32 mask = D - d >= PAIR ? ~0u : (1u << (D - d)) - 1;
      __m512bh key[R];
      UNROLL for (int r = 0; r < R; ++r)  // past the end: repeat the last slot; its logits are masked
          key[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys + std::min(c + r, size - 1) * D + d);
      UNROLL for (int q = 0; q < Q; ++q) {
        const __m512bh query = (__m512bh)_mm512_maskz_loadu_epi16(mask, queries + q * D + d);
        UNROLL for (int r = 0; r < R; ++r) acc[q][r] = _mm512_dpbf16_ps(acc[q][r], key[r], query);
      }
    }
    const f32v dots = hsum16((const f32v*)acc);
    std::memcpy(logits + c, &dots, sizeof(f32x4));
    UNROLL for (int q = 1; q < Q; ++q)
        std::memcpy(logits + q * SLOT_BLOCK + c, (const float*)&dots + q * R, sizeof(f32x4));
  }
  const int64_t stride = E + 2, padded = (size + PAIR - 1) / PAIR * PAIR;
  for (int q = 0; q < Q; ++q) {
    float* row = logits + q * SLOT_BLOCK;
    for (int64_t c = (size + R - 1) / R * R; c < padded; ++c) row[c] = 0;
    std::tie(results[q * stride], results[q * stride + 1]) = softmax_inplace(row, biases[q], size, scaling, cap);
    for (int64_t c = (size + LANES - 1) / LANES * LANES; c < padded; ++c) row[c] = 0;
    for (int64_t c = 0; c < padded; c += PAIR) {
      const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_load_ps(row + c + LANES), _mm512_load_ps(row + c));
      std::memcpy(weights + q * SLOT_BLOCK + c, &packed, sizeof(packed));
    }
  }
  int64_t e = 0;
  for (; e + 2 * PAIR <= E; e += 2 * PAIR)
    weighted_sum_bf16<Q, 2>(values + e, weights, size, E, stride, results + 2 + e);
  for (; e < E; e += PAIR) weighted_sum_bf16<Q, 1>(values + e, weights, size, E, stride, results + 2 + e);
}
#endif

// Flash-decoding: partials of all blocks in parallel, then a log-sum-exp reduction over the blocks of each query.
template <typename T>
void attend(const Tensor& query, const Slots& slots, const int32_t* token_position, at::IntArrayRef num_filled,
            const AttentionParams& params, const float* sinks, Tensor& out) {
  const int64_t B = query.size(0), heads = query.size(1), num_tokens = query.size(2), D = query.size(3);
  const int64_t H = slots.keys.size(1), P = slots.keys.size(2), E = slots.values.size(3), G = heads / H;
  const int64_t num_queries = G * num_tokens;
  const int64_t max_slots = *std::max_element(num_filled.begin(), num_filled.end()) + num_tokens;
  const int64_t blocks = (max_slots + SLOT_BLOCK - 1) / SLOT_BLOCK, stride = E + 2;
  constexpr bool has_bf16 = HAS_AVX512_BF16 && std::is_same_v<T, BFloat16>;
  const bool use_bf16 = has_bf16 && E % PAIR == 0;
  std::vector<float> queries_f32(use_bf16 ? 0 : B * heads * num_tokens * D);
  std::vector<float> partials(B * H * blocks * num_queries * stride);
  std::vector<T> queries_bf16(use_bf16 ? B * heads * num_tokens * D : 0);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < num_tokens; ++t) {
        const T* from = query.const_data_ptr<T>() + b * query.stride(0) + h * query.stride(1) + t * query.stride(2);
        const int64_t at = ((b * heads + h) * num_tokens + t) * D;
        if (use_bf16)
          std::memcpy(queries_bf16.data() + at, from, D * sizeof(T));
        else
          interleave(from, D, 1.0f, queries_f32.data() + at);
      }
  const float scaling = static_cast<float>(params.scaling), cap = static_cast<float>(params.softcap);
  at::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> bias(num_tokens * SLOT_BLOCK);
    std::vector<const float*> biases(num_queries);
    for (int64_t q = 0; q < num_queries; ++q) biases[q] = bias.data() + q % num_tokens * SLOT_BLOCK;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, row = item / blocks, b = row / H, start = block * SLOT_BLOCK;
      const int64_t size = std::min(SLOT_BLOCK, num_filled[b] + num_tokens - start), at = row * P + start;
      float* results = partials.data() + item * num_queries * stride;
      if (size <= 0) {
        for (int64_t q = 0; q < num_queries; ++q) results[q * stride] = MASKED;
        continue;
      }
      for (int64_t t = 0; t < num_tokens; ++t)
        slot_bias(slots.multiplicity.const_data_ptr<float>() + at, slots.position.const_data_ptr<int32_t>() + at,
                  token_position[b * num_tokens + t], size, num_filled[b] + t + 1 - start, params,
                  bias.data() + t * SLOT_BLOCK);
      const T *keys = slots.keys.const_data_ptr<T>() + at * D, *values = slots.values.const_data_ptr<T>() + at * E;
      for (int64_t q = 0; q < num_queries;) {
        const int64_t remaining = num_queries - q, offset = (row * num_queries + q) * D;
        const auto run = [&](auto queries_at_once) {
          constexpr int Q = queries_at_once();
#if HAS_AVX512_BF16
          if constexpr (has_bf16)
            if (use_bf16)
              return attend_block_bf16<Q>(queries_bf16.data() + offset, keys, values, biases.data() + q, size, D, E,
                                          scaling, cap, results + q * stride);
#endif
          attend_block<T, Q>(queries_f32.data() + offset, keys, values, biases.data() + q, size, D, E, scaling, cap,
                             results + q * stride);
        };
        switch (remaining) {
          case 1: run(std::integral_constant<int, 1>()); break;
          case 2: run(std::integral_constant<int, 2>()); break;
          case 3: run(std::integral_constant<int, 3>()); break;
          default: run(std::integral_constant<int, 4>());
        }
        q += std::min<int64_t>(remaining, 4);
      }
    }
  });
  T* to = out.data_ptr<T>();
  std::vector<float> mean(E);
  for (int64_t row = 0; row < B * H; ++row)
    for (int64_t q = 0; q < num_queries; ++q, to += E) {
      const float* block_results = partials.data() + (row * blocks * num_queries + q) * stride;
      const float sink = sinks == nullptr ? MASKED : sinks[(row % H) * G + q / num_tokens];
      float max = sink, total = 0;
      for (int64_t block = 0; block < blocks; ++block) max = std::max(max, block_results[block * num_queries * stride]);
      if (sinks != nullptr) total += std::exp(sink - max);
      std::fill(mean.begin(), mean.end(), 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* partial = block_results + block * num_queries * stride;
        const float factor = std::exp(partial[0] - max);
        if (factor == 0) continue;
        total += factor * partial[1];
        for (int64_t e = 0; e < E; ++e) mean[e] += factor * partial[2 + e];
      }
      deinterleave<T>(mean.data(), E);
      for (int64_t e = 0; e < E; ++e) to[e] = static_cast<T>(mean[e] / total);
    }
}

// Check everything that `append_tokens` and `attend` address memory by.
void check_decode(const Tensor& query, const Tensor& key, const Tensor& value, const Slots& slots,
                  const Tensor& token_position, at::IntArrayRef num_filled, const std::optional<Tensor>& sinks) {
  for (const Tensor* each : {&query, &key, &value, &slots.keys, &slots.values})
    TORCH_CHECK(each->dim() == 4 && each->is_cpu() && each->scalar_type() == query.scalar_type() &&
                    each->stride(3) == 1,
                "zsmerge::decode_attention takes rows [B, H, T, D] of one dtype");
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t H = slots.keys.size(1), P = slots.keys.size(2), E = slots.values.size(3);
  TORCH_CHECK(B > 0 && H > 0 && Hq > 0 && T > 0 && D > 0 && E > 0 && Hq % H == 0 && has_shape(key, {B, H, T, D}) &&
                  has_shape(value, {B, H, T, E}),
              "zsmerge::decode_attention: slots of another shape than the layer's");
  TORCH_CHECK(is_dense(slots.keys, query.scalar_type(), {B, H, P, D}) &&
                  is_dense(slots.values, query.scalar_type(), {B, H, P, E}) &&
                  is_dense(slots.multiplicity, at::kFloat, {B, H, P}) && is_dense(slots.score, at::kFloat, {B, H, P}) &&
                  is_dense(slots.cumulative_attention, at::kFloat, {B, H, P}) &&
                  is_dense(slots.position, at::kInt, {B, H, P}),
              "zsmerge::decode_attention writes to contiguous slots of as many rows as there are queries");
  TORCH_CHECK(token_position.scalar_type() == at::kInt && has_shape(token_position, {B, T}) &&
                  static_cast<int64_t>(num_filled.size()) == B && (!sinks || has_shape(*sinks, {Hq})),
              "zsmerge::decode_attention: positions or sinks for other tokens than the layer's");
  for (const int64_t filled : num_filled)
    TORCH_CHECK(filled >= 0 && filled <= P - T, "zsmerge::decode_attention: no room behind slot ", filled);
}

// Append a pass's tokens to the slots after num_filled [B] and attend causally from them to all slots.
// query [B, Hq, T, D], key and value [B, H, T, D]; token_position int32 [B, T]; sinks float [Hq] (attention-sink
// logits); out [B, Hq, T, D].
void decode_attention_out(const Tensor& query, const Tensor& key, const Tensor& value, const Slots& slots,
                          const Tensor& token_position, at::IntArrayRef num_filled, const int64_t* active,
                          const AttentionParams& params, const std::optional<Tensor>& sinks, Tensor& out) {
  check_decode(query, key, value, slots, token_position, num_filled, sinks);
  const Tensor positions = token_position.contiguous();
  const Tensor sink_column = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const float* sink_data = sinks ? sink_column.const_data_ptr<float>() : nullptr;
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    append_tokens<T>(slots, key, value, positions.const_data_ptr<int32_t>(), num_filled, active);
    attend<T>(query, slots, positions.const_data_ptr<int32_t>(), num_filled, params, sink_data, out);
  };
  switch (query.scalar_type()) {
    case at::kBFloat16: run(BFloat16()); break;
    case at::kHalf: run(Half()); break;
    case at::kFloat: run(0.0f); break;
    default:
      TORCH_CHECK(false, "zsmerge::decode_attention knows bfloat16, float16 and float32, not ", query.scalar_type());
  }
}

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, Tensor keys, Tensor values,
                        Tensor multiplicity, Tensor score, Tensor cumulative_attention, Tensor position,
                        const Tensor& token_position, at::IntArrayRef num_filled, at::IntArrayRef active,
                        double scaling, double alpha, double softcap, int64_t window,
                        const std::optional<Tensor>& sinks) {
  TORCH_CHECK(static_cast<int64_t>(active.size()) == query.size(0), "zsmerge::decode_attention: active is for each row");
  Tensor out = at::empty({query.size(0), query.size(1), query.size(2), values.size(3)}, query.options());
  const Slots slots{keys, values, multiplicity, score, cumulative_attention, position};
  decode_attention_out(query, key, value, slots, token_position, num_filled, active.data(),
                       {scaling, alpha, softcap, window}, sinks, out);
  return out;
}

// Write new queries [B, Hq, T, D] and their positions [B, T] (-1: padding) into the ring queries [B, Hq, W, D],
// query_position [B, W], in active rows (null: all). The query of position p has entry p mod W.
void push_active_queries(Tensor queries, Tensor query_position, const Tensor& new_queries, const Tensor& new_position,
                         const int64_t* active) {
  TORCH_CHECK(queries.dim() == 4 && new_queries.dim() == 4 && queries.size(2) > 0 &&
                  is_dense(queries, new_queries.scalar_type(), queries.sizes()) && new_queries.is_cpu() &&
                  has_shape(new_queries, {queries.size(0), queries.size(1), new_queries.size(2), queries.size(3)}) &&
                  new_queries.stride(3) == 1 &&
                  is_dense(query_position, at::kInt, {queries.size(0), queries.size(2)}) &&
                  new_position.scalar_type() == at::kInt &&
                  has_shape(new_position, {queries.size(0), new_queries.size(2)}),
              "zsmerge::push_queries: a query ring of another shape than the layer's");
  const int64_t heads = queries.size(1), W = queries.size(2), T = new_queries.size(2);
  const int64_t row_bytes = queries.size(3) * queries.element_size(), element_bytes = new_queries.element_size();
  const Tensor positions = new_position.contiguous();
  for (int64_t b = 0; b < queries.size(0); ++b) {
    if (active != nullptr && !active[b]) continue;
    for (int64_t t = 0; t < T; ++t) {
      const int32_t position = positions.const_data_ptr<int32_t>()[b * T + t];
      if (position < 0) continue;
      const int64_t entry = position % W;
      query_position.data_ptr<int32_t>()[b * W + entry] = position;
      for (int64_t h = 0; h < heads; ++h)
        std::memcpy(static_cast<char*>(queries.data_ptr()) + ((b * heads + h) * W + entry) * row_bytes,
                    static_cast<const char*>(new_queries.const_data_ptr()) +
                        (b * new_queries.stride(0) + h * new_queries.stride(1) + t * new_queries.stride(2)) *
                            element_bytes,
                    row_bytes);
    }
  }
}

void push_queries(Tensor queries, Tensor query_position, const Tensor& new_queries, const Tensor& new_position) {
  push_active_queries(queries, query_position, new_queries, new_position, nullptr);
}
