// Winograd's 3×3 convolution F(4×4, 3×3) (Lavin and Gray 2016) of channels-last maps in float32: 36 products
// give the 16 pixels of a tile, instead of 144.
//
// The interpolation points are 0, ±1/√2, ±√2 and infinity, which round less than 0, ±1, ±2 and infinity. Each
// thread takes some tiles through all three steps, so that what lies between them stays in its caches.
#include "panels.h"

namespace {

constexpr float A = 0.70710678118654752f, B = 1.41421356237309505f;
constexpr int APART = 16;  // numbers between the 36 parts of a buffer, which would else fall into the same lines of the cache

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

// Computes the 4×4 pixels Aᵀ m A of one tile plus the bias, for the outputs 0 to `made` of y.
void transform_out(const float* p, int64_t stride, const float* bias, const Maps& m, int64_t tile, int made, float* y) {
    int64_t map;
    int top, left;
    m.place(tile, map, top, left);
    float* to = y + ((map * m.height + top) * m.width + left) * m.O;
    const int rows = std::min(4, m.height - top), wide = std::min(4, m.width - left);
    for (int c = 0; c < made; c += W) {
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

// Computes TILES rows of v (·, C) times a panel of weights u (C, COLUMNS).
void multiply(const float* v, const float* u, int C, float* p, int64_t row) {
    const float* from[TILES];
    for (int r = 0; r < TILES; r++) from[r] = v + (int64_t)r * C;
    Block acc = {};
    accumulate(acc, from, 0, u, C, 1);
    for (int r = 0; r < TILES; r++)
        for (int i = 0; i < VECTORS; i++) store(p + r * row + i * W, acc[r][i]);
}

// Computes G g of three rows, or g Gᵀ of three columns, in six.
inline void weight_into(Vec g0, Vec g1, Vec g2, Vec (&to)[6]) {
    constexpr float third = 1 / 1.5f, sixth = 1 / 6.f;
    const Vec even = spread(-third) * g0 - spread(third / 2) * g2, odd = spread(third * A) * g1;
    const Vec even2 = spread(sixth) * g0 + spread(2 * sixth) * g2, odd2 = spread(sixth * B) * g1;
    to[0] = g0, to[1] = even - odd, to[2] = even + odd, to[3] = even2 + odd2, to[4] = even2 - odd2, to[5] = g2;
}

// Computes G g Gᵀ of weights g (O, C, 3, 3) for the outputs from o, element k at u + k·stride, as (C, COLUMNS).
template <class T>
void transform_weights(const typename T::Elem* g, int O, int C, int64_t o, float* u, int64_t stride) {
    constexpr int DEEP = 32;
    alignas(64) float wide[DEEP * 9 * COLUMNS];
    for (int c0 = 0; c0 < C; c0 += DEEP) {
        const int n = std::min(DEEP, C - c0);
        widen<T>(g + (o * C + c0) * 9, (int64_t)C * 9, (int)std::min<int64_t>(COLUMNS, O - o), n * 9, wide);
        for (int c = 0; c < n; c++)
            for (int i = 0; i < COLUMNS; i += W) {
                const float* from = wide + c * 9 * COLUMNS + i;
                Vec rows[3][6];
                for (int k = 0; k < 3; k++)
                    weight_into(load(from + k * COLUMNS), load(from + (3 + k) * COLUMNS), load(from + (6 + k) * COLUMNS), rows[k]);
                for (int k = 0; k < 6; k++) {
                    Vec made[6];
                    weight_into(rows[0][k], rows[1][k], rows[2][k], made);
                    for (int j = 0; j < 6; j++) store(u + (k * 6 + j) * stride + (int64_t)(c0 + c) * COLUMNS + i, made[j]);
                }
            }
    }
}

// Weights that are transformed already, or (O, C, 3, 3) as the layer holds them, which are transformed for
// `at_once` panels at a time.
template <class T>
struct Weights {
    const typename T::Elem* g;  // null: u holds all
    float* u;
    int64_t at_once;
};

// bytes: see `ldm_winograd`.
template <class T>
void convolve(const Weights<T>& weights, const float* x, const float* bias, float* y, const Maps& m, int64_t maps, int64_t bytes, int threads) {
    const int C = m.C;
    const int64_t panels = (m.O + COLUMNS - 1) / COLUMNS, most = weights.at_once * COLUMNS, tiles = maps * m.across * m.down;
    const int64_t fitting = std::max<int64_t>(1, bytes / (36 * 4 * (C + most))), shared = (tiles + threads - 1) / threads;
    const int64_t rounds = (shared + fitting - 1) / fitting;  // of each thread
    const int64_t at_once = round_up((shared + rounds - 1) / rounds, TILES), parts = (tiles + at_once - 1) / at_once;
    const int64_t v_stride = at_once * C + APART, p_stride = at_once * most + APART;
#pragma omp parallel num_threads((int)std::min<int64_t>(threads, weights.g ? std::max(parts, weights.at_once) : parts))
    {
        auto v = buffer<float>(36 * v_stride), p = buffer<float>(36 * p_stride);
        std::memset(v.get(), 0, 36 * v_stride * 4);
        const bool kept = parts <= omp_get_num_threads();  // the inputs of a thread's only part, for all panels
        for (int64_t first = 0; first < panels; first += weights.at_once) {
            const int64_t last = std::min(panels, first + weights.at_once), size = (last - first) * C * COLUMNS + APART, o = first * COLUMNS;
            const int made = (int)std::min<int64_t>((last - first) * COLUMNS, m.O - o);
            if (weights.g) {
#pragma omp for schedule(static)
                for (int64_t panel = first; panel < last; panel++)
                    transform_weights<T>(weights.g, m.O, C, panel * COLUMNS, weights.u + (panel - first) * C * COLUMNS, size);
            }
            auto compute = [&](int64_t part) {
                const int64_t begin = part * at_once, n = std::min(at_once, tiles - begin);
                for (int64_t t = 0; t < n && !(kept && first); t++) transform_in(x, m, begin + t, v.get() + t * C, v_stride);
                for (int k = 0; k < 36; k++)
                    for (int64_t panel = 0; panel < last - first; panel++)
                        for (int64_t t = 0; t < n; t += TILES)
                            multiply(v.get() + k * v_stride + t * C, weights.u + k * size + panel * C * COLUMNS, C,
                                     p.get() + k * p_stride + t * most + panel * COLUMNS, most);
                for (int64_t t = 0; t < n; t++) transform_out(p.get() + t * most, p_stride, bias ? bias + o : nullptr, m, begin + t, made, y + o);
            };
            if (kept) {
                if (omp_get_thread_num() < parts) compute(omp_get_thread_num());
#pragma omp barrier
            } else {
#pragma omp for schedule(dynamic, 1)
                for (int64_t part = 0; part < parts; part++) compute(part);
            }
        }
    }
}

template <class T>
void convolve_untransformed(const typename T::Elem* g, const float* x, const float* bias, float* y, const Maps& m, int64_t maps, int64_t bytes,
                            int64_t most, int threads) {
    const int64_t size = (int64_t)36 * m.C * COLUMNS, panels = (m.O + COLUMNS - 1) / COLUMNS;
    const int64_t fitting = std::max<int64_t>(1, most / (4 * size)), rounds = (panels + fitting - 1) / fitting;
    const int64_t at_once = (panels + rounds - 1) / rounds;
    auto u = buffer<float>(at_once * size + 36 * APART);
    convolve<T>({g, u.get(), at_once}, x, bias, y, m, maps, bytes, threads);
}

}  // namespace

extern "C" {

// Computes G g Gᵀ of weights g (O, C, 3, 3), packed as (36, ⌈O/COLUMNS⌉·C·COLUMNS + APART).
void ldm_winograd_weights(const float* g, float* u, int O, int C, int threads) {
    const int64_t panels = (O + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) 
        transform_weights<Single>(g, O, C, panel * COLUMNS, u + panel * C * COLUMNS, panels * C * COLUMNS + APART);
}

// Computes y (maps, height, width, O): the convolution, with padding 1, of x (maps, height, width, C) by
// weights from `ldm_winograd_weights`, plus the bias (O,) or null. C and O are multiples of 16; bytes: what a
// thread may use for the tiles that it computes at once.
void ldm_winograd(const float* x, float* u, const float* bias, float* y, int maps, int height, int width, int C, int O, int64_t bytes,
                  int threads) {
    convolve<Single>({nullptr, u, (O + COLUMNS - 1) / COLUMNS}, x, bias, y, Maps{height, width, C, O}, maps, bytes, threads);
}

// The same by weights g (O, C, 3, 3) of a dtype (0 float32, 1 bfloat16, 2 float16), which are transformed in a
// buffer of about `most` bytes.
void ldm_winograd_untransformed(int dtype, const float* x, const void* g, const float* bias, float* y, int maps, int height, int width, int C, int O,
                                int64_t bytes, int64_t most, int threads) {
    EACH_WEIGHT(dtype, convolve_untransformed, g, x, bias, y, (Maps{height, width, C, O}), maps, bytes, most, threads);
}
}
