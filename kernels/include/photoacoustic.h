/* Time of flight between the points of an image and detector elements, in samples: the body of delay-and-sum, of universal
   back-projection and of their adjoint. Lengths are in samples (metres times sampling rate over speed of sound). */
#pragma once

#include "scs.h"

namespace scs {

/* Added to |r - s|^2, so that nothing is divided by 0. */
constexpr float LEAST_SQUARED = 1e-12f;

/* What an element counts for at a point: its weight alone (delay-and-sum), or times the solid angle of its surface. */
enum Weighting { PLAIN = 0, PLANE = 1, SPACE = 2 };

/* A row of the table of elements. `towards` is the normal, which points into the image; `weight` is 0 for a dead element.
   `low_x` ... is what rounding took from x ... */
struct Element {
    float x, y, z, towards_x, towards_y, towards_z, weight, low_x, low_y, low_z;
};

/* A number as the sum of two, the second of the size of the first one's rounding. */
template <class Real>
struct Sum {
    Real high, low;
};

/* a + b of two that are not negative, without rounding (Dekker, Numer Math 18, 224, 1971). */
template <class Real>
SCS_HD Sum<Real> added(Real a, Real b)
{
    const Real more = most(a, b), less = least(a, b), high = more + less;
    return {high, less - (high - more)};
}

/* distance + early - k, `distance` and `half` being the rounded root of `squared` and the inverse of twice that. A distance rounded
   as it stands leaves few digits of a part, so what this took, and the rounding of its square, is added to it. */
template <class Real>
SCS_HD Real rest(Sum<Real> squared, Real distance, Real half, Real early, Real k)
{
    const Real lost = (minus_square(squared.high, distance) + squared.low) * half;
    return (distance - k) + (early + lost);
}

/* Where in a row of `samples` numbers, with zeros around it, the sound of a point arrives. Number 0 is the zero before the first
   sample, so it does at distance + 1 - delay; what is whole in that moves the row, `early` is the rest. Not before first = -whole,
   not after last = samples + 1 - whole, where zeros are. k is the sample before, `part` the part of the way to the next one:
   where rounding took the distance past a sample, or not up to it, the one that lies there. */
template <class Real, class Whole>
SCS_HD void arrival(Sum<Real> squared, Real early, Real first, Real last, Real one, Whole& k, Real& part)
{
    const Real distance = square_root(squared.high), half = half_inverse_root(squared.high);
    k = truncated(least(most(distance + early, first), last));
    const Real near = least(most(rest(squared, distance, half, early, number(k)), -0.5f * one), 1.5f * one);
    k = truncated(least(most(number(k) + (number(truncated(near + one)) - one), first), last));
    part = least(most(rest(squared, distance, half, early, number(k)), Real{}), one);
}

/* n (r - s) / |r - s|^2 in the plane, .../|r - s|^3 in space (Xu, Wang, Phys Rev E 71, 016706, 2005); 0 behind the element. */
template <int WEIGHTING, class Real>
SCS_HD Real solid_angle(Real distance_squared, Real towards, Real tiny)
{
    const Real squared = most(distance_squared, tiny), ahead = most(towards, Real{});
    return WEIGHTING == PLANE ? ahead / squared : ahead / (squared * square_root(squared));
}

}  // namespace scs
