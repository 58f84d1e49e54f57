// Winograd's 3×3 convolution F(4×4, 3×3) (Lavin and Gray 2016) of channels-last maps in float32: 36 products
// give the 16 pixels of a tile, instead of 144.
//
// The interpolation points are 0, ±1/√2, ±√2 and infinity, which round less than 0, ±1, ±2 and infinity. Each
// thread takes some tiles through all three steps, so that what lies between them stays in its caches.
#include "simd.h"

namespace {

constexpr float A = 0.70710678118654752f, B = 1.41421356237309505f;
// the products of TILES tiles with VECTORS vectors of outputs fill the registers
constexpr int VECTORS = W == 4 ? 4 : 2, TILES = (REGISTERS == 32 ? 24 : 12) / VECTORS, COLUMNS = VECTORS * W;

// Computes Bᵀ d of six rows, or d B of six columns.
inline void into(Vec& d0, Vec& d1, Vec& d2, Vec& d3, Vec& d4, Vec& d5) {
    const Vec two = spread(2.f), half = spread(.5f), more = spread(2.5f);
    const Vec first = d0 - more * d2 + d4, last = d5 - more * d3 + d1;
    const Vec even = d4 - two * d2, odd = spread(A) * (d3 - two * d1), even2 = d4 - half * d2, odd2 = spread(B) * (d3 - half * d1);
    d0 = first, d1 = even + odd, d2 = even - odd, d3 = even2 + odd2, d4 = even2 - odd2, d5 = last;
}

// Computes Aᵀ m of six rows, or m A of six columns; the four results are in the first four.
inline void out_of(Vec& m0, Vec& m1, Vec& m2, Vec& m3, Vec m4, Vec m5) {
    const Vec sum = m1 + m2, difference = m1 - m2, sum2 = m3 + m4, difference2 = m3 - m4;
    m0 = m0 + sum + sum2, m1 = spread(A) * difference + spread(B) * difference2;
    m2 = spread(.5f) * sum + spread(2.f) * sum2, m3 = spread(A / 2) * difference + spread(2 * B) * difference2 + m5;
}

struct Maps {
    int height, width, C, O;
    int64_t across = (width + 3) / 4, down = (height + 3) / 4;

    // Sets the map, and the first row and column, of a tile.
    void place(int64_t tile, int64_t& map, int& top, int& left) const {
        map = tile / (across * down), top = tile / across % down * 4, left = tile % across * 4;
    }
};

// Computes Bᵀ d B of the 6×6 pixels d around one tile; element k is at v + k·stride.
void transform_in(const float* x, const Maps& m, int64_t tile, float* v, int64_t stride) {
    int64_t map;
    int top, left;
    m.place(tile, map, top, left);
    const float* from[36];
    for (int k = 0; k < 36; k++) {
        const int row = top - 1 + k / 6, column = left - 1 + k % 6;
        from[k] = row < 0 || row >= m.height || column < 0 || column >= m.width ? nullptr : x + ((map * m.height + row) * m.width + column) * m.C;
    }
    for (int c = 0; c < m.C; c += W) {
        Vec d[36];
        for (int k = 0; k < 36; k++) d[k] = from[k] ? load(from[k] + c) : Vec{};
        for (int k = 0; k < 6; k++) into(d[k], d[6 + k], d[12 + k], d[18 + k], d[24 + k], d[30 + k]);
        for (int k = 0; k < 36; k += 6) {
            into(d[k], d[k + 1], d[k + 2], d[k + 3], d[k + 4], d[k + 5]);
            for (int j = k; j < k + 6; j++) store(v + j * stride + c, d[j]);
        }
    }
}

// Computes the 4×4 pixels Aᵀ m A of one tile plus the bias.
void transform_out(const float* p, int64_t stride, const float* bias, const Maps& m, int64_t tile, float* y) {
    int64_t map;
    int top, left;
    m.place(tile, map, top, left);
    float* to = y + ((map * m.height + top) * m.width + left) * m.O;
    const int rows = std::min(4, m.height - top), wide = std::min(4, m.width - left);
    for (int c = 0; c < m.O; c += W) {
        Vec d[36];
        for (int k = 0; k < 6; k++) {
            for (int j = k; j < 36; j += 6) d[j] = load(p + j * stride + c);
            out_of(d[k], d[6 + k], d[12 + k], d[18 + k], d[24 + k], d[30 + k]);
        }
        const Vec b = bias ? load(bias + c) : Vec{};
        for (int row = 0; row < rows; row++) {
            Vec* own = d + 6 * row;
            out_of(own[0], own[1], own[2], own[3], own[4], own[5]);
            for (int column = 0; column < wide; column++) store(to + ((int64_t)row * m.width + column) * m.O + c, own[column] + b);
        }
    }
}

// Computes TILES rows of v (·, C) times packed weights u (C, COLUMNS).
void multiply(const float* v, const float* u, int C, float* p, int64_t row) {
    Vec acc[TILES][VECTORS] = {};
    for (int c = 0; c < C; c++) {
        Vec uv[VECTORS];
        for (int i = 0; i < VECTORS; i++) uv[i] = load(u + (int64_t)c * COLUMNS + i * W);
        for (int r = 0; r < TILES; r++) {
            const Vec vv = spread(v[(int64_t)r * C + c]);
            for (int i = 0; i < VECTORS; i++) acc[r][i] = fma(vv, uv[i], acc[r][i]);
        }
    }
    for (int r = 0; r < TILES; r++)
        for (int i = 0; i < VECTORS; i++) store(p + r * row + i * W, acc[r][i]);
}

}  // namespace

