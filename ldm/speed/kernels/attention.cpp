// Attention for CPUs with AVX-512, where PyTorch's kernel reaches a third of the processor's peak rate.
//
// The algorithm is FlashAttention (Dao et al. 2022, algorithm 1) with blocks that fit in the L2 cache: 48
// queries against 512 keys. Keys and values are packed once per head, so that the inner loops multiply
// registers: one instruction multiplies 16 columns, or 16 pairs of columns in bfloat16.
#include "simd.h"

namespace {

constexpr int ROWS = 48, KEYS = 512;  // size of one block of scores, 96 KiB in float32
constexpr float LOWEST = -1e30f;      // the score of a masked key

struct View {  // (B, H, L, d) with contiguous d; the strides are in elements
    const void* data;
    int64_t batch, head, row;
};

// Packs the keys of a head as [M/16][d words][16 keys].
template <class T>
void pack_keys(const typename T::Elem* k, int64_t row, int keys, int padded, int d, uint32_t* out) {
    const int words = d / T::PAIR;
    for (int block = 0; block < padded; block += 16)
        for (int j = 0; j < 16; j++) {
            uint32_t* to = out + (size_t)block * words + j;
            const bool real = block + j < keys;
            const auto* from = k + (real ? block + j : 0) * row;
            for (int w = 0; w < words; w++) {
                uint32_t word = 0;
                if (real) std::memcpy(&word, from + w * T::PAIR, 4);
                to[(size_t)w * 16] = word;
            }
        }
}

// Packs the values of a head as [M words][wide]; a word holds one column of one key, or of a pair of keys.
template <class T>
void pack_values(const typename T::Elem* v, int64_t row, int keys, int padded, int d, int wide, uint32_t* out) {
    for (int key = 0; key < padded; key += T::PAIR)
        for (int c = 0; c < wide; c += 16) {
            const __mmask16 in = tail(d - c);
            const __m512i a = _mm512_castps_si512(T::load(v + key * row + c, key < keys ? in : 0));
            uint32_t* to = out + (size_t)key / T::PAIR * wide + c;
            if constexpr (T::PAIR == 1) {
                _mm512_storeu_si512(to, a);
            } else {
                const __m512i b = _mm512_castps_si512(T::load(v + (key + 1) * row + c, key + 1 < keys ? in : 0));
                _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
            }
        }
}

// Computes the scores of 6 queries against C·16 keys, and updates the maximum of each query.
template <class T, int C>
inline void score_tile(const uint32_t* q, int words, const uint32_t* k, const float* bias, float* s, float* top) {
    __m512 acc[6][C];
    for (int r = 0; r < 6; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm512_loadu_ps(bias + 16 * c);
    for (int w = 0; w < words; w++) {
        __m512i kv[C];
        for (int c = 0; c < C; c++) kv[c] = _mm512_loadu_si512(k + ((size_t)c * words + w) * 16);
        for (int r = 0; r < 6; r++) {
            const __m512i qv = _mm512_set1_epi32(q[r * words + w]);
            for (int c = 0; c < C; c++) acc[r][c] = T::dot(acc[r][c], qv, kv[c]);
        }
    }
    for (int r = 0; r < 6; r++) {
        __m512 m = _mm512_loadu_ps(top + r * 16);
        for (int c = 0; c < C; c++) {
            _mm512_storeu_ps(s + r * KEYS + 16 * c, acc[r][c]);
            m = _mm512_max_ps(m, acc[r][c]);
        }
        _mm512_storeu_ps(top + r * 16, m);
    }
}

// Multiplies the accumulators of the output by alpha, and adds the product of R rows of probabilities and
// C·16 (with HALF 8 more) columns of values.
template <class T, int R, int C, bool HALF>
inline void value_tile(const uint32_t* p, int steps, const uint32_t* v, int wide, const float* alpha, float* o) {
    __m512 acc[R][C > 0 ? C : 1];
    __m256 half[R];
    for (int r = 0; r < R; r++) {
        const __m512 a = _mm512_set1_ps(alpha[r]);
        for (int c = 0; c < C; c++) acc[r][c] = _mm512_mul_ps(a, _mm512_loadu_ps(o + r * wide + 16 * c));
        if constexpr (HALF) half[r] = _mm256_mul_ps(_mm512_castps512_ps256(a), _mm256_loadu_ps(o + r * wide + 16 * C));
    }
    for (int i = 0; i < steps; i++) {
        __m512i vv[C > 0 ? C : 1];
        for (int c = 0; c < C; c++) vv[c] = _mm512_loadu_si512(v + (size_t)i * wide + 16 * c);
        __m256i vh;
        if constexpr (HALF) vh = _mm256_loadu_si256((const __m256i*)(v + (size_t)i * wide + 16 * C));
        for (int r = 0; r < R; r++) {
            const __m512i pv = _mm512_set1_epi32(p[r * (KEYS / T::PAIR) + i]);
            for (int c = 0; c < C; c++) acc[r][c] = T::dot(acc[r][c], pv, vv[c]);
            if constexpr (HALF) half[r] = T::dot(half[r], _mm512_castsi512_si256(pv), vh);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) _mm512_storeu_ps(o + r * wide + 16 * c, acc[r][c]);
        if constexpr (HALF) _mm256_storeu_ps(o + r * wide + 16 * C, half[r]);
    }
}

template <class T, int R, int C, bool HALF>
void value_columns(const uint32_t* p, int steps, const uint32_t* v, int wide, const float* alpha, float* o) {
    for (int r = 0; r < ROWS; r += R) value_tile<T, R, C, HALF>(p + r * (KEYS / T::PAIR), steps, v, wide, alpha + r, o + r * wide);
}

// Applies value_tile to all columns, in groups whose accumulators fill the registers.
template <class T>
void values(const uint32_t* p, int steps, const uint32_t* v, int d, int wide, const float* alpha, float* o) {
    int left = d / 16;
    const bool half = d % 16 != 0;
    while (left > (half ? 2 : 0)) {
        const int c = half ? std::min(left - 2, 4) : left % 5 == 0 ? 5 : left >= 4 && left != 6 ? 4 : std::min(left, 3);
        switch (c) {
            case 5: value_columns<T, 4, 5, false>(p, steps, v, wide, alpha, o); break;
            case 4: value_columns<T, 6, 4, false>(p, steps, v, wide, alpha, o); break;
            case 3: value_columns<T, 8, 3, false>(p, steps, v, wide, alpha, o); break;
            case 2: value_columns<T, 12, 2, false>(p, steps, v, wide, alpha, o); break;
            default: value_columns<T, 24, 1, false>(p, steps, v, wide, alpha, o);
        }
        left -= c, v += 16 * c, o += 16 * c;
    }
    if (half) switch (left) {
            case 2: value_columns<T, 8, 2, true>(p, steps, v, wide, alpha, o); break;
            case 1: value_columns<T, 12, 1, true>(p, steps, v, wide, alpha, o); break;
            default: value_columns<T, 24, 0, true>(p, steps, v, wide, alpha, o);
        }
}

// Turns scores into probabilities, not yet divided by their sum; alpha is the factor for the sums of earlier
// blocks.
template <class T>
inline void exponentials(float* s, uint32_t* p, int keys, float scale, float* top, float& best, float& sum, float& alpha) {
    const float m = std::max(best, _mm512_reduce_max_ps(_mm512_loadu_ps(top)));
    alpha = best == m ? 1.f : std::exp2((best - m) * scale);
    best = m;
    const __m512 c = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-m * scale), floor = _mm512_set1_ps(-126.f);
    __m512 total = _mm512_setzero_ps(), other = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += 32) {  // may compute 16 columns too many, which are in the buffer and never read
        const __m512 a = exp2_<T::DEGREE>(_mm512_max_ps(floor, _mm512_fmadd_ps(_mm512_loadu_ps(s + j), c, shift)));
        const __m512 b = exp2_<T::DEGREE>(_mm512_max_ps(floor, _mm512_fmadd_ps(_mm512_loadu_ps(s + j + 16), c, shift)));
        total = _mm512_add_ps(total, a);
        if (j + 16 < keys) other = _mm512_add_ps(other, b);
        T::store_p(p + j / T::PAIR, a, b);
    }
    sum = sum * alpha + _mm512_reduce_add_ps(_mm512_add_ps(total, other));
}

