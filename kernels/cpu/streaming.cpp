/* What happens to readouts on arrival, and to a fully sampled frame when it closes: one pass over memory each. */
#include <cmath>

#include "transpose.h"

namespace scs {
namespace {

/* Readouts as they lie in a received message: any alignment, the samples of a channel one after the other. */
struct Readouts {
    const char* first;
    std::int64_t channels, samples, readout_bytes, channel_bytes;

    const char* row(std::int64_t r) const { return first + r / channels * readout_bytes + r % channels * channel_bytes; }
};

/* Where their lines go: one readout after the other, or each to its place, the channels of a readout `channel` numbers apart. */
struct Lines {
    float* first;
    const std::int64_t* places;
    std::int64_t channels, line, channel;

    float* row(std::int64_t r) const
    {
        const std::int64_t readout = r / channels;
        return first + 2 * ((places ? places[readout] : readout) * line + r % channels * channel);
    }
};

struct Readout {
    const Plan& plan;
    const float* factors; /* (width), complex */
    int width;

    int before() const { return width / 2; }

    /* LANES rows or fewer, from number `r` on, to their lines. */
    void run(const Readouts& in, std::int64_t r, int height, const Lines& lines, float* work) const
    {
        const int n = plan.n;
        float *rows = work + n * ELEMENT, *lanes = rows + n * ELEMENT;
        const char* from[LANES] = {};
        for (int i = 0; i < height; ++i) from[i] = in.samples == n ? in.row(r + i) : filled(in, r + i, rows + 2 * n * i);
        rows_to_lanes(from, height, n, lanes);
        transform_back(plan, work, [&](Index place) { return get(lanes + plan.frequency[place] * ELEMENT); },
                       [&](Index position, Complex<Vector> z) { keep(position, z, rows); });
        float* out[LANES] = {};
        for (int i = 0; i < height; ++i) out[i] = lines.row(r + i);
        lanes_to_rows(rows, height, width, out);
    }

    const char* filled(const Readouts& in, std::int64_t r, float* row) const
    {
        std::memcpy(row, in.row(r), sizeof(float) * 2 * in.samples);
        std::memset(row + 2 * in.samples, 0, sizeof(float) * 2 * (plan.n - in.samples));
        return reinterpret_cast<const char*>(row);
    }

    /* Positions count from the center on; those that are not kept are dropped here. */
    void keep(Index position, Complex<Vector> z, float* kept) const
    {
        const Index at = position < width - before() ? position + before() : position - plan.n + before();
        if (at < 0 || (at < before()) != (position >= plan.n - before())) return;
        put(kept + at * ELEMENT, z * Complex<Vector>{broadcast(factors[2 * at]), broadcast(factors[2 * at + 1])});
    }
};

Vector square_root(Vector x)
{
    for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
}

/* Columns of k-space, (coils, n, inner), to the root of the sum over coils of the squares of their images. */
struct Squares {
    const Plan& plan;
    std::int64_t coils, inner;
    float factor;

    void run(const float* kspace, std::int64_t first, int w, float* image, float* work) const
    {
        const int n = plan.n;
        float* sum = work + n * ELEMENT;
        std::memset(sum, 0, sizeof(float) * n * LANES);
        for (std::int64_t c = 0; c < coils; ++c) {
            const float* from = kspace + 2 * (c * n * inner + first);
            transform_back(plan, work,
                           [&](Index place) {
                               const float* numbers = from + 2 * plan.frequency[place] * inner;
                               return w == LANES ? load_numbers(numbers) : some(numbers, w);
                           },
                           [&](Index i, Complex<Vector> z) {
                               store(sum + i * LANES, load(sum + i * LANES) + (z.re * z.re + z.im * z.im));
                           });
        }
        for (int i = 0; i < n; ++i) {
            const Vector value = square_root(load(sum + i * LANES)) * broadcast(factor);
            std::memcpy(image + (i + n / 2) % n * inner + first, &value, sizeof(float) * w);
        }
    }

    static Complex<Vector> some(const float* from, int width)
    {
        float numbers[ELEMENT] = {};
        std::memcpy(numbers, from, sizeof(float) * 2 * width);
        return load_numbers(numbers);
    }
};

}  // namespace
}  // namespace scs

/* Lines of `width` numbers, from readouts of `samples` complex numbers that are filled with zeros to n and transformed with
   exponent +: of the positions -(width / 2) to width - width / 2 - 1, each times its factor. The line of a channel begins at
   lines + place * line + number of the channel * channel, in complex numbers; the place of readout r is places[r], or r without
   any. Strides of the readouts are in bytes. No two lines may share memory. */
SCS_API int scs_readout_lines(const void* first, const float* factors, float* lines, const std::int64_t* places,
                              std::int64_t readouts, std::int64_t channels, std::int64_t samples,
                              std::int64_t readout_bytes, std::int64_t channel_bytes, std::int64_t n,
                              std::int64_t width, std::int64_t line, std::int64_t channel, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!plan || readouts < 0 || channels < 1 || samples < 0 || samples > n || width < 1 || width > n || threads < 1)
        return BAD_ARGUMENT;
    const Readouts in{static_cast<const char*>(first), channels, samples, readout_bytes, channel_bytes};
    const Lines out{lines, places, channels, line, channel};
    const Readout readout{*plan, factors, static_cast<int>(width)};
    const std::int64_t rows = readouts * channels;
    int status = OK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : status)
    for (std::int64_t tile = 0; tile < (rows + LANES - 1) / LANES; ++tile) {
        float* work = static_cast<float*>(scratch(0, sizeof(float) * 3 * n * ELEMENT));
        const std::int64_t r = tile * LANES;
        if (work) readout.run(in, r, static_cast<int>(rows - r < LANES ? rows - r : LANES), out, work);
        else status = NO_MEMORY;
    }
    return status;
}

/* image (n, inner) of centered k-space (coils, n, inner): the root of the sum of squares of its transforms along n with exponent
   +, times `factor`, with position 0 at n / 2. */
SCS_API int scs_root_sum_of_squares(const float* kspace, float* image, std::int64_t coils, std::int64_t n,
                                    std::int64_t inner, float factor, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!plan || coils < 1 || inner < 0 || threads < 1) return BAD_ARGUMENT;
    const Squares squares{*plan, coils, inner, factor};
    int status = OK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : status)
    for (std::int64_t tile = 0; tile < (inner + LANES - 1) / LANES; ++tile) {
        float* work = static_cast<float*>(scratch(0, sizeof(float) * 2 * n * ELEMENT));
        const std::int64_t first = tile * LANES;
        if (work) squares.run(kspace, first, static_cast<int>(inner - first < LANES ? inner - first : LANES), image, work);
        else status = NO_MEMORY;
    }
    return status;
}
