// Attention of prefill chunks in bfloat16: many queries over all slots. Needs simd.cpp.
//
// Matrix products use oneDNN's batch-reduce GEMM as ATen exposes it (AMX, else AVX-512); the online softmax between
// them is float32. No mask is materialised, and fully masked blocks are skipped.

constexpr int64_t BLOCK_Q = 64;         // queries per block
constexpr int64_t BLOCK_KV = 256;       // slots per block
constexpr int64_t WIDTH_MULTIPLE = 64;  // block widths are multiples of it: oneDNN compiles a kernel for each new width

#if HAS_AVX512_BF16

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Arguments of one call, shared by its blocks. Slots are padded from C to C_padded, whole blocks.
struct PrefillArgs {
  const BFloat16* query;
  at::IntArrayRef query_strides;
  at::IntArrayRef num_past;
  int64_t T, Hq, group_size, C, C_padded, D, E, window;
  float scaling, cap;
  const float *bias, *sinks;                      // [B, H, C_padded] and [Hq], or null
  const int32_t *query_position, *slot_position;  // [B, T] and [B, C_padded], or null without a window
  BFloat16 *keys, *values;  // [B, H, C_padded / BLOCK_KV, D / 2, BLOCK_KV, 2], [B, H, C_padded / 2, E, 2]
};

// VNNI layout: pairs along the reduction dimension are adjacent. Padding is 0.
void pack_keys(const PrefillArgs& args, const Tensor& keys, int64_t item) {
  const int64_t blocks = args.C_padded / BLOCK_KV, row = item / blocks, start = item % blocks * BLOCK_KV;
  const int64_t H = args.Hq / args.group_size, b = row / H, h = row % H, size = std::min(BLOCK_KV, args.C - start);
  const auto* key = keys.const_data_ptr<BFloat16>() + b * keys.stride(0) + h * keys.stride(1) + start * keys.stride(2);
  auto* to = reinterpret_cast<uint32_t*>(args.keys + (row * args.C_padded + start) * args.D);
  for (int64_t c = 0; c < size; ++c) {
    const BFloat16* from = key + c * keys.stride(2);
    for (int64_t d = 0; d < args.D / 2; ++d) std::memcpy(to + d * BLOCK_KV + c, from + 2 * d, sizeof(uint32_t));
  }
  for (int64_t d = 0; d < args.D / 2; ++d) std::fill(to + d * BLOCK_KV + size, to + (d + 1) * BLOCK_KV, 0);
}

void pack_values(const PrefillArgs& args, const Tensor& values, int64_t item) {
  const int64_t blocks = args.C_padded / BLOCK_KV, row = item / blocks, start = item % blocks * BLOCK_KV;
  const int64_t H = args.Hq / args.group_size, b = row / H, h = row % H, size = std::min(BLOCK_KV, args.C - start);
  const int64_t step = values.stride(2);
  const auto* value = values.const_data_ptr<BFloat16>() + b * values.stride(0) + h * values.stride(1) + start * step;
  BFloat16* out = args.values + (row * args.C_padded + start) * args.E;
  for (int64_t c = 0; c < BLOCK_KV; c += 2, out += 2 * args.E)
    for (int64_t e = 0; e < args.E; ++e) {
      out[2 * e] = c < size ? value[c * step + e] : BFloat16(0.0f);
      out[2 * e + 1] = c + 1 < size ? value[(c + 1) * step + e] : BFloat16(0.0f);
    }
}

