// AVX2 with FMA and F16C: 8 lanes, 16 registers.
#pragma once
#include <immintrin.h>

namespace {

constexpr int W = 8, REGISTERS = 16;
using Vec = __m256;
typedef uint32_t Words __attribute__((vector_size(4 * W)));  // the bits of a vector
using Lanes = __m256i;  // which lanes are read or written: -1 or 0 in each
struct All {};          // all lanes; masked stores are slow, so that full vectors need their own

inline Lanes tail(int left) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline int count(Lanes in) { return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(in))); }
inline Vec spread(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p, All = {}) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, Lanes in) { return _mm256_maskload_ps(p, in); }
inline void store(float* p, Vec x, All = {}) { _mm256_storeu_ps(p, x); }
inline void store(float* p, Vec x, Lanes in) { _mm256_maskstore_ps(p, in, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }

// sums += x
inline void add_wide(double* sums, Vec x) {
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(_mm256_castps256_ps128(x))));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))));
}

// 16-bit numbers, one in each lane of 32 bits.
inline __m128i narrow(Words x) { return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)); }
inline Words load16(const uint16_t* p, All = {}) { return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store16(uint16_t* p, Words x, All = {}) { _mm_storeu_si128((__m128i*)p, narrow(x)); }
inline Words load16(const uint16_t* p, Lanes in) {
    uint16_t some[W] = {};
    std::memcpy(some, p, count(in) * sizeof *p);
    return load16(some);
}
inline void store16(uint16_t* p, Words x, Lanes in) {
    uint16_t some[W];
    store16(some, x);
    std::memcpy(p, some, count(in) * sizeof *p);
}
inline Vec from_half(Words x) { return _mm256_cvtph_ps(narrow(x)); }
inline Words to_half(Vec x) { return (Words)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

// Exchanges rows and columns of 8×8 numbers.
inline void transpose(Vec (&x)[W]) {
    Vec pairs[W], fours[W];
    for (int i = 0; i < W; i += 2) pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    for (int i = 0; i < W; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

struct HalvesF32 {};  // no row needs half of a vector, as rows are multiples of eight

}  // namespace
