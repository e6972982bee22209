// Decode steps through packages of AOTInductor, and the operator registrations of decoding. Needs decode_attention.cpp.

// What the attention of one layer works on in the step that this thread runs.
struct LayerContext {
  const Tensor* state;  // the tensors of its slots (6), its query ring and the ring's positions
  const Tensor* token_position;
  at::IntArrayRef num_filled;
  const int64_t* active;
  double alpha;
  int64_t window;
  bool pushes_queries;
  std::vector<Tensor>* kept;  // takes query, key, value and sinks (empty: none); null: nobody needs them
};
thread_local const LayerContext* current_layer = nullptr;

// Attention of a packaged layer: query [B, Hq, T, D], key and value [B, H, T, D] -> [B, Hq, T, E].
Tensor attend_slots(const Tensor& query, const Tensor& key, const Tensor& value, double scaling, double softcap,
                    const std::optional<Tensor>& sinks) {
  TORCH_CHECK(current_layer != nullptr, "zsmerge::attend_slots runs in a packaged step only");
  const LayerContext& layer = *current_layer;
  const Tensor *state = layer.state, &keys = state[0], &values = state[1], &ring = state[6];
  const int64_t rows = query.size(0), T = query.size(2);
  TORCH_CHECK(query.dim() == 4 && values.dim() == 4, "zsmerge::attend_slots takes rows [B, H, T, D]");
  Tensor out = at::empty({rows, query.size(1), T, values.size(3)}, query.options());
  decode_attention_out(query, key, value, {keys, values, state[2], state[3], state[4], state[5]},
                       *layer.token_position, layer.num_filled, layer.active,
                       {scaling, layer.alpha, softcap, layer.window}, sinks, out);
  if (layer.pushes_queries) push_active_queries(ring, state[7], query, *layer.token_position, layer.active);
  if (layer.kept != nullptr) layer.kept->insert(layer.kept->end(), {query, key, value, sinks ? *sinks : at::empty({0})});
  return out;
}

// The decoder layers of a model as packages, run one after another without Python in between.
struct PackagedStep : torch::CustomClassHolder {
  static constexpr int64_t HIDDEN = -1;  // as a source: the output of the layer before
  struct Layer {
    int64_t package;
    std::vector<int64_t> sources;  // of its inputs, as indices of the step's
    std::vector<Tensor> weights;
  };
  std::vector<std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> packages;
  std::vector<Layer> layers;

  void add_package(std::string path) {
    packages.push_back(std::make_unique<torch::inductor::AOTIModelPackageLoader>(path));
  }

  void add_layer(int64_t package, std::vector<int64_t> sources, std::vector<Tensor> weights) {
    TORCH_CHECK(package >= 0 && package < static_cast<int64_t>(packages.size()), "zsmerge::PackagedStep: no package ",
                package);
    layers.push_back({package, std::move(sources), std::move(weights)});
  }

  // Run layers [first, first + alphas.size()), the first on `hidden` if it has the output of a layer before it. For each:
  // the eight tensors of its slots and query ring, num_filled of each row, alpha, sliding window (0: none), whether it
  // pushes its queries, and whether its query, key, value and sinks are wanted. token_position int32 [rows, T]; active: of each
  // row. Returns the last output, then what is wanted.
  std::vector<Tensor> run(int64_t first, Tensor hidden, std::vector<Tensor> inputs, std::vector<Tensor> state,
                          std::vector<int64_t> num_filled, std::vector<double> alphas, std::vector<int64_t> windows,
                          std::vector<int64_t> pushes_queries, std::vector<int64_t> wanted,
                          std::vector<int64_t> active, Tensor token_position) {
    TORCH_CHECK(token_position.dim() == 2, "zsmerge::PackagedStep: positions are [rows, T]");
    const int64_t rows = token_position.size(0);
    const size_t count = alphas.size();
    TORCH_CHECK(first >= 0 && count <= layers.size() && first <= static_cast<int64_t>(layers.size() - count) &&
                    static_cast<int64_t>(active.size()) == rows &&
                    num_filled.size() == count * rows && state.size() == 8 * count && windows.size() == count &&
                    pushes_queries.size() == count && wanted.size() == count,
                "zsmerge::PackagedStep: lists that do not fit to ", rows, " rows");
    std::vector<Tensor> results{std::move(hidden)};
    for (size_t i = 0; i < count; ++i) {
      const Layer& layer = layers[first + i];
      std::vector<Tensor> given;
      for (const int64_t source : layer.sources) {
        TORCH_CHECK(source == HIDDEN || (source >= 0 && source < static_cast<int64_t>(inputs.size())),
                    "zsmerge::PackagedStep: layer ", first + i, " has no input ", source);
        given.push_back(source == HIDDEN ? results[0] : inputs[source]);
      }
      given.insert(given.end(), layer.weights.begin(), layer.weights.end());
      const LayerContext context{&state[8 * i], &token_position,
                                 at::IntArrayRef(num_filled.data() + i * rows, rows), active.data(), alphas[i],
                                 windows[i], pushes_queries[i] != 0, wanted[i] ? &results : nullptr};
      struct Guard {
        ~Guard() { current_layer = nullptr; }
      } guard;
      current_layer = &context;
      const std::vector<Tensor> output = packages[layer.package]->run(given);
      TORCH_CHECK(output.size() == 1, "zsmerge::PackagedStep: a layer has one output, not ", output.size());
      results[0] = output[0];
    }
    return results;
  }
};

// Whether `gemv` takes packed int4 weights.
int64_t int4_pack_width() { return HAS_INTEGER_PRODUCTS ? PACK_WIDTH : 0; }
// Whether it takes any number of rows in half precision.
bool has_chunks() { return HAS_AVX2; }

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def("int4_pack_width() -> int", &int4_pack_width);
  library.def("has_chunks() -> bool", &has_chunks);
  library.def("gemv(Tensor x, Tensor[] operands, int num_matrices) -> Tensor[]");
  library.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) "
      "multiplicity, "
      "Tensor(d!) score, Tensor(e!) cumulative_attention, Tensor(f!) position, Tensor token_position, int[] "
      "num_filled, int[] active, float scaling, float alpha, float softcap, "
      "int window, Tensor? sinks) -> Tensor");
  library.def(
      "push_queries(Tensor(a!) queries, Tensor(b!) query_position, Tensor new_queries, Tensor new_position) -> ()");
  library.def(
      "attend_slots(Tensor query, Tensor key, Tensor value, float scaling, float softcap, Tensor? sinks) -> Tensor");
  library.class_<PackagedStep>("PackagedStep")
      .def(torch::init<>())
      .def("add_package", &PackagedStep::add_package)
      .def("add_layer", &PackagedStep::add_layer)
      .def("run", &PackagedStep::run);
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("gemv", &gemv);
  library.impl("decode_attention", &decode_attention);
  library.impl("push_queries", &push_queries);
  library.impl("attend_slots", &attend_slots);
}

}  // namespace
