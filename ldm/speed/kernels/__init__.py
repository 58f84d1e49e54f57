"""C++ kernels for processors with AVX-512, AVX2 or NEON, their build, and the operators that call them."""
