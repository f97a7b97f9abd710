/* Multi-coil data consistency along y and x: one coil per thread, whose plane stays in the cache through rows, columns, mask,
   columns, rows. Images are (batch, slices, y, x), maps (coils, slices, y, x). Inside, a plane of images lies as tiles of LANES
   rows, one after the other, [x][LANES]; a plane of k-space as tiles of LANES columns, [y][LANES]. */
#include "descend.h"
#include "team.h"
#include "transpose.h"

namespace scs {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int APART = 4 * ELEMENT; /* keeps equal rows of different tiles out of each other's cache sets */

struct Planes {
    const Plan &along_y, &along_x;
    std::int64_t coils, slices;

    int rows() const { return along_y.n; }
    int columns() const { return along_x.n; }
    int y_tiles() const { return (rows() + LANES - 1) / LANES; }
    int x_tiles() const { return (columns() + LANES - 1) / LANES; }
    std::int64_t row_tile() const { return columns() * ELEMENT; }
    std::int64_t column_tile() const { return y_tiles() * LANES * ELEMENT + APART; }
    std::int64_t plane() const { return y_tiles() * row_tile(); }
    std::int64_t kspace_plane() const { return x_tiles() * column_tile(); }
    std::int64_t longest() const { return (rows() > columns() ? rows() : columns()) * ELEMENT; }
    int height(int tile) const { return rows() - tile * LANES < LANES ? rows() - tile * LANES : LANES; }
    std::int64_t pixels() const { return std::int64_t{1} * rows() * columns(); }

    void fetch(const float* image, float* plane_, int tile) const
    {
        rows_to_lanes(image + 2 * tile * LANES * columns(), columns(), height(tile), columns(), plane_ + tile * row_tile());
    }

    void deliver(const float* plane_, float* image, int tile) const
    {
        lanes_to_rows(plane_ + tile * row_tile(), columns(), height(tile), columns(), image + 2 * tile * LANES * columns());
    }

    /* Rows of maps times image, to k-space along x, into the tiles of columns. */
    void rows_forward(const float* sees, const float* image, float* kspace, float* work) const
    {
        for (int tile = 0; tile < y_tiles(); ++tile) {
            const float *s = sees + tile * row_tile(), *x = image + tile * row_tile();
            transform(along_x, work, [=](Index n) { return get(s + n * ELEMENT) * get(x + n * ELEMENT); }, To{work});
            for (int t = 0; t < x_tiles(); ++t) {
                Vector re[LANES], im[LANES];
                SCS_UNROLL
                for (int i = 0; i < LANES; ++i) {
                    const int k = t * LANES + i;
                    const Complex<Vector> z = k < columns() ? get(work + along_x.place[k] * ELEMENT) : Complex<Vector>{};
                    re[i] = z.re, im[i] = z.im;
                }
                transpose(re);
                transpose(im);
                float* to = kspace + t * column_tile() + tile * LANES * ELEMENT;
                SCS_UNROLL
                for (int i = 0; i < LANES; ++i) put(to + i * ELEMENT, {re[i], im[i]});
            }
        }
    }

    /* Back along x and onto the sum over coils of conj(maps) times it. */
    void rows_back(const float* sees, const float* kspace, float* sum, bool first, float* work) const
    {
        for (int tile = 0; tile < y_tiles(); ++tile) {
            for (int t = 0; t < x_tiles(); ++t) {
                Vector re[LANES], im[LANES];
                const float* from = kspace + t * column_tile() + tile * LANES * ELEMENT;
                SCS_UNROLL
                for (int i = 0; i < LANES; ++i) {
                    const Complex<Vector> z = get(from + i * ELEMENT);
                    re[i] = z.re, im[i] = z.im;
                }
                transpose(re);
                transpose(im);
                SCS_UNROLL
                for (int i = 0; i < LANES; ++i)
                    if (t * LANES + i < columns()) put(work + along_x.place[t * LANES + i] * ELEMENT, {re[i], im[i]});
            }
            const float* s = sees + tile * row_tile();
            float* total = sum + tile * row_tile();
            if (first)
                transform_back(along_x, work, From{work}, [=](Index n, Complex<Vector> z) {
                    put(total + n * ELEMENT, conj_times(get(s + n * ELEMENT), z));
                });
            else
                transform_back(along_x, work, From{work}, [=](Index n, Complex<Vector> z) {
                    put(total + n * ELEMENT, conj_multiply_add(get(total + n * ELEMENT), get(s + n * ELEMENT), z));
                });
        }
    }

