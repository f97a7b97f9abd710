/* Delay-and-sum, universal back-projection, and the scatter that is their adjoint. */
#include <algorithm>
#include <atomic>
#include <new>

#include "photoacoustic_tiles.h"
#include "sharing.h"

namespace scs {
namespace {

using std::int64_t;

constexpr int TILES = 0, IMAGE = 1, SUMS = 2; /* slots of scratch */

struct Gather {
    const float* rows;
    int64_t elements, samples, stride;
    const Element* element;
    Grid grid;
    Start start;
    float* image;

    int64_t across() const { return Stretch::tiles(grid.nx); }
    int64_t down() const { return Stretch::tiles(grid.ny); }
    int64_t tiles() const { return across() * down() * grid.nz; }

    template <int WEIGHTING>
    void tile(int64_t i) const
    {
        const int64_t z = i / (across() * down()), y0 = i / across() % down() * SIDE, x0 = i % across() * SIDE;
        const Stretch x(grid.x, grid.nx, x0), y(grid.y, grid.ny, y0);
        const double height = exact(grid.z, grid.nz, z);
        alignas(64) float sums[SIDE * SIDE] = {}, turned[SIDE * SIDE] = {};
        for (int64_t e = 0; e < elements; ++e)
            if (element[e].weight != 0) add<WEIGHTING>(e, Sight(x, y, height, element[e]), sums, turned);
        float* to = image + (z * grid.ny + y0) * grid.nx + x0;
        for (int64_t l = 0; l < y.count; ++l)
            for (int64_t p = 0; p < x.count; ++p) to[l * grid.nx + p] = sums[l * SIDE + p] + turned[p * SIDE + l];
    }

    /* turned: sums along y. */
    template <int WEIGHTING>
    void add(int64_t e, const Sight& sight, float* sums, float* turned) const
    {
        const float* row = rows + e * stride + start.whole;
        const Lanes<Wide> lanes(element[e], start, samples);
        switch (sight.way(start, samples, WEIGHTING != PLAIN)) {
        case ALONG_X: return smooth(row, Smooth<ALONG_X, WEIGHTING>(sight, lanes), sums);
        case ALONG_Y: return smooth(row, Smooth<ALONG_Y, WEIGHTING>(sight, lanes), turned);
        case PAIRS: return smooth(row, Smooth<PAIRS, WEIGHTING>(sight, lanes), sums);
        case EXACT: return each<WEIGHTING>(row, lanes, sight, sums);
        }
    }

    template <Way WAY, int WEIGHTING>
    static void smooth(const float* row, const Smooth<WAY, WEIGHTING>& arrivals, float* sums)
    {
        const Wide s = from_middle();
        for (int64_t v = 0; v < arrivals.along.vectors(); ++v)
            for (int64_t g = 0; g * WIDE < arrivals.across.count; ++g) {
                const Bends<WEIGHTING>& bends = arrivals.bends[v][g];
                float* sum = sums + g * WIDE * SIDE + v * WIDE;
                for (int64_t l = 0; l < WIDE; ++l, sum += SIDE) {
                    WideWhole k;
                    Wide part, weight, before, after;
                    bends.at(l, s, k, part, weight);
                    if constexpr (WAY == PAIRS) load_pairs(row + bends.first[l], k, before, after);
                    else take_pairs(row + bends.first[l], k, before, after);
                    accumulate<WEIGHTING>(part, before, after, weight, sum);
                }
            }
    }

    template <int WEIGHTING>
    static void each(const float* row, const Lanes<Wide>& lanes, const Sight& sight, float* sums)
    {
        const Points points(sight, lanes);
        for (int64_t l = 0; l < sight.y.count; ++l)
            for (int64_t v = 0; v < sight.x.vectors(); ++v) {
                WideWhole k;
                Wide part, weight, before, after;
                reach<WEIGHTING>(lanes, points.line(l), points.columns, v * WIDE, k, part, weight);
                load_pairs(row, k, before, after);
                accumulate<WEIGHTING>(part, before, after, weight, sums + l * SIDE + v * WIDE);
            }
    }

