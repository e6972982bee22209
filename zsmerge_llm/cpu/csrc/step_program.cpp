// Recorded decode steps, and the operator registrations of decoding. Needs decode_attention.cpp.

constexpr size_t MAX_TENSORS = 32;  // most tensors of a compiled function

template <size_t N, size_t... I>
void call(void* function, void* const* data, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(std::enable_if_t<(I < N), void*>...)>(function)(data[I]...);
}
template <size_t N = 1>
void call(void* function, const std::vector<void*>& data) {
  if constexpr (N <= MAX_TENSORS) {
    if (data.size() == N) return call<N>(function, data.data(), std::make_index_sequence<N>());
    call<N + 1>(function, data);
  }
}

// The work of one decode step in order, on fixed memory, replayed without Python in between (as a CUDA graph is).
struct Program : torch::CustomClassHolder {
  struct Code {
    void* function;
    std::vector<void*> data;
  };
  struct Gemv {
    Tensor x;
    std::vector<Tensor> weights, scales, biases, out;
  };
  struct Attention {
    Tensor query, key, value, out;
    double scaling, softcap;
    int64_t window;
    std::optional<Tensor> sinks;
  };
  std::vector<std::variant<Code, Gemv, Attention>> parts;
  int64_t recorded_rows = 1;  // rows that it was recorded for

  int64_t size() { return parts.size(); }

  // Add a compiled function, by its address, and its tensors.
  void add_code(int64_t function, std::vector<Tensor> data) {
    TORCH_CHECK(!data.empty() && data.size() <= MAX_TENSORS, "zsmerge::Program: a function of ", data.size(),
                " tensors");
    Code code{reinterpret_cast<void*>(function), {}};
    for (const Tensor& each : data) code.data.push_back(const_cast<void*>(each.const_data_ptr()));
    parts.emplace_back(std::move(code));
  }

  void add_gemv(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> biases,
                std::vector<Tensor> out) {
    parts.emplace_back(Gemv{x, std::move(weights), std::move(scales), std::move(biases), std::move(out)});
  }

  void add_attention(Tensor query, Tensor key, Tensor value, Tensor out, double scaling, double softcap, int64_t window,
                     std::optional<Tensor> sinks) {
    recorded_rows = query.size(0);
    parts.emplace_back(Attention{query, key, value, out, scaling, softcap, window, sinks});
  }

  // Run parts [first, last). For each layer that attends in them: the eight tensors of its slots and query ring,
  // num_filled of each row, alpha, and whether it pushes its queries. token_position int32 [rows, T]. A program
  // recorded for more rows uses the first `rows`, and of these the active ones.
  void run(int64_t first, int64_t last, std::vector<Tensor> slots, std::vector<int64_t> num_filled,
           std::vector<double> alphas, std::vector<int64_t> pushes_queries, std::vector<int64_t> active,
           Tensor token_position) {
    const int64_t rows = token_position.size(0);
    TORCH_CHECK(static_cast<int64_t>(active.size()) == rows && num_filled.size() == alphas.size() * rows &&
                    slots.size() == 8 * alphas.size() && pushes_queries.size() == alphas.size(),
                "zsmerge::Program: lists that do not fit to ", rows, " rows");
    size_t layer = 0;
    for (int64_t i = first; i < last; ++i) {
      auto& part = parts.at(i);
      if (const auto* code = std::get_if<Code>(&part)) {
        call(code->function, code->data);
      } else if (auto* gemv = std::get_if<Gemv>(&part)) {
        // At least two rows: GEMV rounds a single row differently.
        const int64_t needed = gemv->x.size(0) / recorded_rows * std::min(recorded_rows, std::max<int64_t>(rows, 2));
        gemv_out(gemv->x.narrow(0, 0, needed), gemv->weights, gemv->scales, gemv->biases, gemv->out);
      } else {
        const auto& attention = std::get<Attention>(part);
        const Tensor* state = &slots.at(8 * layer + 7) - 7;
        const Tensor query = attention.query.narrow(0, 0, rows);
        Tensor out = attention.out.narrow(0, 0, rows);
        decode_attention_out(query, attention.key.narrow(0, 0, rows), attention.value.narrow(0, 0, rows),
                             {state[0], state[1], state[2], state[3], state[4], state[5]}, token_position,
                             at::IntArrayRef(num_filled.data() + layer * rows, rows), active.data(),
                             {attention.scaling, alphas[layer], attention.softcap, attention.window}, attention.sinks,
                             out);
        if (pushes_queries[layer]) push_active_queries(state[6], state[7], query, token_position, active.data());
        ++layer;
      }
    }
  }
};

// Whether `gemv` takes packed int4 weights.
bool has_int4_products() { return HAS_VNNI; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("has_int4_products() -> bool", &has_int4_products);
  library.def("gemv(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases) -> Tensor[]");
  library.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) "
      "multiplicity, "
      "Tensor(d!) score, Tensor(e!) cumulative_attention, Tensor(f!) position, Tensor token_position, int[] "
      "num_filled, float scaling, float alpha, float softcap, "
      "int window, Tensor? sinks) -> Tensor");
  library.def(
      "push_queries(Tensor(a!) queries, Tensor(b!) query_position, Tensor new_queries, Tensor new_position) -> ()");
  library.class_<Program>("Program")
      .def(torch::init<>())
      .def("size", &Program::size)
      .def("add_code", &Program::add_code)
      .def("add_gemv", &Program::add_gemv)
      .def("add_attention", &Program::add_attention)
      .def("run", &Program::run);
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("gemv", &gemv);
  library.impl("decode_attention", &decode_attention);
  library.impl("push_queries", &push_queries);
}

}  // namespace
