// Common to all kernels: buffers, 2^x, and the operations of float32 and bfloat16 on the lanes of a vector.
//
// The arithmetic (+ - * / << >> & |, comparison, selection) is that of the vector types of GCC and Clang. What
// they do not have is written with the intrinsics of each instruction set, which the compiler's flags choose.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#error "expected AVX-512 (F, BW, DQ, VL), AVX2 with FMA and F16C, or 64-bit ARM"
#endif

namespace {

inline Words spread_word(uint32_t x) { return Words{} + x; }
inline Words load_words(const uint32_t* p) { return (Words)load((const float*)p); }
inline void store_words(uint32_t* p, Words x) { store((float*)p, (Vec)x); }

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(size_t n) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)));
}

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <int V>
using Count = std::integral_constant<int, V>;

// Calls f(number of vectors, first column, lanes) for groups of V vectors, then for single ones, and for the
// rest of the columns.
template <int V, class F>
inline void columns(int C, F f) {
    int c = 0;
    for (; c + V * W <= C; c += V * W) f(Count<V>{}, c, All{});
    for (; c + W <= C; c += W) f(Count<1>{}, c, All{});
    if (c < C) f(Count<1>{}, c, tail(C - c));
}

// Returns the sum, or the maximum, of the lanes.
template <class F>
inline float fold(Vec x, F f) {
    alignas(64) float lane[W];
    store(lane, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lane[i] = f(lane[i], lane[i + n]);
    return lane[0];
}
inline float total(Vec x) { return fold(x, [](float a, float b) { return a + b; }); }
inline float maximum(Vec x) { return fold(x, [](float a, float b) { return std::max(a, b); }); }

// 2^x for |x| <= 126: the minimax polynomial of the fraction |f| <= 1/2 (relative error 7e-5 for degree 3,
// 2e-9 for degree 6), and the integer part as exponent.
template <int DEGREE>
inline Vec exp2_(Vec x) {
    const Vec magic = spread(12582912.f);  // 1.5·2^23: adding it rounds to integers
    const Vec t = x + magic, f = x - (t - magic);
    Vec p;
    if constexpr (DEGREE == 3) {  // its error is a twentieth of the rounding to bfloat16
        p = fma(spread(0.05517166f), f, spread(0.24261116f));
        p = fma(p, f, spread(0.69326099f));
        p = fma(p, f, spread(0.99992807f));
    } else {
        p = fma(spread(1.53458109e-4f), f, spread(1.33999318e-3f));
        p = fma(p, f, spread(9.61848897e-3f));
        p = fma(p, f, spread(5.55032878e-2f));
        p = fma(p, f, spread(0.240226470f));
        p = fma(p, f, spread(0.693147206f));
        p = fma(p, f, spread(1.f));
    }
    return (Vec)((Words)p + ((Words)t << 23));
}

// The operations of each dtype. A word is the operand of one lane: a float32, or a pair of bfloat16.
struct F32 : HalvesF32 {
    using Elem = float;
    static constexpr int PAIR = 1, DEGREE = 6;
    static Vec dot(Vec acc, Words a, Words b) { return fma((Vec)a, (Vec)b, acc); }
    static Vec divide(Vec a, Vec b) { return a / b; }
    template <class In = All>
    static Vec load(const Elem* p, In in = {}) {
        return ::load(p, in);
    }
    template <class In = All>
    static void store(Elem* p, Vec x, In in = {}) {
        ::store(p, x, in);
    }
    static void store_p(uint32_t* p, Vec a, Vec b) { ::store((float*)p, a), ::store((float*)p + W, b); }
};

}  // namespace

// Calls the kernel for a dtype.
#ifdef LDM_BF16
#define EACH(bf16, call_bf16, call_f32) (bf16) ? (call_bf16) : (call_f32)
#else
#define EACH(bf16, call_bf16, call_f32) (bf16) ? std::abort() : (call_f32)
#endif