    template <int WEIGHTING>
    SCS_HD static void accumulate(Wide part, Wide before, Wide after, Wide weight, float* sum)
    {
        const Wide step = after - before, old = load_wide(sum);
        if constexpr (WEIGHTING == PLAIN) store_wide(sum, multiply_add(part, step, old + before));
        else store_wide(sum, multiply_add(weight, multiply_add(part, step, before), old));
    }
};

/* Arrivals are those of the sum. Points are added line by line or along the lines, by what is larger: neighbours often reach the
   same sample, and adding to a number that was stored just before waits for the store. */
struct Scatter {
    const float* image;   /* tiles of SIDE x SIDE, for each the lines along x, then those along y */
    const Stretch *x, *y; /* tiles */
    Grid grid;
    int64_t samples;
    const Element* element;
    Start start;

    static constexpr int64_t TILE = 2 * SIDE * SIDE;

    template <int WEIGHTING>
    void row(int64_t i, float* pairs, float* out) const
    {
        std::memset(pairs, 0, sizeof(float) * 2 * (samples + 2));
        const Lanes<Wide> lanes(element[i], start, samples);
        const float* tile = image;
        float* first = pairs + 2 * start.whole;
        for (int64_t z = 0; z < grid.nz; ++z)
            for (int64_t j = 0; j < Stretch::tiles(grid.ny); ++j)
                for (int64_t k = 0; k < Stretch::tiles(grid.nx); ++k, tile += TILE)
                    add<WEIGHTING>(tile, lanes, Sight(x[k], y[j], exact(grid.z, grid.nz, z), element[i]), first);
        for (int64_t k = 1; k <= samples; ++k) out[k - 1] = element[i].weight * (pairs[2 * k] + pairs[2 * k - 1]);
    }

    template <int WEIGHTING>
    void add(const float* tile, const Lanes<Wide>& lanes, const Sight& sight, float* pairs) const
    {
        switch (sight.way(start, samples, WEIGHTING != PLAIN)) {
        case ALONG_X: return smooth(tile, Smooth<ALONG_X, WEIGHTING>(sight, lanes), true, pairs);
        case ALONG_Y: return smooth(tile + SIDE * SIDE, Smooth<ALONG_Y, WEIGHTING>(sight, lanes), true, pairs);
        case PAIRS: return smooth(tile, Smooth<PAIRS, WEIGHTING>(sight, lanes), sight.steep(), pairs);
        case EXACT: return each<WEIGHTING>(tile, lanes, sight, pairs);
        }
    }

    template <Way WAY, int WEIGHTING>
    static void smooth(const float* tile, const Smooth<WAY, WEIGHTING>& arrivals, bool across, float* pairs)
    {
        const Wide s = from_middle();
        for (int64_t v = 0; v < arrivals.along.vectors(); ++v)
            for (int64_t g = 0; g * WIDE < arrivals.across.count; ++g) {
                const Bends<WEIGHTING>& bends = arrivals.bends[v][g];
                Block block;
                for (int64_t l = 0; l < WIDE; ++l) {
                    WideWhole k;
                    Wide part, weight;
                    bends.at(l, s, k, part, weight);
                    block.set<WEIGHTING>(l, k + bends.first[l], part, weight, tile + (g * WIDE + l) * SIDE + v * WIDE);
                }
                block.add(across, pairs);
            }
    }

