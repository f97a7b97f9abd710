/* Delay-and-sum, universal back-projection, and the scatter that is their adjoint. */
#include <algorithm>

#include "eight.h" /* before the bodies, which call its functions */

#include "photoacoustic.h"

namespace scs {
namespace {

using std::int64_t;

constexpr float TINY = 1e-6f;
constexpr int64_t MOST_SAMPLES = 1 << 24; /* above, a float does not hold every index */
constexpr int TILE_X = 64, TILE_Y = 32;
constexpr int ORDERED = 0, PAIRS = 1, AXIS = 2; /* slots of scratch */

/* A grid of points along three axes, in samples. `x` is read in vectors, so it must go on to a multiple of eight. */
struct Grid {
    const float *x, *y, *z;
    int64_t nx, ny, nz;
};

/* An element as vectors see it. */
struct Lanes {
    Eight x, towards_x, early, last;
    const Element& at;
    Lanes(const Element& element, float delay, int64_t samples)
        : x(eight(element.x)), towards_x(eight(element.towards_x)), early(eight(1 - delay)),
          last(eight(static_cast<float>(samples + 1))), at(element)
    {
    }
};

/* A row of points at the same y and z. */
struct Line {
    Eight aside_squared, towards;
    Line(const Element& element, float y, float z)
    {
        const float dy = y - element.y, dz = z - element.z;
        aside_squared = eight(dy * dy + dz * dz);
        towards = eight(dy * element.towards_y + dz * element.towards_z);
    }
};

/* Index of the sample before the arrival, the part of the way to the next one, and the weight: the same in both directions. */
template <int WEIGHTING>
SCS_HD void reach(const Lanes& element, const Line& line, const float* x, Whole& k, Eight& part, Eight& weight)
{
    const Eight dx = load8(x) - element.x, squared = multiply_add(dx, dx, line.aside_squared);
    const Eight at = arrival(squared, element.early, element.last);
    k = truncated(at);
    part = at - number(k);
    if constexpr (WEIGHTING != PLAIN)
        weight = solid_angle<WEIGHTING>(squared, multiply_add(dx, element.towards_x, line.towards), eight(TINY));
}

struct Gather {
    const float* rows;
    int64_t elements, samples, stride;
    const Element* element;
    Grid grid;
    float delay;
    float* image;

    template <int WEIGHTING>
    void tile(int64_t z, int64_t y0, int64_t x0) const
    {
        const int64_t ny = std::min<int64_t>(TILE_Y, grid.ny - y0), nx = std::min<int64_t>(TILE_X, grid.nx - x0);
        alignas(64) float sums[TILE_Y * TILE_X] = {};
        for (int64_t i = 0; i < elements; ++i)
            if (element[i].weight != 0) add<WEIGHTING>(i, z, y0, ny, x0, nx, sums);
        for (int64_t y = 0; y < ny; ++y)
            std::memcpy(image + ((z * grid.ny + y0 + y) * grid.nx + x0), sums + y * TILE_X, sizeof(float) * nx);
    }

    template <int WEIGHTING>
    void add(int64_t i, int64_t z, int64_t y0, int64_t ny, int64_t x0, int64_t nx, float* sums) const
    {
        const float* row = rows + i * stride;
        const Lanes lanes(element[i], delay, samples);
        for (int64_t y = 0; y < ny; ++y, sums += TILE_X) {
            const Line line(element[i], grid.y[y0 + y], grid.z[z]);
            for (int64_t x = 0; x < nx; x += EIGHT) {
                Whole k;
                Eight part, weight, before, after;
                reach<WEIGHTING>(lanes, line, grid.x + x0 + x, k, part, weight);
                load_pairs(row, k, before, after);
                const Eight value = multiply_add(part, after - before, before), sum = load8(sums + x);
                store8(sums + x, WEIGHTING == PLAIN ? sum + value : multiply_add(weight, value, sum));
            }
        }
    }

    template <int WEIGHTING>
    void all(int threads) const
    {
        const int64_t across = (grid.nx + TILE_X - 1) / TILE_X, down = (grid.ny + TILE_Y - 1) / TILE_Y;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t i = 0; i < across * down * grid.nz; ++i)
            tile<WEIGHTING>(i / (across * down), i / across % down * TILE_Y, i % across * TILE_X);
    }
};

/* The points of a line lie in vectors so that lanes are far apart: neighbours often reach the same sample, and adding to a
   number that was stored just before waits for the store. */
struct Scatter {
    const float* image; /* (nz, ny, vectors, EIGHT) */
    Grid grid;          /* x in the same order */
    int64_t samples;
    const Element* element;
    float delay;