struct Scratch {
    Buffer<float> s = buffer<float>(ROWS * KEYS), o, top = buffer<float>(ROWS * 16);
    Buffer<uint32_t> p = buffer<uint32_t>(ROWS * KEYS), q;
    Scratch(int d, int wide) : o(buffer<float>(ROWS * wide)), q(buffer<uint32_t>(ROWS * d)) { std::memset(s.get(), 0, ROWS * KEYS * 4); }
};

template <class T>
void block(const typename T::Elem* q, int64_t q_row, const uint32_t* k, const uint32_t* v, const float* bias, typename T::Elem* out, int64_t out_row,
           int rows, int padded, int d, int wide, float scale, Scratch& x) {
    const int words = d / T::PAIR;
    float best[ROWS], sum[ROWS], alpha[ROWS];
    std::fill(best, best + ROWS, LOWEST), std::fill(sum, sum + ROWS, 0.f);
    std::memset(x.o.get(), 0, ROWS * wide * 4);
    for (int r = 0; r < ROWS; r++) {
        if (r < rows) std::memcpy(x.q.get() + r * words, q + r * q_row, d * sizeof(*q));
        else std::memset(x.q.get() + r * words, 0, words * 4);
    }
    for (int first = 0; first < padded; first += KEYS) {
        const int keys = std::min(KEYS, padded - first);
        std::fill(x.top.get(), x.top.get() + ROWS * 16, LOWEST);
        for (int j = 0; j < keys;) {
            const int left = (keys - j) / 16, c = left == 5 ? 3 : std::min(left, 4);
            const uint32_t* tile = k + (size_t)(first + j) * words;
            for (int r = 0; r < ROWS; r += 6) {
                auto run = c == 4 ? score_tile<T, 4> : c == 3 ? score_tile<T, 3> : c == 2 ? score_tile<T, 2> : score_tile<T, 1>;
                run(x.q.get() + r * words, words, tile, bias + first + j, x.s.get() + r * KEYS + j, x.top.get() + r * 16);
            }
            j += 16 * c;
        }
        for (int r = 0; r < ROWS; r++)
            exponentials<T>(x.s.get() + r * KEYS, x.p.get() + r * (KEYS / T::PAIR), keys, scale, x.top.get() + r * 16, best[r], sum[r], alpha[r]);
        values<T>(x.p.get(), keys / T::PAIR, v + (size_t)first / T::PAIR * wide, d, wide, alpha, x.o.get());
    }
    for (int r = 0; r < rows; r++) {
        const __m512 inverse = _mm512_set1_ps(1.f / sum[r]);
        for (int c = 0; c < d; c += 16) {
            const __mmask16 in = tail(d - c);
            T::store(out + r * out_row + c, _mm512_mul_ps(inverse, _mm512_loadu_ps(x.o.get() + r * wide + c)), in);
        }
    }
}

