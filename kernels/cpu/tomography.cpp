/* Joseph projector, its exact adjoint, and the pixel-driven back-projection of filtered back-projection. */
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "eight.h" /* before the bodies, which call its functions */

#include "tomography.h"

namespace scs {
namespace {

using std::int64_t;

constexpr int64_t MOST = 1 << 24; /* above, a float does not hold every index */
constexpr int ROWS = 8;           /* lines of pixels that the adjoint works on at a time */
constexpr int TILE = 64;
constexpr int RAYS = 0, PAIRS = 1; /* slots of scratch */

int64_t rounded(int64_t n) { return (n + EIGHT - 1) / EIGHT * EIGHT; }

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) { return Floats(static_cast<float*>(std::malloc(sizeof(float) * static_cast<std::size_t>(count)))); }

/* A scan of an image of n[0] x n[1] pixels. */
struct Scan {
    int64_t n[2], views, bins;
    const View* view;
    float size0, size1;

    int64_t across(int axis) const { return n[1 - axis]; }
    Eight last(int axis) const { return eight(static_cast<float>(across(axis) + 1)); }
    bool sound() const
    {
        const bool image = n[0] >= 1 && n[1] >= 1 && n[0] < MOST && n[1] < MOST;
        return image && views >= 0 && bins >= 1 && bins < MOST && view;
    }
};

/* Rays as arrays, so that eight are one load; `axis` -1 behind the last one. */
struct RayTable {
    float *start, *slope, *length;
    std::int32_t* axis;

    RayTable(float* memory, int64_t count)
        : start(memory), slope(memory + count), length(memory + 2 * count), axis(reinterpret_cast<std::int32_t*>(memory + 3 * count))
    {
    }
    static int64_t size(int64_t count) { return 4 * count; }

    void fill(const Scan& scan, int64_t view, int64_t from) const
    {
        for (int64_t bin = 0; bin < rounded(scan.bins); ++bin) {
            const int64_t i = from + bin;
            if (bin < scan.bins) {
                const Ray ray = ray_of(scan.view[view], bin, scan.size0, scan.size1);
                start[i] = ray.start, slope[i] = ray.slope, length[i] = ray.length, axis[i] = ray.axis;
            } else {
                start[i] = slope[i] = length[i] = 0, axis[i] = -1;
            }
        }
    }
};

/* Eight rays that step along the same axis; the lanes of others stay at the zero before the pixels. */
struct Bundle {
    Eight start, slope;
    Whole mine;

    Bundle(const RayTable& rays, int64_t at, int axis) : start(load8(rays.start + at)), slope(load8(rays.slope + at))
    {
        std::memcpy(&mine, rays.axis + at, sizeof mine);
        mine = mine == axis;
        start = mine ? start : Eight{}, slope = mine ? slope : Eight{};
    }
    bool empty() const { return all(mine == 0); }
};

/* An image with a zero before and two after each line, for steps along either axis. */
struct Lines {
    const float* first;
    int64_t stride;
};

int64_t line_stride(int64_t n) { return n + 3; }

void frame(const float* image, int64_t lines, int64_t n, int64_t between_lines, int64_t between, float* out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < lines; ++i) {
        float* line = out + i * line_stride(n);
        line[0] = line[n + 1] = line[n + 2] = 0;
        for (int64_t j = 0; j < n; ++j) line[j + 1] = image[i * between_lines + j * between];
    }
}

/* Steps at which a ray of the bundle is inside, all others adding nothing: from, to (exclusive). */
void inside(const Bundle& rays, float last, int64_t steps, int64_t& from, int64_t& to)
{
    float low = static_cast<float>(steps), high = -1;
    for (int lane = 0; lane < EIGHT; ++lane) {
        if (!rays.mine[lane]) continue;
        const float start = rays.start[lane], slope = rays.slope[lane];
        if (std::fabs(slope) * static_cast<float>(steps) < 1e-3f) {
            if (start < -1 || start > last + 1) continue;
            low = 0, high = static_cast<float>(steps);
            continue;
        }
        const float a = -start / slope, b = (last - start) / slope;
        low = least(low, least(a, b) - 1), high = most(high, most(a, b) + 1);
    }
    from = static_cast<int64_t>(most(low, 0));
    to = high < 0 ? from : std::max(from, static_cast<int64_t>(least(high + 1, static_cast<float>(steps))));
}

/* Two bundles at a time, so that one's loads fill the other's waits. */
void along(const Lines& lines, const Bundle& a, const Bundle& b, int64_t from, int64_t to, Eight last, Eight& sum_a, Eight& sum_b)
{
    Eight step = eight(static_cast<float>(from));
    const float* line = lines.first + from * lines.stride;
    const auto read = [&](const Bundle& rays) {
        Eight before, after;
        const Eight at = passes(rays.start, rays.slope, step, last);
        const Whole k = truncated(at);
        load_pairs(line, k, before, after);
        return multiply_add(at - number(k), after - before, before);
    };
    for (int64_t i = from; i < to; ++i, line += lines.stride, step += 1) {
        sum_a += read(a);
        sum_b += read(b);
    }
}