    /* One coil of the gram. weights: real, packed for one slice. */
    void gram(const float* sees, const float* weights, const float* image, float* sum, bool first, float* work,
              float* kspace) const
    {
        rows_forward(sees, image, kspace, work);
        for (int t = 0; t < x_tiles(); ++t) {
            float* tile = kspace + t * column_tile();
            const float* w = weights + std::int64_t{1} * t * rows() * LANES;
            there_and_back(
                along_y, tile, From{tile},
                [=](Index place, Complex<Vector> z) { return scale(z, load(w + place * LANES)); }, To{tile});
        }
        rows_back(sees, kspace, sum, first, work);
    }

    /* One coil to k-space, (y, x). weights: complex, packed. */
    void forward(const float* sees, const float* weights, const float* image, float* out, float* work, float* kspace) const
    {
        rows_forward(sees, image, kspace, work);
        for (int t = 0; t < x_tiles(); ++t) {
            float* tile = kspace + t * column_tile();
            const float* w = weights + std::int64_t{1} * t * rows() * ELEMENT;
            const int width = columns() - t * LANES;
            transform(along_y, tile, From{tile}, [=, this](Index place, Complex<Vector> z) {
                const Complex<Vector> result = get(w + place * ELEMENT) * z;
                float* to = out + 2 * (along_y.frequency[place] * columns() + t * LANES);
                if (width >= LANES) store_numbers(to, result);
                else store_first(to, result, width);
            });
        }
    }

    void adjoint(const float* sees, const float* weights, const float* in, float* sum, bool first, float* work,
                 float* kspace) const
    {
        for (int t = 0; t < x_tiles(); ++t) {
            float* tile = kspace + t * column_tile();
            const float* w = weights + std::int64_t{1} * t * rows() * ELEMENT;
            const int width = columns() - t * LANES;
            transform_back(
                along_y, tile,
                [=, this](Index place) {
                    const float* from = in + 2 * (along_y.frequency[place] * columns() + t * LANES);
                    const Complex<Vector> z = width >= LANES ? load_numbers(from) : load_first(from, width);
                    return conj_times(get(w + place * ELEMENT), z);
                },
                To{tile});
        }
        rows_back(sees, kspace, sum, first, work);
    }

    static void store_first(float* to, Complex<Vector> value, int width)
    {
        float numbers[ELEMENT];
        store_numbers(numbers, value);
        std::memcpy(to, numbers, sizeof(float) * 2 * width);
    }

    static Complex<Vector> load_first(const float* from, int width)
    {
        float numbers[ELEMENT] = {};
        std::memcpy(numbers, from, sizeof(float) * 2 * width);
        return load_numbers(numbers);
    }
};

/* What the threads share while they work on one image, and each one's own memory. */
struct Workshop {
    const Planes& planes;
    const float *maps, *weights; /* of the slice */
    float *image, *sums;         /* packed image; one sum over coils per thread */
    double* partial;             /* sums of scalar products, for three that may be under way */
    Team team;
    float *work = nullptr, *kspace = nullptr;

    bool ready()
    {
        work = static_cast<float*>(scratch(0, sizeof(float) * planes.longest()));
        kspace = static_cast<float*>(scratch(1, sizeof(float) * planes.kspace_plane()));
        return work && kspace;
    }

    int busy() const { return planes.coils < team.members ? static_cast<int>(planes.coils) : team.members; }
    float* own_sum() const { return sums + team.member * planes.plane(); }

    /* Each thread's sum over its coils; complete when all have met. */
    template <class Coil>
    void over_coils(Coil coil) const
    {
        bool first = true;
        for (std::int64_t c = team.member; c < planes.coils; c += team.members, first = false) coil(c, first);
        team.meet();
    }

    void gram() const
    {
        over_coils([this](std::int64_t c, bool first) {
            planes.gram(maps + c * planes.plane(), weights, image, own_sum(), first, work, kspace);
        });
    }

    /* The total over the threads' sums, into the first of them, of the tiles that are this thread's. */
    void gather() const
    {
        const std::int64_t from = team.first(planes.y_tiles()) * planes.row_tile();
        const std::int64_t to = team.last(planes.y_tiles()) * planes.row_tile();
        for (int other = 1; other < busy(); ++other) {
            const float* sum = sums + other * planes.plane();
            for (std::int64_t i = from; i < to; i += LANES) store(sums + i, load(sums + i) + load(sum + i));
        }
    }