    template <int WEIGHTING>
    void row(int64_t i, float* pairs, float* out) const
    {
        std::memset(pairs, 0, sizeof(float) * 2 * (samples + 2));
        const Lanes lanes(element[i], delay, samples);
        const float* point = image;
        for (int64_t z = 0; z < grid.nz; ++z)
            for (int64_t y = 0; y < grid.ny; ++y) {
                const Line line(element[i], grid.y[y], grid.z[z]);
                for (int64_t x = 0; x < grid.nx; x += EIGHT, point += EIGHT) {
                    Whole k;
                    Eight part, weight, value = load8(point);
                    reach<WEIGHTING>(lanes, line, grid.x + x, k, part, weight);
                    if constexpr (WEIGHTING != PLAIN) value *= weight;
                    const Eight after = part * value;
                    add_pairs(pairs, k, value - after, after);
                }
            }
        for (int64_t k = 1; k <= samples; ++k) out[k - 1] = element[i].weight * (pairs[2 * k] + pairs[2 * k - 1]);
    }
};

int64_t rounded(int64_t n) { return (n + EIGHT - 1) / EIGHT * EIGHT; }

/* from[count] to vectors whose lane l holds the l-th part of the line; what is missing at the end becomes `filler`. */
void spread(const float* from, int64_t count, float filler, float* to)
{
    const int64_t vectors = rounded(count) / EIGHT;
    for (int64_t lane = 0; lane < EIGHT; ++lane)
        for (int64_t v = 0; v < vectors; ++v) {
            const int64_t i = lane * vectors + v;
            to[v * EIGHT + lane] = i < count ? from[i] : filler;
        }
}

template <class Work>
void by_weighting(int weighting, Work work)
{
    if (weighting == PLAIN) work(std::integral_constant<int, PLAIN>{});
    if (weighting == PLANE) work(std::integral_constant<int, PLANE>{});
    if (weighting == SPACE) work(std::integral_constant<int, SPACE>{});
}

bool sound(int64_t batch, int64_t elements, int64_t samples, int64_t nx, int64_t ny, int64_t nz, int weighting, int threads)
{
    const bool sizes = batch >= 0 && elements >= 0 && samples >= 1 && samples < MOST_SAMPLES && nx >= 1 && ny >= 1 && nz >= 1;
    return sizes && weighting >= PLAIN && weighting <= SPACE && threads >= 1;
}

/* One row to float, with a zero before it and two after: (x - offset) weight, or for universal back-projection that of
   2 x - 2 t dx/dt, t in samples, the derivative by central differences and one-sided at the ends. */
template <class Sample>
void prepare_row(const Sample* from, int64_t samples, float offset, float weight, float delay, bool derivative, float* to)
{
    to[0] = to[samples + 1] = to[samples + 2] = 0;
    float* out = to + 1;
    if (weight == 0) {
        std::memset(out, 0, sizeof(float) * samples);
        return;
    }
    if (!derivative) {
        for (int64_t k = 0; k < samples; ++k) out[k] = (static_cast<float>(from[k]) - offset) * weight;
        return;
    }
    const int count = static_cast<int>(samples); /* a vector of these becomes floats in one instruction */
    const auto value = [=](int k) { return static_cast<float>(from[k]) - offset; };
    const auto filtered = [=](int k, float rise) { return 2 * weight * (value(k) - (static_cast<float>(k) + delay) * rise); };
    for (int k = 1; k < count - 1; ++k) out[k] = filtered(k, 0.5f * (value(k + 1) - value(k - 1)));
    out[0] = filtered(0, count > 1 ? value(1) - value(0) : 0);
    if (count > 1) out[count - 1] = filtered(count - 1, value(count - 1) - value(count - 2));
}

}  // namespace
}  // namespace scs

/* Rows as `scs_pat_gather` reads them. kind: 0 float, 1 int16, 2 uint16. from: rows, each `stride` numbers after the last;
   to: (rows, samples + 3); element i, whose weight is multiplied in, is that of row i modulo `elements`. Rows of weight 0 become zeros unread. */