extern "C" {

// Computes G g Gᵀ of weights g (O, C, 3, 3), packed as (36, ⌈O/COLUMNS⌉, C, COLUMNS).
void ldm_winograd_weights(const float* g, float* u, int O, int C, int threads) {
    const double a = std::sqrt(0.5), b = std::sqrt(2.0);
    const double G[6][3] = {{1, 0, 0},           {-1 / 1.5, -a / 1.5, -.5 / 1.5}, {-1 / 1.5, a / 1.5, -.5 / 1.5}, {1 / 6., b / 6, 2 / 6.},
                            {1 / 6., -b / 6, 2 / 6.}, {0, 0, 1}};
    const int blocks = (O + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int block = 0; block < blocks; block++)
        for (int c = 0; c < C; c++)
            for (int j = 0; j < COLUMNS; j++) {
                const int o = block * COLUMNS + j;
                const float* from = o < O ? g + ((int64_t)o * C + c) * 9 : nullptr;
                for (int k = 0; k < 36; k++) {
                    double sum = 0;
                    for (int i = 0; from && i < 9; i++) sum += G[k / 6][i / 3] * G[k % 6][i % 3] * from[i];
                    u[(((int64_t)k * blocks + block) * C + c) * COLUMNS + j] = (float)sum;
                }
            }
}

// Computes y (maps, height, width, O): the convolution, with padding 1, of x (maps, height, width, C) by
// weights from `ldm_winograd_weights`, plus the bias (O,) or null. C and O are multiples of 16; bytes: what a
// thread may use for the tiles that it computes at once.
void ldm_winograd(const float* x, const float* u, const float* bias, float* y, int maps, int height, int width, int C, int O, int64_t bytes,
                  int threads) {
    const Maps m{height, width, C, O};
    const int64_t tiles = maps * m.across * m.down, blocks = (O + COLUMNS - 1) / COLUMNS, made = blocks * COLUMNS;
    const int64_t fitting = std::max<int64_t>(1, bytes / (36 * 4 * (C + made))), shared = (tiles + threads - 1) / threads;
    const int64_t rounds = (shared + fitting - 1) / fitting;  // of each thread
    const int64_t at_once = round_up((shared + rounds - 1) / rounds, TILES), parts = (tiles + at_once - 1) / at_once;
    const int64_t v_stride = at_once * C + 16, p_stride = at_once * made + 16;  // 16: not all in the same cache lines
#pragma omp parallel num_threads((int)std::min<int64_t>(threads, parts))
    {
        auto v = buffer<float>(36 * v_stride), p = buffer<float>(36 * p_stride);
        std::memset(v.get(), 0, 36 * v_stride * 4);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = part * at_once, n = std::min(at_once, tiles - first);
            for (int64_t t = 0; t < n; t++) transform_in(x, m, first + t, v.get() + t * C, v_stride);
            for (int k = 0; k < 36; k++)
                for (int64_t block = 0; block < blocks; block++)
                    for (int64_t t = 0; t < n; t += TILES)
                        multiply(v.get() + k * v_stride + t * C, u + ((k * blocks + block) * C) * COLUMNS, C,
                                 p.get() + k * p_stride + t * made + block * COLUMNS, made);
            for (int64_t t = 0; t < n; t++) transform_out(p.get() + t * made, p_stride, bias, m, first + t, y);
        }
    }
}
}