// Online softmax over one block of one query: dot products [size], of which the first `visible` count, -> bfloat16
// weights exp(logit - max). Updates the running max and total; returns the factor that rescales earlier weights.
float online_softmax(float* logits, BFloat16* weights, int64_t size, int64_t visible, const PrefillArgs& args,
                     const float* bias, const int32_t* slot_position, int32_t window_start, float& max, float& total) {
  const i32v lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32v top = splat(max);
  for (int64_t c = 0; c < size; c += LANES) {
    f32v logit = load<f32v>(logits + c) * args.scaling;
    if (args.cap > 0) logit = softcapped(logit, args.cap);
    if (bias != nullptr) logit += load<f32v>(bias + c);
    if (c + LANES > visible) logit = lanes < static_cast<int32_t>(visible - c) ? logit : splat(MASKED);
    if (slot_position != nullptr) logit = load<i32v>(slot_position + c) > window_start ? logit : splat(MASKED);
    store(logit, logits + c);
    top = logit > top ? logit : top;
  }
  const float new_max = hmax(top);
  f32v sums = {};
  for (int64_t c = 0; c < size; c += LANES) {
    const f32v weight = exp_nonpositive(load<f32v>(logits + c) - new_max);
    sums += weight;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + c), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
  }
  const float factor = std::exp(max - new_max);
  max = new_max;
  total = total * factor + hsum(sums);
  return factor;
}

struct Workspace {  // buffers of one thread
  explicit Workspace(const PrefillArgs& args)
      : query(BLOCK_Q * args.D), weights(BLOCK_Q * BLOCK_KV), logits(BLOCK_Q * BLOCK_KV), output(BLOCK_Q * args.E) {}
  std::vector<BFloat16> query, weights;
  std::vector<float> logits, output;
};

void prefill_block(const PrefillArgs& args, int64_t item, Workspace& workspace, BFloat16* out) {
  const int64_t blocks = (args.T + BLOCK_Q - 1) / BLOCK_Q, first = item % blocks * BLOCK_Q, row = item / blocks;
  const int64_t b = row / args.Hq, head = row % args.Hq, h = head / args.group_size, H = args.Hq / args.group_size;
  const int64_t past = args.num_past[b], size = std::min(BLOCK_Q, args.T - first), M = round_up(size, LANES);
  const BFloat16* from =
      args.query + b * args.query_strides[0] + head * args.query_strides[1] + first * args.query_strides[2];
  for (int64_t t = 0; t < M; ++t)
    std::memcpy(workspace.query.data() + t * args.D, from + std::min(t, size - 1) * args.query_strides[2],
                args.D * sizeof(BFloat16));
  std::fill(workspace.output.begin(), workspace.output.end(), 0.0f);
  float max[BLOCK_Q], total[BLOCK_Q];
  std::fill_n(max, BLOCK_Q, args.sinks == nullptr ? MASKED : args.sinks[head]);
  std::fill_n(total, BLOCK_Q, args.sinks == nullptr ? 0.0f : 1.0f);
  const int64_t end = std::min(past + first + size, args.C);
  for (int64_t start = 0; start < end; start += BLOCK_KV) {
    const int64_t width = round_up(std::min(BLOCK_KV, end - start), WIDTH_MULTIPLE),
                  at = (b * H + h) * args.C_padded + start;
    at::native::cpublas::brgemm(M, width, args.D, args.D, BLOCK_KV, BLOCK_KV, false, workspace.query.data(),
                                args.keys + at * args.D, workspace.logits.data());
    const float* bias = args.bias == nullptr ? nullptr : args.bias + at;
    const int32_t* slot_position =
        args.slot_position == nullptr ? nullptr : args.slot_position + b * args.C_padded + start;
    for (int64_t t = 0; t < size; ++t) {
      const int32_t window_start =
          slot_position == nullptr ? 0 : args.query_position[b * args.T + first + t] - (int32_t)args.window;
      const float factor =
          online_softmax(workspace.logits.data() + t * BLOCK_KV, workspace.weights.data() + t * BLOCK_KV, width,
                         std::max<int64_t>(past + first + t + 1 - start, 0), args, bias, slot_position, window_start,
                         max[t], total[t]);
      if (factor != 1)
        for (int64_t e = 0; e < args.E; ++e) workspace.output[t * args.E + e] *= factor;
    }
    at::native::cpublas::brgemm(M, args.E, width, BLOCK_KV, args.E, args.E, true, workspace.weights.data(),
                                args.values + at * args.E, workspace.output.data());
  }
  for (int64_t t = 0; t < size; ++t) {
    BFloat16* to = out + ((b * args.T + first + t) * args.Hq + head) * args.E;
    for (int64_t e = 0; e < args.E; ++e) to[e] = static_cast<BFloat16>(workspace.output[t * args.E + e] / total[t]);
  }
}

