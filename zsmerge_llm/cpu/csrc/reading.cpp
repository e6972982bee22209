// Attention while a chunk is read: many tokens to all slots, in bfloat16. Behind vectors.cpp.
//
// Products go through oneDNN's blocks as ATen exposes them (AMX where there is any, else AVX-512), the softmax between
// them is ours and in float32. No mask is made, and what no token of a block may see is not computed.

constexpr int64_t TOKENS = 64;    // queries of one block
constexpr int64_t STRIDE = 256;   // slots of one block
constexpr int64_t GRAIN = 64;     // sizes of blocks are multiples of it: each new size is compiled once by oneDNN

#if BFLOAT16_PRODUCTS

int64_t padded_to(int64_t size, int64_t grain) { return (size + grain - 1) / grain * grain; }

// What all blocks of one call share. Slots are padded to `room`, whole strides.
struct Reading {
  const BFloat16* query;
  at::IntArrayRef steps;               // the query's strides
  at::IntArrayRef bases;
  int64_t tokens, heads, group, slots, room, D, E, window;
  float scaling, cap;
  const float *bias, *sinks;           // [B, H, room] and [Hq], or null
  const int32_t *asking, *position;    // [B, T] and [B, room] where there is a window, or null
  BFloat16 *keys, *values;             // [B, H, room / STRIDE, D / 2, STRIDE, 2] and [B, H, room / 2, E, 2]
};

// Pairs of numbers stand together, as the products take them; what is padding is 0.
void pack_keys(const Reading& task, const Tensor& keys, int64_t item) {
  const int64_t strides = task.room / STRIDE, row = item / strides, start = item % strides * STRIDE;
  const int64_t H = task.heads / task.group, b = row / H, h = row % H, size = std::min(STRIDE, task.slots - start);
  const auto* key = keys.const_data_ptr<BFloat16>() + b * keys.stride(0) + h * keys.stride(1) + start * keys.stride(2);
  auto* to = reinterpret_cast<uint32_t*>(task.keys + (row * task.room + start) * task.D);
  for (int64_t c = 0; c < size; ++c) {
    const BFloat16* from = key + c * keys.stride(2);
    for (int64_t d = 0; d < task.D / 2; ++d) std::memcpy(to + d * STRIDE + c, from + 2 * d, sizeof(uint32_t));
  }
  for (int64_t d = 0; d < task.D / 2; ++d) std::fill(to + d * STRIDE + size, to + (d + 1) * STRIDE, 0);
}

void pack_values(const Reading& task, const Tensor& values, int64_t item) {
  const int64_t strides = task.room / STRIDE, row = item / strides, start = item % strides * STRIDE;
  const int64_t H = task.heads / task.group, b = row / H, h = row % H, size = std::min(STRIDE, task.slots - start);
  const int64_t step = values.stride(2);
  const auto* value = values.const_data_ptr<BFloat16>() + b * values.stride(0) + h * values.stride(1) + start * step;
  BFloat16* out = task.values + (row * task.room + start) * task.E;
  for (int64_t c = 0; c < STRIDE; c += 2, out += 2 * task.E)
    for (int64_t e = 0; e < task.E; ++e) {
      out[2 * e] = c < size ? value[c * step + e] : BFloat16(0.0f);
      out[2 * e + 1] = c + 1 < size ? value[(c + 1) * step + e] : BFloat16(0.0f);
    }
}

// One query's logits [size] of a stride, of which it sees `visible` -> weights in bfloat16, with respect to `most`, the
// largest logit so far. Returns by what the former weights have to be multiplied.
float weigh(float* logits, BFloat16* weights, int64_t size, int64_t visible, const Reading& task, const float* bias,
            const int32_t* position, int32_t oldest, float& most, float& total) {
  const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats top = all(most);
  for (int64_t c = 0; c < size; c += LANES) {
    floats logit = load<floats>(logits + c) * task.scaling;
    if (task.cap > 0) logit = capped(logit, task.cap);
    if (bias != nullptr) logit += load<floats>(bias + c);
    if (c + LANES > visible) logit = lanes < static_cast<int32_t>(visible - c) ? logit : all(NEVER);
    if (position != nullptr) logit = load<ints>(position + c) > oldest ? logit : all(NEVER);
    store(logit, logits + c);
    top = logit > top ? logit : top;
  }
  const float largest = highest(top);
  floats sums = {};
  for (int64_t c = 0; c < size; c += LANES) {
    const floats weight = exponential(load<floats>(logits + c) - largest);
    sums += weight;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + c), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
  }
  const float factor = std::exp(most - largest);
  most = largest;
  total = total * factor + sum(sums);
  return factor;
}

