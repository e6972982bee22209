"""Everything for a CPU: C++ kernels, weights of 4 and 8 bits, compiled decode steps."""
