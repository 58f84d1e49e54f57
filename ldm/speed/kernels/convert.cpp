// Conversion between float32, bfloat16 and float16, rounded to nearest even, with a check for values that are
// not finite.
#include <sys/mman.h>
#include <unistd.h>

#include "simd.h"

namespace {

// Each dtype as 16 lanes of float32. `store` rounds, and returns the lanes whose result is NaN or infinite.
struct Single {
    using Elem = float;
    static __m512 load(const Elem* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
    static __mmask16 store(Elem* p, __m512 x, __mmask16 m) {
        _mm512_mask_storeu_ps(p, m, x);
        return _mm512_fpclass_ps_mask(x, 0x99);
    }
};

struct Brain {
    using Elem = uint16_t;
    static __m512 load(const Elem* p, __mmask16 m) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
    }
    static __mmask16 store(Elem* p, __m512 x, __mmask16 m) {  // in integer arithmetic, because the instruction flushes subnormal numbers to zero
        const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i y = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        y = _mm512_mask_mov_epi32(y, _mm512_fpclass_ps_mask(x, 0x81), _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(y));
        return _mm512_cmpeq_epi32_mask(_mm512_and_si512(y, _mm512_set1_epi32(0x7f80)), _mm512_set1_epi32(0x7f80));
    }
};

struct Half {
    using Elem = uint16_t;
    static __m512 load(const Elem* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
    static __mmask16 store(Elem* p, __m512 x, __mmask16 m) {
        const __m256i y = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), full = _mm256_set1_epi16(0x7c00);
        _mm256_mask_storeu_epi16(p, m, y);
        return _mm256_cmpeq_epi16_mask(_mm256_and_si256(y, full), full);
    }
};

// Converts 16 numbers, or those of a mask; returns the lanes whose result is not finite.
template <class From, class To>
inline __mmask16 step(const typename From::Elem* x, typename To::Elem* y, __mmask16 in) {
    return To::store(y, From::load(x, in), in);
}

#ifdef __AVX512BF16__
template <>
inline __mmask16 step<Half, Brain>(const uint16_t* x, uint16_t* y, __mmask16 in) {  // no float16 is a subnormal bfloat16, so the instruction can be used
    const __m256i from = _mm256_maskz_loadu_epi16(in, x), full = _mm256_set1_epi16(0x7c00);
    _mm256_mask_storeu_epi16(y, in, (__m256i)_mm512_cvtneps_pbh(_mm512_cvtph_ps(from)));
    return _mm256_cmpeq_epi16_mask(_mm256_and_si256(from, full), full);
}
#endif

constexpr int64_t CHUNK = 1 << 19;  // elements

// Asks the operating system for all pages inside [p, p + bytes) at once, at half of the cost of a page fault
// each; otherwise they fault one by one.
inline void touch(void* p, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)p + page - 1) / page * page, end = ((uintptr_t)p + bytes) / page * page;
    if (begin < end) madvise((void*)begin, end - begin, MADV_POPULATE_WRITE);
#endif
}

// Converts one chunk; returns whether all results are finite.
template <class From, class To>
bool convert(const void* from, void* to, int64_t begin, int64_t end) {
    const auto* x = (const typename From::Elem*)from;
    auto* y = (typename To::Elem*)to;
    touch(y + begin, (end - begin) * sizeof *y);
    int wrong = 0;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) wrong |= step<From, To>(x + i, y + i, 0xffff);
    if (i < end) wrong |= step<From, To>(x + i, y + i, tail((int)(end - i)));
    return !wrong;
}

using Convert = bool (*)(const void*, void*, int64_t, int64_t);
template <class From>
constexpr Convert OF[3] = {convert<From, Single>, convert<From, Brain>, convert<From, Half>};
constexpr const Convert* CONVERT[3] = {OF<Single>, OF<Brain>, OF<Half>};

}  // namespace

// Converts tensors from[k] of n[k] elements to to[k] in the dtype `made`, and sets finite[k]. dtypes: 0
// float32, 1 bfloat16, 2 float16. Threads continue with the next tensor without waiting for each other.
extern "C" void ldm_convert(
    int count, const void* const* from, void* const* to, const int64_t* n, const int* dtype, int made, uint8_t* finite, int threads) {
    std::fill(finite, finite + count, 1);
#pragma omp parallel num_threads(threads)
    for (int k = 0; k < count; k++) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t begin = 0; begin < n[k]; begin += CHUNK)
            if (!CONVERT[dtype[k]][made](from[k], to[k], begin, std::min(n[k], begin + CHUNK))) {
#pragma omp atomic write
                finite[k] = 0;
            }
    }
}