struct Desk {  // of one thread
  explicit Desk(const Reading& task)
      : query(TOKENS * task.D), weights(TOKENS * STRIDE), logits(TOKENS * STRIDE), mixed(TOKENS * task.E) {}
  std::vector<BFloat16> query, weights;
  std::vector<float> logits, mixed;
};

void read_block(const Reading& task, int64_t item, Desk& desk, BFloat16* out) {
  const int64_t blocks = (task.tokens + TOKENS - 1) / TOKENS, first = item % blocks * TOKENS, row = item / blocks;
  const int64_t b = row / task.heads, head = row % task.heads, h = head / task.group, H = task.heads / task.group;
  const int64_t base = task.bases[b], size = std::min(TOKENS, task.tokens - first), M = padded_to(size, LANES);
  const BFloat16* from = task.query + b * task.steps[0] + head * task.steps[1] + first * task.steps[2];
  for (int64_t t = 0; t < M; ++t)
    std::memcpy(desk.query.data() + t * task.D, from + std::min(t, size - 1) * task.steps[2], task.D * sizeof(BFloat16));
  std::fill(desk.mixed.begin(), desk.mixed.end(), 0.0f);
  float most[TOKENS], total[TOKENS];
  std::fill_n(most, TOKENS, task.sinks == nullptr ? NEVER : task.sinks[head]);
  std::fill_n(total, TOKENS, task.sinks == nullptr ? 0.0f : 1.0f);
  const int64_t end = std::min(base + first + size, task.slots);
  for (int64_t start = 0; start < end; start += STRIDE) {
    const int64_t width = padded_to(std::min(STRIDE, end - start), GRAIN), at = (b * H + h) * task.room + start;
    at::native::cpublas::brgemm(M, width, task.D, task.D, STRIDE, STRIDE, false, desk.query.data(),
                                task.keys + at * task.D, desk.logits.data());
    const float* bias = task.bias == nullptr ? nullptr : task.bias + at;
    const int32_t* position = task.position == nullptr ? nullptr : task.position + b * task.room + start;
    for (int64_t t = 0; t < size; ++t) {
      const int32_t oldest = position == nullptr ? 0 : task.asking[b * task.tokens + first + t] - (int32_t)task.window;
      const float factor =
          weigh(desk.logits.data() + t * STRIDE, desk.weights.data() + t * STRIDE, width,
                std::max<int64_t>(base + first + t + 1 - start, 0), task, bias, position, oldest, most[t], total[t]);
      if (factor != 1)
        for (int64_t e = 0; e < task.E; ++e) desk.mixed[t * task.E + e] *= factor;
    }
    at::native::cpublas::brgemm(M, task.E, width, STRIDE, task.E, task.E, true, desk.weights.data(),
                                task.values + at * task.E, desk.mixed.data());
  }
  for (int64_t t = 0; t < size; ++t) {
    BFloat16* to = out + ((b * task.tokens + first + t) * task.heads + head) * task.E;
    for (int64_t e = 0; e < task.E; ++e) to[e] = static_cast<BFloat16>(desk.mixed[t * task.E + e] / total[t]);
  }
}

