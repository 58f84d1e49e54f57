// Common to all kernels: buffers, 2^x, and the operations of float32 and bfloat16 on 16 lanes.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(size_t n) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)));
}

// 2^x for |x| <= 126: the minimax polynomial of the fraction |f| <= 1/2 (relative error 7e-5 for degree 3,
// 2e-9 for degree 6), and the integer part as exponent.
template <int DEGREE>
inline __m512 exp2_(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.f);  // 1.5·2^23: adding it rounds to integers
    __m512 t = _mm512_add_ps(x, magic), f = _mm512_sub_ps(x, _mm512_sub_ps(t, magic));
    __m512 p;
    if constexpr (DEGREE == 3) {  // its error is a twentieth of the rounding to bfloat16
        p = _mm512_set1_ps(0.05517166f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24261116f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69326099f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992807f));
    } else {
        p = _mm512_set1_ps(1.53458109e-4f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33999318e-3f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61848897e-3f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55032878e-2f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240226470f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147206f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    }
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

// The operations of each dtype. A word is the operand of one lane: a float32, or a pair of bfloat16.
struct F32 {
    using Elem = float;
    static constexpr int PAIR = 1, DEGREE = 6;
    static __m512 dot(__m512 acc, __m512i a, __m512i b) { return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc); }
    static __m256 dot(__m256 acc, __m256i a, __m256i b) { return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), acc); }
    static __m512 divide(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
    static __m512 load(const Elem* p, __mmask16 m = 0xffff) { return _mm512_maskz_loadu_ps(m, p); }
    static void store(Elem* p, __m512 x, __mmask16 m = 0xffff) { _mm512_mask_storeu_ps(p, m, x); }
    static void store_p(uint32_t* p, __m512 a, __m512 b) { _mm512_storeu_ps(p, a), _mm512_storeu_ps(p + 16, b); }
};

#ifdef __AVX512BF16__
struct BF16 {
    using Elem = uint16_t;
    static constexpr int PAIR = 2, DEGREE = 3;
    static __m512 dot(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
    static __m256 dot(__m256 acc, __m256i a, __m256i b) { return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)b); }
    static __m512 divide(__m512 a, __m512 b) { return _mm512_mul_ps(a, _mm512_rcp14_ps(b)); }
    static __m512 load(const Elem* p, __mmask16 m = 0xffff) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
    }
    static void store(Elem* p, __m512 x, __mmask16 m = 0xffff) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x)); }
    static void store_p(uint32_t* p, __m512 a, __m512 b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
};
#endif

inline __mmask16 tail(int left) { return left >= 16 ? 0xffff : (__mmask16)((1u << std::max(left, 0)) - 1); }

}  // namespace

// Calls the kernel for a dtype.
#ifdef __AVX512BF16__
#define EACH(bf16, call_bf16, call_f32) (bf16) ? (call_bf16) : (call_f32)
#else
#define EACH(bf16, call_bf16, call_f32) (bf16) ? std::abort() : (call_f32)
#endif