    /* The sum over all threads of a number that each has. */
    double total(double own, int which) const
    {
        double* numbers = partial + which * MOST_THREADS;
        numbers[team.member] = own;
        team.meet();
        double sum = 0;
        for (int other = 0; other < team.members; ++other) sum += numbers[other];
        return sum;
    }
};

/* Plain loops over the part of packed arrays that is a thread's own. */
struct Part {
    std::int64_t from, to, step;

    double inner(const float* a, const float* b) const
    {
        double sum = 0;
        for (std::int64_t tile = from; tile < to; tile += step) {
            Vector even{}, odd{};
            for (std::int64_t i = tile; i < tile + step; i += ELEMENT) {
                even += load(a + i) * load(b + i);
                odd += load(a + i + LANES) * load(b + i + LANES);
            }
            even += odd;
            for (int lane = 0; lane < LANES; ++lane) sum += even[lane];
        }
        return sum;
    }

    void add(float* x, float a, const float* y) const
    {
        for (std::int64_t i = from; i < to; i += LANES) store(x + i, load(x + i) + broadcast(a) * load(y + i));
    }

    void copy(const float* x, float* y) const { std::memcpy(y + from, x + from, sizeof(float) * (to - from)); }
};

float ratio(double above, double below) { return below > 0 ? static_cast<float>(above / below) : 0.0f; }

/* Conjugate gradients; the direction is the workshop's image, and x, residual are packed. */
void iterate(const Workshop& shop, float* x, float* residual, float ridge, int iterations, bool from_zero)
{
    const Planes& planes = shop.planes;
    const std::int64_t tile = planes.row_tile();
    const Part own{shop.team.first(planes.y_tiles()) * tile, shop.team.last(planes.y_tiles()) * tile, tile};
    if (!from_zero) {
        own.copy(x, shop.image);
        shop.team.meet();
        shop.gram();
        shop.gather();
        own.add(residual, -1, shop.sums);
        own.add(residual, -ridge, x);
        shop.team.meet();
    }
    own.copy(residual, shop.image);
    double energy = shop.total(own.inner(residual, residual), 0);
    for (int i = 0; i < iterations; ++i) {
        shop.gram();
        shop.gather();
        own.add(shop.sums, ridge, shop.image);
        const float step = ratio(energy, shop.total(own.inner(shop.image, shop.sums), 1));
        own.add(x, step, shop.image);
        own.add(residual, -step, shop.sums);
        const double before = energy;
        energy = shop.total(own.inner(residual, residual), 2);
        const float share = ratio(energy, before);
        for (std::int64_t j = own.from; j < own.to; j += LANES)
            store(shop.image + j, load(residual + j) + broadcast(share) * load(shop.image + j));
        shop.team.meet();
    }
}

bool sensible(const Plan* y, const Plan* x, std::int64_t batch, std::int64_t coils, std::int64_t slices, int threads)
{
    return y && x && batch >= 0 && coils >= 1 && slices >= 0 && threads >= 1 && threads <= MOST_THREADS;
}

/* Calls run(workshop, member of the batch, slice) in every thread, with `arrays` packed planes behind workshop.image. */
template <class Run>
int for_slices(const Planes& planes, const float* packed, const float* weights, std::int64_t weight_slices,
               std::int64_t weight_floats, std::int64_t batch, int arrays, int threads, Run run)
{
    const std::size_t shared = sizeof(float) * planes.plane() * (threads + arrays);
    double* partial = static_cast<double*>(scratch(2, sizeof(double) * 3 * MOST_THREADS));
    float* image = static_cast<float*>(scratch(3, shared));
    if (!image || !partial) return NO_MEMORY;
    bool lacking[MOST_THREADS] = {};
    as_team(threads, [&](Team team) {
        Workshop shop{planes, nullptr, nullptr, image, image + arrays * planes.plane(), partial, team};
        lacking[team.member] = !shop.ready();
        team.meet();
        for (int other = 0; other < team.members; ++other)
            if (lacking[other]) return;
        for (std::int64_t job = 0; job < batch * planes.slices; ++job) {
            const std::int64_t b = job / planes.slices, z = job % planes.slices;
            shop.maps = packed + z * planes.coils * planes.plane();
            shop.weights = weights + (weight_slices == 1 ? 0 : z) * weight_floats;
            run(shop, b, z);
            team.meet();
        }
    });
    for (const bool one : lacking)
        if (one) return NO_MEMORY;
    return OK;
}

std::int64_t weight_floats(const Planes& planes, int per_element)
{
    return std::int64_t{1} * planes.x_tiles() * planes.rows() * per_element;
}

}  // namespace
}  // namespace scs