SCS_API int scs_pat_prepare(const void* from, int kind, std::int64_t rows, std::int64_t stride, std::int64_t elements,
                            std::int64_t samples, const float* element, float offset, float delay, int derivative, float* to, int threads)
{
    using namespace scs;
    if (kind < 0 || kind > 2 || rows < 0 || stride < samples || elements < 1 || samples < 1 || samples >= MOST_SAMPLES || threads < 1)
        return BAD_ARGUMENT;
    const Element* table = reinterpret_cast<const Element*>(element);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t i = 0; i < rows; ++i) {
        const float weight = table[i % elements].weight;
        float* out = to + i * (samples + 3);
        const auto prepare = [&](auto* typed) {
            prepare_row(typed + i * stride, samples, offset, weight, delay, derivative != 0, out);
        };
        if (kind == 0) prepare(static_cast<const float*>(from));
        if (kind == 1) prepare(static_cast<const std::int16_t*>(from));
        if (kind == 2) prepare(static_cast<const std::uint16_t*>(from));
    }
    return OK;
}

/* image[b, z, y, x] = sum over elements of weight(element, point) row_b(arrival), rows as prepared, element weights in them.
   rows: (batch, elements, samples + 3). element: (elements, 8). image: (batch, nz, ny, nx). */
SCS_API int scs_pat_gather(const float* rows, std::int64_t batch, std::int64_t elements, std::int64_t samples,
                           const float* element, const float* x, const float* y, const float* z, std::int64_t nx,
                           std::int64_t ny, std::int64_t nz, float delay, int weighting, float* image, int threads)
{
    using namespace scs;
    if (!sound(batch, elements, samples, nx, ny, nz, weighting, threads)) return BAD_ARGUMENT;
    const Element* table = reinterpret_cast<const Element*>(element);
    float* padded = static_cast<float*>(scratch(AXIS, sizeof(float) * rounded(nx)));
    if (!padded) return NO_MEMORY;
    for (std::int64_t i = 0; i < rounded(nx); ++i) padded[i] = x[std::min(i, nx - 1)];
    for (std::int64_t b = 0; b < batch; ++b) {
        const float* own = rows + b * elements * (samples + 3);
        const Gather gather{own, elements, samples, samples + 3, table, {padded, y, z, nx, ny, nz}, delay, image + b * nx * ny * nz};
        by_weighting(weighting, [&](auto w) { gather.all<w>(threads); });
    }
    return OK;
}

/* The adjoint: rows[b, element, k] += weight image[b, point] (1 - part) and ... part at k + 1. rows: (batch, elements, samples). */
SCS_API int scs_pat_scatter(const float* image, std::int64_t batch, std::int64_t elements, std::int64_t samples,
                            const float* element, const float* x, const float* y, const float* z, std::int64_t nx,
                            std::int64_t ny, std::int64_t nz, float delay, int weighting, float* rows, int threads)
{
    using namespace scs;
    if (!sound(batch, elements, samples, nx, ny, nz, weighting, threads)) return BAD_ARGUMENT;
    const std::int64_t wide = rounded(nx), lines = ny * nz;
    float* ordered = static_cast<float*>(scratch(ORDERED, sizeof(float) * wide * (batch * lines + 1)));
    if (!ordered) return NO_MEMORY;
    float* axis = ordered + wide * batch * lines;
    spread(x, nx, x[0], axis);
    for (std::int64_t i = 0; i < batch * lines; ++i) spread(image + i * nx, nx, 0, ordered + i * wide);
    const Element* table = reinterpret_cast<const Element*>(element);
    bool memory = true;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(&& : memory)
    for (std::int64_t i = 0; i < batch * elements; ++i) {
        float* pairs = static_cast<float*>(scratch(PAIRS, sizeof(float) * 2 * (samples + 2)));
        memory = memory && pairs;
        if (!pairs) continue;
        const Scatter work{ordered + i / elements * lines * wide, {axis, y, z, wide, ny, nz}, samples, table, delay};
        by_weighting(weighting, [&](auto w) { work.row<w>(i % elements, pairs, rows + i * samples); });
    }
    return memory ? OK : NO_MEMORY;
}
