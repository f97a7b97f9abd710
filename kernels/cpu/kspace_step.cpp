/* The step of data consistency coil by coil: to k-space, towards the data, and back, while a column or a plane is in the cache.
   Images and data are (batch, coils, slices, y, x); x may be given alone for what one transform sees. */
#include "kspace_step.h"

#include "team.h"
#include "transpose.h"

namespace scs {
namespace {

constexpr int APART = 4 * ELEMENT; /* keeps equal rows of different tiles out of each other's cache sets */

/* What is done to a frequency. taken: the share where sampled; data: null for the linear part alone. */
struct Step {
    float share, factor;

    template <class Data>
    SCS_HD Complex<Vector> operator()(Complex<Vector> k, Vector sampled, bool with_data, Data data) const
    {
        return with_data ? towards(k, sampled * share, factor, data()) : away(k, sampled * share, factor);
    }
};

SCS_HD Complex<Vector> load_columns(const float* from, int width)
{
    if (width >= LANES) return load_numbers(from);
    float numbers[ELEMENT] = {};
    std::memcpy(numbers, from, sizeof(float) * 2 * width);
    return load_numbers(numbers);
}

SCS_HD Vector load_reals(const float* from, int width)
{
    if (width >= LANES) return load(from);
    float numbers[LANES] = {};
    std::memcpy(numbers, from, sizeof(float) * width);
    return load(numbers);
}

SCS_HD void store_columns(float* to, Complex<Vector> value, int width)
{
    if (width >= LANES) return store_numbers(to, value);
    float numbers[ELEMENT];
    store_numbers(numbers, value);
    std::memcpy(to, numbers, sizeof(float) * 2 * width);
}

/* LANES columns of (n, inner), in one pass over memory. sampled: (n). */
void step_columns(const Plan& plan, const float* x, const float* sampled, const float* data, float* out, std::int64_t inner,
                  int width, Step step, float* work)
{
    const bool whole = width >= LANES;
    const auto row = [=](const float* from, Index n) {
        return whole ? load_mixed(from + 2 * n * inner) : load_some(from + 2 * n * inner, width);
    };
    there_and_back(
        plan, work, [=](Index n) { return row(x, n); },
        [&](Index place, Complex<Vector> k) {
            const int frequency = plan.frequency[place];
            return step(k, broadcast(sampled[frequency]), data, [&] { return row(data, frequency); });
        },
        [=](Index n, Complex<Vector> z) {
            if (whole) store_mixed(out + 2 * n * inner, z);
            else store_some(out + 2 * n * inner, z, width);
        });
}

/* One plane: columns to tiles of LANES columns, [place along y][LANES]; tiles of LANES such rows there and back along x; columns
   back. Sampled and data lie as the rows in the middle do: tiles of rows, [place along x][LANES]. */
struct Plane {
    const Plan &along_y, &along_x;

    int rows() const { return along_y.n; }
    int columns() const { return along_x.n; }
    int y_tiles() const { return (rows() + LANES - 1) / LANES; }
    int x_tiles() const { return (columns() + LANES - 1) / LANES; }
    std::int64_t pixels() const { return std::int64_t{1} * rows() * columns(); }
    std::int64_t column_tile() const { return y_tiles() * LANES * ELEMENT + APART; }
    std::int64_t tiles() const { return x_tiles() * column_tile(); }
    std::int64_t packed(int per_element) const { return std::int64_t{1} * y_tiles() * columns() * per_element; }

    void columns_down(const float* x, float* tiles_, int t) const
    {
        float* tile = tiles_ + t * column_tile();
        const int width = columns() - t * LANES;
        const float* first = x + 2 * t * LANES;
        transform(along_y, tile, [=, this](Index n) { return load_columns(first + 2 * n * columns(), width); }, To{tile});
        std::memset(tile + rows() * ELEMENT, 0, sizeof(float) * (y_tiles() * LANES - rows()) * ELEMENT);
    }

    void columns_up(float* tiles_, float* out, int t) const
    {
        float* tile = tiles_ + t * column_tile();
        const int width = columns() - t * LANES;
        float* first = out + 2 * t * LANES;
        transform_back(along_y, tile, From{tile}, [=, this](Index n, Complex<Vector> z) {
            store_columns(first + 2 * n * columns(), z, width);
        });
    }

