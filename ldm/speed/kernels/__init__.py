"""C++ kernels for processors with AVX-512, their build, and the operators that call them."""
