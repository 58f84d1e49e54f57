// Group normalisation of channels-last maps, with SiLU in the same pass.
#include "simd.h"

namespace {

// Adds to sums the differences, and their squares (lanes further on), of positions begin to end to position 0, for V·16 channels.
template <class T, int V>
inline void part_moments(const typename T::Elem* x, int64_t begin, int64_t end, int C, __mmask16 in, double* sums, int64_t lanes) {
    __m512 first[V], one[V], two[V];
    for (int v = 0; v < V; v++) first[v] = T::load(x + 16 * v, in), one[v] = two[v] = _mm512_setzero_ps();
    for (int64_t n = begin; n < end; n++)
        for (int v = 0; v < V; v++) {
            const __m512 y = _mm512_sub_ps(T::load(x + n * C + 16 * v, in), first[v]);
            one[v] = _mm512_add_ps(one[v], y), two[v] = _mm512_fmadd_ps(y, y, two[v]);
        }
    for (int v = 0; v < V; v++, sums += 16)
        for (int half = 0; half < 2; half++) {
            const __m256 a = half ? _mm512_extractf32x8_ps(one[v], 1) : _mm512_castps512_ps256(one[v]);
            const __m256 b = half ? _mm512_extractf32x8_ps(two[v], 1) : _mm512_castps512_ps256(two[v]);
            double *to = sums + 8 * half, *squares = to + lanes;
            _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(a)));
            _mm512_storeu_pd(squares, _mm512_add_pd(_mm512_loadu_pd(squares), _mm512_cvtps_pd(b)));
        }
}

// Mean and sum of squared deviations of each channel of a map (B, N, C), from parts of 64 positions each; differences to the first position keep
// a large mean from costing digits.
template <class T>
void moments(const typename T::Elem* x, double* mean, double* m2, int B, int64_t N, int C, int threads) {
    const int64_t part = 64, parts = (N + part - 1) / part, lanes = (C + 15) / 16 * 16;
    const int teams = (int)std::min<int64_t>(threads, parts);
    auto sums = buffer<double>((size_t)teams * 2 * lanes);
    for (int b = 0; b < B; b++) {
        const auto* from = x + b * N * C;
        std::fill(sums.get(), sums.get() + (size_t)teams * 2 * lanes, 0.0);
#pragma omp parallel num_threads(teams)
        {
            double* own = sums.get() + (size_t)omp_get_thread_num() * 2 * lanes;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < parts; i++) {
                const int64_t end = std::min(N, (i + 1) * part);
                int c = 0;
                for (; c + 64 <= C; c += 64) part_moments<T, 4>(from + c, i * part, end, C, 0xffff, own + c, lanes);
                for (; c < C; c += 16) part_moments<T, 1>(from + c, i * part, end, C, tail(C - c), own + c, lanes);
            }
        }
        alignas(64) float first[16];
        for (int c = 0; c < C; c++) {
            double one = 0, two = 0;
            for (int t = 0; t < teams; t++) one += sums[(size_t)t * 2 * lanes + c], two += sums[(size_t)t * 2 * lanes + lanes + c];
            if (c % 16 == 0) _mm512_store_ps(first, T::load(from + c, tail(C - c)));
            mean[(size_t)b * C + c] = first[c % 16] + one / N;
            m2[(size_t)b * C + c] = two - one * one / N;
        }
    }
}

template <class T, int V>
inline void part_affine(const typename T::Elem* x, const float* scale, const float* shift, typename T::Elem* y, int64_t rows, int C, __mmask16 in,
                        bool silu) {
    const __m512 minus = _mm512_set1_ps(-1.4426950408889634f), one = _mm512_set1_ps(1.f), most = _mm512_set1_ps(126.f);
    __m512 a[V], s[V];
    for (int v = 0; v < V; v++) a[v] = _mm512_maskz_loadu_ps(in, scale + 16 * v), s[v] = _mm512_maskz_loadu_ps(in, shift + 16 * v);
    for (int64_t n = 0; n < rows; n++)
        for (int v = 0; v < V; v++) {
            __m512 z = _mm512_fmadd_ps(T::load(x + n * C + 16 * v, in), a[v], s[v]);
            if (silu) {
                const __m512 e = _mm512_min_ps(most, _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_mul_ps(z, minus)));
                z = T::divide(z, _mm512_add_ps(one, exp2_<T::DEGREE>(e)));
            }
            T::store(y + n * C + 16 * v, z, in);
        }
}

