"""What is held and what is evicted: pure tensors, without transformers, devices or kernels."""
