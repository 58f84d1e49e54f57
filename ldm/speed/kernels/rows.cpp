// Products of a few rows with weights of 32, 16 or 8 bits: reading the weights takes the time.
//
// A weight is read once, in the order of memory and in its own dtype, and multiplied with all rows as it is
// widened to float32. A result is the sum of products along its own row alone, in an order that does not depend
// on the number of rows.
#include "elements.h"

namespace {

constexpr int OUTPUTS = 4, TOGETHER = REGISTERS == 32 ? 4 : 2;  // outputs, and rows, whose sums are in registers at once
constexpr int64_t SHARE = 64;                                   // outputs of a thread are a multiple of it

// Whole numbers of 8 bits; the result is multiplied with the scale of its output.
struct Octet {
    using Elem = int8_t;
    typedef int8_t Bytes __attribute__((vector_size(W)));
    typedef float Floats __attribute__((vector_size(4 * W)));
    static Vec load(const Elem* p, All = {}) {
        Bytes bytes;
        std::memcpy(&bytes, p, W);
        return (Vec)__builtin_convertvector(bytes, Floats);
    }
    static Vec some(const Elem* p, int count) {
        Elem padded[W] = {};
        std::memcpy(padded, p, count);
        return load(padded);
    }
};

// The first `left` numbers of a vector of weights; the others are zeros.
template <class T>
inline Vec load_some(const typename T::Elem* p, int left) {
    if constexpr (std::is_same_v<T, Octet>)
        return Octet::some(p, left);
    else
        return T::load(p, tail(left));
}

// Results of R rows for O outputs from o on.
template <class T, int R, int O>
inline void sums(const typename T::Elem* w, const float* x, const float* scale, float* y, int64_t o, int n, int64_t outputs) {
    Vec acc[R][O] = {};
    int k = 0;
    for (; k + W <= n; k += W) {
        Vec wide[O];
        for (int j = 0; j < O; j++) wide[j] = T::load(w + (o + j) * n + k, All{});
        for (int r = 0; r < R; r++) {
            const Vec v = load(x + (int64_t)r * n + k);
            for (int j = 0; j < O; j++) acc[r][j] = fma(v, wide[j], acc[r][j]);
        }
    }
    if (k < n)
        for (int r = 0; r < R; r++) {
            const Vec v = load(x + (int64_t)r * n + k, tail(n - k));
            for (int j = 0; j < O; j++) acc[r][j] = fma(v, load_some<T>(w + (o + j) * n + k, n - k), acc[r][j]);
        }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < O; j++) y[r * outputs + o + j] = total(acc[r][j]) * (scale ? scale[o + j] : 1.f);
}

template <class T, int R>
inline void share(const typename T::Elem* w, const float* x, const float* scale, float* y, int n, int64_t outputs, int64_t begin, int64_t end) {
    int64_t o = begin;
    for (; o + OUTPUTS <= end; o += OUTPUTS) sums<T, R, OUTPUTS>(w, x, scale, y, o, n, outputs);
    for (; o < end; o++) sums<T, R, 1>(w, x, scale, y, o, n, outputs);
}

// Rows in groups of TOGETHER; for the weights of some outputs, all groups one after the other.
template <class T>
inline void block(const typename T::Elem* w, const float* x, const float* scale, float* y, int rows, int n, int64_t outputs, int64_t begin, int64_t end) {
    for (int r = 0; r < rows;) {
        const float* from = x + (int64_t)r * n;
        float* to = y + r * outputs;
        const int left = rows - r;
        if (left >= TOGETHER) {
            share<T, TOGETHER>(w, from, scale, to, n, outputs, begin, end), r += TOGETHER;
        } else if (left >= 2) {
            share<T, 2>(w, from, scale, to, n, outputs, begin, end), r += 2;
        } else {
            share<T, 1>(w, from, scale, to, n, outputs, begin, end), r += 1;
        }
    }
}

template <class T>
void rows_product(const typename T::Elem* w, const float* x, const float* scale, float* y, int rows, int n, int64_t outputs, int threads) {
    const int64_t parts = (outputs + SHARE - 1) / SHARE;
    const int64_t together = rows > TOGETHER ? 16 : outputs;  // weights that stay in the cache for the next group of rows
#pragma omp parallel for num_threads((int)std::min<int64_t>(threads, parts)) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t last = std::min(outputs, (part + 1) * SHARE);
        for (int64_t o = part * SHARE; o < last; o += together) block<T>(w, x, scale, y, rows, n, outputs, o, std::min(last, o + together));
    }
}

}  // namespace

extern "C" {

// Computes y (rows, outputs), the product of x (rows, n) and weights w (outputs, n) of a dtype (0 float32,
// 1 bfloat16, 2 float16, 3 int8), times the scale (outputs) or 1 if that is null.
void ldm_rows(int dtype, const float* x, const void* w, const float* scale, float* y, int rows, int n, int64_t outputs, int threads) {
    if (dtype == 0)
        rows_product<Single>((const float*)w, x, scale, y, rows, n, outputs, threads);
    else if (dtype == 1)
        rows_product<Brain>((const uint16_t*)w, x, scale, y, rows, n, outputs, threads);
    else if (dtype == 2)
        rows_product<Half>((const uint16_t*)w, x, scale, y, rows, n, outputs, threads);
    else
        rows_product<Octet>((const int8_t*)w, x, scale, y, rows, n, outputs, threads);
}
}
