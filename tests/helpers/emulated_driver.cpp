// Calls one kernel with arguments from a file, and writes the buffers that it changes to another.
//
// emulated_driver FUNCTION INPUT OUTPUT. INPUT: for each argument its kind, and 0: an integer; 1: a double; 2: a
// buffer's size and bytes; 3: null; 4: the number of buffers of an array of pointers, and each as in 2. The
// 64-bit ARM calling convention passes integers and pointers in the same order whatever their types are, and a
// double apart from them.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#define KERNELS(X) X(ldm_affine) X(ldm_attention) X(ldm_convert) X(ldm_group_norm) X(ldm_group_norm_gradient) X(ldm_moments) X(ldm_product) X(ldm_winograd) X(ldm_winograd_untransformed) X(ldm_winograd_weights)
#define DECLARE(name) void name();
#define ENTRY(name) {#name, (void*)name},
extern "C" { KERNELS(DECLARE) }

using Bytes = std::vector<char>;

int64_t number(FILE* file) {
    int64_t value = 0;
    return std::fread(&value, 8, 1, file) == 1 ? value : -1;
}

int main(int, char** argv) {
    const struct { const char* name; void* address; } table[] = {KERNELS(ENTRY)};
    void* kernel = nullptr;
    for (const auto& entry : table)
        if (!std::strcmp(entry.name, argv[1])) kernel = entry.address;
    if (!kernel) return 2;
    FILE* in = std::fopen(argv[2], "rb");
    std::deque<Bytes> buffers;
    std::deque<std::vector<int64_t>> arrays;
    auto buffer = [&] {
        buffers.emplace_back(number(in));
        if (std::fread(buffers.back().data(), 1, buffers.back().size(), in) != buffers.back().size()) throw 3;
        return (int64_t)buffers.back().data();
    };
    int64_t a[24] = {};
    double real = 0;
    int n = 0;
    for (int64_t kind; (kind = number(in)) >= 0;) {
        if (kind == 0) a[n++] = number(in);
        if (kind == 1 && std::fread(&real, 8, 1, in) != 1) return 3;
        if (kind == 2) a[n++] = buffer();
        if (kind == 3) a[n++] = 0;
        if (kind == 4) {
            arrays.emplace_back(number(in));
            for (auto& entry : arrays.back()) entry = buffer();
            a[n++] = (int64_t)arrays.back().data();
        }
    }
    using I = int64_t;
    ((void (*)(I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, double))kernel)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21],
        a[22], a[23], real);
    FILE* out = std::fopen(argv[3], "wb");
    for (const auto& bytes : buffers) std::fwrite(bytes.data(), 1, bytes.size(), out);
    return std::fclose(out);
}
