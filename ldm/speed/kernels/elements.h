// The dtypes of weights as lanes of float32: loading widens, storing rounds to nearest even.
#pragma once
#include "simd.h"

namespace {

// Each dtype as lanes of float32. `store` rounds, and returns the lanes whose result is NaN or infinite.
struct Single {
    using Elem = float;
    template <class In>
    static Vec load(const Elem* p, In in) {
        return ::load(p, in);
    }
    template <class In>
    static Words store(Elem* p, Vec x, In in) {
        ::store(p, x, in);
        return (Words)(((Words)x & 0x7f800000) == 0x7f800000);
    }
};

struct Brain {
    using Elem = uint16_t;
    template <class In>
    static Vec load(const Elem* p, In in) {
        return (Vec)(load16(p, in) << 16);
    }
    template <class In>
    static Words store(Elem* p, Vec x, In in) {  // in integer arithmetic, because the instruction flushes subnormal numbers to zero
        const Words bits = (Words)x, rounded = (bits + ((bits >> 16) & 1) + 0x7fff) >> 16;
        const Words y = (bits & 0x7fffffff) > 0x7f800000 ? spread_word(0x7fc0) : rounded;  // NaN stays NaN
        store16(p, y, in);
        return (Words)((y & 0x7f80) == 0x7f80);
    }
};

struct Half {
    using Elem = uint16_t;
    template <class In>
    static Vec load(const Elem* p, In in) {
        return from_half(load16(p, in));
    }
    template <class In>
    static Words store(Elem* p, Vec x, In in) {
        const Words y = to_half(x);
        store16(p, y, in);
        return (Words)((y & 0x7c00) == 0x7c00);
    }
};

}  // namespace
