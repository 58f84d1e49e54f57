// Group normalization of channels-last maps, with SiLU in the same pass.
#include "simd.h"

namespace {

// Adds to sums the differences of positions [begin, end) from position 0, and at sums + lanes their squares,
// for V vectors of channels.
template <class T, int V, class In>
inline void part_moments(const typename T::Elem* x, int64_t begin, int64_t end, int C, In in, double* sums, int64_t lanes) {
    Vec first[V], one[V], two[V];
    for (int v = 0; v < V; v++) first[v] = T::load(x + W * v, in), one[v] = two[v] = Vec{};
    for (int64_t n = begin; n < end; n++)
        for (int v = 0; v < V; v++) {
            const Vec y = T::load(x + n * C + W * v, in) - first[v];
            one[v] += y, two[v] = fma(y, y, two[v]);
        }
    for (int v = 0; v < V; v++) add_wide(sums + W * v, one[v]), add_wide(sums + lanes + W * v, two[v]);
}

// Computes sums (B, 2, lanes) over the positions of each sample, to which add(b, begin, end, sums) adds those
// of a part. The threads share the samples, or the parts of each sample if there are fewer samples than
// threads.
template <class Add>
void totals(int B, int64_t N, int64_t lanes, int threads, double* sums, Add add) {
    const int64_t part = 64, parts = (N + part - 1) / part;
    std::fill(sums, sums + B * 2 * lanes, 0.0);
    if (B >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int b = 0; b < B; b++)
            for (int64_t i = 0; i < parts; i++) add(b, i * part, std::min(N, (i + 1) * part), sums + b * 2 * lanes);
        return;
    }
    const int teams = (int)std::min<int64_t>(threads, parts);
    auto shares = buffer<double>((size_t)teams * 2 * lanes);
    for (int b = 0; b < B; b++) {
        std::fill(shares.get(), shares.get() + (size_t)teams * 2 * lanes, 0.0);
#pragma omp parallel num_threads(teams)
        {
            double* own = shares.get() + (size_t)omp_get_thread_num() * 2 * lanes;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < parts; i++) add(b, i * part, std::min(N, (i + 1) * part), own);
        }
        for (int t = 0; t < teams; t++)
            for (int64_t j = 0; j < 2 * lanes; j++) sums[b * 2 * lanes + j] += shares[(size_t)t * 2 * lanes + j];
    }
}

// Computes the mean and the sum of squared deviations of each channel of a map (B, N, C). Differences from
// the first position avoid cancellation for large means.
template <class T>
void moments(const typename T::Elem* x, double* mean, double* m2, int B, int64_t N, int C, int threads) {
    const int64_t lanes = round_up(C, W);
    auto sums = buffer<double>((size_t)B * 2 * lanes);
    totals(B, N, lanes, threads, sums.get(), [=](int b, int64_t begin, int64_t end, double* own) {
        const auto* from = x + b * N * C;
        columns<4>(C, [=](auto V, int c, auto in) { part_moments<T, V>(from + c, begin, end, C, in, own + c, lanes); });
    });
    for (int b = 0; b < B; b++) {
        alignas(64) float first[W];
        const double* one = sums.get() + b * 2 * lanes;
        for (int c = 0; c < C; c++) {
            if (c % W == 0) store(first, T::load(x + b * N * C + c, tail(C - c)));
            mean[(size_t)b * C + c] = first[c % W] + one[c] / N;
            m2[(size_t)b * C + c] = one[lanes + c] - one[c] * one[c] / N;
        }
    }
}

// 2^(-x·log2 e), within the range of exp2_.
template <class T>
inline Vec exp_minus(Vec x) {
    return exp2_<T::DEGREE>(smaller(spread(126.f), larger(spread(-126.f), x * spread(-1.4426950408889634f))));
}

