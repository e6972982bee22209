"""The seam with transformers: the registered attention function, forward passes and the backend that computes them."""
