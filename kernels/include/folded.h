/* Pixels that fold onto each other under every-R-th-line sampling: a Hermitian R x R matrix V diag(values) V^H per group. */
#pragma once

#include "scs.h"

namespace scs {

/* out = V diag(1 / (values + ridge)) V^H in for one group, or one vector of groups. `vector(k, j)` is row k of column j of V,
   `value(j)` the eigenvalue of column j. Every column is fetched once. */
template <int R, class Real, class Vectors, class Values>
SCS_HD void folded_solve(Vectors vector, Values value, Real ridge, const Complex<Real>* in, Complex<Real>* out)
{
    for (int k = 0; k < R; ++k) out[k] = Complex<Real>{};
    for (int j = 0; j < R; ++j) {
        Complex<Real> column[R], sum{};
        for (int k = 0; k < R; ++k) {
            column[k] = vector(k, j);
            sum = conj_multiply_add(sum, column[k], in[k]);
        }
        const Real weight = value(j) + ridge;
        sum = {sum.re / weight, sum.im / weight};
        for (int k = 0; k < R; ++k) out[k] = multiply_add(out[k], column[k], sum);
    }
}

}  // namespace scs
