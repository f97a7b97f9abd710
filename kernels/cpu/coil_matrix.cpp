/* The per-pixel coil matrix, LANES pixels at a time. */
#include "coil_matrix.h"
#include "native.h"

namespace scs {
namespace {

constexpr int MOST_COILS = 128;

/* Pixels from `at` on; the last ones of the image may be fewer than a vector. */
void block(const float* matrix, const float* in, float* out, std::int64_t pixels, int coils, std::int64_t at)
{
    Complex<Vector> x[MOST_COILS], y[MOST_COILS];
    for (int c = 0; c < coils; ++c) x[c] = load_mixed(in + 2 * (c * pixels + at));
    hermitian_times(
        coils, [=](long long i) { return load_mixed(matrix + 2 * (i * pixels + at)); }, x, y);
    for (int c = 0; c < coils; ++c) store_mixed(out + 2 * (c * pixels + at), y[c]);
}

void pixel(const float* matrix, const float* in, float* out, std::int64_t pixels, int coils, std::int64_t at)
{
    const auto number = [=](const float* array, long long i) {
        const float* z = array + 2 * (i * pixels + at);
        return Complex<float>{z[0], z[1]};
    };
    Complex<float> x[MOST_COILS], y[MOST_COILS];
    for (int c = 0; c < coils; ++c) x[c] = number(in, c);
    hermitian_times(coils, [=](long long i) { return number(matrix, i); }, x, y);
    for (int c = 0; c < coils; ++c) std::memcpy(out + 2 * (c * pixels + at), &y[c], sizeof y[c]);
}

}  // namespace
}  // namespace scs

/* out[b, c, p] = sum over d of M[c, d, p] in[b, d, p]. matrix: (coils (coils + 1) / 2, pixels), the upper triangle row by row;
   in, out: (batch, coils, pixels), not the same memory; all complex, interleaved. */
SCS_API int scs_coil_matrix(const float* matrix, const float* in, float* out, std::int64_t batch, int coils,
                            std::int64_t pixels, int threads)
{
    using namespace scs;
    if (coils < 1 || coils > MOST_COILS || batch < 0 || pixels < 0 || threads < 1 || in == out) return BAD_ARGUMENT;
    const std::int64_t blocks = pixels / LANES, plane = 2 * coils * pixels;
    for (std::int64_t b = 0; b < batch; ++b, in += plane, out += plane) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (std::int64_t i = 0; i < blocks; ++i) block(matrix, in, out, pixels, coils, i * LANES);
        for (std::int64_t at = blocks * LANES; at < pixels; ++at) pixel(matrix, in, out, pixels, coils, at);
    }
    return OK;
}
