// The transforms before and after the 16 products of Winograd's 3×3 convolution F(2×2, 3×3), for
// channels-last maps in float32.
#include "simd.h"

namespace {

// Computes Bᵀ d of four rows, or d B of four columns.
inline void into(Vec& a, Vec& b, Vec& c, Vec& d) {
    const Vec first = a - c, sum = b + c, difference = c - b;
    d = b - d, a = first, b = sum, c = difference;
}

// Computes Aᵀ m of four rows, or m A of four columns; the two results are in a and b.
inline void out_of(Vec& a, Vec& b, Vec c, Vec d) {
    const Vec sum = b + c, difference = b - c;
    a = a + sum, b = difference - d;
}

}  // namespace

extern "C" {

// Computes v (16, n, C) = Bᵀ d B of n tiles d, from tile `first` on, of x (B, H, W, C). Tiles are 4×4 and two
// pixels apart, 0 outside the map; C is a multiple of 16.
void ldm_winograd_in(const float* x, float* v, int height, int width, int C, int64_t first, int64_t n, int threads) {
    const int64_t across = (width + 1) / 2, down = (height + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = first + i, map = tile / (across * down);
        const int top = tile / across % down * 2 - 1, left = tile % across * 2 - 1;
        const float* from[16];
        for (int k = 0; k < 16; k++) {
            const int row = top + k / 4, column = left + k % 4;
            from[k] = row < 0 || row >= height || column < 0 || column >= width ? nullptr : x + ((map * height + row) * width + column) * C;
        }
        for (int c = 0; c < C; c += W) {
            Vec d[16];
            for (int k = 0; k < 16; k++) d[k] = from[k] ? load(from[k] + c) : Vec{};
            for (int k = 0; k < 4; k++) into(d[k], d[4 + k], d[8 + k], d[12 + k]);
            for (int k = 0; k < 16; k += 4) into(d[k], d[k + 1], d[k + 2], d[k + 3]);
            for (int k = 0; k < 16; k++) store(v + (k * n + i) * C + c, d[k]);
        }
    }
}

// Computes the 2×2 pixels Aᵀ m A of n tiles, from tile `first` on, of y (B, H, W, C), plus the bias (C,), or
// null; m is (16, n, C).
void ldm_winograd_out(const float* m, const float* bias, float* y, int height, int width, int C, int64_t first, int64_t n, int threads) {
    const int64_t across = (width + 1) / 2, down = (height + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = first + i, map = tile / (across * down);
        const int top = tile / across % down * 2, left = tile % across * 2;
        float* to = y + ((map * height + top) * width + left) * C;
        for (int c = 0; c < C; c += W) {
            Vec d[16];
            for (int k = 0; k < 16; k++) d[k] = load(m + (k * n + i) * C + c);
            for (int k = 0; k < 4; k++) out_of(d[k], d[4 + k], d[8 + k], d[12 + k]);
            const Vec b = bias ? load(bias + c) : Vec{};
            for (int row = 0; row < std::min(2, height - top); row++) {
                Vec* own = d + 4 * row;
                out_of(own[0], own[1], own[2], own[3]);
                for (int column = 0; column < std::min(2, width - left); column++)
                    store(to + ((int64_t)row * width + column) * C + c, own[column] + b);
            }
        }
    }
}
}
