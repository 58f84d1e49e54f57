// Conversion between float32, bfloat16 and float16, rounded to nearest even, with a check for values that are
// not finite.
#include <sys/mman.h>
#include <unistd.h>

#include "elements.h"

namespace {

// Converts the numbers of a vector; returns the lanes whose result is not finite.
template <class From, class To, class In>
inline Words step(const typename From::Elem* x, typename To::Elem* y, In in) {
#ifdef LDM_BF16
    if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, Brain>) {  // no float16 is a subnormal bfloat16, so the instruction can be used
        const Words from = load16(x, in);
        BF16::store(y, from_half(from), in);
        return (Words)((from & 0x7c00) == 0x7c00);
    }
#endif
    return To::store(y, From::load(x, in), in);
}

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
    Words wrong = {};
    int64_t i = begin;
    for (; i + W <= end; i += W) wrong |= step<From, To>(x + i, y + i, All{});
    if (i < end) wrong |= step<From, To>(x + i, y + i, tail((int)(end - i)));  // the other lanes are 0, which is finite
    uint32_t any = 0;
    for (int j = 0; j < W; j++) any |= wrong[j];
    return !any;
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
