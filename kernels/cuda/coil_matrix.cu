/* The per-pixel coil matrix: one thread per pixel and member of the batch. */
#include "coil_matrix.h"
#include "cuda.h"

#if !defined(SCS_COILS)
#define SCS_COILS 8
#endif

extern "C" __global__ void scs_coil_matrix(const scs::Number* matrix, const scs::Number* in, scs::Number* out,
                                           long long pixels)
{
    const long long at = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (at >= pixels) return;
    in += blockIdx.y * SCS_COILS * pixels + at;
    out += blockIdx.y * SCS_COILS * pixels + at;
    scs::Number x[SCS_COILS], y[SCS_COILS];
#pragma unroll
    for (int c = 0; c < SCS_COILS; ++c) x[c] = in[c * pixels];
    scs::hermitian_times(SCS_COILS, [=](long long i) { return matrix[i * pixels + at]; }, x, y);
#pragma unroll
    for (int c = 0; c < SCS_COILS; ++c) out[c * pixels] = y[c];
}