// Attention mass of up to BLOCK_Q queries of one KV head over its slots, after pack_keys. out [2, C_padded]: the sum
// over the queries, each times `weight`, and the maximum over the queries.
void mass_block(const PrefillArgs& args, int64_t row, const std::vector<const BFloat16*>& queries,
                const std::vector<int32_t>& query_position, const std::vector<float>& sinks, float weight,
                const int32_t* slot_position, Workspace& workspace, float* out) {
  const int64_t size = queries.size(), M = round_up(size, LANES);
  for (int64_t q = 0; q < M; ++q)
    std::memcpy(workspace.query.data() + q * args.D, queries[std::min(q, size - 1)], args.D * sizeof(BFloat16));
  std::vector<float>& logits = workspace.logits;
  logits.resize(BLOCK_Q * args.C_padded);
  for (int64_t start = 0; start < args.C_padded; start += BLOCK_KV)
    at::native::cpublas::brgemm(M, BLOCK_KV, args.D, args.D, BLOCK_KV, args.C_padded, false, workspace.query.data(),
                                args.keys + (row * args.C_padded + start) * args.D, logits.data() + start);
  std::fill_n(out, 2 * args.C_padded, 0.0f);
  const float* bias = args.bias + row * args.C_padded;
  for (int64_t q = 0; q < size; ++q) {
    if (query_position[q] < 0) continue;
    float* row_logits = logits.data() + q * args.C_padded;
    f32v top = splat(sinks[q]), sums = {};
    for (int64_t c = 0; c < args.C_padded; c += LANES) {
      f32v logit = load<f32v>(row_logits + c) * args.scaling;
      if (args.cap > 0) logit = softcapped(logit, args.cap);
      logit = load<i32v>(slot_position + c) <= query_position[q] ? logit + load<f32v>(bias + c) : splat(MASKED);
      store(logit, row_logits + c);
      top = logit > top ? logit : top;
    }
    const float new_max = hmax(top);
    for (int64_t c = 0; c < args.C_padded; c += LANES) {
      const f32v unnormalized = exp_nonpositive(load<f32v>(row_logits + c) - new_max);
      sums += unnormalized;
      store(unnormalized, row_logits + c);
    }
    const float total = hsum(sums) + (sinks[q] > MASKED ? std::exp(sinks[q] - new_max) : 0.0f);
    const f32v inverse = splat(1 / total);
    for (int64_t c = 0; c < args.C_padded; c += LANES) {
      const f32v mass = load<f32v>(row_logits + c) * inverse, max_mass = load<f32v>(out + args.C_padded + c);
      store(load<f32v>(out + c) + mass * weight, out + c);
      store(mass > max_mass ? mass : max_mass, out + args.C_padded + c);
    }
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Pad the last dimension [..., C] -> [..., C_padded].
Tensor pad_slots(const Tensor& slots, at::ScalarType type, int64_t C_padded, double fill) {
  return at::constant_pad_nd(slots.to(type), {0, C_padded - slots.size(-1)}, fill).contiguous();
}

// query [B, Hq, T, D] over keys [B, H, C, D] and values [B, H, C, E] -> [B, Hq, T, E], stored as [B, T, Hq, E].
// Query t of row b sees the first num_past[b] + t + 1 slots; bias float [B, H, C] is added to its logits. With a window
// it sees only slots whose slot_position [B, C] is less than `window` behind its query_position [B, T]. sinks float
// [Hq].
Tensor prefill_attention(const Tensor& query, const Tensor& keys, const Tensor& values, at::IntArrayRef num_past,
                         double scaling, double softcap, int64_t window, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& query_position, const std::optional<Tensor>& slot_position,
                         const std::optional<Tensor>& sinks) {
  for (const Tensor& each : {query, keys, values})
    TORCH_CHECK(each.dim() == 4 && each.is_cpu() && each.scalar_type() == at::kBFloat16 && each.stride(3) == 1,
                "zsmerge::prefill_attention takes rows of bfloat16");
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t H = keys.size(1), C = keys.size(2), E = values.size(3), C_padded = round_up(C, BLOCK_KV);
  TORCH_CHECK(B > 0 && H > 0 && Hq > 0 && T > 0 && D > 0 && E > 0 && D % 2 == 0 && Hq % H == 0 &&
                  has_shape(keys, {B, H, C, D}) && has_shape(values, {B, H, C, E}) &&
                  static_cast<int64_t>(num_past.size()) == B && (!bias || has_shape(*bias, {B, H, C})) &&
                  (!sinks || has_shape(*sinks, {Hq})),
              "zsmerge::prefill_attention: these shapes do not match");
  TORCH_CHECK(window <= 0 || (query_position && slot_position && has_shape(*query_position, {B, T}) &&
                              has_shape(*slot_position, {B, C})),
              "zsmerge::prefill_attention: a sliding window needs the positions of all queries and slots");
  for (const int64_t past : num_past)
    TORCH_CHECK(past >= 0 && past <= C - T, "zsmerge::prefill_attention: the queries' own keys are not in slots ", past,
                " to ", past + T);
  const Tensor padded_bias = bias ? pad_slots(*bias, at::kFloat, C_padded, MASKED) : Tensor();
  const Tensor slot_positions = window > 0 ? pad_slots(*slot_position, at::kInt, C_padded, 0) : Tensor();
  const Tensor query_positions = window > 0 ? query_position->to(at::kInt).contiguous() : Tensor();
  const Tensor sink_data = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const Tensor packed_keys = at::empty({B, H, C_padded, D}, keys.options());
  const Tensor packed_values = at::empty({B, H, C_padded, E}, values.options());
  const PrefillArgs args{query.const_data_ptr<BFloat16>(), query.strides(), num_past, T, Hq, Hq / H, C, C_padded, D, E,
                         window, static_cast<float>(scaling), static_cast<float>(softcap), data<float>(padded_bias),
                         data<float>(sink_data), data<int32_t>(query_positions), data<int32_t>(slot_positions),
                         packed_keys.data_ptr<BFloat16>(), packed_values.data_ptr<BFloat16>()};
  Tensor out = at::empty({B, T, Hq, E}, query.options());
  at::parallel_for(0, B * H * (C_padded / BLOCK_KV), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) pack_keys(args, keys, item), pack_values(args, values, item);
  });
  BFloat16* to = out.data_ptr<BFloat16>();
  dynamic_for(B * Hq * ((T + BLOCK_Q - 1) / BLOCK_Q), [&](const auto& next) {
    Workspace workspace(args);
    for (int64_t item = next(); item >= 0; item = next()) prefill_block(args, item, workspace, to);
    at::native::cpublas::brgemm_release();
  });
  return out.transpose(1, 2);
}

