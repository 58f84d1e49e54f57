// Linear layers and convolutions of channels-last maps in float32, by weights of 32 or 16 bits as the layer
// holds them.
//
// Each thread computes some of the outputs. It widens the weights of some inputs into a buffer, in the order in
// which the products read them, multiplies all rows with them, and uses the buffer again for the next inputs.
// In float32 the buffer takes the place of a packed copy of the weights.
#include "panels.h"

namespace {

constexpr int DEPTH = 288;  // inputs of a panel at once, which stay in the L1 cache
constexpr int PANELS = 8, BLOCKS = 16;  // panels, and blocks of rows, at once, which stay in the L2 cache

struct Layer {
    int maps, height, width, C, O, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_h, out_w;

    int taps() const { return kernel_h * kernel_w; }
    int64_t rows() const { return (int64_t)maps * out_h * out_w; }

    // Sets where the inputs of TILES rows from `first` begin, [taps][TILES]; outside of the map they are zeros.
    void place(const float* x, const float* zeros, int64_t first, const float** from) const {
        for (int r = 0; r < TILES; r++) {
            const int64_t row = std::min(first + r, rows() - 1), map = row / ((int64_t)out_h * out_w);
            const int top = (int)(row / out_w % out_h) * stride_h - pad_h, left = (int)(row % out_w) * stride_w - pad_w;
            for (int t = 0; t < taps(); t++) {
                const int i = top + t / kernel_w, j = left + t % kernel_w;
                from[t * TILES + r] = i < 0 || i >= height || j < 0 || j >= width ? zeros : x + ((map * height + i) * width + j) * C;
            }
        }
    }
};

// Computes or continues the sums of `rows` rows for one panel. bias: where the sums begin; null to continue.
template <class In>
inline void block(const float* const* from, int taps, int64_t at, const float* panel, int n, const float* bias, float* y, int64_t pitch, int rows,
                  const In (&in)[VECTORS]) {
    Block acc = {};
    if (bias) {
        for (int i = 0; i < VECTORS; i++) {
            const Vec b = load(bias + i * W, in[i]);
            for (int r = 0; r < TILES; r++) acc[r][i] = b;
        }
    } else {
        for (int r = 0; r < TILES; r++)
            if (r < rows)
                for (int i = 0; i < VECTORS; i++) acc[r][i] = load(y + r * pitch + i * W, in[i]);
    }
    for (int t = 0; t < taps; t++) accumulate(acc, from + t * TILES, at, panel + t * COLUMNS, n, taps);
    for (int r = 0; r < TILES; r++)
        if (r < rows)
            for (int i = 0; i < VECTORS; i++) store(y + r * pitch + i * W, acc[r][i], in[i]);
}

// One thread's share: panels first to last of the rows in blocks begin to end. The zeros are C numbers.
template <class T>
void share(const typename T::Elem* w, const float* x, const float* bias, const float* zeros, float* y, const Layer& l, int64_t first, int64_t last,
           int64_t begin, int64_t end) {
    const int taps = l.taps(), deep = std::max(1, DEPTH / taps / 16 * 16);
    const int64_t size = (int64_t)deep * taps * COLUMNS;
    auto wide = buffer<float>(PANELS * size);
    auto from = buffer<const float*>((size_t)BLOCKS * taps * TILES);
    for (; first < last; first += PANELS)
        for (int c = 0; c < l.C; c += deep) {
            const int n = std::min(deep, l.C - c), panels = (int)std::min<int64_t>(PANELS, last - first);
            for (int p = 0; p < panels; p++) {
                const int64_t o = (first + p) * COLUMNS;
                widen<T>(w + (o * l.C + c) * taps, (int64_t)l.C * taps, (int)std::min<int64_t>(COLUMNS, l.O - o), (int64_t)n * taps, wide.get() + p * size);
            }
            for (int64_t b = begin; b < end; b += BLOCKS) {
                const int some = (int)std::min<int64_t>(BLOCKS, end - b);
                for (int i = 0; i < some; i++) l.place(x, zeros, (b + i) * TILES, from.get() + i * taps * TILES);
                for (int p = 0; p < panels; p++) {
                    const int64_t o = (first + p) * COLUMNS;
                    auto run = [&](const auto& in) {
                        for (int i = 0; i < some; i++) {
                            const int64_t row = (b + i) * TILES;
                            block(from.get() + i * taps * TILES, taps, c, wide.get() + p * size, n, c ? nullptr : bias + o, y + row * l.O + o, l.O,
                                  (int)std::min<int64_t>(TILES, l.rows() - row), in);
                        }
                    };
                    if (l.O - o >= COLUMNS) {
                        const All all[VECTORS] = {};
                        run(all);
                    } else {
                        Lanes rest[VECTORS];
                        for (int v = 0; v < VECTORS; v++) rest[v] = tail((int)(l.O - o) - v * W);
                        run(rest);
                    }
                }
            }
        }
}

template <class T>
void product(const typename T::Elem* w, const float* x, const float* bias, const float* zeros, float* y, const Layer& l, int threads) {
    const int64_t blocks = (l.rows() + TILES - 1) / TILES, panels = (l.O + COLUMNS - 1) / COLUMNS;
    const int across = (int)std::min<int64_t>(threads, panels), down = (int)std::min<int64_t>(std::max(1, threads / across), blocks);
#pragma omp parallel for num_threads(across * down) schedule(static, 1)
    for (int i = 0; i < across * down; i++)
        share<T>(w, x, bias, zeros, y, l, panels * (i % across) / across, panels * (i % across + 1) / across, blocks * (i / across) / down,
                 blocks * (i / across + 1) / down);
}

}  // namespace

extern "C" {

// Computes y (maps, out_h, out_w, O), the convolution of x (maps, height, width, C) by weights w (O, C,
// kernel_h, kernel_w) of a dtype (0 float32, 1 bfloat16, 2 float16), plus the bias (O,). A linear layer is the
// convolution of one map of one row by a kernel of 1×1. sizes: those of `Layer`; zeros: C numbers.
void ldm_product(int dtype, const float* x, const void* w, const float* bias, const float* zeros, float* y, const int* sizes, int threads) {
    Layer l;
    std::memcpy(&l, sizes, sizeof l);
    EACH_WEIGHT(dtype, product, w, x, bias, zeros, y, l, threads);
}
}
