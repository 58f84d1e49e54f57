// NEON of 64-bit ARM: 4 lanes, 32 registers.
#pragma once
#include <arm_neon.h>

namespace {

constexpr int W = 4, REGISTERS = 32;
using Vec = float32x4_t;
typedef uint32_t Words __attribute__((vector_size(4 * W)));  // the bits of a vector
struct Lanes {  // the number of lanes that are read or written
    int count;
};
struct All {};  // all lanes

inline Lanes tail(int left) { return {std::min(std::max(left, 0), W)}; }
inline Vec spread(float x) { return vdupq_n_f32(x); }
inline Vec load(const float* p, All = {}) { return vld1q_f32(p); }
inline Vec load(const float* p, Lanes in) {
    float some[W] = {};
    std::memcpy(some, p, in.count * sizeof *p);
    return load(some);
}
inline void store(float* p, Vec x, All = {}) { vst1q_f32(p, x); }
inline void store(float* p, Vec x, Lanes in) {
    float some[W];
    store(some, x);
    std::memcpy(p, some, in.count * sizeof *p);
}
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec larger(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec smaller(Vec a, Vec b) { return vminq_f32(a, b); }

// sums += x
inline void add_wide(double* sums, Vec x) {
    vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), vcvt_f64_f32(vget_low_f32(x))));
    vst1q_f64(sums + 2, vaddq_f64(vld1q_f64(sums + 2), vcvt_high_f64_f32(x)));
}

// 16-bit numbers, one in each lane of 32 bits.
inline Words load16(const uint16_t* p, All = {}) { return (Words)vmovl_u16(vld1_u16(p)); }
inline void store16(uint16_t* p, Words x, All = {}) { vst1_u16(p, vmovn_u32((uint32x4_t)x)); }
inline Words load16(const uint16_t* p, Lanes in) {
    uint16_t some[W] = {};
    std::memcpy(some, p, in.count * sizeof *p);
    return load16(some);
}
inline void store16(uint16_t* p, Words x, Lanes in) {
    uint16_t some[W];
    store16(some, x);
    std::memcpy(p, some, in.count * sizeof *p);
}
inline Vec from_half(Words x) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)x))); }
inline Words to_half(Vec x) { return (Words)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(x))); }

// Exchanges rows and columns of W×W numbers.
inline void transpose(Vec (&x)[W]) {
    alignas(64) float from[W][W], to[W][W];
    for (int i = 0; i < W; i++) store(from[i], x[i]);
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) to[j][i] = from[i][j];
    for (int i = 0; i < W; i++) x[i] = load(to[i]);
}

struct HalvesF32 {};  // no row needs half of a vector, as rows are multiples of eight

}  // namespace