    /* sampled, data: of this tile of rows. */
    void rows_through(float* tiles_, int tile, const float* sampled, const float* data, Step step, float* work) const
    {
        float* corner = tiles_ + tile * LANES * ELEMENT;
        for (int t = 0; t < x_tiles(); ++t) turn(corner + t * column_tile(), work + t * LANES * ELEMENT);
        there_and_back(
            along_x, work, From{work},
            [=](Index place, Complex<Vector> k) {
                return step(k, load(sampled + place * LANES), data, [=] { return get(data + place * ELEMENT); });
            },
            To{work});
        for (int t = 0; t < x_tiles(); ++t) turn(work + t * LANES * ELEMENT, corner + t * column_tile());
    }

    /* A block of LANES x LANES elements on its side. */
    static void turn(const float* from, float* to)
    {
        Vector re[LANES], im[LANES];
        SCS_UNROLL
        for (int i = 0; i < LANES; ++i) {
            const Complex<Vector> z = get(from + i * ELEMENT);
            re[i] = z.re, im[i] = z.im;
        }
        transpose(re);
        transpose(im);
        SCS_UNROLL
        for (int i = 0; i < LANES; ++i) put(to + i * ELEMENT, {re[i], im[i]});
    }

    /* One tile of rows of (y, x) numbers, real or complex, in the order that `rows_through` reads; 0 where there is no row. */
    template <int Parts>
    void pack(const float* numbers, float* to, int tile) const
    {
        for (int at = 0; at < columns(); at += LANES) {
            const int width = columns() - at;
            Vector re[LANES], im[LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int place = tile * LANES + lane;
                re[lane] = im[lane] = Vector{};
                if (place >= rows()) continue;
                const float* from = numbers + Parts * (std::int64_t{1} * along_y.frequency[place] * columns() + at);
                const Complex<Vector> z = Parts == 2 ? load_columns(from, width) : Complex<Vector>{load_reals(from, width), {}};
                re[lane] = z.re, im[lane] = z.im;
            }
            transpose(re);
            if (Parts == 2) transpose(im);
            for (int i = 0; i < LANES && i < width; ++i) {
                float* element = to + along_x.place[at + i] * Parts * LANES;
                store(element, re[i]);
                if (Parts == 2) store(element + LANES, im[i]);
            }
        }
    }

    /* One plane by a team, which may be a single thread; `tiles_` is shared, `work` is not. */
    void run(const Team& team, const float* x, const float* sampled, const float* data, float* out, Step step, float* tiles_,
             float* work) const
    {
        const std::int64_t from = team.first(x_tiles()), to = team.last(x_tiles());
        for (std::int64_t t = from; t < to; ++t) columns_down(x, tiles_, static_cast<int>(t));
        team.meet();
        for (std::int64_t r = team.first(y_tiles()); r < team.last(y_tiles()); ++r) {
            const float* own = data ? data + r * columns() * ELEMENT : nullptr;
            rows_through(tiles_, static_cast<int>(r), sampled + r * columns() * LANES, own, step, work);
        }
        team.meet();
        for (std::int64_t t = from; t < to; ++t) columns_up(tiles_, out, static_cast<int>(t));
        team.meet();
    }
};

}  // namespace
}  // namespace scs

/* out = F^H [(1 - t) factor F x + t data] along n with t = share sampled. x, out: (batch, coils, outer, n, inner), may be the same
   memory; data: (coils, outer, n, inner) or null; sampled: (sampled_outer, n), sampled_outer 1 or outer. All in the natural order of
   plain transforms. */