void project_view(const Scan& scan, const Lines* lines, const RayTable& rays, float* out)
{
    for (int64_t bin = 0; bin < scan.bins; bin += 2 * EIGHT) {
        Eight total[2] = {};
        const bool second = bin + EIGHT < scan.bins;
        for (int axis = 0; axis < 2; ++axis) {
            const Bundle a(rays, bin, axis), b(rays, second ? bin + EIGHT : bin, axis);
            if (a.empty() && b.empty()) continue;
            const Eight last = scan.last(axis);
            int64_t from, to, from_b, to_b;
            inside(a, last[0], scan.n[axis], from, to);
            inside(b, last[0], scan.n[axis], from_b, to_b);
            if (from_b < to_b) from = from < to ? std::min(from, from_b) : from_b, to = std::max(to, to_b);
            along(lines[axis], a, b, from, to, last, total[0], total[1]);
        }
        for (int half = 0; half < 1 + second; ++half)
            for (int64_t i = bin + half * EIGHT; i < std::min(scan.bins, bin + (half + 1) * EIGHT); ++i)
                out[i] = total[half][i - bin - half * EIGHT] * rays.length[i];
    }
}

/* Adds the rays of all views to the lines i0 ... of pixels, as pairs: what belongs to a number and to the next one. */
void spread(const Scan& scan, const RayTable& rays, const float* values, int axis, int64_t i0, int64_t count, float* pairs)
{
    const int64_t wide = rounded(scan.bins), stride = 2 * (scan.across(axis) + 2);
    const Eight last = scan.last(axis), first_step = eight(static_cast<float>(i0));
    const Eight last_step = first_step + static_cast<float>(count - 1);
    std::memset(pairs, 0, sizeof(float) * stride * count);
    for (int64_t at = 0; at < scan.views * wide; at += EIGHT) {
        const Bundle bundle(rays, at, axis);
        const Eight in = multiply_add(first_step, bundle.slope, bundle.start), out = multiply_add(last_step, bundle.slope, bundle.start);
        if (all((most(in, out) <= 0) | (least(in, out) >= last))) continue;
        const Eight value = bundle.mine ? load8(values + at) : Eight{};
        Eight step = first_step;
        for (int64_t i = 0; i < count; ++i, step += 1) {
            const Eight place = passes(bundle.start, bundle.slope, step, last);
            const Whole k = truncated(place);
            const Eight after = (place - number(k)) * value;
            add_pairs(pairs + i * stride, k, value - after, after);
        }
    }
}

/* Into `image`: lines along one axis, added to it along the other, so axis 0 must come first. */
bool adjoint(const Scan& scan, const RayTable& rays, const float* values, int axis, float* image, int threads)
{
    const int64_t n = scan.across(axis), lines = scan.n[axis], blocks = (lines + ROWS - 1) / ROWS;
    bool memory = true;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(&& : memory)
    for (int64_t block = 0; block < blocks; ++block) {
        float* pairs = static_cast<float*>(scratch(PAIRS, sizeof(float) * 2 * (n + 2) * ROWS));
        memory = memory && pairs;
        if (!pairs) continue;
        const int64_t i0 = block * ROWS, count = std::min<int64_t>(ROWS, lines - i0);
        spread(scan, rays, values, axis, i0, count, pairs);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < count; ++i) {
                const float* pair = pairs + i * 2 * (n + 2) + 2 * j;
                const float sum = pair[1] + pair[2];
                if (axis == 0) image[(i0 + i) * n + j] = sum;
                if (axis == 1) image[j * lines + i0 + i] += sum;
            }
    }
    return memory;
}

struct PixelDriven {
    const float* rows; /* (views, bins + 3), zeros around */
    const float* view; /* (views, 6) */
    int64_t n0, n1, views, bins;
    float* image;

    void tile(int64_t i0, int64_t j0) const
    {
        const int64_t ni = std::min<int64_t>(TILE / 2, n0 - i0), nj = std::min<int64_t>(TILE, n1 - j0);
        alignas(64) float sums[TILE / 2 * TILE] = {};
        for (int64_t v = 0; v < views; ++v)
            for (int64_t i = 0; i < ni; ++i) add(v, i0 + i, j0, nj, sums + i * TILE);
        for (int64_t i = 0; i < ni; ++i) std::memcpy(image + (i0 + i) * n1 + j0, sums + i * TILE, sizeof(float) * nj);
    }

