/* Multi-coil data consistency along one axis: columns are independent, so LANES of them go through everything at once and the
   coils of a column follow each other in the cache. Images are (batch, outer, n, inner), maps (coils, outer, n, inner). */
#include "descend.h"
#include "transpose.h"

namespace scs {
namespace {

struct Lines {
    const Plan& plan;
    const float* maps;    /* packed */
    const float* weights; /* (n), real, or complex for the passes in one direction */
    std::int64_t coils, outer, inner;

    std::int64_t tiles() const { return (inner + LANES - 1) / LANES; }
    int floats() const { return plan.n * ELEMENT; }
    const float* coil(std::int64_t tile, std::int64_t c) const { return maps + (tile * coils + c) * floats(); }

    int width(std::int64_t tile) const
    {
        const std::int64_t left = inner - tile % tiles() * LANES;
        return static_cast<int>(left < LANES ? left : LANES);
    }

    /* Where the columns of a tile begin in an array of `planes` x (n, inner). */
    std::int64_t start(std::int64_t tile, std::int64_t plane) const
    {
        return 2 * (plane * plan.n * inner + tile % tiles() * LANES);
    }

    void fetch(std::int64_t tile, const float* from, float* elements) const
    {
        const int w = width(tile);
        for (int n = 0; n < plan.n; ++n) {
            const float* numbers = from + 2 * n * inner;
            put(elements + n * ELEMENT, w == LANES ? load_mixed(numbers) : load_some(numbers, w));
        }
    }

    void deliver(std::int64_t tile, const float* elements, float* to) const
    {
        const int w = width(tile);
        for (int n = 0; n < plan.n; ++n) {
            const Complex<Vector> z = get(elements + n * ELEMENT);
            if (w == LANES) store_mixed(to + 2 * n * inner, z);
            else store_some(to + 2 * n * inner, z, w);
        }
    }

    /* sum = sum over coils of maps^H F^H weights F maps image */
    void gram(std::int64_t tile, const float* image, float* sum, float* work) const
    {
        const auto weigh = [this](Index place, Complex<Vector> z) {
            return scale(z, broadcast(weights[plan.frequency[place]]));
        };
        for (std::int64_t c = 0; c < coils; ++c) {
            const float* sees = coil(tile, c);
            const auto seen = [=](Index n) { return get(sees + n * ELEMENT) * get(image + n * ELEMENT); };
            if (c == 0)
                there_and_back(plan, work, seen, weigh, [=](Index n, Complex<Vector> z) {
                    put(sum + n * ELEMENT, conj_times(get(sees + n * ELEMENT), z));
                });
            else
                there_and_back(plan, work, seen, weigh, [=](Index n, Complex<Vector> z) {
                    put(sum + n * ELEMENT, conj_multiply_add(get(sum + n * ELEMENT), get(sees + n * ELEMENT), z));
                });
        }
    }

    Complex<Vector> weight(int frequency) const
    {
        return {broadcast(weights[2 * frequency]), broadcast(weights[2 * frequency + 1])};
    }

    void forward(std::int64_t tile, std::int64_t c, const float* image, float* kspace, float* work) const
    {
        const float* sees = coil(tile, c);
        const int w = width(tile);
        transform(plan, work, [=](Index n) { return get(sees + n * ELEMENT) * get(image + n * ELEMENT); },
                  [&](Index place, Complex<Vector> z) {
                      const int k = plan.frequency[place];
                      const Complex<Vector> result = weight(k) * z;
                      if (w == LANES) store_mixed(kspace + 2 * k * inner, result);
                      else store_some(kspace + 2 * k * inner, result, w);
                  });
    }

    void adjoint(std::int64_t tile, std::int64_t c, const float* kspace, float* sum, float* work) const
    {
        const float* sees = coil(tile, c);
        const int w = width(tile);
        transform_back(plan, work,
                       [&](Index place) {
                           const int k = plan.frequency[place];
                           const float* numbers = kspace + 2 * k * inner;
                           return conj_times(weight(k), w == LANES ? load_mixed(numbers) : load_some(numbers, w));
                       },
                       [=](Index n, Complex<Vector> z) {
                           const Complex<Vector> before = c == 0 ? Complex<Vector>{} : get(sum + n * ELEMENT);
                           put(sum + n * ELEMENT, conj_multiply_add(before, get(sees + n * ELEMENT), z));
                       });
    }

