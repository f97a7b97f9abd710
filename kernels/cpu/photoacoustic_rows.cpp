/* Signals as they come to rows as `scs_pat_gather` reads them: to float, without the offset, band-passed if wanted, weighed. */
#include <algorithm>
#include <atomic>

#include "transpose.h"

#include "eight.h" /* before the bodies, which call its functions */

#include "photoacoustic.h"
#include "sharing.h"

namespace scs {
namespace {

using std::int64_t;

constexpr int64_t MOST_SAMPLES = 1 << 23;
constexpr int TOGETHER = 2 * LANES; /* rows of a band-pass: the real and the imaginary parts of LANES columns */
constexpr int ROWS = 16;            /* of a chunk without band-pass */
constexpr int WORK = 0;             /* slot of scratch */

/* What is done to rows; element i is that of row i modulo `elements`. */
struct Rows {
    int64_t rows, stride, elements, samples;
    const Element* element;
    float offset, delay;
    bool derivative;
    float* to;

    float weight(int64_t i) const { return element[i % elements].weight; }

    /* One row, `silence` being what it reads at rest, with a zero before it and two after: (x - silence) weight, or for universal
       back-projection that of 2 x - 2 t dx/dt, t in samples, the derivative by central differences and one-sided at the ends. */
    template <class Sample>
    void prepare(int64_t i, const Sample* from, float silence) const
    {
        float *row = to + i * (samples + 3), *out = row + 1;
        row[0] = row[samples + 1] = row[samples + 2] = 0;
        const float factor = weight(i);
        if (factor == 0) {
            std::memset(out, 0, sizeof(float) * samples);
            return;
        }
        const int count = static_cast<int>(samples); /* a vector of these becomes floats in one instruction */
        const auto value = [=](int k) { return static_cast<float>(from[k]) - silence; };
        if (!derivative) {
            for (int k = 0; k < count; ++k) out[k] = value(k) * factor;
            return;
        }
        const float start = delay;
        const auto projected = [=](int k, float rise) { return 2 * factor * (value(k) - (static_cast<float>(k) + start) * rise); };
        for (int k = 1; k < count - 1; ++k) out[k] = projected(k, 0.5f * (value(k + 1) - value(k - 1)));
        out[0] = projected(0, count > 1 ? value(1) - value(0) : 0);
        if (count > 1) out[count - 1] = projected(count - 1, value(count - 1) - value(count - 2));
    }

    template <class Sample>
    void plain(const Sample* from, int threads) const
    {
        share((rows + ROWS - 1) / ROWS, threads, [&](int64_t chunk) {
            for (int64_t i = chunk * ROWS; i < std::min(rows, (chunk + 1) * ROWS); ++i) prepare(i, from + i * stride, offset);
        });
    }
};

/* A filter without phase is real in frequency, so two rows pass it as the parts of one complex row. A ramp leads each row back to
   its start, so that none jumps where its end meets it. */
struct BandPass {
    const Rows& rows;
    const Plan& plan;
    const float* response; /* n / 2 + 1 factors, 1 / n among them */

    int64_t padded() const { return (plan.n + LANES - 1) / LANES * LANES; }
    int64_t memory() const { return plan.n * ELEMENT + LANES * padded(); }

    template <class Sample>
    void run(const Sample* from, int64_t first, float* work) const
    {
        float* lines = work + plan.n * ELEMENT;
        for (int half = 0; half < 2; ++half) {
            for (int64_t l = 0; l < LANES; ++l) read(from, first + half * LANES + l, lines + l * padded());
            turn_in(lines, work + half * LANES);
        }
        const auto weigh = [this](Index place, Complex<Vector> z) {
            const int frequency = plan.frequency[place];
            return scale(z, broadcast(response[std::min(frequency, plan.n - frequency)]));
        };
        there_and_back(plan, work, From{work}, weigh, To{work});
        for (int half = 0; half < 2; ++half) {
            turn_out(work + half * LANES, lines);
            for (int64_t l = 0; l < LANES; ++l) {
                const int64_t i = first + half * LANES + l;
                if (i < rows.rows) rows.prepare(i, lines + l * padded(), 0);
            }
        }
    }

