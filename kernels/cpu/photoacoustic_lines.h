/* How points of a grid and elements of an array see each other, a line of points at a time: what the sums over elements and over
   points have in common. */
#pragma once

#include "eight.h" /* before the bodies, which call its functions */

#include "photoacoustic.h"

namespace scs {
namespace {

using std::int64_t;

constexpr float TINY = 1e-6f;
constexpr int64_t MOST_SAMPLES = 1 << 23; /* above, a float does not hold every index beside a start of as many */

/* A grid of points along three axes, in samples: along each all coordinates, then what rounding took from them. */
struct Grid {
    const float *x, *y, *z;
    int64_t nx, ny, nz;
};

/* Coordinates, each the sum of two floats. */
double exact(const float* axis, int64_t n, int64_t i) { return static_cast<double>(axis[i]) + axis[n + i]; }

Sum<float> split(double x)
{
    const float high = static_cast<float>(x);
    return {high, static_cast<float>(x - high)};
}

/* When recording starts: see `arrival`. */
struct Start {
    int64_t whole;
    float early;

    float first() const { return static_cast<float>(-whole); }
    float last(int64_t samples) const { return static_cast<float>(samples + 1 - whole); }

    /* Where the row ends before the first sound could arrive, it does at any distance: k must not become negative. */
    static Start of(int64_t whole, float early, int64_t samples)
    {
        return whole > samples + 1 ? Start{samples + 1, 0} : Start{whole, early};
    }
};

/* The x of points as an element sees them: distance along x and its square. */
struct Columns {
    float *apart, *high, *low;

    Columns(float* memory, int64_t count) : apart(memory), high(memory + count), low(memory + 2 * count) {}
    static int64_t size(int64_t count) { return 3 * count; }

    void set(int64_t i, double dx) const
    {
        const Sum<float> square = split(dx * dx);
        apart[i] = static_cast<float>(dx), high[i] = square.high, low[i] = square.low;
    }
};

/* What an element and points with the same y and z have to do with each other. V: a vector. */
template <class V>
struct Line {
    V high, low, towards;
    Line(const Element& element, double dy, double dz)
    {
        const Sum<float> aside = split(dy * dy + dz * dz + LEAST_SQUARED);
        high = spread_over<V>(aside.high), low = spread_over<V>(aside.low);
        towards = spread_over<V>(static_cast<float>(dy) * element.towards_y + static_cast<float>(dz) * element.towards_z);
    }
    Line(float high, float low, float towards) : high(spread_over<V>(high)), low(spread_over<V>(low)), towards(spread_over<V>(towards)) {}
};

/* An element as vectors see it. */
template <class V>
struct Lanes {
    V early, first, last, one, towards_x;
    const Element& at;
    Lanes(const Element& element, Start start, int64_t samples)
        : early(spread_over<V>(start.early)), first(spread_over<V>(start.first())), last(spread_over<V>(start.last(samples))),
          one(spread_over<V>(1)), towards_x(spread_over<V>(element.towards_x)), at(element)
    {
    }
    double x() const { return static_cast<double>(at.x) + at.low_x; }
    double y() const { return static_cast<double>(at.y) + at.low_y; }
    double z() const { return static_cast<double>(at.z) + at.low_z; }
};

template <class V>
SCS_HD V vector_at(const float* from)
{
    if constexpr (sizeof(V) == sizeof(Wide)) return load_wide(from);
    else return load8(from);
}

/* Index of the sample before the arrival, the part of the way to the next one, and the weight: the same in both directions. */
template <int WEIGHTING, class V, class K>
SCS_HD void reach(const Lanes<V>& element, const Line<V>& line, const Columns& columns, int64_t x, K& k, V& part, V& weight)
{
    Sum<V> squared = added(vector_at<V>(columns.high + x), line.high);
    squared.low += vector_at<V>(columns.low + x) + line.low;
    arrival(squared, element.early, element.first, element.last, element.one, k, part);
    if constexpr (WEIGHTING != PLAIN) {
        const V towards = multiply_add(vector_at<V>(columns.apart + x), element.towards_x, line.towards);
        weight = solid_angle<WEIGHTING>(squared.high, towards, spread_over<V>(TINY));
    }
}

}  // namespace
}  // namespace scs
