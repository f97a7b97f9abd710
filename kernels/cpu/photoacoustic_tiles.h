/* Times of flight to a tile of evenly spaced points from few of them: along a vector of points the distance to an element that is
   not close is nearly a polynomial of third order, whose coefficients are those of one exact distance. */
#pragma once

#include <algorithm>
#include <cmath>

#include "photoacoustic_lines.h"

namespace scs {
namespace {

constexpr int SIDE = 32;                    /* points along either side of a tile */
constexpr int GROUPS = SIDE / WIDE;         /* vectors along a side */
constexpr float MIDDLE = 0.5f * (WIDE - 1); /* of a vector, in lanes */
constexpr double TOLERATED = 1e-4;          /* error of an arrival in samples, and of a weight as a part of it */
constexpr int AHEAD = WIDE - 1;             /* of a window's 2 WIDE samples, those before the arrival at the middle of a vector */

/* How arrivals are found: point by point, or by polynomials along x, or along x or y so that all of a vector lie in a window. */
enum Way { EXACT, PAIRS, ALONG_X, ALONG_Y };

/* The points of a tile along an axis, what they are as even ones, and how far those are off. */
struct Stretch {
    double place[SIDE], first, step = 0, off = 0;
    int64_t count;

    Stretch(const float* axis, int64_t n, int64_t from) : first(exact(axis, n, from)), count(std::min<int64_t>(SIDE, n - from))
    {
        for (int64_t i = 0; i < SIDE; ++i) place[i] = exact(axis, n, from + std::min(i, count - 1));
        if (count > 1) step = (place[count - 1] - first) / static_cast<double>(count - 1);
        for (int64_t i = 0; i < count; ++i) off = std::max(off, std::fabs(place[i] - at(i)));
    }

    static int64_t tiles(int64_t n) { return (n + SIDE - 1) / SIDE; }
    int64_t vectors() const { return (count + WIDE - 1) / WIDE; }
    double at(int64_t i) const { return first + static_cast<double>(i) * step; }
    double middle(int64_t vector) const { return at(vector * WIDE) + static_cast<double>(MIDDLE) * step; }
    double half() const { return static_cast<double>(MIDDLE) * std::fabs(step); } /* of a vector's length */

    /* Least and largest distance from x to what whole vectors span. */
    double near(double x) const
    {
        const double last = at(vectors() * WIDE - 1);
        return std::max({std::min(first, last) - x, x - std::max(first, last), 0.0});
    }
    double far(double x) const { return std::max(std::fabs(first - x), std::fabs(at(vectors() * WIDE - 1) - x)); }
};

/* A tile as an element sees it. */
struct Sight {
    const Stretch &x, &y;
    double ex, ey, dz;

    Sight(const Stretch& x, const Stretch& y, double z, const Element& e)
        : x(x), y(y), ex(static_cast<double>(e.x) + e.low_x), ey(static_cast<double>(e.y) + e.low_y),
          dz(z - (static_cast<double>(e.z) + e.low_z))
    {
    }

    /* Whether arrivals change more along y than along x. */
    bool steep() const { return std::fabs(y.at(SIDE / 2) - ey) > std::fabs(x.at(SIDE / 2) - ex); }
    double aside() const { return dz * dz + LEAST_SQUARED; }

    /* Whether polynomials do. With r = half a vector's length over the distance d, the terms of d sqrt(1 + ...) are d r^n g_n with
       |g_4| <= 1/8 and |g_n| <= 2 / (2 n - 1); an eighth of the fourth is left. Of a weight, up to 10 / 4 r^3 and 15 r^4 are. */
    static bool smooth(const Stretch& a, double near, bool weighted)
    {
        const double r = a.half() / near, cube = r * r * r;
        if (!(r < 0.1) || (weighted && cube * (2.5 + 17 * r) > TOLERATED)) return false;
        return a.off + near * r * cube * (1.0 / 64 + 0.25 * r) <= TOLERATED;
    }

