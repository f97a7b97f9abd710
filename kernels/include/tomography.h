/* Rays through an image by Joseph's method (IEEE Trans Med Imaging 1, 192, 1982): a ray steps one pixel along the axis that it is
   closer to and reads between the two pixels on either side of it. Lengths are in pixels, pixel (0, 0) lies at (0, 0). */
#pragma once

#include "scs.h"

namespace scs {

/* The rays of a view: ray u passes through (p0, p1) + u (q0, q1) along (v0, v1) + u (w0, w1), u being the number of the bin. */
struct View {
    double p0, p1, q0, q1, v0, v1, w0, w1;
};

/* At step i along its axis a ray is at start + i slope on the other one, counted from the zero before the first pixel. */
struct Ray {
    float start, slope, length; /* `length`: of one step, in the unit of the pixel sizes */
    int axis;                   /* along which it steps */
};

SCS_HD double magnitude(double x) { return x < 0 ? -x : x; }

SCS_HD Ray ray_of(const View& view, long long bin, float size0, float size1)
{
    const double u = static_cast<double>(bin), p0 = view.p0 + u * view.q0, p1 = view.p1 + u * view.q1;
    const double v0 = view.v0 + u * view.w0, v1 = view.v1 + u * view.w1;
    const int axis = magnitude(v0) >= magnitude(v1) ? 0 : 1;
    const double slope = axis == 0 ? v1 / v0 : v0 / v1;
    const double start = 1 + (axis == 0 ? p1 - p0 * slope : p0 - p1 * slope);
    const float along = axis == 0 ? size0 : size1, across = (axis == 0 ? size1 : size0) * static_cast<float>(slope);
    return {static_cast<float>(start), static_cast<float>(slope), square_root(along * along + across * across), axis};
}

/* Where the ray is at a step, from 0 (the zero before the line of pixels) to last = pixels + 1 (that behind it). */
template <class Real>
SCS_HD Real passes(Real start, Real slope, Real step, Real last)
{
    return least(most(multiply_add(step, slope, start), Real{}), last);
}

/* Where a point, counted from the center of the image, meets the detector: u = numerator / denominator, both affine. */
template <class Real>
struct Shadow {
    Real numerator, denominator;
};

template <class Real>
SCS_HD Shadow<Real> shadow(const float* view, float at0, Real at1)
{
    return {at1 * view[2] + (view[0] + view[1] * at0), at1 * view[5] + (view[3] + view[4] * at0)};
}

}  // namespace scs
