// Attention, where PyTorch's kernel reaches a third of the processor's peak rate.
//
// The algorithm is FlashAttention (Dao et al. 2022, algorithm 1) with blocks that fit in the L2 cache: 48
// queries against some hundred keys. Keys and values are packed once per head, so that the inner loops multiply
// registers: one instruction multiplies W columns, or W pairs of columns in bfloat16.
#include "simd.h"

namespace {

constexpr int ROWS = 48;          // queries in one block of scores
constexpr float LOWEST = -1e30f;  // the score of a masked key
constexpr int WIDEST = REGISTERS == 32 ? 4 : 2;  // vectors of keys against which 6 queries fill the registers

struct View {  // (B, H, L, d) with contiguous d; the strides are in elements
    const void* data;
    int64_t batch, head, row;
};

// Packs the keys of a head as [M/W][d words][W keys].
template <class T>
void pack_keys(const typename T::Elem* k, int64_t row, int keys, int padded, int d, uint32_t* out) {
    const int words = d / T::PAIR;
    for (int block = 0; block < padded; block += W)
        for (int j = 0; j < W; j++) {
            uint32_t* to = out + (size_t)block * words + j;
            const bool real = block + j < keys;
            const auto* from = k + (real ? block + j : 0) * row;
            for (int w = 0; w < words; w++) {
                uint32_t word = 0;
                if (real) std::memcpy(&word, from + w * T::PAIR, 4);
                to[(size_t)w * W] = word;
            }
        }
}

// Packs the values of a head as [M words][wide]; a word holds one column of one key, or of a pair of keys.
template <class T>
void pack_values(const typename T::Elem* v, int64_t row, int keys, int padded, int d, int wide, uint32_t* out) {
    for (int key = 0; key < padded; key += T::PAIR)
        columns<1>(d, [=](auto, int c, auto in) {
            uint32_t* to = out + (size_t)key / T::PAIR * wide + c;
            const Words a = key < keys ? (Words)T::load(v + key * row + c, in) : Words{};
            if constexpr (T::PAIR == 1) {
                store_words(to, a);
            } else {
                const Words b = key + 1 < keys ? (Words)T::load(v + (key + 1) * row + c, in) : Words{};
                store_words(to, (a >> 16) | b);
            }
        });
}

// Computes the scores of 6 queries against C vectors of keys, and updates the maximum of each query.
template <class T, int C>
inline void score_tile(const uint32_t* q, int words, const uint32_t* k, const float* bias, float* s, int block, float* top) {
    Vec acc[6][C];
    for (int r = 0; r < 6; r++)
        for (int c = 0; c < C; c++) acc[r][c] = load(bias + W * c);
    for (int w = 0; w < words; w++) {
        Words kv[C];
        for (int c = 0; c < C; c++) kv[c] = load_words(k + ((size_t)c * words + w) * W);
        for (int r = 0; r < 6; r++) {
            const Words qv = spread_word(q[r * words + w]);
            for (int c = 0; c < C; c++) acc[r][c] = T::dot(acc[r][c], qv, kv[c]);
        }
    }
    for (int r = 0; r < 6; r++) {
        Vec m = load(top + r * W);
        for (int c = 0; c < C; c++) {
            store(s + r * block + W * c, acc[r][c]);
            m = larger(m, acc[r][c]);
        }
        store(top + r * W, m);
    }
}

// Multiplies the accumulators of the output by alpha, and adds the product of R rows of probabilities and C
// vectors (with HALF half a vector more) of columns of values.
template <class T, int R, int C, bool HALF>
inline void value_tile(const uint32_t* p, int stride, int steps, const uint32_t* v, int wide, const float* alpha, float* o) {
    Vec acc[R][C > 0 ? C : 1];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = spread(alpha[r]) * load(o + r * wide + W * c);
    if constexpr (HALF) {
        typename T::Half half[R];
        for (int r = 0; r < R; r++) half[r] = T::half_spread(alpha[r]) * T::half_load(o + r * wide + W * C);
        for (int i = 0; i < steps; i++) {
            Words vv[C > 0 ? C : 1];
            for (int c = 0; c < C; c++) vv[c] = load_words(v + (size_t)i * wide + W * c);
            for (int r = 0; r < R; r++) {
                const uint32_t pv = p[r * stride + i];
                for (int c = 0; c < C; c++) acc[r][c] = T::dot(acc[r][c], spread_word(pv), vv[c]);
                half[r] = T::half_dot(half[r], pv, v + (size_t)i * wide + W * C);
            }
        }
        for (int r = 0; r < R; r++) T::half_store(o + r * wide + W * C, half[r]);
    } else {
        for (int i = 0; i < steps; i++) {
            Words vv[C];
            for (int c = 0; c < C; c++) vv[c] = load_words(v + (size_t)i * wide + W * c);
            for (int r = 0; r < R; r++) {
                const Words pv = spread_word(p[r * stride + i]);
                for (int c = 0; c < C; c++) acc[r][c] = T::dot(acc[r][c], pv, vv[c]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(o + r * wide + W * c, acc[r][c]);
}

// Applies value_tile to all columns, in groups whose accumulators fill the registers.
template <class T>
void values(const uint32_t* p, int stride, int steps, const uint32_t* v, int d, int wide, const float* alpha, float* o) {
    int left = d / W;
    auto group = [&](auto rows, auto wide_vectors, auto half) {
        constexpr int R = rows, C = wide_vectors;
        for (int r = 0; r < ROWS; r += R) value_tile<T, R, C, half>(p + r * stride, stride, steps, v, wide, alpha + r, o + r * wide);
        left -= C, v += W * C, o += W * C;
    };
    if constexpr (W == 16) {  // rows may end with half a vector
        const bool half = d % W != 0;
        while (half && left > 2) switch (std::min(left - 2, 4)) {
                case 4: group(Count<6>{}, Count<4>{}, Count<0>{}); break;
                case 3: group(Count<8>{}, Count<3>{}, Count<0>{}); break;
                case 2: group(Count<12>{}, Count<2>{}, Count<0>{}); break;
                default: group(Count<24>{}, Count<1>{}, Count<0>{});
            }
        if (half) switch (left) {
                case 2: return group(Count<8>{}, Count<2>{}, Count<1>{});
                case 1: return group(Count<12>{}, Count<1>{}, Count<1>{});
                default: return group(Count<24>{}, Count<0>{}, Count<1>{});
            }
    }
    if constexpr (REGISTERS == 32)
        while (left) switch (left % 5 == 0 ? 5 : left >= 4 && left != 6 ? 4 : std::min(left, 3)) {
                case 5: group(Count<4>{}, Count<5>{}, Count<0>{}); break;
                case 4: group(Count<6>{}, Count<4>{}, Count<0>{}); break;
                case 3: group(Count<8>{}, Count<3>{}, Count<0>{}); break;
                case 2: group(Count<12>{}, Count<2>{}, Count<0>{}); break;
                default: group(Count<24>{}, Count<1>{}, Count<0>{});
            }
    else
        while (left) switch (left % 3 == 1 && left > 1 ? 2 : std::min(left, 3)) {
                case 3: group(Count<4>{}, Count<3>{}, Count<0>{}); break;
                case 2: group(Count<6>{}, Count<2>{}, Count<0>{}); break;
                default: group(Count<12>{}, Count<1>{}, Count<0>{});
            }
}

// Turns scores into probabilities, not yet divided by their sum; alpha is the factor for the sums of earlier
// blocks.
template <class T>
inline void exponentials(float* s, uint32_t* p, int keys, float scale, float* top, float& best, float& sum, float& alpha) {
    const float m = std::max(best, maximum(load(top)));
    alpha = best == m ? 1.f : std::exp2((best - m) * scale);
    best = m;
    const Vec c = spread(scale), shift = spread(-m * scale), floor = spread(-126.f);
    Vec one = {}, two = {};
    for (int j = 0; j < keys; j += 2 * W) {  // may compute W columns too many, which are in the buffer and never read
        const Vec a = exp2_<T::DEGREE>(larger(floor, fma(load(s + j), c, shift)));
        const Vec b = exp2_<T::DEGREE>(larger(floor, fma(load(s + j + W), c, shift)));
        one += a;
        if (j + W < keys) two += b;
        T::store_p(p + j / T::PAIR, a, b);
    }
    sum = sum * alpha + total(one + two);
}

struct Scratch {
    int block;  // keys in one block of scores
    Buffer<float> s, o, top = buffer<float>(ROWS * W);
    Buffer<uint32_t> p, q;
    Scratch(int block, int d, int wide)
        : block(block), s(buffer<float>(ROWS * block)), o(buffer<float>(ROWS * wide)), p(buffer<uint32_t>(ROWS * block)), q(buffer<uint32_t>(ROWS * d)) {
        std::memset(s.get(), 0, (size_t)ROWS * block * 4);
    }
};

template <class T>
void block(const typename T::Elem* q, int64_t q_row, const uint32_t* k, const uint32_t* v, const float* bias, typename T::Elem* out, int64_t out_row,
           int rows, int padded, int d, int wide, float scale, Scratch& x) {
    const int words = d / T::PAIR, stride = x.block / T::PAIR;
    float best[ROWS], sum[ROWS], alpha[ROWS];
    std::fill(best, best + ROWS, LOWEST), std::fill(sum, sum + ROWS, 0.f);
    std::memset(x.o.get(), 0, ROWS * wide * 4);
    for (int r = 0; r < ROWS; r++) {
        if (r < rows) std::memcpy(x.q.get() + r * words, q + r * q_row, d * sizeof(*q));
        else std::memset(x.q.get() + r * words, 0, words * 4);
    }
    for (int first = 0; first < padded; first += x.block) {
        const int keys = std::min(x.block, padded - first);
        std::fill(x.top.get(), x.top.get() + ROWS * W, LOWEST);
        for (int j = 0; j < keys;) {
            const int left = (keys - j) / W, c = left == 5 && WIDEST == 4 ? 3 : std::min(left, WIDEST);
            const uint32_t* tile = k + (size_t)(first + j) * words;
            for (int r = 0; r < ROWS; r += 6) {
                auto run = c == 4 ? score_tile<T, WIDEST> : c == 3 ? score_tile<T, std::min(3, WIDEST)> : c == 2 ? score_tile<T, 2> : score_tile<T, 1>;
                run(x.q.get() + r * words, words, tile, bias + first + j, x.s.get() + r * x.block + j, x.block, x.top.get() + r * W);
            }
            j += W * c;
        }
        for (int r = 0; r < ROWS; r++)
            exponentials<T>(x.s.get() + r * x.block, x.p.get() + r * stride, keys, scale, x.top.get() + r * W, best[r], sum[r], alpha[r]);
        values<T>(x.p.get(), stride, keys / T::PAIR, v + (size_t)first / T::PAIR * wide, d, wide, alpha, x.o.get());
    }
    for (int r = 0; r < rows; r++)
        columns<1>(d, [&](auto, int c, auto in) { T::store(out + r * out_row + c, spread(1.f / sum[r]) * load(x.o.get() + r * wide + c), in); });
}

template <class T>
void attention(const View& q, const View& k, const View& v, const uint8_t* mask, const View& out, int B, int H, int L, int M, int d, int keys_at_once,
               int threads) {
    using E = typename T::Elem;
    const int padded = round_up(M, W), wide = round_up(d, W), blocks = (L + ROWS - 1) / ROWS;
    const size_t k_size = (size_t)padded * d / T::PAIR, v_size = (size_t)padded * wide / T::PAIR;
    auto keys = buffer<uint32_t>(k_size * B * H), vals = buffer<uint32_t>(v_size * B * H);
    auto bias = buffer<float>((size_t)padded * B);
    for (int b = 0; b < B; b++)
        for (int j = 0; j < padded; j++) bias[(size_t)b * padded + j] = j < M && (!mask || mask[(size_t)b * M + j]) ? 0.f : LOWEST;
    const float scale = 1.4426950408889634f / std::sqrt((float)d);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(keys_at_once, d, wide);
#pragma omp for schedule(static)
        for (int i = 0; i < B * H; i++) {
            pack_keys<T>((const E*)k.data + i / H * k.batch + i % H * k.head, k.row, M, padded, d, keys.get() + i * k_size);
            pack_values<T>((const E*)v.data + i / H * v.batch + i % H * v.head, v.row, M, padded, d, wide, vals.get() + i * v_size);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < (int64_t)B * H * blocks; item++) {
            const int i = item / blocks, b = i / H, h = i % H, row = item % blocks * ROWS;
            block<T>((const E*)q.data + b * q.batch + h * q.head + row * q.row, q.row, keys.get() + i * k_size, vals.get() + i * v_size,
                     bias.get() + (size_t)b * padded, (E*)out.data + b * out.batch + h * out.head + row * out.row, out.row,
                     std::min(ROWS, L - row), padded, d, wide, scale, scratch);
        }
    }
}

}  // namespace

extern "C" {

int has_bf16() {
#ifdef LDM_BF16
    return 1;
#else
    return 0;
#endif
}

// Computes softmax(q kᵀ / sqrt(d)) v. strides: (batch, head, row) of q, k, v and out, in elements. mask: (B,
// M) bytes, 0 for masked keys; or null. keys: how many are in one block of scores, a multiple of 32.
void ldm_attention(int bf16, const void* q, const void* k, const void* v, const uint8_t* mask, void* out, const int64_t* strides, int B, int H, int L,
                   int M, int d, int keys, int threads) {
    const int64_t* s = strides;
    const View Q{q, s[0], s[1], s[2]}, K{k, s[3], s[4], s[5]}, V{v, s[6], s[7], s[8]}, O{out, s[9], s[10], s[11]};
    EACH(bf16, attention<BF16>(Q, K, V, mask, O, B, H, L, M, d, keys, threads), attention<F32>(Q, K, V, mask, O, B, H, L, M, d, keys, threads));
}
}