    /* Whether the arrivals of every vector lie in a window: none is further from that of the middle than half its length times the
       largest slope. */
    static bool narrow(const Stretch& a, double along, double across_squared)
    {
        const double most = a.half() * along, room = AHEAD - 0.01;
        return WINDOWS && most * most < room * room * (along * along + across_squared);
    }

    Way way(Start start, int64_t samples, bool weighted) const
    {
        const double nx = x.near(ex), ny = y.near(ey), fx = x.far(ex), fy = y.far(ey), aside = dz * dz;
        const double near = std::sqrt(nx * nx + ny * ny + aside), far = std::sqrt(fx * fx + fy * fy + aside);
        const double shift = static_cast<double>(start.whole) + start.early, end = static_cast<double>(samples);
        if (!(near + shift >= 1 && far + shift <= end)) return EXACT; /* some may leave the row, whose ends are in `arrival` */
        const bool inside = near + shift >= AHEAD + 1 && far + shift <= end - WIDE, along_x = smooth(x, near, weighted);
        if (inside && along_x && narrow(x, fx, ny * ny + aside)) return ALONG_X;
        if (inside && smooth(y, near, weighted) && narrow(y, fy, nx * nx + aside)) return ALONG_Y;
        return along_x ? PAIRS : EXACT;
    }
};

/* The lines of a tile as an element sees them: of the distance across them its square, and the part of `towards`. */
struct Lines {
    alignas(64) float high[SIDE], low[SIDE], towards[SIDE];

    Lines(const Stretch& across, double from, float normal, const Sight& sight, float normal_z)
    {
        const double aside = sight.aside();
        const float rest = static_cast<float>(sight.dz) * normal_z;
        for (int i = 0; i < SIDE; ++i) {
            const double d = across.place[i] - from;
            const Sum<float> square = split(d * d + aside);
            high[i] = square.high, low[i] = square.low, towards[i] = static_cast<float>(d) * normal + rest;
        }
    }
};

/* The points of a tile, each for itself. */
struct Points {
    Lines lines;
    alignas(64) float memory[3 * SIDE];
    Columns columns;

    Points(const Sight& sight, const Lanes<Wide>& lanes)
        : lines(sight.y, sight.ey, lanes.at.towards_y, sight, lanes.at.towards_z), columns(memory, SIDE)
    {
        for (int64_t i = 0; i < SIDE; ++i) columns.set(i, sight.x.place[i] - sight.ex);
    }

    Line<Wide> line(int64_t l) const { return {lines.high[l], lines.low[l], lines.towards[l]}; }
};

/* -7.5 ... 7.5 for sixteen lanes */
SCS_HD Wide from_middle()
{
    Wide s;
    for (int l = 0; l < WIDE; ++l) s[l] = static_cast<float>(l) - MIDDLE;
    return s;
}

/* Arrivals at, and weights of, a vector of points on each of WIDE lines, as polynomials of s = lane - MIDDLE. */
template <int WEIGHTING>
struct Bends {
    alignas(64) float time[4][WIDE]; /* after sample `first` */
    alignas(64) std::int32_t first[WIDE];
    alignas(64) float power[3][WIDE], towards[WIDE]; /* of the inverse distance; slope s is what towards gains */
    float slope;

    /* u: distance along the lines from the element to the middles of the vectors. Arrivals are at most `ahead` before theirs. */
    void set(double u, double step, const Lines& lines, int64_t line, const Lanes<Wide>& lanes, float normal, int ahead)
    {
        const Sum<float> square = split(u * u);
        const Wide across = load_wide(lines.high + line);
        Sum<Wide> squared = added(spread_over<Wide>(square.high), across);
        squared.low += square.low + load_wide(lines.low + line);
        const Wide distance = square_root(squared.high), half = half_inverse_root(squared.high), rough = half + half;
        WideWhole k = truncated(distance + lanes.early); /* of an arrival within the row, see `way`; may be one too many */
        const Wide part = rest(squared, distance, half, lanes.early, number(k));
        const Wide inverse = rough + rough * (0.5f - squared.high * half * rough);
        const float h = static_cast<float>(step), along = static_cast<float>(u);
        expand(h, part + static_cast<float>(ahead), across, inverse, along * inverse);
        k -= ahead;
        std::memcpy(first, &k, sizeof k);
        if constexpr (WEIGHTING != PLAIN) {
            weigh(h * inverse, inverse, along * inverse);
            store_wide(towards, along * normal + load_wide(lines.towards + line));
            slope = h * normal;
        }
    }