/* Floats that packed maps take. */
SCS_API std::int64_t scs_planes_floats(std::int64_t coils, std::int64_t slices, std::int64_t y, std::int64_t x)
{
    return coils * slices * ((y + scs::LANES - 1) / scs::LANES) * x * scs::ELEMENT;
}

/* Floats that packed weights take: real or complex ones. */
SCS_API std::int64_t scs_planes_weight_floats(std::int64_t slices, std::int64_t y, std::int64_t x,
                                              std::int64_t complex)
{
    return slices * ((x + scs::LANES - 1) / scs::LANES) * y * (complex ? scs::ELEMENT : scs::LANES);
}

SCS_API int scs_planes_pack(const float* maps, float* packed, std::int64_t coils, std::int64_t slices, std::int64_t y,
                            std::int64_t x, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(y), *along_x = plan_for(x);
    if (!sensible(along_y, along_x, 1, coils, slices, threads)) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, coils, slices};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t job = 0; job < coils * slices; ++job) {
        const std::int64_t z = job / coils, c = job % coils;
        for (int tile = 0; tile < planes.y_tiles(); ++tile)
            planes.fetch(maps + 2 * (c * slices + z) * planes.pixels(), packed + job * planes.plane(), tile);
    }
    return OK;
}

/* weights: (slices, y, x), real or complex, in the natural order of plain transforms. */
SCS_API int scs_planes_pack_weights(const float* weights, float* packed, std::int64_t slices, std::int64_t y,
                                    std::int64_t x, int complex)
{
    using namespace scs;
    const Plan *along_y = plan_for(y), *along_x = plan_for(x);
    if (!sensible(along_y, along_x, 1, 1, slices, 1)) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, 1, slices};
    const int parts = complex ? 2 : 1;
    for (std::int64_t z = 0; z < slices; ++z, weights += parts * planes.pixels())
        for (int t = 0; t < planes.x_tiles(); ++t)
            for (int place = 0; place < y; ++place)
                for (int part = 0; part < parts; ++part)
                    for (int lane = 0; lane < LANES; ++lane) {
                        const std::int64_t k = t * LANES + lane, row = along_y->frequency[place];
                        *packed++ = k < x ? weights[parts * (row * x + k) + part] : 0.0f;
                    }
    return OK;
}

/* out = gram x, or with the image of_data = A^H y, (slices, y, x), the step x + share (of_data - gram x). weights: packed real ones
   of 1 or all slices. */
SCS_API int scs_planes_gram(const float* packed, const float* weights, std::int64_t weight_slices, const float* x,
                            const float* of_data, float share, float* out, std::int64_t batch, std::int64_t coils,
                            std::int64_t slices, std::int64_t rows, std::int64_t columns, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(rows), *along_x = plan_for(columns);
    if (!sensible(along_y, along_x, batch, coils, slices, threads)) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, coils, slices};
    return for_slices(planes, packed, weights, weight_slices, weight_floats(planes, LANES), batch, of_data ? 2 : 1, threads,
                      [&](const Workshop& shop, std::int64_t b, std::int64_t z) {
                          const std::int64_t at = 2 * (b * slices + z) * planes.pixels(), tile = planes.row_tile();
                          const Team& team = shop.team;
                          const std::int64_t first = team.first(planes.y_tiles()), last = team.last(planes.y_tiles());
                          for (std::int64_t t = first; t < last; ++t) planes.fetch(x + at, shop.image, t);
                          team.meet();
                          shop.gram();
                          shop.gather();
                          for (std::int64_t t = first; t < last; ++t) {
                              if (of_data) {
                                  float* constant = shop.image + planes.plane();
                                  planes.fetch(of_data + 2 * z * planes.pixels(), constant, t);
                                  descend(shop.image + t * tile, constant + t * tile, shop.sums + t * tile, share, tile);
                              }
                              planes.deliver(shop.sums, out + at, t);
                          }
                      });
}

