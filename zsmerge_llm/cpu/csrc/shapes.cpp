// Checks of the tensors that operators address memory by: once a call, whoever calls. Needs simd.cpp.

inline bool has_shape(const Tensor& tensor, at::IntArrayRef sizes) {
  return tensor.is_cpu() && tensor.sizes() == sizes;
}

// Whether a tensor is contiguous, in host memory, and of this dtype and shape.
inline bool is_dense(const Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes) {
  return has_shape(tensor, sizes) && tensor.scalar_type() == type && tensor.is_contiguous();
}