// Attention mass of queries [B, Hq, m, D] at query_position int32 [B, m] (-1: unused) over slots with keys [B, H, C,
// D], slot_position int32 [B, H, C] and bias float [B, H, C], causally. float [2, B, H, C]: the mean over a KV head's
// queries, and their maximum.
Tensor attention_mass(const Tensor& query, const Tensor& keys, const Tensor& bias, const Tensor& query_position,
                      const Tensor& slot_position, double scaling, double softcap, const std::optional<Tensor>& sinks) {
  for (const Tensor& each : {query, keys})
    TORCH_CHECK(each.dim() == 4 && each.is_cpu() && each.scalar_type() == at::kBFloat16 && each.stride(3) == 1,
                "zsmerge::attention_mass takes rows of bfloat16");
  const int64_t B = query.size(0), Hq = query.size(1), m = query.size(2), D = query.size(3);
  const int64_t H = keys.size(1), C = keys.size(2), C_padded = round_up(C, BLOCK_KV);
  TORCH_CHECK(B > 0 && H > 0 && C > 0 && D > 0 && m > 0 && D % 2 == 0 && Hq > 0 && Hq % H == 0 &&
                  has_shape(keys, {B, H, C, D}) && has_shape(bias, {B, H, C}) && has_shape(slot_position, {B, H, C}) &&
                  has_shape(query_position, {B, m}) && (!sinks || has_shape(*sinks, {Hq})),
              "zsmerge::attention_mass: these shapes do not match");
  const int64_t G = Hq / H, num_queries = G * m;
  const Tensor padded_bias = pad_slots(bias, at::kFloat, C_padded, MASKED);
  const Tensor slot_positions = pad_slots(slot_position, at::kInt, C_padded, 0);
  const Tensor query_positions = query_position.to(at::kInt).contiguous();
  const Tensor sink_data = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const Tensor packed = at::empty({B, H, C_padded, D}, keys.options());
  const int64_t blocks = (num_queries + BLOCK_Q - 1) / BLOCK_Q;
  const Tensor partials = at::empty({B * H, blocks, 2, C_padded}, padded_bias.options());
  const PrefillArgs args{query.const_data_ptr<BFloat16>(), query.strides(), {}, m, Hq, G, C, C_padded, D, 0, 0,
                         static_cast<float>(scaling), static_cast<float>(softcap), data<float>(padded_bias),
                         data<float>(sink_data), data<int32_t>(query_positions), data<int32_t>(slot_positions),
                         packed.data_ptr<BFloat16>(), nullptr};
  at::parallel_for(0, B * H * (C_padded / BLOCK_KV), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) pack_keys(args, keys, item);
  });
  at::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace workspace(args);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, b = row / H, first = item % blocks * BLOCK_Q;
      const int32_t* positions_of_row = args.query_position + b * m;
      const int64_t used = std::count_if(positions_of_row, positions_of_row + m, [](int32_t at) { return at >= 0; });
      const float weight = 1.0f / static_cast<float>(G * std::max<int64_t>(1, used));
      std::vector<const BFloat16*> queries;
      std::vector<int32_t> positions;
      std::vector<float> sink_logits;
      for (int64_t q = first; q < std::min(first + BLOCK_Q, num_queries); ++q) {
        const int64_t head = row % H * G + q / m, t = q % m;
        queries.push_back(args.query + b * args.query_strides[0] + head * args.query_strides[1] +
                          t * args.query_strides[2]);
        positions.push_back(positions_of_row[t]);
        sink_logits.push_back(args.sinks == nullptr ? MASKED : args.sinks[head]);
      }
      mass_block(args, row, queries, positions, sink_logits, weight, args.slot_position + row * C_padded, workspace,
                 partials.data_ptr<float>() + item * 2 * C_padded);
    }
    at::native::cpublas::brgemm_release();
  });
  const Tensor mean = partials.select(2, 0).sum(1), max = partials.select(2, 1).amax(1);
  return at::stack({mean, max}).view({2, B, H, C_padded}).slice(3, 0, C);
}

bool has_bf16_products() { return true; }

#else

Tensor prefill_attention(const Tensor& query, const Tensor&, const Tensor&, at::IntArrayRef, double, double, int64_t,
                         const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                         const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::prefill_attention needs a processor that multiplies bfloat16");
  return query;
}

Tensor attention_mass(const Tensor& query, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
                      const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::attention_mass needs a processor that multiplies bfloat16");
  return query;
}

bool has_bf16_products() { return false; }

#endif

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("has_bf16_products() -> bool", &has_bf16_products);
  library.def(
      "prefill_attention(Tensor query, Tensor keys, Tensor values, int[] num_past, float scaling, float softcap, int "
      "window, Tensor? bias, "
      "Tensor? query_position, Tensor? slot_position, Tensor? sinks) -> Tensor");
  library.def(
      "attention_mass(Tensor query, Tensor keys, Tensor bias, Tensor query_position, Tensor slot_position, float "
      "scaling, float softcap, "
      "Tensor? sinks) -> Tensor");
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("prefill_attention", &prefill_attention);
  library.impl("attention_mass", &attention_mass);
}

}  // namespace