    /* d sqrt(1 + 2 n r s + (r s)^2) with r = h / d, to the third order in s, and the fourth as what a polynomial of Chebyshev has
       in its place. n: part of the direction that lies along the lines. */
    void expand(float h, Wide constant, Wide across, Wide inverse, Wide n)
    {
        const float whole = MIDDLE * MIDDLE;
        const Wide r = h * inverse, second = 0.5f * h * r * (across * inverse * inverse);
        const Wide fourth = second * r * r * (1.25f * n * n - 0.25f);
        store_wide(time[0], constant - fourth * (whole * whole / 8));
        store_wide(time[1], h * n);
        store_wide(time[2], second + fourth * whole);
        store_wide(time[3], -(second * r * n));
    }

    /* 1 / d^2 or 1 / d^3 times 1, s, s^2 and polynomials of Gegenbauer, the third in the same way. */
    void weigh(Wide r, Wide inverse, Wide n)
    {
        constexpr bool PLANAR = WEIGHTING == PLANE;
        const Wide power0 = PLANAR ? inverse * inverse : inverse * inverse * inverse, first = (PLANAR ? 2.0f : 3.0f) * n;
        const Wide square = n * n, second = PLANAR ? 4.0f * square - 1.0f : 7.5f * square - 1.5f;
        const Wide third = n * (PLANAR ? 4.0f - 8.0f * square : 7.5f - 17.5f * square);
        store_wide(power[0], power0);
        store_wide(power[1], power0 * r * (third * r * r * (0.75f * MIDDLE * MIDDLE) - first));
        store_wide(power[2], power0 * r * r * second);
    }

    /* Of line l: samples before arrivals, counted from `first`, parts of the way to the next one, weights. */
    SCS_HD void at(int64_t l, Wide s, WideWhole& k, Wide& part, Wide& weight) const
    {
        const auto of = [=](const float(&c)[WIDE]) { return spread_over<Wide>(c[l]); };
        const Wide t = multiply_add(multiply_add(multiply_add(of(time[3]), s, of(time[2])), s, of(time[1])), s, of(time[0]));
        k = truncated(t);
        part = t - number(k);
        if constexpr (WEIGHTING != PLAIN) {
            const Wide ahead = most(multiply_add(s, spread_over<Wide>(slope), of(towards)), Wide{});
            weight = ahead * multiply_add(multiply_add(of(power[2]), s, of(power[1])), s, of(power[0]));
        }
    }
};

/* Arrivals at the points of a tile, along its lines: x or y. */
template <Way WAY, int WEIGHTING>
struct Smooth {
    Bends<WEIGHTING> bends[GROUPS][GROUPS]; /* vector on a line, group of lines */
    const Stretch &along, &across;
    static constexpr bool TURNED = WAY == ALONG_Y;

    Smooth(const Sight& sight, const Lanes<Wide>& lanes) : along(TURNED ? sight.y : sight.x), across(TURNED ? sight.x : sight.y)
    {
        const Element& e = lanes.at;
        const Lines lines(across, TURNED ? sight.ex : sight.ey, TURNED ? e.towards_x : e.towards_y, sight, e.towards_z);
        const double from = TURNED ? sight.ey : sight.ex;
        const int ahead = WAY == PAIRS ? static_cast<int>(along.half()) + 2 : AHEAD;
        for (int64_t v = 0; v < along.vectors(); ++v)
            for (int64_t g = 0; g < GROUPS; ++g)
                bends[v][g].set(along.middle(v) - from, along.step, lines, g * WIDE, lanes, TURNED ? e.towards_y : e.towards_x, ahead);
    }
};

}  // namespace
}  // namespace scs
