// AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers, and bfloat16 dot products where the compiler may use them.
#pragma once
#include <immintrin.h>

namespace {

constexpr int W = 16, REGISTERS = 32;
using Vec = __m512;
typedef uint32_t Words __attribute__((vector_size(4 * W)));  // the bits of a vector
using Lanes = __mmask16;  // which lanes are read or written
struct All {};            // all lanes

inline Lanes tail(int left) { return left >= 16 ? 0xffff : (__mmask16)((1u << std::max(left, 0)) - 1); }
inline Vec spread(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, Lanes in) { return _mm512_maskz_loadu_ps(in, p); }
inline void store(float* p, Vec x, All = {}) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Vec x, Lanes in) { _mm512_mask_storeu_ps(p, in, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }

// sums += x
inline void add_wide(double* sums, Vec x) {
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(_mm512_castps512_ps256(x))));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
}

// 16-bit numbers, one in each lane of 32 bits.
inline Words load16(const uint16_t* p, All = {}) { return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline Words load16(const uint16_t* p, Lanes in) { return (Words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, p)); }
inline void store16(uint16_t* p, Words x, All = {}) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x)); }
inline void store16(uint16_t* p, Words x, Lanes in) { _mm256_mask_storeu_epi16(p, in, _mm512_cvtepi32_epi16((__m512i)x)); }
inline Vec from_half(Words x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
inline Words to_half(Vec x) { return (Words)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

// Exchanges rows and columns of W×W numbers.
inline void transpose(Vec (&x)[W]) {
    alignas(64) float from[W][W], to[W][W];
    for (int i = 0; i < W; i++) store(from[i], x[i]);
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) to[j][i] = from[i][j];
    for (int i = 0; i < W; i++) x[i] = load(to[i]);
}

// Half of a vector of float32, for rows whose length is an odd multiple of eight.
struct HalvesF32 {
    using Half = __m256;
    static Half half_spread(float x) { return _mm256_set1_ps(x); }
    static Half half_load(const float* p) { return _mm256_loadu_ps(p); }
    static void half_store(float* p, Half x) { _mm256_storeu_ps(p, x); }
    static Half half_dot(Half acc, uint32_t a, const uint32_t* b) {
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_set1_epi32(a)), _mm256_loadu_ps((const float*)b), acc);
    }
};

#ifdef __AVX512BF16__
#define LDM_BF16
struct BF16 : HalvesF32 {
    using Elem = uint16_t;
    static constexpr int PAIR = 2, DEGREE = 3;
    static Vec dot(Vec acc, Words a, Words b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
    static Half half_dot(Half acc, uint32_t a, const uint32_t* b) {
        return _mm256_dpbf16_ps(acc, (__m256bh)_mm256_set1_epi32(a), (__m256bh)_mm256_loadu_si256((const __m256i*)b));
    }
    static Vec divide(Vec a, Vec b) { return _mm512_mul_ps(a, _mm512_rcp14_ps(b)); }
    template <class In = All>
    static Vec load(const Elem* p, In in = {}) {
        return (Vec)(load16(p, in) << 16);
    }
    static void store(Elem* p, Vec x, All = {}) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
    static void store(Elem* p, Vec x, Lanes in) { _mm256_mask_storeu_epi16(p, in, (__m256i)_mm512_cvtneps_pbh(x)); }
    static void store_p(uint32_t* p, Vec a, Vec b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
};
#endif

}  // namespace
