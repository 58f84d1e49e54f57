// What the products of maps and weights share: the block of results that fills the registers, and the panels
// of weights that it reads.
//
// A panel holds the weights of COLUMNS outputs, [input][COLUMNS]. The products of TILES rows with one panel are
// TILES × VECTORS vectors.
#pragma once
#include "elements.h"

namespace {

constexpr int VECTORS = W == 4 ? 4 : 2, TILES = (REGISTERS == 32 ? 24 : 12) / VECTORS, COLUMNS = VECTORS * W;

using Block = Vec[TILES][VECTORS];

// Adds the products of n inputs of TILES rows, at from[r] + at, with those of a panel, which are `step` panels'
// rows apart.
inline __attribute__((always_inline)) void accumulate(Block& acc, const float* const* from, int64_t at, const float* u, int n, int step) {
    const float* row[TILES];
    for (int r = 0; r < TILES; r++) row[r] = from[r] + at;
    for (int c = 0; c < n; c++, u += (int64_t)step * COLUMNS) {
        Vec uv[VECTORS];
        for (int i = 0; i < VECTORS; i++) uv[i] = load(u + i * W);
        for (int r = 0; r < TILES; r++) {
            const Vec x = spread(row[r][c]);
            for (int i = 0; i < VECTORS; i++) acc[r][i] = fma(x, uv[i], acc[r][i]);
        }
    }
}

// Widens n inputs of `rows` outputs, w[output·pitch + input], to a panel [n][COLUMNS]; the other columns are 0.
// The n inputs after them are fetched meanwhile.
template <class T>
void widen(const typename T::Elem* w, int64_t pitch, int rows, int64_t n, float* panel) {
    constexpr int64_t line = 64 / sizeof(typename T::Elem);
    for (int o = 0; o < COLUMNS; o += W)
        for (int64_t k = 0; k < n; k += W) {
            Vec lines[W];
            const int left = (int)std::min<int64_t>(W, n - k);
            for (int j = 0; j < W; j++) {
                const auto* from = w + (o + j) * pitch + k;
                if (k % line == 0) __builtin_prefetch(from + n);
                lines[j] = o + j >= rows ? Vec{} : left == W ? T::load(from, All{}) : T::load(from, tail(left));
            }
            transpose(lines);
            for (int j = 0; j < left; j++) store(panel + (k + j) * COLUMNS + o, lines[j]);
        }
}

}  // namespace

// Calls a template for the dtype of weights: 0 float32, 1 bfloat16, 2 float16.
#define EACH_WEIGHT(dtype, f, w, ...)                                   \
    ((dtype) == 0   ? f<Single>((const float*)(w), __VA_ARGS__)         \
     : (dtype) == 1 ? f<Brain>((const uint16_t*)(w), __VA_ARGS__)       \
                    : f<Half>((const uint16_t*)(w), __VA_ARGS__))