template <class T>
void attention(const View& q, const View& k, const View& v, const uint8_t* mask, const View& out, int B, int H, int L, int M, int d, int threads) {
    using E = typename T::Elem;
    const int padded = (M + 15) / 16 * 16, wide = (d + 15) / 16 * 16, blocks = (L + ROWS - 1) / ROWS;
    const size_t k_size = (size_t)padded * d / T::PAIR, v_size = (size_t)padded * wide / T::PAIR;
    auto keys = buffer<uint32_t>(k_size * B * H), vals = buffer<uint32_t>(v_size * B * H);
    auto bias = buffer<float>((size_t)padded * B);
    for (int b = 0; b < B; b++)
        for (int j = 0; j < padded; j++) bias[(size_t)b * padded + j] = j < M && (!mask || mask[(size_t)b * M + j]) ? 0.f : LOWEST;
    const float scale = 1.4426950408889634f / std::sqrt((float)d);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(d, wide);
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
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// Computes softmax(q kᵀ / sqrt(d)) v. strides: (batch, head, row) of q, k, v and out, in elements. mask: (B,
// M) bytes, 0 for masked keys; or null.
void ldm_attention(int bf16, const void* q, const void* k, const void* v, const uint8_t* mask, void* out, const int64_t* strides, int B, int H, int L,
                   int M, int d, int threads) {
    const int64_t* s = strides;
    const View Q{q, s[0], s[1], s[2]}, K{k, s[3], s[4], s[5]}, V{v, s[6], s[7], s[8]}, O{out, s[9], s[10], s[11]};
    EACH(bf16, attention<BF16>(Q, K, V, mask, O, B, H, L, M, d, threads), attention<F32>(Q, K, V, mask, O, B, H, L, M, d, threads));
}
}
