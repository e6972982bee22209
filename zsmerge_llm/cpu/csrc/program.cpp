// A step that was recorded, and what Python sees of it all. Behind attention.cpp.

constexpr size_t MOST_DATA = 32;  // that a compiled function may be given

template <size_t N, size_t... I>
void call(void* function, void* const* data, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(std::enable_if_t<(I < N), void*>...)>(function)(data[I]...);
}
template <size_t N = 1>
void call(void* function, const std::vector<void*>& data) {
  if constexpr (N <= MOST_DATA) {
    if (data.size() == N) return call<N>(function, data.data(), std::make_index_sequence<N>());
    call<N + 1>(function, data);
  }
}

// What the layers of a model do in one step, in order, always on the same memory: run without Python in between.
struct Program : torch::CustomClassHolder {
  struct Code {
    void* function;
    std::vector<void*> data;
  };
  struct Product {
    Tensor x;
    std::vector<Tensor> weights, scales, biases, out;
  };
  struct Attention {
    Tensor query, key, value, out;
    double scaling, softcap;
    int64_t window;
    std::optional<Tensor> sinks;
  };
  std::vector<std::variant<Code, Product, Attention>> parts;
  int64_t most = 1;  // rows it was recorded for

  int64_t size() { return parts.size(); }

  // A compiled function of some tensors, by its address.
  void add_code(int64_t function, std::vector<Tensor> data) {
    TORCH_CHECK(!data.empty() && data.size() <= MOST_DATA, "zsmerge::Program: a function of ", data.size(), " tensors");
    Code code{reinterpret_cast<void*>(function), {}};
    for (const Tensor& each : data) code.data.push_back(const_cast<void*>(each.const_data_ptr()));
    parts.emplace_back(std::move(code));
  }

  void add_rows(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> biases,
                std::vector<Tensor> out) {
    parts.emplace_back(Product{x, std::move(weights), std::move(scales), std::move(biases), std::move(out)});
  }

  void add_look(Tensor query, Tensor key, Tensor value, Tensor out, double scaling, double softcap, int64_t window,
                std::optional<Tensor> sinks) {
    most = query.size(0);
    parts.emplace_back(Attention{query, key, value, out, scaling, softcap, window, sinks});
  }

  // Parts [first, last). Of each layer that attends in them: the eight tensors of its slots and of the queries that it
  // remembers, its rows' fills, its alpha, and whether it remembers these queries. now int32 [rows, T]: a program may
  // have been recorded for more rows, of which the first are used, and of these the ones that are present.
  void run(int64_t first, int64_t last, std::vector<Tensor> slots, std::vector<int64_t> fills,
           std::vector<double> alphas, std::vector<int64_t> remembering, std::vector<int64_t> present, Tensor now) {
    const int64_t rows = now.size(0);
    TORCH_CHECK(static_cast<int64_t>(present.size()) == rows && fills.size() == alphas.size() * rows &&
                    slots.size() == 8 * alphas.size() && remembering.size() == alphas.size(),
                "zsmerge::Program: lists that do not fit to ", rows, " rows");
    size_t layer = 0;
    for (int64_t i = first; i < last; ++i) {
      auto& part = parts.at(i);
      if (const auto* code = std::get_if<Code>(&part)) {
        call(code->function, code->data);
      } else if (auto* product = std::get_if<Product>(&part)) {
        // One row alone would be rounded in another way than among others.
        const int64_t needed = product->x.size(0) / most * std::min(most, std::max<int64_t>(rows, 2));
        rows_into(product->x.narrow(0, 0, needed), product->weights, product->scales, product->biases, product->out);
      } else {
        const auto& look = std::get<Attention>(part);
        const Tensor* own = &slots.at(8 * layer + 7) - 7;
        const Tensor query = look.query.narrow(0, 0, rows);
        Tensor out = look.out.narrow(0, 0, rows);
        look_into(query, look.key.narrow(0, 0, rows), look.value.narrow(0, 0, rows),
                  {own[0], own[1], own[2], own[3], own[4], own[5]}, now,
                  at::IntArrayRef(fills.data() + layer * rows, rows), present.data(),
                  {look.scaling, alphas[layer], look.softcap, look.window}, look.sinks, out);
        if (remembering[layer]) remember_present(own[6], own[7], query, now, present.data());
        ++layer;
      }
    }
  }
};

// Whether `rows` takes weights of 4 bits here.
bool packed() { return INT16_PRODUCTS; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("packed() -> bool", &packed);
  library.def("rows(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases) -> Tensor[]");
  library.def(
      "look(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) count, "
      "Tensor(d!) score, Tensor(e!) accumulated, Tensor(f!) position, Tensor now, int[] fills, float scaling, float alpha, float softcap, "
      "int window, Tensor? sinks) -> Tensor");
  library.def("remember(Tensor(a!) queries, Tensor(b!) asked, Tensor newest, Tensor now) -> ()");
  library.class_<Program>("Program")
      .def(torch::init<>())
      .def("size", &Program::size)
      .def("add_code", &Program::add_code)
      .def("add_rows", &Program::add_rows)
      .def("add_look", &Program::add_look)
      .def("run", &Program::run);
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("rows", &rows);
  library.impl("look", &look);
  library.impl("remember", &remember);
}

}  // namespace
