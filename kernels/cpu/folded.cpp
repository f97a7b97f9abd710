/* The exact solution for every-R-th-line sampling, LANES groups of pixels at a time. */
#include "folded.h"
#include "transpose.h"

namespace scs {
namespace {

constexpr int MOST = 16;

struct Folded {
    const float *vectors, *values; /* (R, R, groups) complex, (R, groups) */
    std::int64_t groups, run;      /* run: groups that lie next to each other in the image */
    float ridge;

    /* `width` groups from `at` on; in(k), out(k): pixel k of the first of them. */
    template <int R, class In, class Out>
    void solve(std::int64_t at, int width, In in, Out out) const
    {
        const bool whole = width == LANES;
        const auto numbers = [=](const float* from) { return whole ? load_mixed(from) : load_some(from, width); };
        const auto value = [=, this](int j) {
            const float* from = values + j * groups + at;
            float mixed[2 * LANES] = {};
            if (whole) return shuffled<mixed_lane>(load(from), Vector{});
            std::memcpy(mixed, from, sizeof(float) * width);
            for (int lane = width; lane < LANES; ++lane) mixed[lane] = 1;
            return shuffled<mixed_lane>(load(mixed), Vector{});
        };
        Complex<Vector> x[R], y[R];
        for (int k = 0; k < R; ++k) x[k] = numbers(in(k));
        folded_solve<R>([=, this](int k, int j) { return numbers(vectors + 2 * ((k * R + j) * groups + at)); }, value,
                        broadcast(ridge), x, y);
        for (int k = 0; k < R; ++k) {
            if (whole) store_mixed(out(k), y[k]);
            else store_some(out(k), y[k], width);
        }
    }

    /* Which number of memory `load_mixed` puts into a lane. */
    static constexpr int mixed_lane(int lane) { return lane / 4 * 2 + lane % 2 + (lane % 4 < 2 ? 0 : LANES / 2); }
};

template <int R>
void all(const Folded& folded, const float* in, float* out, std::int64_t batch, std::int64_t rz, std::int64_t plane,
         int threads)
{
    const std::int64_t ry = R / rz, outer = folded.groups / folded.run, blocks = (folded.run + LANES - 1) / LANES;
    const std::int64_t image = R * folded.groups;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t job = 0; job < batch * outer * blocks; ++job) {
        const std::int64_t first = job % blocks * LANES, z = job / blocks % outer, b = job / blocks / outer;
        const std::int64_t left = folded.run - first;
        const auto pixel = [=](int k) {
            return 2 * (b * image + (k / ry * outer + z) * plane + k % ry * folded.run + first);
        };
        folded.solve<R>(z * folded.run + first, static_cast<int>(left < LANES ? left : LANES),
                        [=](int k) { return in + pixel(k); }, [=](int k) { return out + pixel(k); });
    }
}

/* Calls the version for R, which is at most MOST. */
template <int R>
bool chosen(int r, const Folded& folded, const float* in, float* out, std::int64_t batch, std::int64_t rz,
            std::int64_t plane, int threads)
{
    if (r == R) all<R>(folded, in, out, batch, rz, plane, threads);
    if constexpr (R < MOST) return r == R || chosen<R + 1>(r, folded, in, out, batch, rz, plane, threads);
    else return r == R;
}

}  // namespace
}  // namespace scs

/* out = (matrices + ridge)^-1 in; in, out: (batch, z, y, x) complex, where the pixels of a group lie z / rz and y / ry apart.
   vectors: (rz ry, rz ry, groups) complex, columns second; values: (rz ry, groups); groups in the order (z / rz, y / ry, x). */
SCS_API int scs_folded_solve(const float* vectors, const float* values, const float* in, float* out, float ridge,
                             std::int64_t batch, std::int64_t rz, std::int64_t ry, std::int64_t z, std::int64_t y,
                             std::int64_t x, int threads)
{
    using namespace scs;
    if (rz < 1 || ry < 1 || rz * ry > MOST || z % rz || y % ry || batch < 0 || threads < 1) return BAD_ARGUMENT;
    const Folded folded{vectors, values, z / rz * (y / ry) * x, y / ry * x, ridge};
    if (folded.groups == 0) return OK;
    return chosen<1>(static_cast<int>(rz * ry), folded, in, out, batch, rz, y * x, threads) ? OK : BAD_ARGUMENT;
}