template <class T, int V, class In>
inline void part_affine(const typename T::Elem* x, const float* scale, const float* shift, typename T::Elem* y, int64_t rows, int C, In in, bool silu) {
    Vec a[V], s[V];
    for (int v = 0; v < V; v++) a[v] = load(scale + W * v, in), s[v] = load(shift + W * v, in);
    for (int64_t n = 0; n < rows; n++)
        for (int v = 0; v < V; v++) {
            Vec z = fma(T::load(x + n * C + W * v, in), a[v], s[v]);
            if (silu) z = T::divide(z, spread(1.f) + exp_minus<T>(z));
            T::store(y + n * C + W * v, z, in);
        }
}

// Computes y = x·scale + shift for each channel of each sample, followed by SiLU if silu.
template <class T>
void affine(const typename T::Elem* x, const float* scale, const float* shift, typename T::Elem* y, int B, int64_t N, int C, bool silu, int threads) {
    const int64_t part = std::max<int64_t>(1, 16384 / C), parts = (N + part - 1) / part;
#pragma omp parallel for num_threads((int)std::min<int64_t>(threads, B * parts)) schedule(static)
    for (int64_t i = 0; i < B * parts; i++) {
        const int64_t b = i / parts, begin = b * N + i % parts * part, end = std::min((b + 1) * N, begin + part);
        const auto* from = x + begin * C;
        auto* to = y + begin * C;
        columns<4>(C, [=](auto V, int c, auto in) {
            part_affine<T, V>(from + c, scale + b * C + c, shift + b * C + c, to + c, end - begin, C, in, silu);
        });
    }
}

// Parameters of a norm: silu(norm(x + add) · (1 + gain) + offset), with weight and bias (C,), and add, gain
// and offset (B, C) or null.
struct Norm {
    const float *weight, *bias, *add, *gain, *offset;
    int B, C, groups;
    int64_t N;

    int width() const { return C / groups; }

    // Computes scale and shift (B, C) such that the norm is x·scale + shift, from the mean and the inverse
    // standard deviation of each group of x + add.
    void coefficients(const double* mu, const double* rstd, float* scale, float* shift) const {
        for (int i = 0; i < B * C; i++) {
            const int c = i % C, g = i / width();
            const double a = rstd[g] * weight[c], s = bias[c] + ((add ? add[i] : 0.f) - mu[g]) * a, k = gain ? 1.0 + gain[i] : 1.0;
            scale[i] = (float)(a * k), shift[i] = (float)(s * k + (offset ? offset[i] : 0.f));
        }
    }
};

// Computes y; and of x + add the mean of each channel (B, C), and the mean and the inverse standard deviation
// of each group (B, groups).
template <class T>
void group_norm(const typename T::Elem* x, const Norm& norm, typename T::Elem* y, double* mean, double* mu, double* rstd, double eps, bool silu,
                int threads) {
    const int B = norm.B, C = norm.C, width = norm.width();
    const int64_t N = norm.N;
    auto m2 = buffer<double>((size_t)B * C);
    auto scale = buffer<float>((size_t)B * C), shift = buffer<float>((size_t)B * C);
    moments<T>(x, mean, m2.get(), B, N, C, threads);
    for (int g = 0; g < B * norm.groups; g++) {
        const size_t from = (size_t)g * width;  // (b, c) as one index
        double sum = 0, var = 0;
        for (size_t i = from; i < from + width; i++) sum += (mean[i] += norm.add ? norm.add[i] : 0.f);
        mu[g] = sum / width;
        for (size_t i = from; i < from + width; i++) var += m2[i] + N * (mean[i] - mu[g]) * (mean[i] - mu[g]);
        rstd[g] = 1 / std::sqrt(var / ((double)N * width) + eps);
    }
    norm.coefficients(mu, rstd, scale.get(), shift.get());
    affine<T>(x, scale.get(), shift.get(), y, B, N, C, silu, threads);
}

// Returns the gradient of SiLU's input from that of its output.
template <class T>
inline Vec silu_gradient(Vec z, Vec dy) {
    const Vec one = spread(1.f), s = T::divide(one, one + exp_minus<T>(z));
    return dy * (s * fma(z, one - s, one));  // s·(1 + z·(1 - s))
}

