/* Fourier transforms of several columns in shared memory by one block. A column of N numbers lies with stride COLUMNS. As on the
   processor, decimation in frequency leaves an order of its own, from which decimation in time starts. */
#pragma once

#include "cuda.h"
#include "fft_butterflies.h"
#include "fft_factors.h"

namespace scs {

template <int N>
struct Stages {
    static constexpr Factors factors = take_apart(N);
    static constexpr int count = factors.count;

    /* Length of a block of the stage over its radix. */
    static __host__ __device__ constexpr int rest(int stage)
    {
        int result = N;
        for (int s = 0; s <= stage; ++s) result /= factors.radix[s];
        return result;
    }
};

/* Which frequency lies at a place. */
template <int N, int Stage = 0>
__device__ __forceinline__ int frequency(int place)
{
    constexpr int radix = Stages<N>::factors.radix[Stage], rest = Stages<N>::rest(Stage);
    if constexpr (Stage + 1 == Stages<N>::count) return place % radix;
    else return place / rest % radix + radix * frequency<N, Stage + 1>(place);
}

/* Every thread takes butterflies; all have finished when it returns. Up is decimation in time, with exponent +.
   roots: exp(-2 pi i k / N) for k below N. */
template <int N, int COLUMNS, int Stage, bool Up>
__device__ void stage(Number* x, const Number* roots)
{
    constexpr int radix = Stages<N>::factors.radix[Stage], rest = Stages<N>::rest(Stage);
    constexpr int step = N / (radix * rest);
    SCS_ROLLED /* as many turns as threads leave: unrolled, NVRTC 13.5 takes minutes over it for sm_100 */
    for (int item = threadIdx.x; item < N / radix * COLUMNS; item += blockDim.x) {
        const int column = item % COLUMNS, butterfly = item / COLUMNS;
        const int j = butterfly % rest;
        Number* at = x + (butterfly / rest * radix * rest + j) * COLUMNS + column;
        Number values[radix];
        SCS_UNROLL
        for (int p = 0; p < radix; ++p) {
            values[p] = at[p * rest * COLUMNS];
            if (Up && rest > 1 && p > 0) values[p] = conj_times(roots[j * p * step], values[p]);
        }
        Butterfly<radix, Up ? 1 : -1>::run(values);
        SCS_UNROLL
        for (int p = 0; p < radix; ++p)
            at[p * rest * COLUMNS] = !Up && rest > 1 && p > 0 ? roots[j * p * step] * values[p] : values[p];
    }
    __syncthreads();
}

/* Exponent -: position to place. What is in `x` must be visible to all threads; the result is. */
template <int N, int COLUMNS, int Stage = 0>
__device__ void transform(Number* x, const Number* roots)
{
    stage<N, COLUMNS, Stage, false>(x, roots);
    if constexpr (Stage + 1 < Stages<N>::count) transform<N, COLUMNS, Stage + 1>(x, roots);
}

/* Exponent +: place to position; not divided by N. */
template <int N, int COLUMNS, int Stage = Stages<N>::count - 1>
__device__ void transform_back(Number* x, const Number* roots)
{
    stage<N, COLUMNS, Stage, true>(x, roots);
    if constexpr (Stage > 0) transform_back<N, COLUMNS, Stage - 1>(x, roots);
}

}  // namespace scs