/* kspace = weights F maps x, (batch, coils, slices, y, x). weights: packed complex ones. */
SCS_API int scs_planes_forward(const float* packed, const float* weights, std::int64_t weight_slices, const float* x,
                               float* kspace, std::int64_t batch, std::int64_t coils, std::int64_t slices,
                               std::int64_t rows, std::int64_t columns, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(rows), *along_x = plan_for(columns);
    if (!sensible(along_y, along_x, batch, coils, slices, threads)) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, coils, slices};
    return for_slices(
        planes, packed, weights, weight_slices, weight_floats(planes, ELEMENT), batch, 1, threads,
        [&](const Workshop& shop, std::int64_t b, std::int64_t z) {
            const Team& team = shop.team;
            const float* image = x + 2 * (b * slices + z) * planes.pixels();
            for (std::int64_t t = team.first(planes.y_tiles()); t < team.last(planes.y_tiles()); ++t)
                planes.fetch(image, shop.image, t);
            team.meet();
            shop.over_coils([&](std::int64_t c, bool) {
                planes.forward(shop.maps + c * planes.plane(), shop.weights, shop.image,
                               kspace + 2 * ((b * coils + c) * slices + z) * planes.pixels(), shop.work, shop.kspace);
            });
        });
}

/* x = maps^H F^H conj(weights) kspace, the adjoint of the above. */
SCS_API int scs_planes_adjoint(const float* packed, const float* weights, std::int64_t weight_slices,
                               const float* kspace, float* x, std::int64_t batch, std::int64_t coils,
                               std::int64_t slices, std::int64_t rows, std::int64_t columns, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(rows), *along_x = plan_for(columns);
    if (!sensible(along_y, along_x, batch, coils, slices, threads)) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, coils, slices};
    return for_slices(
        planes, packed, weights, weight_slices, weight_floats(planes, ELEMENT), batch, 1, threads,
        [&](const Workshop& shop, std::int64_t b, std::int64_t z) {
            shop.over_coils([&](std::int64_t c, bool first) {
                planes.adjoint(shop.maps + c * planes.plane(), shop.weights,
                               kspace + 2 * ((b * coils + c) * slices + z) * planes.pixels(), shop.own_sum(), first,
                               shop.work, shop.kspace);
            });
            shop.gather();
            const Team& team = shop.team;
            float* image = x + 2 * (b * slices + z) * planes.pixels();
            for (std::int64_t t = team.first(planes.y_tiles()); t < team.last(planes.y_tiles()); ++t)
                planes.deliver(shop.sums, image, t);
        });
}

/* x after `iterations` of conjugate gradients for (gram + ridge) x = right_side; x holds the start unless `from_zero`. Slices
   and members of the batch have step sizes of their own. */
SCS_API int scs_planes_solve(const float* packed, const float* weights, std::int64_t weight_slices,
                             const float* right_side, float* x, float ridge, int iterations, int from_zero,
                             std::int64_t batch, std::int64_t coils, std::int64_t slices, std::int64_t rows,
                             std::int64_t columns, int threads)
{
    using namespace scs;
    const Plan *along_y = plan_for(rows), *along_x = plan_for(columns);
    if (!sensible(along_y, along_x, batch, coils, slices, threads) || iterations < 0) return BAD_ARGUMENT;
    const Planes planes{*along_y, *along_x, coils, slices};
    return for_slices(planes, packed, weights, weight_slices, weight_floats(planes, LANES), batch, 3, threads,
                      [&](const Workshop& shop, std::int64_t b, std::int64_t z) {
                          const std::int64_t at = 2 * (b * slices + z) * planes.pixels();
                          const Team& team = shop.team;
                          float *estimate = shop.image + planes.plane(), *residual = estimate + planes.plane();
                          const std::int64_t first = team.first(planes.y_tiles()), last = team.last(planes.y_tiles());
                          for (std::int64_t t = first; t < last; ++t) {
                              planes.fetch(right_side + at, residual, t);
                              if (!from_zero) planes.fetch(x + at, estimate, t);
                              else std::memset(estimate + t * planes.row_tile(), 0, sizeof(float) * planes.row_tile());
                          }
                          team.meet();
                          iterate(shop, estimate, residual, ridge, iterations, from_zero);
                          for (std::int64_t t = first; t < last; ++t) planes.deliver(estimate, x + at, t);
                      });
}
