/* Delay-and-sum, universal back-projection, and the scatter that is their adjoint. */
#include <algorithm>
#include <atomic>

#include "photoacoustic_lines.h"
#include "sharing.h"

namespace scs {
namespace {

using std::int64_t;

constexpr int TILE_X = 64, TILE_Y = 32;
constexpr int ORDERED = 0, PAIRS = 1; /* slots of scratch */

struct Gather {
    const float* rows;
    int64_t elements, samples, stride;
    const Element* element;
    Grid grid;
    Start start;
    float* image;

    int64_t across() const { return (grid.nx + TILE_X - 1) / TILE_X; }
    int64_t down() const { return (grid.ny + TILE_Y - 1) / TILE_Y; }
    int64_t tiles() const { return across() * down() * grid.nz; }

    template <int WEIGHTING>
    void tile(int64_t i) const
    {
        const int64_t z = i / (across() * down()), y0 = i / across() % down() * TILE_Y, x0 = i % across() * TILE_X;
        const int64_t ny = std::min<int64_t>(TILE_Y, grid.ny - y0), nx = std::min<int64_t>(TILE_X, grid.nx - x0);
        alignas(64) float sums[TILE_Y * TILE_X] = {};
        double place[TILE_X];
        for (int64_t x = 0; x < TILE_X; ++x) place[x] = exact(grid.x, grid.nx, x0 + std::min(x, nx - 1));
        for (int64_t e = 0; e < elements; ++e)
            if (element[e].weight != 0) add<WEIGHTING>(e, z, y0, ny, place, nx, sums);
        for (int64_t y = 0; y < ny; ++y)
            std::memcpy(image + ((z * grid.ny + y0 + y) * grid.nx + x0), sums + y * TILE_X, sizeof(float) * nx);
    }

    template <int WEIGHTING>
    void add(int64_t e, int64_t z, int64_t y0, int64_t ny, const double* place, int64_t nx, float* sums) const
    {
        const float* row = rows + e * stride + start.whole;
        const Lanes<Wide> lanes(element[e], start, samples);
        alignas(64) float memory[3 * TILE_X];
        const Columns columns(memory, TILE_X);
        for (int64_t x = 0; x < TILE_X; ++x) columns.set(x, place[x] - lanes.x());
        const double dz = exact(grid.z, grid.nz, z) - lanes.z();
        for (int64_t y = 0; y < ny; ++y, sums += TILE_X) {
            const Line<Wide> line(element[e], exact(grid.y, grid.ny, y0 + y) - lanes.y(), dz);
            for (int64_t x = 0; x < nx; x += WIDE) {
                WideWhole k;
                Wide part, weight, before, after;
                reach<WEIGHTING>(lanes, line, columns, x, k, part, weight);
                load_pairs(row, k, before, after);
                const Wide value = multiply_add(part, after - before, before), sum = load_wide(sums + x);
                store_wide(sums + x, WEIGHTING == PLAIN ? sum + value : multiply_add(weight, value, sum));
            }
        }
    }
};

/* The points of a line lie in vectors so that lanes are far apart: neighbours often reach the same sample, and adding to a
   number that was stored just before waits for the store. */
struct Scatter {
    const float* image; /* (nz, ny, vectors, EIGHT) */
    Grid grid;          /* x in the same order */
    int64_t samples;
    const Element* element;
    Start start;

    static int64_t memory(int64_t samples, int64_t nx) { return 2 * (samples + 2) + Columns::size(nx); }