SCS_API int scs_lines_step(const float* x, const float* sampled, std::int64_t sampled_outer, const float* data, float* out,
                           float share, float factor, std::int64_t batch, std::int64_t coils, std::int64_t outer,
                           std::int64_t n, std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!plan || batch < 0 || coils < 0 || outer < 0 || inner < 0 || threads < 1) return BAD_ARGUMENT;
    const std::int64_t tiles = (inner + LANES - 1) / LANES, planes = coils * outer;
    int status = OK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : status)
    for (std::int64_t job = 0; job < batch * planes * tiles; ++job) {
        float* work = static_cast<float*>(scratch(0, sizeof(float) * n * ELEMENT));
        if (!work) {
            status = NO_MEMORY;
            continue;
        }
        const std::int64_t plane = job / tiles, column = job % tiles * LANES, left = inner - column;
        const std::int64_t at = 2 * (plane * n * inner + column), of_data = 2 * (plane % planes * n * inner + column);
        const float* known = sampled + (sampled_outer == 1 ? 0 : plane % outer * n);
        const int width = static_cast<int>(left < LANES ? left : LANES);
        step_columns(*plan, x + at, known, data ? data + of_data : nullptr, out + at, inner, width, {share, factor}, work);
    }
    return status;
}

/* Floats that one packed plane takes: real numbers, or complex ones. */
SCS_API std::int64_t scs_step_floats(std::int64_t y, std::int64_t x, std::int64_t complex)
{
    return (y + scs::LANES - 1) / scs::LANES * x * (complex ? scs::ELEMENT : scs::LANES);
}

/* numbers: (planes, y, x), real or complex, in the natural order of plain transforms. */
SCS_API int scs_step_pack(const float* numbers, float* packed, std::int64_t planes, std::int64_t y, std::int64_t x, int complex,
                          int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(y), *along_x = plan_for(x);
    if (!along_y || !along_x || planes < 0 || threads < 1) return BAD_ARGUMENT;
    const Plane plane{*along_y, *along_x};
    const std::int64_t step = x * (complex ? ELEMENT : LANES), tiles = plane.y_tiles();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t job = 0; job < planes * tiles; ++job) {
        const float* from = numbers + job / tiles * plane.pixels() * (complex ? 2 : 1);
        if (complex) plane.pack<2>(from, packed + job * step, static_cast<int>(job % tiles));
        else plane.pack<1>(from, packed + job * step, static_cast<int>(job % tiles));
    }
    return OK;
}

/* As scs_lines_step along y and x. x, out: (batch, coils, slices, y, x), may be the same memory; data: (coils, slices), sampled:
   (1 or slices), both packed. Each thread takes whole planes; those left over are shared out. */
SCS_API int scs_planes_step(const float* x, const float* sampled, std::int64_t sampled_slices, const float* data, float* out,
                            float share, float factor, std::int64_t batch, std::int64_t coils, std::int64_t slices,
                            std::int64_t rows, std::int64_t columns, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(rows), *along_x = plan_for(columns);
    if (!along_y || !along_x || batch < 0 || coils < 0 || slices < 0 || threads < 1) return BAD_ARGUMENT;
    const Plane plane{*along_y, *along_x};
    float* shared = static_cast<float*>(scratch(2, sizeof(float) * plane.tiles()));
    if (!shared) return NO_MEMORY;
    const std::int64_t jobs = batch * coils * slices;
    bool lacking = false;
    as_team(threads, [&](Team team) {
        float* own = static_cast<float*>(scratch(1, sizeof(float) * plane.tiles()));
        float* work = static_cast<float*>(scratch(0, sizeof(float) * plane.x_tiles() * LANES * ELEMENT));
        if (!own || !work) __atomic_store_n(&lacking, true, __ATOMIC_RELAXED);
        team.meet();
        if (__atomic_load_n(&lacking, __ATOMIC_RELAXED)) return;
        const auto run = [&](const Team& workers, std::int64_t job, float* tiles) {
            const std::int64_t at = 2 * job * plane.pixels(), z = sampled_slices == 1 ? 0 : job % slices;
            const float* of_data = data ? data + job % (coils * slices) * plane.packed(ELEMENT) : nullptr;
            plane.run(workers, x + at, sampled + z * plane.packed(LANES), of_data, out + at, {share, factor}, tiles, work);
        };
        const std::int64_t alone = jobs / team.members * team.members;
        for (std::int64_t job = team.member; job < alone; job += team.members) run(Team{}, job, own);
        team.meet();
        for (std::int64_t job = alone; job < jobs; ++job) run(team, job, shared);
    });
    return lacking ? NO_MEMORY : OK;
}
