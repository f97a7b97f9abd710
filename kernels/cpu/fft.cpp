/* Batched complex Fourier transforms along any axis of a contiguous array. */
#include "fft.h"

#include <atomic>
#include <cmath>
#include <cstdlib>

#include "transpose.h"

namespace scs {
namespace {

std::atomic<const Plan*> plans[LONGEST + 1];

/* None for the last stage and for radix 1. */
const float* twiddles(int radix, int rest)
{
    float* table = static_cast<float*>(std::malloc(sizeof(float) * 2 * (radix - 1) * rest + 1));
    float* next = table;
    for (int j = 0; j < rest; ++j)
        for (int p = 1; p < radix; ++p) {
            const double angle = -2 * M_PI * (j * p % (radix * rest)) / (radix * rest);
            *next++ = static_cast<float>(std::cos(angle));
            *next++ = static_cast<float>(std::sin(angle));
        }
    return table;
}

const Plan* make(Index n)
{
    Plan* plan = static_cast<Plan*>(std::calloc(1, sizeof(Plan)));
    plan->n = n;
    const Factors factors = take_apart(n);
    plan->stages = factors.count;
    std::memcpy(plan->radix, factors.radix, sizeof factors.radix);
    int* frequency = static_cast<int*>(std::calloc(n, sizeof(int)));
    int* place = static_cast<int*>(std::calloc(n, sizeof(int)));
    int rest = n, step = 1;
    for (int s = 0; s < plan->stages; ++s) {
        const int radix = plan->radix[s];
        rest /= radix;
        plan->rest[s] = rest;
        plan->twiddle[s] = twiddles(radix, rest);
        for (int i = 0; i < n; ++i) frequency[i] += step * (i / rest % radix);
        step *= radix;
    }
    for (int i = 0; i < n; ++i) place[frequency[i]] = i;
    plan->frequency = frequency;
    plan->place = place;
    return plan;
}

struct Axis {
    const Plan& plan;
    int sign;
    float factor;

    /* LANES columns: from(n) natural numbers in, to(n, value) natural numbers out. */
    template <class Source, class Sink>
    void run(float* work, Source from, Sink to) const
    {
        const Vector scale_ = broadcast(factor);
        if (sign < 0)
            transform(plan, work, from, [&](Index i, Complex<Vector> z) { to(plan.frequency[i], scale(z, scale_)); });
        else
            transform_back(plan, work, [&](Index i) { return from(plan.frequency[i]); },
                           [&](Index n, Complex<Vector> z) { to(n, scale(z, scale_)); });
    }

    /* `width` <= LANES neighboring columns of an array whose rows lie `stride` numbers apart. */
    void columns(const float* in, float* out, std::int64_t stride, int width, float* work) const
    {
        if (width == LANES)
            return run(work, [=](Index n) { return load_mixed(in + 2 * n * stride); },
                       [=](Index n, Complex<Vector> z) { store_mixed(out + 2 * n * stride, z); });
        run(work, [=](Index n) { return load_some(in + 2 * n * stride, width); },
            [=](Index n, Complex<Vector> z) { store_some(out + 2 * n * stride, z, width); });
    }

    /* `height` <= LANES rows of n numbers each, one after the other in memory. */
    void rows(const float* in, float* out, int height, float* work) const
    {
        const int n = plan.n;
        float* turned_ = work + n * ELEMENT;
        rows_to_lanes(in, n, height, n, turned_);
        run(work, From{turned_}, To{turned_});
        lanes_to_rows(turned_, n, height, n, out);
    }
};

template <int Radix>
void in_place(const Plan& plan, int stage, float* work, bool up_)
{
    const bool bottom_ = plan.rest[stage] == 1;
    if (up_ && bottom_) bottom_up<Radix>(plan, From{work}, To{work});
    else if (up_) up<Radix, 0>(plan, stage, From{work}, To{work});
    else if (bottom_) bottom_down<Radix>(plan, From{work}, To{work});
    else down<Radix, 0>(plan, stage, From{work}, To{work});
}

void any_stage(const Plan& plan, int stage, float* work, bool up_)
{
    switch (plan.radix[stage]) {
        case 16: return in_place<16>(plan, stage, work, up_);
        case 8: return in_place<8>(plan, stage, work, up_);
        case 5: return in_place<5>(plan, stage, work, up_);
        case 4: return in_place<4>(plan, stage, work, up_);
        case 3: return in_place<3>(plan, stage, work, up_);
        case 2: return in_place<2>(plan, stage, work, up_);
        default: return;
    }
}

}  // namespace

void stage_down(const Plan& plan, int stage, float* work) { any_stage(plan, stage, work, false); }
void stage_up(const Plan& plan, int stage, float* work) { any_stage(plan, stage, work, true); }

const Plan* plan_for(std::int64_t n)
{
    if (n < 1 || n > LONGEST || take_apart(static_cast<int>(n)).count == 0) return nullptr;
    const Plan* known = plans[n].load(std::memory_order_acquire);
    if (known) return known;
    const Plan* made = make(static_cast<int>(n));
    /* another thread may have been quicker; its plan is as good, and the few bytes of this one are left */
    return plans[n].compare_exchange_strong(known, made, std::memory_order_acq_rel) ? made : known;
}

}  // namespace scs

/* The transform of (outer, n, inner) along n, times `factor`; sign -1 or 1 is that of the exponent. in may be out.
   Lengths 2^a 3^b 5^c up to LONGEST. */
SCS_API int scs_fft(const float* in, float* out, std::int64_t outer, std::int64_t n, std::int64_t inner, int sign,
                    float factor, int threads)
{
    using namespace scs;
    const Plan* plan = plan_for(n);
    if (!plan || outer < 0 || inner < 0 || threads < 1 || (sign != 1 && sign != -1)) return BAD_ARGUMENT;
    const Axis axis{*plan, sign, factor};
    const std::int64_t lines = inner == 1 ? 1 : outer, across = inner == 1 ? outer : inner;
    const std::int64_t tiles = (across + LANES - 1) / LANES;
    int status = OK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : status)
    for (std::int64_t job = 0; job < lines * tiles; ++job) {
        float* work = static_cast<float*>(scratch(0, sizeof(float) * 2 * n * ELEMENT));
        if (!work) {
            status = NO_MEMORY;
            continue;
        }
        const std::int64_t first = job % tiles * LANES;
        const int count = static_cast<int>(across - first < LANES ? across - first : LANES);
        if (inner == 1) {
            axis.rows(in + 2 * first * n, out + 2 * first * n, count, work);
        } else {
            const std::int64_t start = 2 * (job / tiles * n * inner + first);
            axis.columns(in + start, out + start, inner, count, work);
        }
    }
    return status;
}