// Behind packed keys: what some queries of one KV head, [TOKENS, D], pay its slots [C]. Into `out`: the sum over the
// queries, each times its share, and the most that any of them pays.
void watch_block(const Reading& task, int64_t row, const std::vector<const BFloat16*>& queries,
                 const std::vector<int32_t>& asking, const std::vector<float>& sinks, float share,
                 const int32_t* position, Desk& desk, float* out) {
  const int64_t size = queries.size(), M = padded_to(size, LANES);
  for (int64_t q = 0; q < M; ++q)
    std::memcpy(desk.query.data() + q * task.D, queries[std::min(q, size - 1)], task.D * sizeof(BFloat16));
  std::vector<float>& logits = desk.logits;
  logits.resize(TOKENS * task.room);
  for (int64_t start = 0; start < task.room; start += STRIDE)
    at::native::cpublas::brgemm(M, STRIDE, task.D, task.D, STRIDE, task.room, false, desk.query.data(),
                                task.keys + (row * task.room + start) * task.D, logits.data() + start);
  std::fill_n(out, 2 * task.room, 0.0f);
  const float* bias = task.bias + row * task.room;
  for (int64_t q = 0; q < size; ++q) {
    if (asking[q] < 0) continue;
    float* line = logits.data() + q * task.room;
    floats top = all(sinks[q]), sums = {};
    for (int64_t c = 0; c < task.room; c += LANES) {
      floats logit = load<floats>(line + c) * task.scaling;
      if (task.cap > 0) logit = capped(logit, task.cap);
      logit = load<ints>(position + c) <= asking[q] ? logit + load<floats>(bias + c) : all(NEVER);
      store(logit, line + c);
      top = logit > top ? logit : top;
    }
    const float largest = highest(top);
    for (int64_t c = 0; c < task.room; c += LANES) {
      const floats weight = exponential(load<floats>(line + c) - largest);
      sums += weight;
      store(weight, line + c);
    }
    const float whole = sum(sums) + (sinks[q] > NEVER ? std::exp(sinks[q] - largest) : 0.0f);
    const floats part = all(1 / whole);
    for (int64_t c = 0; c < task.room; c += LANES) {
      const floats paid = load<floats>(line + c) * part, most = load<floats>(out + task.room + c);
      store(load<floats>(out + c) + paid * share, out + c);
      store(paid > most ? paid : most, out + task.room + c);
    }
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Something of each slot, [..., C] -> [..., room].
Tensor widened(const Tensor& given, at::ScalarType type, int64_t room, double filling) {
  return at::constant_pad_nd(given.to(type), {0, room - given.size(-1)}, filling).contiguous();
}

// query [B, Hq, T, D] to keys [B, H, C, D] and values [B, H, C, E]: out [B, Hq, T, E], standing as [B, T, Hq, E].
// Query t of row b sees the first bases[b] + t + 1 slots; bias float [B, H, C] is added to its logits; with a window it
// sees no slot whose position [B, C] is `window` or more behind its own, asking [B, T]. sinks float [Hq].
Tensor read(const Tensor& query, const Tensor& keys, const Tensor& values, at::IntArrayRef bases, double scaling,
            double softcap, int64_t window, const std::optional<Tensor>& bias, const std::optional<Tensor>& asking,
            const std::optional<Tensor>& position, const std::optional<Tensor>& sinks) {
  const int64_t B = query.size(0), heads = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t H = keys.size(1), C = keys.size(2), E = values.size(3), room = padded_to(C, STRIDE);
  for (const Tensor& each : {query, keys, values})
    TORCH_CHECK(each.scalar_type() == at::kBFloat16 && each.stride(3) == 1, "zsmerge::read takes rows of bfloat16");
  TORCH_CHECK(D % 2 == 0 && heads % H == 0 && static_cast<int64_t>(bases.size()) == B,
              "zsmerge::read: these shapes do not match");
  for (const int64_t base : bases)
    TORCH_CHECK(base >= 0 && base + T <= C, "zsmerge::read: the tokens do not stand in slots ", base, " to ", base + T);
  const Tensor added = bias ? widened(*bias, at::kFloat, room, NEVER) : Tensor();
  const Tensor stands = window > 0 ? widened(*position, at::kInt, room, 0) : Tensor();
  const Tensor asks = window > 0 ? asking->to(at::kInt).contiguous() : Tensor();
  const Tensor learned = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const Tensor packed_keys = at::empty({B, H, room, D}, keys.options());
  const Tensor packed_values = at::empty({B, H, room, E}, values.options());
  const Reading task{query.const_data_ptr<BFloat16>(), query.strides(), bases, T, heads, heads / H, C, room, D, E, window,
                    static_cast<float>(scaling), static_cast<float>(softcap), data<float>(added), data<float>(learned),
                    data<int32_t>(asks), data<int32_t>(stands), packed_keys.data_ptr<BFloat16>(),
                    packed_values.data_ptr<BFloat16>()};
  Tensor out = at::empty({B, T, heads, E}, query.options());
  at::parallel_for(0, B * H * (room / STRIDE), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) pack_keys(task, keys, item), pack_values(task, values, item);
  });
  BFloat16* to = out.data_ptr<BFloat16>();
  by_turns(B * heads * ((T + TOKENS - 1) / TOKENS), [&](const auto& next) {
    Desk desk(task);
    for (int64_t item = next(); item >= 0; item = next()) read_block(task, item, desk, to);
    at::native::cpublas::brgemm_release();
  });
  return out.transpose(1, 2);
}