// y = x·scale + shift of each channel of each sample, and SiLU behind it if asked.
template <class T>
void affine(const typename T::Elem* x, const float* scale, const float* shift, typename T::Elem* y, int B, int64_t N, int C, bool silu, int threads) {
    const int64_t part = std::max<int64_t>(1, 16384 / C), parts = (N + part - 1) / part;
#pragma omp parallel for num_threads((int)std::min<int64_t>(threads, B * parts)) schedule(static)
    for (int64_t i = 0; i < B * parts; i++) {
        const int64_t b = i / parts, begin = b * N + i % parts * part, end = std::min((b + 1) * N, begin + part);
        const auto* from = x + begin * C;
        auto* to = y + begin * C;
        int c = 0;
        for (; c + 64 <= C; c += 64) part_affine<T, 4>(from + c, scale + b * C + c, shift + b * C + c, to + c, end - begin, C, 0xffff, silu);
        for (; c < C; c += 16) part_affine<T, 1>(from + c, scale + b * C + c, shift + b * C + c, to + c, end - begin, C, tail(C - c), silu);
    }
}

template <class T>
void group_norm(const typename T::Elem* x, const float* weight, const float* bias, const float* add, const float* gain, const float* offset,
                typename T::Elem* y, int B, int64_t N, int C, int groups, double eps, bool silu, int threads) {
    auto mean = buffer<double>((size_t)B * C), m2 = buffer<double>((size_t)B * C);
    auto scale = buffer<float>((size_t)B * C), shift = buffer<float>((size_t)B * C);
    moments<T>(x, mean.get(), m2.get(), B, N, C, threads);
    const int width = C / groups;
    for (int g = 0; g < B * groups; g++) {
        const size_t from = (size_t)g * width;  // (b, c) in one index
        double mu = 0, var = 0;
        for (size_t i = from; i < from + width; i++) mu += (mean[i] += add ? add[i] : 0.f);
        mu /= width;
        for (size_t i = from; i < from + width; i++) var += m2[i] + N * (mean[i] - mu) * (mean[i] - mu);
        const double rstd = 1 / std::sqrt(var / ((double)N * width) + eps);
        for (size_t i = from; i < from + width; i++) {
            const int c = i % C;
            const double a = rstd * weight[c], s = bias[c] + ((add ? add[i] : 0.f) - mu) * a, k = gain ? 1.0 + gain[i] : 1.0;
            scale[i] = (float)(a * k), shift[i] = (float)(s * k + (offset ? offset[i] : 0.f));
        }
    }
    affine<T>(x, scale.get(), shift.get(), y, B, N, C, silu, threads);
}

}  // namespace

extern "C" {

// x and y (B, N, C); weight and bias (C,); add (before the norm), gain and offset (behind it: times 1 + gain, plus offset) (B, C), or null.
void ldm_group_norm(int bf16, const void* x, const float* weight, const float* bias, const float* add, const float* gain, const float* offset, void* y,
                    int B, int64_t N, int C, int groups, double eps, int silu, int threads) {
    EACH(bf16, group_norm<BF16>((const uint16_t*)x, weight, bias, add, gain, offset, (uint16_t*)y, B, N, C, groups, eps, silu, threads),
         group_norm<F32>((const float*)x, weight, bias, add, gain, offset, (float*)y, B, N, C, groups, eps, silu, threads));
}

void ldm_moments(int bf16, const void* x, double* mean, double* m2, int B, int64_t N, int C, int threads) {
    EACH(bf16, moments<BF16>((const uint16_t*)x, mean, m2, B, N, C, threads), moments<F32>((const float*)x, mean, m2, B, N, C, threads));
}

void ldm_affine(int bf16, const void* x, const float* scale, const float* shift, void* y, int B, int64_t N, int C, int silu, int threads) {
    EACH(bf16, affine<BF16>((const uint16_t*)x, scale, shift, (uint16_t*)y, B, N, C, silu, threads),
         affine<F32>((const float*)x, scale, shift, (float*)y, B, N, C, silu, threads));
}
}