// For V vectors of channels of some positions: adds the sums of dz and dz·(x - center) to sums, or with WRITE
// computes dx = dz·scale + x·slope + level.
template <class T, int V, bool WRITE, class In>
inline void part_gradient(const typename T::Elem* x, const typename T::Elem* dy, const float* scale, const float* shift, const float* slope,
                          const float* level, typename T::Elem* dx, double* sums, int64_t lanes, int64_t rows, int C, In in, bool silu) {
    Vec a[V], s[V], p[V], q[V], one[V], two[V];
    for (int v = 0; v < V; v++) {
        a[v] = load(scale + W * v, in), s[v] = load(shift + W * v, in), p[v] = load(slope + W * v, in);
        one[v] = two[v] = q[v] = Vec{};
        if constexpr (WRITE) q[v] = load(level + W * v, in);
    }
    for (int64_t n = 0; n < rows; n++)
        for (int v = 0; v < V; v++) {
            const Vec from = T::load(x + n * C + W * v, in);
            Vec dz = T::load(dy + n * C + W * v, in);
            if (silu) dz = silu_gradient<T>(fma(from, a[v], s[v]), dz);
            if constexpr (WRITE)
                T::store(dx + n * C + W * v, fma(dz, a[v], fma(from, p[v], q[v])), in);
            else
                one[v] += dz, two[v] = fma(dz, from - p[v], two[v]);
        }
    if constexpr (!WRITE)
        for (int v = 0; v < V; v++) add_wide(sums + W * v, one[v]), add_wide(sums + lanes + W * v, two[v]);
}

// Computes the gradients of all inputs of a norm: dx; dweight and dbias (C,); dadd, dgain and doffset (B, C).
template <class T>
void group_norm_gradient(const typename T::Elem* x, const typename T::Elem* dy, const Norm& norm, const double* mean, const double* mu,
                         const double* rstd, typename T::Elem* dx, float* dweight, float* dbias, float* dadd, float* dgain, float* doffset, bool silu,
                         int threads) {
    const int B = norm.B, C = norm.C, width = norm.width();
    const int64_t N = norm.N, lanes = round_up(C, W);
    auto scale = buffer<float>((size_t)B * C), shift = buffer<float>((size_t)B * C), slope = buffer<float>((size_t)B * C);
    auto level = buffer<float>((size_t)B * C);
    auto sums = buffer<double>((size_t)B * 2 * lanes);
    norm.coefficients(mu, rstd, scale.get(), shift.get());
    float *a = scale.get(), *s = shift.get(), *p = slope.get(), *q = level.get();
    for (int i = 0; i < B * C; i++) p[i] = (float)(mean[i] - (norm.add ? norm.add[i] : 0.f));
    totals(B, N, lanes, threads, sums.get(), [=](int b, int64_t begin, int64_t end, double* own) {
        const int64_t at = (b * N + begin) * C, i = (int64_t)b * C;
        columns<2>(C, [=](auto V, int c, auto in) {
            part_gradient<T, V, false>(x + at + c, dy + at + c, a + i + c, s + i + c, p + i + c, nullptr, nullptr, own + c, lanes, end - begin, C, in,
                                       silu);
        });
    });
    std::fill(dweight, dweight + C, 0.f), std::fill(dbias, dbias + C, 0.f);
    for (int g = 0; g < B * norm.groups; g++) {
        const size_t from = (size_t)g * width;
        double one = 0, two = 0;  // sums over the group of the gradient of x̂, and of that times x̂
        for (size_t i = from; i < from + width; i++) {
            const int c = i % C;
            const double* own = sums.get() + i / C * 2 * lanes + c;
            const double dz = own[0], dzx = (own[lanes] + dz * (mean[i] - mu[g])) * rstd[g], k = norm.gain ? 1.0 + norm.gain[i] : 1.0;  // Σ dz·x̂
            one += norm.weight[c] * k * dz, two += norm.weight[c] * k * dzx;
            dweight[c] += (float)(k * dzx), dbias[c] += (float)(k * dz);
            if (norm.gain) dgain[i] = (float)(norm.weight[c] * dzx + norm.bias[c] * dz);
            if (norm.offset) doffset[i] = (float)dz;
        }
        const double n = (double)N * width, m = rstd[g] * rstd[g] * two / n;
        for (size_t i = from; i < from + width; i++) {
            const double put = norm.add ? norm.add[i] : 0.f, l = -rstd[g] * one / n - m * (put - mu[g]);
            p[i] = (float)-m, q[i] = (float)l;
            if (norm.add) dadd[i] = (float)(a[i] * sums[i / C * 2 * lanes + i % C] - m * N * (mean[i] - put) + l * N);
        }
    }
    const int64_t part = std::max<int64_t>(1, 16384 / C), parts = (N + part - 1) / part;
#pragma omp parallel for num_threads((int)std::min<int64_t>(threads, B * parts)) schedule(static)
    for (int64_t j = 0; j < B * parts; j++) {
        const int64_t b = j / parts, begin = b * N + j % parts * part, end = std::min((b + 1) * N, begin + part), at = begin * C, i = b * C;
        columns<2>(C, [=](auto V, int c, auto in) {
            part_gradient<T, V, true>(x + at + c, dy + at + c, a + i + c, s + i + c, p + i + c, q + i + c, dx + at + c, nullptr, 0, end - begin, C, in,
                                      silu);
        });
    }
}

}  // namespace

