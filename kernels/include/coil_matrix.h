/* A Hermitian coil x coil matrix for every pixel, applied to coil images. */
#pragma once

#include "scs.h"

namespace scs {

/* Rows of the upper triangle that are stored before row c of a matrix with `coils` rows. */
SCS_HD long long triangle_row(long long c, long long coils) { return c * coils - c * (c - 1) / 2; }

/* out = M in at one pixel (or one vector of pixels), M given by its upper triangle, row by row. `entry(i)` is its i-th number.
   The diagonal's imaginary part is not read. Every entry is used twice, so it is fetched once. */
template <class Real, class Entry>
SCS_HD void hermitian_times(int coils, Entry entry, const Complex<Real>* in, Complex<Real>* out)
{
    for (int c = 0; c < coils; ++c) out[c] = Complex<Real>{};
    long long next = 0;
    for (int c = 0; c < coils; ++c) {
        Complex<Real> sum = out[c] + scale(in[c], entry(next++).re);
        for (int d = c + 1; d < coils; ++d) {
            const Complex<Real> m = entry(next++);
            sum = multiply_add(sum, m, in[d]);
            out[d] = conj_multiply_add(out[d], m, in[c]);
        }
        out[c] = sum;
    }
}

}  // namespace scs
