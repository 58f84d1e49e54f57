// The transforms before and after the 16 products of Winograd's 3×3 convolution F(2×2, 3×3), for
// channels-last maps in float32.
#include "simd.h"

namespace {

// Computes Bᵀ d of four rows, or d B of four columns.
inline void into(__m512& a, __m512& b, __m512& c, __m512& d) {
    const __m512 first = _mm512_sub_ps(a, c), sum = _mm512_add_ps(b, c), difference = _mm512_sub_ps(c, b);
    d = _mm512_sub_ps(b, d), a = first, b = sum, c = difference;
}

// Computes Aᵀ m of four rows, or m A of four columns; the two results are in a and b.
inline void out_of(__m512& a, __m512& b, __m512 c, __m512 d) {
    const __m512 sum = _mm512_add_ps(b, c), difference = _mm512_sub_ps(b, c);
    a = _mm512_add_ps(a, sum), b = _mm512_sub_ps(difference, d);
}

}  // namespace

extern "C" {

// Computes v (16, n, C) = Bᵀ d B of n tiles d, from tile `first` on, of x (B, H, W, C). Tiles are 4×4 and two
// pixels apart, 0 outside the map; C is a multiple of 16.
void ldm_winograd_in(const float* x, float* v, int H, int W, int C, int64_t first, int64_t n, int threads) {
    const int64_t across = (W + 1) / 2, down = (H + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = first + i, map = tile / (across * down);
        const int top = tile / across % down * 2 - 1, left = tile % across * 2 - 1;
        const float* from[16];
        for (int k = 0; k < 16; k++) {
            const int row = top + k / 4, column = left + k % 4;
            from[k] = row < 0 || row >= H || column < 0 || column >= W ? nullptr : x + ((map * H + row) * W + column) * C;
        }
        for (int c = 0; c < C; c += 16) {
            __m512 d[16];
            for (int k = 0; k < 16; k++) d[k] = from[k] ? _mm512_loadu_ps(from[k] + c) : _mm512_setzero_ps();
            for (int k = 0; k < 4; k++) into(d[k], d[4 + k], d[8 + k], d[12 + k]);
            for (int k = 0; k < 16; k += 4) into(d[k], d[k + 1], d[k + 2], d[k + 3]);
            for (int k = 0; k < 16; k++) _mm512_storeu_ps(v + (k * n + i) * C + c, d[k]);
        }
    }
}

// Computes the 2×2 pixels Aᵀ m A of n tiles, from tile `first` on, of y (B, H, W, C), plus the bias (C,), or
// null; m is (16, n, C).
void ldm_winograd_out(const float* m, const float* bias, float* y, int H, int W, int C, int64_t first, int64_t n, int threads) {
    const int64_t across = (W + 1) / 2, down = (H + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = first + i, map = tile / (across * down);
        const int top = tile / across % down * 2, left = tile % across * 2;
        float* to = y + ((map * H + top) * W + left) * C;
        for (int c = 0; c < C; c += 16) {
            __m512 d[16];
            for (int k = 0; k < 16; k++) d[k] = _mm512_loadu_ps(m + (k * n + i) * C + c);
            for (int k = 0; k < 4; k++) out_of(d[k], d[4 + k], d[8 + k], d[12 + k]);
            const __m512 b = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
            for (int row = 0; row < std::min(2, H - top); row++) {
                __m512* own = d + 4 * row;
                out_of(own[0], own[1], own[2], own[3]);
                for (int column = 0; column < std::min(2, W - left); column++)
                    _mm512_storeu_ps(to + ((int64_t)row * W + column) * C + c, _mm512_add_ps(own[column], b));
            }
        }
    }
}
}