extern "C" {

// x and y are (B, N, C). The parameters of the norm are those of `Norm`; mean (B, C), mu and rstd (B, groups)
// are outputs, see `group_norm`.
void ldm_group_norm(int bf16, const void* x, const float* weight, const float* bias, const float* add, const float* gain, const float* offset, void* y,
                    double* mean, double* mu, double* rstd, int B, int64_t N, int C, int groups, double eps, int silu, int threads) {
    const Norm norm{weight, bias, add, gain, offset, B, C, groups, N};
    EACH(bf16, group_norm<BF16>((const uint16_t*)x, norm, (uint16_t*)y, mean, mu, rstd, eps, silu, threads),
         group_norm<F32>((const float*)x, norm, (float*)y, mean, mu, rstd, eps, silu, threads));
}

// Computes the gradients of the inputs from that of y.
void ldm_group_norm_gradient(int bf16, const void* x, const void* dy, const float* weight, const float* bias, const float* add, const float* gain,
                             const float* offset, const double* mean, const double* mu, const double* rstd, void* dx, float* dweight, float* dbias,
                             float* dadd, float* dgain, float* doffset, int B, int64_t N, int C, int groups, int silu, int threads) {
    const Norm norm{weight, bias, add, gain, offset, B, C, groups, N};
    EACH(bf16, group_norm_gradient<BF16>((const uint16_t*)x, (const uint16_t*)dy, norm, mean, mu, rstd, (uint16_t*)dx, dweight, dbias, dadd, dgain,
                                         doffset, silu, threads),
         group_norm_gradient<F32>((const float*)x, (const float*)dy, norm, mean, mu, rstd, (float*)dx, dweight, dbias, dadd, dgain, doffset, silu,
                                  threads));
}

void ldm_moments(int bf16, const void* x, double* mean, double* m2, int B, int64_t N, int C, int threads) {
    EACH(bf16, moments<BF16>((const uint16_t*)x, mean, m2, B, N, C, threads), moments<F32>((const float*)x, mean, m2, B, N, C, threads));
}

void ldm_affine(int bf16, const void* x, const float* scale, const float* shift, void* y, int B, int64_t N, int C, int silu, int threads) {
    EACH(bf16, affine<BF16>((const uint16_t*)x, scale, shift, (uint16_t*)y, B, N, C, silu, threads),
         affine<F32>((const float*)x, scale, shift, (float*)y, B, N, C, silu, threads));
}
}