    /* What a dead element holds may be no number. */
    template <class Sample>
    void read(const Sample* from, int64_t i, float* line) const
    {
        if (i >= rows.rows || rows.weight(i) == 0) {
            std::memset(line, 0, sizeof(float) * plan.n);
            return;
        }
        const Sample* row = from + i * rows.stride;
        const int samples = static_cast<int>(rows.samples), n = plan.n;
        const float offset = rows.offset;
        for (int k = 0; k < samples; ++k) line[k] = static_cast<float>(row[k]) - offset;
        const float last = line[samples - 1], step = (line[0] - last) / static_cast<float>(n - samples + 1);
        for (int k = samples; k < n; ++k) line[k] = last + step * static_cast<float>(k - samples + 1);
    }

    /* LANES lines to one part of each element, and back. */
    void turn_in(const float* lines, float* part) const
    {
        int at = 0;
        for (; at + LANES <= plan.n; at += LANES) {
            Vector block[LANES];
            SCS_UNROLL
            for (int l = 0; l < LANES; ++l) block[l] = load(lines + l * padded() + at);
            transpose(block);
            SCS_UNROLL
            for (int i = 0; i < LANES; ++i) store(part + (at + i) * ELEMENT, block[i]);
        }
        for (; at < plan.n; ++at)
            for (int l = 0; l < LANES; ++l) part[at * ELEMENT + l] = lines[l * padded() + at];
    }

    void turn_out(const float* part, float* lines) const
    {
        int at = 0;
        for (; at + LANES <= plan.n; at += LANES) {
            Vector block[LANES];
            SCS_UNROLL
            for (int i = 0; i < LANES; ++i) block[i] = load(part + (at + i) * ELEMENT);
            transpose(block);
            SCS_UNROLL
            for (int l = 0; l < LANES; ++l) store(lines + l * padded() + at, block[l]);
        }
        for (; at < plan.n; ++at)
            for (int l = 0; l < LANES; ++l) lines[l * padded() + at] = part[at * ELEMENT + l];
    }

    template <class Sample>
    int all(const Sample* from, int threads) const
    {
        std::atomic<int> status{OK};
        share((rows.rows + TOGETHER - 1) / TOGETHER, threads, [&](int64_t chunk) {
            float* work = static_cast<float*>(scratch(WORK, sizeof(float) * memory()));
            if (work) run(from, chunk * TOGETHER, work);
            else status = NO_MEMORY;
        });
        return status;
    }
};

}  // namespace
}  // namespace scs

/* kind: 0 float, 1 int16, 2 uint16. from: rows, each `stride` numbers after the last; to: (rows, samples + 3). Element i, whose
   weight is multiplied in, is that of row i modulo `elements`. Rows of weight 0 become zeros unread. n: length at which rows are
   filtered, at least `samples`, 0 for no filter; response: (n / 2 + 1), over n. */
SCS_API int scs_pat_prepare(const void* from, int kind, std::int64_t rows, std::int64_t stride, std::int64_t elements,
                            std::int64_t samples, const float* element, float offset, float delay, int derivative,
                            std::int64_t n, const float* response, float* to, int threads)
{
    using namespace scs;
    if (kind < 0 || kind > 2 || rows < 0 || stride < samples || elements < 1 || samples < 1 || samples >= MOST_SAMPLES || threads < 1)
        return BAD_ARGUMENT;
    const Rows all{rows, stride, elements, samples, reinterpret_cast<const Element*>(element), offset, delay, derivative != 0, to};
    const Plan* plan = n ? plan_for(n) : nullptr;
    if (n && (!plan || n < samples)) return BAD_ARGUMENT;
    const auto run = [&](auto* typed) {
        if (plan) return BandPass{all, *plan, response}.all(typed, threads);
        all.plain(typed, threads);
        return static_cast<int>(OK);
    };
    if (kind == 0) return run(static_cast<const float*>(from));
    if (kind == 1) return run(static_cast<const std::int16_t*>(from));
    return run(static_cast<const std::uint16_t*>(from));
}
