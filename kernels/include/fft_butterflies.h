/* Discrete Fourier transforms of short lengths, in place and in natural order: the butterflies of every longer one.
   Sign is that of the exponent: X[k] = sum over n of x[n] exp(Sign 2 pi i k n / Radix). */
#pragma once

#include "scs.h"

#if defined(__CUDACC__)
#define SCS_UNROLL _Pragma("unroll")
#define SCS_ROLLED _Pragma("unroll 1")
#else
#define SCS_UNROLL _Pragma("GCC unroll 16")
#define SCS_ROLLED _Pragma("GCC unroll 1")
#endif

namespace scs {

/* Sign i a */
template <int Sign, class R>
SCS_HD Complex<R> quarter_turn(Complex<R> a)
{
    if constexpr (Sign > 0) return {-a.im, a.re};
    else return {a.im, -a.re};
}

/* a (cosine + Sign i sine) */
template <int Sign, class R>
SCS_HD Complex<R> turned(Complex<R> a, float cosine, float sine)
{
    if constexpr (Sign > 0) return {a.re * cosine - a.im * sine, a.im * cosine + a.re * sine};
    else return {a.re * cosine + a.im * sine, a.im * cosine - a.re * sine};
}

template <int Radix, int Sign>
struct Butterfly;

template <int Sign>
struct Butterfly<1, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>*) {}
};

template <int Sign>
struct Butterfly<2, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x)
    {
        const Complex<R> a = x[0], b = x[1];
        x[0] = a + b;
        x[1] = a - b;
    }
};

template <int Sign>
struct Butterfly<3, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x)
    {
        const Complex<R> sum = x[1] + x[2], difference = x[1] - x[2];
        const Complex<R> middle{x[0].re - 0.5f * sum.re, x[0].im - 0.5f * sum.im};
        const Complex<R> side = quarter_turn<Sign>(
            Complex<R>{difference.re * 0.866025403784438647f, difference.im * 0.866025403784438647f});
        x[0] = x[0] + sum;
        x[1] = middle + side;
        x[2] = middle - side;
    }
};

/* Four numbers that lie `Step` apart. */
template <int Sign, int Step, class R>
SCS_HD void four(Complex<R>* x)
{
    const Complex<R> a = x[0] + x[2 * Step], b = x[0] - x[2 * Step];
    const Complex<R> c = x[Step] + x[3 * Step], d = quarter_turn<Sign>(x[Step] - x[3 * Step]);
    x[0] = a + c;
    x[Step] = b + d;
    x[2 * Step] = a - c;
    x[3 * Step] = b - d;
}

template <int Sign>
struct Butterfly<4, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x) { four<Sign, 1>(x); }
};

template <int Sign>
struct Butterfly<5, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x)
    {
        constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
        constexpr float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
        const Complex<R> a = x[1] + x[4], b = x[2] + x[3], d = x[1] - x[4], e = x[2] - x[3];
        const Complex<R> first{x[0].re + c1 * a.re + c2 * b.re, x[0].im + c1 * a.im + c2 * b.im};
        const Complex<R> second{x[0].re + c2 * a.re + c1 * b.re, x[0].im + c2 * a.im + c1 * b.im};
        const Complex<R> f = quarter_turn<Sign>(Complex<R>{s1 * d.re + s2 * e.re, s1 * d.im + s2 * e.im});
        const Complex<R> g = quarter_turn<Sign>(Complex<R>{s2 * d.re - s1 * e.re, s2 * d.im - s1 * e.im});
        x[0] = x[0] + a + b;
        x[1] = first + f;
        x[2] = second + g;
        x[3] = second - g;
        x[4] = first - f;
    }
};

template <int Sign>
struct Butterfly<8, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x)
    {
        constexpr float half = 0.707106781186547524f;
        four<Sign, 2>(x);
        four<Sign, 2>(x + 1);
        /* now x[2 k] is the transform of the even numbers, x[2 k + 1] that of the odd ones */
        const Complex<R> o1 = turned<Sign>(x[3], half, half), o2 = quarter_turn<Sign>(x[5]);
        const Complex<R> o3 = turned<Sign>(x[7], -half, half);
        const Complex<R> e0 = x[0], e1 = x[2], e2 = x[4], e3 = x[6], o0 = x[1];
        x[0] = e0 + o0, x[4] = e0 - o0;
        x[1] = e1 + o1, x[5] = e1 - o1;
        x[2] = e2 + o2, x[6] = e2 - o2;
        x[3] = e3 + o3, x[7] = e3 - o3;
    }
};

template <int Sign>
struct Butterfly<16, Sign> {
    template <class R>
    static SCS_HD void run(Complex<R>* x)
    {
        constexpr float half = 0.707106781186547524f, c = 0.923879532511286756f, s = 0.382683432365089772f;
        SCS_UNROLL
        for (int column = 0; column < 4; ++column) four<Sign, 4>(x + column);
        /* x[4 k + column] holds frequency k of that column; turn it by exp(Sign 2 pi i k column / 16) */
        x[5] = turned<Sign>(x[5], c, s);
        x[6] = turned<Sign>(x[6], half, half);
        x[7] = turned<Sign>(x[7], s, c);
        x[9] = turned<Sign>(x[9], half, half);
        x[10] = quarter_turn<Sign>(x[10]);
        x[11] = turned<Sign>(x[11], -half, half);
        x[13] = turned<Sign>(x[13], s, c);
        x[14] = turned<Sign>(x[14], -half, half);
        x[15] = turned<Sign>(x[15], -c, -s);
        SCS_UNROLL
        for (int row = 0; row < 4; ++row) four<Sign, 1>(x + 4 * row);
        /* frequency k + 4 j lies at x[4 k + j] */
        SCS_UNROLL
        for (int k = 0; k < 4; ++k) {
            SCS_UNROLL
            for (int j = k + 1; j < 4; ++j) {
                const Complex<R> swapped = x[4 * k + j];
                x[4 * k + j] = x[4 * j + k];
                x[4 * j + k] = swapped;
            }
        }
    }
};

}  // namespace scs
