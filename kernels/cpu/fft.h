/* Fourier transforms of LANES columns side by side, in place. Decimation in frequency leaves its result in another order than
   the natural one and decimation in time starts from that order, so that what lies between them (a mask) needs no sorting. */
#pragma once

#include "fft_butterflies.h"
#include "fft_factors.h"
#include "native.h"

namespace scs {

constexpr int LONGEST = 1 << 17;
constexpr int ELEMENT = 2 * LANES;
/* Floats of one number of all columns: LANES real parts, then LANES imaginary ones. */

/* How a length is taken apart, and the tables for it. Made once and never freed. */
struct Plan {
    int n, stages;
    int radix[MOST_STAGES];
    int rest[MOST_STAGES];               /* length of a block of the stage over its radix */
    const float* twiddle[MOST_STAGES];   /* exp(-2 pi i j p / (radix rest)) for j, then p = 1 ... radix - 1; re, im */
    const int* frequency;                /* which frequency lies at a place */
    const int* place;                    /* and the reverse */
};

/* Null for a length that is not 2^a 3^b 5^c or above LONGEST. */
const Plan* plan_for(std::int64_t n);

SCS_HD Complex<Vector> get(const float* element) { return {load(element), load(element + LANES)}; }

SCS_HD void put(float* element, Complex<Vector> value)
{
    store(element, value.re);
    store(element + LANES, value.im);
}

typedef std::int64_t Index;

/* Loads and stores of a working array: `array(i)` is its i-th element. */
struct From {
    const float* array;
    SCS_HD Complex<Vector> operator()(Index i) const { return get(array + i * ELEMENT); }
};

struct To {
    float* array;
    SCS_HD void operator()(Index i, Complex<Vector> value) const { put(array + i * ELEMENT, value); }
};

/* One stage of decimation in frequency: numbers come from `from` and go to `to` at the same places. Rest is that of the stage
   where it is known beforehand, else 0: addresses are constants then, which saves a third of the instructions. */
template <int Radix, int Rest, class Source, class Sink>
void down(const Plan& plan, int stage, Source from, Sink to)
{
    const Index rest = Rest ? Rest : plan.rest[stage], block = rest * Radix, n = plan.n;
    for (Index j = 0; j < rest; ++j) {
        const float* w = plan.twiddle[stage] + 2 * (Radix - 1) * j;
        for (Index first = j; first < n; first += block) {
            Complex<Vector> x[Radix];
            SCS_UNROLL
            for (int q = 0; q < Radix; ++q) x[q] = from(first + rest * q);
            Butterfly<Radix, -1>::run(x);
            to(first, x[0]);
            SCS_UNROLL
            for (int p = 1; p < Radix; ++p) to(first + rest * p, turned<1>(x[p], w[2 * p - 2], w[2 * p - 1]));
        }
    }
}

/* Its inverse but for the factor: one stage of decimation in time. */
template <int Radix, int Rest, class Source, class Sink>
void up(const Plan& plan, int stage, Source from, Sink to)
{
    const Index rest = Rest ? Rest : plan.rest[stage], block = rest * Radix, n = plan.n;
    for (Index j = 0; j < rest; ++j) {
        const float* w = plan.twiddle[stage] + 2 * (Radix - 1) * j;
        for (Index first = j; first < n; first += block) {
            Complex<Vector> x[Radix];
            x[0] = from(first);
            SCS_UNROLL
            for (int p = 1; p < Radix; ++p) x[p] = turned<-1>(from(first + rest * p), w[2 * p - 2], w[2 * p - 1]);
            Butterfly<Radix, 1>::run(x);
            SCS_UNROLL
            for (int q = 0; q < Radix; ++q) to(first + rest * q, x[q]);
        }
    }
}

/* The last stage (rest 1, no twiddles). */
template <int Radix, class Source, class Sink>
void bottom_down(const Plan& plan, Source from, Sink to)
{
    for (Index first = 0, n = plan.n; first < n; first += Radix) {
        Complex<Vector> x[Radix];
        SCS_UNROLL
        for (int q = 0; q < Radix; ++q) x[q] = from(first + q);
        Butterfly<Radix, -1>::run(x);
        SCS_UNROLL
        for (int p = 0; p < Radix; ++p) to(first + p, x[p]);
    }
}

template <int Radix, class Source, class Sink>
void bottom_up(const Plan& plan, Source from, Sink to)
{
    for (Index first = 0, n = plan.n; first < n; first += Radix) {
        Complex<Vector> x[Radix];
        SCS_UNROLL
        for (int p = 0; p < Radix; ++p) x[p] = from(first + p);
        Butterfly<Radix, 1>::run(x);
        SCS_UNROLL
        for (int q = 0; q < Radix; ++q) to(first + q, x[q]);
    }
}

/* The last stage down, a factor for every frequency, and the first stage up: numbers stay in registers between. */
template <int Radix, class Source, class Sink, class Middle>
void bottom(const Plan& plan, Source from, Sink to, Middle weigh)
{
    for (Index first = 0, n = plan.n; first < n; first += Radix) {
        Complex<Vector> x[Radix];
        SCS_UNROLL
        for (int q = 0; q < Radix; ++q) x[q] = from(first + q);
        Butterfly<Radix, -1>::run(x);
        SCS_UNROLL
        for (int p = 0; p < Radix; ++p) x[p] = weigh(first + p, x[p]);
        Butterfly<Radix, 1>::run(x);
        SCS_UNROLL
        for (int q = 0; q < Radix; ++q) to(first + q, x[q]);
    }
}

/* Stages in place, for any radix. */
void stage_down(const Plan& plan, int stage, float* work);
void stage_up(const Plan& plan, int stage, float* work);

/* Calls run.template operator()<Radix>() for the radices whose loads and stores are worth fusing with what stands around them;
   false for others. `take_apart` puts such radices first and last where it can. */
template <class Run>
SCS_HD bool with_radix(int radix, Run run)
{
    switch (radix) {
        case 16: run.template operator()<16>(); return true;
        case 8: run.template operator()<8>(); return true;
        case 4: run.template operator()<4>(); return true;
        default: return false;
    }
}

/* First stage down, fed by `from`. */
template <class Source>
SCS_HD void enter(const Plan& plan, float* work, Source from)
{
    if (plan.stages > 1 &&
        with_radix(plan.radix[0], [&]<int Radix>() {
            if constexpr (Radix == 16)
                if (plan.rest[0] == 16) return down<16, 16>(plan, 0, from, To{work});
            down<Radix, 0>(plan, 0, from, To{work});
        })) return;
    for (Index i = 0; i < plan.n; ++i) put(work + i * ELEMENT, from(i));
    if (plan.stages > 1) stage_down(plan, 0, work);
}

/* Last stage up, delivering to `to`. */
template <class Sink>
SCS_HD void leave(const Plan& plan, float* work, Sink to)
{
    if (plan.stages > 1 &&
        with_radix(plan.radix[0], [&]<int Radix>() {
            if constexpr (Radix == 16)
                if (plan.rest[0] == 16) return up<16, 16>(plan, 0, From{work}, to);
            up<Radix, 0>(plan, 0, From{work}, to);
        })) return;
    if (plan.stages > 1) stage_up(plan, 0, work);
    for (Index i = 0; i < plan.n; ++i) to(i, get(work + i * ELEMENT));
}

/* Transform with exponent -. from(n): the number at position n. to(place, value): frequency plan.frequency[place]. */
template <class Source, class Sink>
void transform(const Plan& plan, float* work, Source from, Sink to)
{
    const int last = plan.stages - 1;
    enter(plan, work, from);
    for (int s = 1; s < last; ++s) stage_down(plan, s, work);
    if (with_radix(plan.radix[last], [&]<int Radix>() { bottom_down<Radix>(plan, From{work}, to); })) return;
    stage_down(plan, last, work);
    for (Index i = 0; i < plan.n; ++i) to(i, get(work + i * ELEMENT));
}

/* Transform with exponent +. from(place): frequency plan.frequency[place]. to(n, value): the number at position n. */
template <class Source, class Sink>
void transform_back(const Plan& plan, float* work, Source from, Sink to)
{
    const int last = plan.stages - 1;
    if (!with_radix(plan.radix[last], [&]<int Radix>() { bottom_up<Radix>(plan, from, To{work}); })) {
        for (Index i = 0; i < plan.n; ++i) put(work + i * ELEMENT, from(i));
        stage_up(plan, last, work);
    }
    for (int s = last - 1; s > 0; --s) stage_up(plan, s, work);
    leave(plan, work, to);
}

/* There and back with weigh(place, value) between; not divided by n. */
template <class Source, class Middle, class Sink>
void there_and_back(const Plan& plan, float* work, Source from, Middle weigh, Sink to)
{
    const int last = plan.stages - 1;
    enter(plan, work, from);
    for (int s = 1; s < last; ++s) stage_down(plan, s, work);
    if (!with_radix(plan.radix[last], [&]<int Radix>() { bottom<Radix>(plan, From{work}, To{work}, weigh); })) {
        stage_down(plan, last, work);
        for (Index i = 0; i < plan.n; ++i) put(work + i * ELEMENT, weigh(i, get(work + i * ELEMENT)));
        stage_up(plan, last, work);
    }
    for (int s = last - 1; s > 0; --s) stage_up(plan, s, work);
    leave(plan, work, to);
}

}  // namespace scs