    template <int WEIGHTING>
    static void each(const float* tile, const Lanes<Wide>& lanes, const Sight& sight, float* pairs)
    {
        const Points points(sight, lanes);
        for (int64_t v = 0; v < sight.x.vectors(); ++v)
            for (int64_t g = 0; g * WIDE < sight.y.count; ++g) {
                Block block;
                for (int64_t l = 0; l < WIDE; ++l) {
                    WideWhole k;
                    Wide part, weight;
                    reach<WEIGHTING>(lanes, points.line(g * WIDE + l), points.columns, v * WIDE, k, part, weight);
                    block.set<WEIGHTING>(l, k, part, weight, tile + (g * WIDE + l) * SIDE + v * WIDE);
                }
                block.add(sight.steep(), pairs);
            }
    }

    /* What a vector of points on each of WIDE lines adds, and where. */
    struct Block {
        alignas(64) std::int32_t at[WIDE * WIDE];
        alignas(64) float pairs[2 * WIDE * WIDE];

        template <int WEIGHTING>
        void set(int64_t line, WideWhole k, Wide part, Wide weight, const float* points)
        {
            Wide value = load_wide(points);
            if constexpr (WEIGHTING != PLAIN) value *= weight;
            const Wide after = part * value;
            std::memcpy(at + line * WIDE, &k, sizeof k);
            store_pairs(pairs + 2 * line * WIDE, value - after, after);
        }

        void add(bool across, float* to) const { across ? add<1, WIDE>(to) : add<WIDE, 1>(to); }

        template <int OUTER, int INNER>
        void add(float* to) const
        {
            for (int64_t i = 0; i < WIDE; ++i)
                for (int64_t j = 0; j < WIDE; ++j) {
                    const int64_t n = i * OUTER + j * INNER;
                    add_pair(to + 2 * static_cast<int64_t>(at[n]), pairs + 2 * n);
                }
        }
    };
};

/* The tiles of an image, zeros where they reach beyond it. */
void tile_up(const float* image, int64_t nx, int64_t ny, int64_t i, float* to)
{
    const int64_t x0 = i % Stretch::tiles(nx) * SIDE, y0 = i / Stretch::tiles(nx) * SIDE;
    std::memset(to, 0, sizeof(float) * Scatter::TILE);
    for (int64_t l = 0; l < std::min<int64_t>(SIDE, ny - y0); ++l)
        for (int64_t p = 0; p < std::min<int64_t>(SIDE, nx - x0); ++p)
            to[l * SIDE + p] = to[(SIDE + p) * SIDE + l] = image[(y0 + l) * nx + x0 + p];
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
    const std::int64_t across = Stretch::tiles(nx), down = Stretch::tiles(ny), tiles = across * down;
    Stretch* x_tiles = static_cast<Stretch*>(scratch(TILES, sizeof(Stretch) * (across + down)));
    float* tiled = static_cast<float*>(scratch(IMAGE, sizeof(float) * Scatter::TILE * tiles * nz * batch));
    if (!x_tiles || !tiled) return NO_MEMORY;
    Stretch* y_tiles = x_tiles + across;
    for (std::int64_t i = 0; i < across; ++i) new (x_tiles + i) Stretch(x, nx, i * SIDE);
    for (std::int64_t i = 0; i < down; ++i) new (y_tiles + i) Stretch(y, ny, i * SIDE);
    share(batch * nz * tiles, threads, [&](std::int64_t i) {
        tile_up(image + i / tiles * nx * ny, nx, ny, i % tiles, tiled + i * Scatter::TILE);
    });
    const Element* table = reinterpret_cast<const Element*>(element);
    const Start start = Start::of(whole, early, samples);
    std::atomic<int> status{OK};
    share(batch * elements, threads, [&](std::int64_t i) {
        float* memory = static_cast<float*>(scratch(SUMS, sizeof(float) * 2 * (samples + 2)));
        const float* own = tiled + i / elements * tiles * nz * Scatter::TILE;
        const Scatter work{own, x_tiles, y_tiles, {x, y, z, nx, ny, nz}, samples, table, start};
        if (memory) by_weighting(weighting, [&](auto w) { work.template row<w>(i % elements, memory, rows + i * samples); });
        else status = NO_MEMORY;
    });
    return status;
}