    void add(int64_t v, int64_t i, int64_t j0, int64_t nj, float* sums) const
    {
        const float* row = rows + v * (bins + 3);
        const float at0 = static_cast<float>(i) - 0.5f * static_cast<float>(n0 - 1);
        const Eight last = eight(static_cast<float>(bins + 1)), lanes = {0, 1, 2, 3, 4, 5, 6, 7};
        Eight at1 = lanes + (static_cast<float>(j0) - 0.5f * static_cast<float>(n1 - 1));
        for (int64_t j = 0; j < nj; j += EIGHT, at1 += 8) {
            const Shadow<Eight> on = shadow(view + 6 * v, at0, at1);
            const Eight inverse = 1 / on.denominator;
            const Eight place = least(most(multiply_add(on.numerator, inverse, eight(1)), Eight{}), last);
            const Whole k = truncated(place);
            Eight before, after;
            load_pairs(row, k, before, after);
            const Eight value = multiply_add(place - number(k), after - before, before);
            store8(sums + j, multiply_add(value, inverse * inverse, load8(sums + j)));
        }
    }
};

}  // namespace
}  // namespace scs

/* sinogram[b, view, bin] = line integrals. image: (batch, n0, n1). views: (views, 8), see View. size0, size1: of a pixel. */
SCS_API int scs_ct_project(const float* image, std::int64_t batch, std::int64_t n0, std::int64_t n1, const double* views,
                           std::int64_t count, std::int64_t bins, float size0, float size1, float* sinogram, int threads)
{
    using namespace scs;
    const Scan scan{{n0, n1}, count, bins, reinterpret_cast<const View*>(views), size0, size1};
    if (!scan.sound() || batch < 0 || threads < 1) return BAD_ARGUMENT;
    const Floats framed[2] = {floats(n0 * line_stride(n1)), floats(n1 * line_stride(n0))};
    if (!framed[0] || !framed[1]) return NO_MEMORY;
    const Lines lines[2] = {{framed[0].get(), line_stride(n1)}, {framed[1].get(), line_stride(n0)}};
    bool memory = true;
    for (std::int64_t b = 0; b < batch; ++b, image += n0 * n1, sinogram += count * bins) {
        frame(image, n0, n1, n1, 1, framed[0].get(), threads);
        frame(image, n1, n0, 1, n1, framed[1].get(), threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(&& : memory)
        for (std::int64_t v = 0; v < count; ++v) {
            const std::int64_t wide = rounded(bins);
            float* kept = static_cast<float*>(scratch(RAYS, sizeof(float) * RayTable::size(wide)));
            memory = memory && kept;
            if (!kept) continue;
            const RayTable rays(kept, wide);
            rays.fill(scan, v, 0);
            project_view(scan, lines, rays, sinogram + v * bins);
        }
    }
    return memory ? OK : NO_MEMORY;
}

/* The adjoint of `scs_ct_project`: every ray adds its value to the pixels that it reads, by the same parts. */
SCS_API int scs_ct_adjoint(const float* sinogram, std::int64_t batch, std::int64_t n0, std::int64_t n1, const double* views,
                           std::int64_t count, std::int64_t bins, float size0, float size1, float* image, int threads)
{
    using namespace scs;
    const Scan scan{{n0, n1}, count, bins, reinterpret_cast<const View*>(views), size0, size1};
    if (!scan.sound() || batch < 0 || threads < 1) return BAD_ARGUMENT;
    const std::int64_t wide = rounded(bins), rays_count = std::max<std::int64_t>(count * wide, 1);
    const Floats table = floats(RayTable::size(rays_count)), values = floats(rays_count);
    if (!table || !values) return NO_MEMORY;
    const RayTable rays(table.get(), rays_count);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t v = 0; v < count; ++v) rays.fill(scan, v, v * wide);
    for (std::int64_t b = 0; b < batch; ++b, image += n0 * n1, sinogram += count * bins) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (std::int64_t v = 0; v < count; ++v)
            for (std::int64_t i = 0; i < wide; ++i)
                values.get()[v * wide + i] = i < bins ? sinogram[v * bins + i] * rays.length[v * wide + i] : 0;
        for (int axis = 0; axis < 2; ++axis)
            if (!adjoint(scan, rays, values.get(), axis, image, threads)) return NO_MEMORY;
    }
    return OK;
}

/* image[b, pixel] = sum over views of row(u) / denominator^2, u by Shadow. rows: (batch, views, bins + 3), zeros around. */
SCS_API int scs_ct_pixel_driven(const float* rows, std::int64_t batch, std::int64_t n0, std::int64_t n1, const float* views,
                                std::int64_t count, std::int64_t bins, float* image, int threads)
{
    using namespace scs;
    if (n0 < 1 || n1 < 1 || batch < 0 || count < 0 || bins < 1 || bins >= MOST || threads < 1) return BAD_ARGUMENT;
    const std::int64_t down = (n0 + TILE / 2 - 1) / (TILE / 2), across = (n1 + TILE - 1) / TILE;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t i = 0; i < batch * down * across; ++i) {
        const std::int64_t b = i / (down * across);
        const PixelDriven work{rows + b * count * (bins + 3), views, n0, n1, count, bins, image + b * n0 * n1};
        work.tile(i / across % down * (TILE / 2), i % across * TILE);
    }
    return OK;
}
