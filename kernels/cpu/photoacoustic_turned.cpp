/* Delay-and-sum and its adjoint where elements come in groups of up to eight that see a square of points alike, each from another
   side: what turns and mirrors the square takes one to the others. One time of flight then does for eight elements, whose samples
   lie side by side, and nothing is gathered number by number. */
#include <algorithm>
#include <atomic>

#include "photoacoustic_lines.h"
#include "sharing.h"

namespace scs {
namespace {

constexpr int LINE = 64;    /* points along x whose sums stay in the cache ... */
constexpr int LINES = 8;    /* ... along y */
constexpr int TOGETHER = 4; /* groups between which a sum stays in a register */
constexpr int STRIPS = 8;   /* of a line, whose points take turns: neighbours of the same sample would wait for one another */
constexpr int SUMS = 0;     /* slot of scratch */

/* Where the points of a line read the row of a group: 8 times the sample before, and the part of the way to the next one. */
struct Places {
    std::int32_t* at;
    float* part;

    void set(const Lanes<Wide>& element, const Line<Wide>& line, const Columns& columns, int64_t count) const
    {
        for (int64_t x = 0; x < count; x += WIDE) {
            WideWhole k;
            Wide parts, none;
            reach<PLAIN>(element, line, columns, x, k, parts, none);
            k *= EIGHT;
            std::memcpy(at + x, &k, sizeof k);
            store_wide(part + x, parts);
        }
    }
};

int64_t widened(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

void columns_of(const Grid& grid, int64_t first, int64_t count, double from, const Columns& columns)
{
    for (int64_t x = 0; x < widened(count); ++x)
        columns.set(x, exact(grid.x, grid.nx, first + std::min(x, count - 1)) - from);
}

struct TurnedGather {
    const float* rows; /* (groups, samples + 3, EIGHT) */
    int64_t groups, samples;
    const Element* element; /* the first one of each group */
    Grid grid;
    Start start;
    float* image; /* (ny, nx, EIGHT) */

    int64_t across() const { return (grid.nx + LINE - 1) / LINE; }
    int64_t tiles() const { return across() * ((grid.ny + LINES - 1) / LINES); }

    void tile(int64_t i) const
    {
        const int64_t y0 = i / across() * LINES, x0 = i % across() * LINE;
        const int64_t ny = std::min<int64_t>(LINES, grid.ny - y0), nx = std::min<int64_t>(LINE, grid.nx - x0);
        alignas(64) float sums[LINES * LINE * EIGHT] = {};
        for (int64_t first = 0; first < groups; first += TOGETHER) add(first, x0, nx, y0, ny, sums);
        for (int64_t y = 0; y < ny; ++y)
            std::memcpy(image + ((y0 + y) * grid.nx + x0) * EIGHT, sums + y * LINE * EIGHT, sizeof(float) * nx * EIGHT);
    }

    void add(int64_t first, int64_t x0, int64_t nx, int64_t y0, int64_t ny, float* sums) const
    {
        alignas(64) float memory[TOGETHER][3 * LINE];
        alignas(64) std::int32_t at[TOGETHER][LINE];
        alignas(64) float part[TOGETHER][LINE];
        const float* row[TOGETHER];
        for (int g = 0; g < TOGETHER; ++g) {
            const Lanes<Wide> lanes(element[first + g], start, samples);
            columns_of(grid, x0, nx, lanes.x(), Columns(memory[g], LINE));
            row[g] = rows + ((first + g) * (samples + 3) + start.whole) * EIGHT;
        }
        for (int64_t y = 0; y < ny; ++y, sums += LINE * EIGHT) {
            for (int g = 0; g < TOGETHER; ++g) {
                const Lanes<Wide> lanes(element[first + g], start, samples);
                const double dy = exact(grid.y, grid.ny, y0 + y) - lanes.y(), dz = exact(grid.z, 1, 0) - lanes.z();
                Places{at[g], part[g]}.set(lanes, Line<Wide>(element[first + g], dy, dz), Columns(memory[g], LINE), nx);
            }
            for (int64_t x = 0; x < nx; ++x) {
                Eight sum = load8(sums + x * EIGHT);
                for (int g = 0; g < TOGETHER; ++g) {
                    const float* from = row[g] + at[g][x];
                    const Eight before = load8(from), after = load8(from + EIGHT);
                    sum += multiply_add(eight(part[g][x]), after - before, before);
                }
                store8(sums + x * EIGHT, sum);
            }
        }
    }
};

struct TurnedScatter {
    const float* image; /* (ny, nx, EIGHT) */
    Grid grid;
    int64_t samples;
    const Element* element;
    Start start;

    int64_t length() const { return (samples + 3) * EIGHT; }
    int64_t memory() const { return length() + 5 * widened(grid.nx); }

    void group(int64_t i, float* memory, float* out) const
    {
        const int64_t wide = widened(grid.nx), strip = grid.nx / STRIPS;
        const Columns columns(memory, wide);
        const Places places{reinterpret_cast<std::int32_t*>(memory + 3 * wide), memory + 4 * wide};
        float* sums = memory + 5 * wide;
        std::memset(sums, 0, sizeof(float) * length());
        const Lanes<Wide> lanes(element[i], start, samples);
        columns_of(grid, 0, grid.nx, lanes.x(), columns);
        const double dz = exact(grid.z, 1, 0) - lanes.z();
        for (int64_t y = 0; y < grid.ny; ++y) {
            places.set(lanes, Line<Wide>(element[i], exact(grid.y, grid.ny, y) - lanes.y(), dz), columns, grid.nx);
            const float* line = image + y * grid.nx * EIGHT;
            float* first = sums + start.whole * EIGHT;
            for (int64_t x = 0; x < strip; ++x)
                for (int64_t s = 0; s < STRIPS; ++s) add(places, x + s * strip, line, first);
            for (int64_t x = strip * STRIPS; x < grid.nx; ++x) add(places, x, line, first);
        }
        std::memcpy(out, sums + EIGHT, sizeof(float) * samples * EIGHT);
    }

    static void add(const Places& places, int64_t x, const float* line, float* sums)
    {
        float* to = sums + places.at[x];
        const Eight value = load8(line + x * EIGHT), after = eight(places.part[x]) * value;
        store8(to, load8(to) + (value - after));
        store8(to + EIGHT, load8(to + EIGHT) + after);
    }
};

bool possible(int64_t groups, int64_t samples, int64_t nx, int64_t ny, int64_t whole, int threads)
{
    const bool sizes = groups >= 0 && samples >= 1 && samples < MOST_SAMPLES / EIGHT && nx >= 1 && ny >= 1;
    return sizes && whole >= -MOST_SAMPLES && whole <= MOST_SAMPLES && threads >= 1;
}

}  // namespace
}  // namespace scs

/* image[y, x, l] = sum over groups of row_l(arrival at the first element). rows: (groups, samples + 3, 8), zeros around the samples;
   groups: a multiple of 4. element: (groups, 10). x, y, z: (2, n), one z. whole and early: 1 - delay, see arrival. */
SCS_API int scs_pat_turned_gather(const float* rows, std::int64_t groups, std::int64_t samples, const float* element, const float* x,
                                  const float* y, const float* z, std::int64_t nx, std::int64_t ny, std::int64_t whole, float early,
                                  float* image, int threads)
{
    using namespace scs;
    if (!possible(groups, samples, nx, ny, whole, threads) || groups % TOGETHER) return BAD_ARGUMENT;
    const Start start = Start::of(whole, early, samples);
    const TurnedGather gather{rows, groups, samples, reinterpret_cast<const Element*>(element), {x, y, z, nx, ny, 1}, start, image};
    share(gather.tiles(), threads, [&](std::int64_t i) { gather.tile(i); });
    return OK;
}

/* The adjoint: rows (groups, samples, 8) of an image (ny, nx, 8). */
SCS_API int scs_pat_turned_scatter(const float* image, std::int64_t groups, std::int64_t samples, const float* element, const float* x,
                                   const float* y, const float* z, std::int64_t nx, std::int64_t ny, std::int64_t whole, float early,
                                   float* rows, int threads)
{
    using namespace scs;
    if (!possible(groups, samples, nx, ny, whole, threads)) return BAD_ARGUMENT;
    const Start start = Start::of(whole, early, samples);
    const TurnedScatter scatter{image, {x, y, z, nx, ny, 1}, samples, reinterpret_cast<const Element*>(element), start};
    std::atomic<int> status{OK};
    share(groups, threads, [&](std::int64_t i) {
        float* memory = static_cast<float*>(scratch(SUMS, sizeof(float) * scatter.memory()));
        if (memory) scatter.group(i, memory, rows + i * samples * EIGHT);
        else status = NO_MEMORY;
    });
    return status;
}