    /* Real part of <a, b>, one for each column. */
    Vector inner_product(const float* a, const float* b) const
    {
        Vector sum{}, other{};
        for (int i = 0; i < floats(); i += ELEMENT) {
            sum += load(a + i) * load(b + i);
            other += load(a + i + LANES) * load(b + i + LANES);
        }
        return sum + other;
    }

    /* x = x + a y in every column */
    void add(float* x, Vector a, const float* y) const
    {
        for (int i = 0; i < floats(); i += LANES) store(x + i, load(x + i) + a * load(y + i));
    }

    /* Conjugate gradients for (gram + ridge) x = b, with step sizes of its own in every column. x holds the start; b becomes
       the residual. */
    void solve(std::int64_t tile, float* x, float* b, float ridge, int iterations, bool from_zero, float* work) const
    {
        float *direction = work + floats(), *image = direction + floats();
        if (!from_zero) {
            gram(tile, x, image, work);
            add(image, broadcast(ridge), x);
            add(b, broadcast(-1), image);
        }
        std::memcpy(direction, b, sizeof(float) * floats());
        Vector energy = inner_product(b, b);
        for (int i = 0; i < iterations; ++i) {
            gram(tile, direction, image, work);
            add(image, broadcast(ridge), direction);
            const Vector step = ratio(energy, inner_product(direction, image));
            add(x, step, direction);
            add(b, -step, image);
            const Vector before = energy;
            energy = inner_product(b, b);
            const Vector share = ratio(energy, before);
            for (int j = 0; j < floats(); j += LANES) store(direction + j, load(b + j) + share * load(direction + j));
        }
    }

    static Vector ratio(Vector above, Vector below) { return below > 0 ? above / below : Vector{}; }
};

/* Calls run(tile, member of the batch, working memory of `arrays` tiles) for all of them. */
template <class Run>
int for_tiles(const Lines& lines, std::int64_t batch, int arrays, int threads, Run run)
{
    const std::int64_t tiles = lines.outer * lines.tiles();
    const std::size_t bytes = sizeof(float) * lines.floats() * arrays;
    int status = OK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : status)
    for (std::int64_t job = 0; job < tiles * batch; ++job) {
        float* work = static_cast<float*>(scratch(0, bytes));
        if (work) run(job % tiles, job / tiles, work);
        else status = NO_MEMORY;
    }
    return status;
}

bool sensible(const Plan* plan, std::int64_t batch, std::int64_t coils, std::int64_t outer, std::int64_t inner, int threads)
{
    return plan && batch >= 0 && coils >= 1 && outer >= 0 && inner >= 0 && threads >= 1;
}

}  // namespace
}  // namespace scs

/* Floats that packed maps take. */
SCS_API std::int64_t scs_lines_floats(std::int64_t coils, std::int64_t outer, std::int64_t n, std::int64_t inner)
{
    return coils * outer * n * ((inner + scs::LANES - 1) / scs::LANES) * scs::ELEMENT;
}

SCS_API int scs_lines_pack(const float* maps, float* packed, std::int64_t coils, std::int64_t outer, std::int64_t n,
                           std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!sensible(plan, 1, coils, outer, inner, threads)) return BAD_ARGUMENT;
    const Lines lines{*plan, nullptr, nullptr, coils, outer, inner};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t tile = 0; tile < outer * lines.tiles(); ++tile)
        for (std::int64_t c = 0; c < coils; ++c)
            lines.fetch(tile, maps + lines.start(tile, c * outer + tile / lines.tiles()),
                        packed + (tile * coils + c) * lines.floats());
    return OK;
}

/* out = gram x, or with the image of_data = A^H y, (outer, n, inner), the step x + share (of_data - gram x). weights: (n), real, in
   the natural order of plain transforms. */
