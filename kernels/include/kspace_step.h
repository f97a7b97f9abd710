/* One step towards what was measured: of a sample of k-space, and of the combined image of all coils. */
#pragma once

#include "scs.h"

namespace scs {

/* (k + taken (data - k)), k on the scale of a transform that is `factor` times too small; taken is the share at a sample, 0 where
   there is none. Written such that taken = 1 gives the data and nothing else. */
template <class Real>
SCS_HD Complex<Real> towards(Complex<Real> k, Real taken, float factor, Complex<Real> data)
{
    const Real kept = (1.0f - taken) * factor;
    return {kept * k.re + taken * data.re, kept * k.im + taken * data.im};
}

/* The linear part of it: without data. */
template <class Real>
SCS_HD Complex<Real> away(Complex<Real> k, Real taken, float factor)
{
    return scale(k, (1.0f - taken) * factor);
}

/* x + share A^H (y - A x) of one pixel, from A^H y and A^H A x. */
template <class Real>
SCS_HD Complex<Real> descended(Complex<Real> x, Complex<Real> of_data, Complex<Real> gram, Real share)
{
    return {x.re + share * (of_data.re - gram.re), x.im + share * (of_data.im - gram.im)};
}

}  // namespace scs
