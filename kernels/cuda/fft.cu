/* Batched Fourier transforms along one axis of a contiguous array (outer, n, inner): one block for SCS_COLUMNS of them. */
#include "fft.h"

#if !defined(SCS_N)
#define SCS_N 256
#define SCS_SIGN -1
#define SCS_COLUMNS 8
#define SCS_ROWS 0
#endif

namespace {

/* Where number n of a column lies. Neighboring threads must read neighboring numbers: along the axis where it is the last one
   (SCS_ROWS), across columns elsewhere. */
__device__ __forceinline__ void locate(int item, int& n, int& column)
{
    n = SCS_ROWS ? item % SCS_N : item / SCS_COLUMNS;
    column = SCS_ROWS ? item / SCS_N : item % SCS_COLUMNS;
}

__device__ __forceinline__ long long address(long long column, int n, long long inner)
{
    return column / inner * SCS_N * inner + column % inner + n * inner;
}

}  // namespace

/* out = factor times the transform of in with exponent SCS_SIGN; roots as in fft.h; columns = outer inner. */
extern "C" __global__ void scs_fft(const scs::Number* in, scs::Number* out, const scs::Number* roots, long long columns,
                                   long long inner, float factor)
{
    SCS_DYNAMIC_SHARED(scs::Number, work);
    const long long first = blockIdx.x * static_cast<long long>(SCS_COLUMNS);
    for (int item = threadIdx.x; item < SCS_N * SCS_COLUMNS; item += blockDim.x) {
        int n, column;
        locate(item, n, column);
        /* a transform with exponent + begins with the frequency that belongs to each place */
        const int from = SCS_SIGN > 0 ? scs::frequency<SCS_N>(n) : n;
        const bool there = first + column < columns;
        work[n * SCS_COLUMNS + column] = there ? in[address(first + column, from, inner)] : scs::Number{0, 0};
    }
    __syncthreads();
#if SCS_SIGN > 0
    scs::transform_back<SCS_N, SCS_COLUMNS>(work, roots);
#else
    scs::transform<SCS_N, SCS_COLUMNS>(work, roots);
#endif
    for (int item = threadIdx.x; item < SCS_N * SCS_COLUMNS; item += blockDim.x) {
        int n, column;
        locate(item, n, column);
        const int to = SCS_SIGN > 0 ? n : scs::frequency<SCS_N>(n);
        if (first + column < columns)
            out[address(first + column, to, inner)] = scs::scale(work[n * SCS_COLUMNS + column], factor);
    }
}