SCS_API int scs_lines_gram(const float* packed, const float* weights, const float* x, const float* of_data, float share,
                           float* out, std::int64_t batch, std::int64_t coils, std::int64_t outer, std::int64_t n,
                           std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!sensible(plan, batch, coils, outer, inner, threads)) return BAD_ARGUMENT;
    const Lines lines{*plan, packed, weights, coils, outer, inner};
    return for_tiles(lines, batch, 3, threads, [&](std::int64_t tile, std::int64_t b, float* work) {
        float *image = work + lines.floats(), *sum = image + lines.floats();
        const std::int64_t plane = tile / lines.tiles(), at = lines.start(tile, b * outer + plane);
        lines.fetch(tile, x + at, image);
        lines.gram(tile, image, sum, work);
        if (of_data) {
            lines.fetch(tile, of_data + lines.start(tile, plane), work);
            descend(image, work, sum, share, lines.floats());
        }
        lines.deliver(tile, sum, out + at);
    });
}

/* kspace = weights F maps x, (batch, coils, outer, n, inner). weights: (n), complex. */
SCS_API int scs_lines_forward(const float* packed, const float* weights, const float* x, float* kspace,
                              std::int64_t batch, std::int64_t coils, std::int64_t outer, std::int64_t n,
                              std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!sensible(plan, batch, coils, outer, inner, threads)) return BAD_ARGUMENT;
    const Lines lines{*plan, packed, weights, coils, outer, inner};
    return for_tiles(lines, batch, 2, threads, [&](std::int64_t tile, std::int64_t b, float* work) {
        float* image = work + lines.floats();
        const std::int64_t plane = tile / lines.tiles();
        lines.fetch(tile, x + lines.start(tile, b * outer + plane), image);
        for (std::int64_t c = 0; c < coils; ++c)
            lines.forward(tile, c, image, kspace + lines.start(tile, (b * coils + c) * outer + plane), work);
    });
}

/* x = maps^H F^H conj(weights) kspace, the adjoint of the above. */
SCS_API int scs_lines_adjoint(const float* packed, const float* weights, const float* kspace, float* x,
                              std::int64_t batch, std::int64_t coils, std::int64_t outer, std::int64_t n,
                              std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!sensible(plan, batch, coils, outer, inner, threads)) return BAD_ARGUMENT;
    const Lines lines{*plan, packed, weights, coils, outer, inner};
    return for_tiles(lines, batch, 2, threads, [&](std::int64_t tile, std::int64_t b, float* work) {
        float* sum = work + lines.floats();
        const std::int64_t plane = tile / lines.tiles();
        for (std::int64_t c = 0; c < coils; ++c)
            lines.adjoint(tile, c, kspace + lines.start(tile, (b * coils + c) * outer + plane), sum, work);
        lines.deliver(tile, sum, x + lines.start(tile, b * outer + plane));
    });
}

/* x after `iterations` of conjugate gradients for (gram + ridge) x = right_side; x holds the start unless `from_zero`. */
SCS_API int scs_lines_solve(const float* packed, const float* weights, const float* right_side, float* x, float ridge,
                            int iterations, int from_zero, std::int64_t batch, std::int64_t coils, std::int64_t outer,
                            std::int64_t n, std::int64_t inner, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!sensible(plan, batch, coils, outer, inner, threads) || iterations < 0) return BAD_ARGUMENT;
    const Lines lines{*plan, packed, weights, coils, outer, inner};
    return for_tiles(lines, batch, 5, threads, [&](std::int64_t tile, std::int64_t b, float* work) {
        float *estimate = work + 3 * lines.floats(), *residual = estimate + lines.floats();
        const std::int64_t at = lines.start(tile, b * outer + tile / lines.tiles());
        lines.fetch(tile, right_side + at, residual);
        if (from_zero) std::memset(estimate, 0, sizeof(float) * lines.floats());
        else lines.fetch(tile, x + at, estimate);
        lines.solve(tile, estimate, residual, ridge, iterations, from_zero, work);
        lines.deliver(tile, estimate, x + at);
    });
}