// What queries [B, Hq, m, D] at asking int32 [B, m] (-1: none) pay slots of keys [B, H, C, D] at position int32
// [B, H, C], none of what came after them; bias float [B, H, C]. float [2, B, H, C]: the mean over the queries of a KV
// head, and the most that any of them pays.
Tensor watch(const Tensor& query, const Tensor& keys, const Tensor& bias, const Tensor& asking, const Tensor& position,
             double scaling, double softcap, const std::optional<Tensor>& sinks) {
  const int64_t B = query.size(0), heads = query.size(1), m = query.size(2), D = query.size(3);
  const int64_t H = keys.size(1), C = keys.size(2), room = padded_to(C, STRIDE), G = heads / H, many = G * m;
  for (const Tensor& each : {query, keys})
    TORCH_CHECK(each.scalar_type() == at::kBFloat16 && each.stride(3) == 1, "zsmerge::watch takes rows of bfloat16");
  TORCH_CHECK(D % 2 == 0 && heads % H == 0 && m > 0, "zsmerge::watch: these shapes do not match");
  const Tensor added = widened(bias, at::kFloat, room, NEVER), stands = widened(position, at::kInt, room, 0);
  const Tensor asks = asking.to(at::kInt).contiguous(), learned = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const Tensor packed = at::empty({B, H, room, D}, keys.options());
  const int64_t blocks = (many + TOKENS - 1) / TOKENS;
  const Tensor parts = at::empty({B * H, blocks, 2, room}, added.options());
  const Reading task{query.const_data_ptr<BFloat16>(), query.strides(), {}, m, heads, G, C, room, D, 0, 0,
                     static_cast<float>(scaling), static_cast<float>(softcap), data<float>(added), data<float>(learned),
                     data<int32_t>(asks), data<int32_t>(stands), packed.data_ptr<BFloat16>(), nullptr};
  at::parallel_for(0, B * H * (room / STRIDE), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) pack_keys(task, keys, item);
  });
  at::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    Desk desk(task);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, b = row / H, first = item % blocks * TOKENS;
      const int32_t* when = task.asking + b * m;
      const int64_t count = std::count_if(when, when + m, [](int32_t at) { return at >= 0; });
      const float share = 1.0f / static_cast<float>(G * std::max<int64_t>(1, count));
      std::vector<const BFloat16*> queries;
      std::vector<int32_t> times;
      std::vector<float> sinks_of;
      for (int64_t q = first; q < std::min(first + TOKENS, many); ++q) {
        const int64_t head = row % H * G + q / m, t = q % m;
        queries.push_back(task.query + b * task.steps[0] + head * task.steps[1] + t * task.steps[2]);
        times.push_back(when[t]);
        sinks_of.push_back(task.sinks == nullptr ? NEVER : task.sinks[head]);
      }
      watch_block(task, row, queries, times, sinks_of, share, task.position + row * room, desk,
                  parts.data_ptr<float>() + item * 2 * room);
    }
    at::native::cpublas::brgemm_release();
  });
  const Tensor mean = parts.select(2, 0).sum(1), most = parts.select(2, 1).amax(1);
  return at::stack({mean, most}).view({2, B, H, room}).slice(3, 0, C);
}

bool reads() { return true; }

#else

Tensor read(const Tensor& query, const Tensor&, const Tensor&, at::IntArrayRef, double, double, int64_t,
            const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
            const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::read needs a processor that multiplies bfloat16");
  return query;
}

Tensor watch(const Tensor& query, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
             const std::optional<Tensor>&) {
  TORCH_CHECK(false, "zsmerge::watch needs a processor that multiplies bfloat16");
  return query;
}

bool reads() { return false; }

#endif

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("reads() -> bool", &reads);
  library.def(
      "read(Tensor query, Tensor keys, Tensor values, int[] bases, float scaling, float softcap, int window, Tensor? bias, "
      "Tensor? asking, Tensor? position, Tensor? sinks) -> Tensor");
  library.def(
      "watch(Tensor query, Tensor keys, Tensor bias, Tensor asking, Tensor position, float scaling, float softcap, "
      "Tensor? sinks) -> Tensor");
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("read", &read);
  library.impl("watch", &watch);
}

}  // namespace