    template <int WEIGHTING>
    void row(int64_t i, float* memory, float* out) const
    {
        const Columns columns(memory, grid.nx);
        float* pairs = memory + Columns::size(grid.nx);
        std::memset(pairs, 0, sizeof(float) * 2 * (samples + 2));
        const Lanes<Eight> lanes(element[i], start, samples);
        for (int64_t x = 0; x < grid.nx; ++x) columns.set(x, exact(grid.x, grid.nx, x) - lanes.x());
        const float* point = image;
        for (int64_t z = 0; z < grid.nz; ++z)
            for (int64_t y = 0; y < grid.ny; ++y) {
                const Line<Eight> line(element[i], exact(grid.y, grid.ny, y) - lanes.y(), exact(grid.z, grid.nz, z) - lanes.z());
                for (int64_t x = 0; x < grid.nx; x += EIGHT, point += EIGHT) {
                    Whole k;
                    Eight part, weight, value = load8(point);
                    reach<WEIGHTING>(lanes, line, columns, x, k, part, weight);
                    if constexpr (WEIGHTING != PLAIN) value *= weight;
                    const Eight after = part * value;
                    add_pairs(pairs + 2 * start.whole, k, value - after, after);
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

bool sound(int64_t batch, int64_t elements, int64_t samples, int64_t nx, int64_t ny, int64_t nz, int64_t whole, int weighting,
           int threads)
{
    const bool sizes = batch >= 0 && elements >= 0 && samples >= 1 && samples < MOST_SAMPLES && nx >= 1 && ny >= 1 && nz >= 1;
    return sizes && whole >= -MOST_SAMPLES && whole <= MOST_SAMPLES && weighting >= PLAIN && weighting <= SPACE && threads >= 1;
}

}  // namespace
}  // namespace scs

/* image[b, z, y, x] = sum over elements of weight(element, point) row_b(arrival), rows as prepared, element weights in them.
   rows: (batch, elements, samples + 3). element: (elements, 10). x, y, z: (2, n), see Grid. image: (batch, nz, ny, nx). whole and
   early: 1 - delay, see arrival. */
SCS_API int scs_pat_gather(const float* rows, std::int64_t batch, std::int64_t elements, std::int64_t samples,
                           const float* element, const float* x, const float* y, const float* z, std::int64_t nx,
                           std::int64_t ny, std::int64_t nz, std::int64_t whole, float early, int weighting, float* image,
                           int threads)
{
    using namespace scs;
    if (!sound(batch, elements, samples, nx, ny, nz, whole, weighting, threads)) return BAD_ARGUMENT;
    const Element* table = reinterpret_cast<const Element*>(element);
    const Start start = Start::of(whole, early, samples);
    for (std::int64_t b = 0; b < batch; ++b) {
        const float* own = rows + b * elements * (samples + 3);
        const Gather gather{own, elements, samples, samples + 3, table, {x, y, z, nx, ny, nz}, start, image + b * nx * ny * nz};
        by_weighting(weighting, [&](auto w) {
            share(gather.tiles(), threads, [&](std::int64_t i) { gather.template tile<w>(i); });
        });
    }
    return OK;
}

/* The adjoint: rows[b, element, k] += weight image[b, point] (1 - part) and ... part at k + 1. rows: (batch, elements, samples). */
SCS_API int scs_pat_scatter(const float* image, std::int64_t batch, std::int64_t elements, std::int64_t samples,
                            const float* element, const float* x, const float* y, const float* z, std::int64_t nx,
                            std::int64_t ny, std::int64_t nz, std::int64_t whole, float early, int weighting, float* rows,
                            int threads)
{
    using namespace scs;
    if (!sound(batch, elements, samples, nx, ny, nz, whole, weighting, threads)) return BAD_ARGUMENT;
    const std::int64_t wide = rounded(nx), lines = ny * nz;
    float* ordered = static_cast<float*>(scratch(ORDERED, sizeof(float) * wide * (batch * lines + 2)));
    if (!ordered) return NO_MEMORY;
    float* axis = ordered + wide * batch * lines;
    spread(x, nx, x[0], axis);
    spread(x + nx, nx, x[nx], axis + wide);
    for (std::int64_t i = 0; i < batch * lines; ++i) spread(image + i * nx, nx, 0, ordered + i * wide);
    const Element* table = reinterpret_cast<const Element*>(element);
    const Start start = Start::of(whole, early, samples);
    std::atomic<int> status{OK};
    share(batch * elements, threads, [&](std::int64_t i) {
        float* memory = static_cast<float*>(scratch(PAIRS, sizeof(float) * Scatter::memory(samples, wide)));
        const Scatter work{ordered + i / elements * lines * wide, {axis, y, z, wide, ny, nz}, samples, table, start};
        if (memory) by_weighting(weighting, [&](auto w) { work.template row<w>(i % elements, memory, rows + i * samples); });
        else status = NO_MEMORY;
    });
    return status;
}
