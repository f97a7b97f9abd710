/* The exact solution for every-R-th-line sampling: one thread per group of pixels and member of the batch. */
#include "cuda.h"
#include "folded.h"

#if !defined(SCS_RZ)
#define SCS_RZ 1
#define SCS_RY 4
#endif
#define SCS_R (SCS_RZ * SCS_RY)

/* in, out: (batch, z, y, x); run = y / SCS_RY times x; groups = z / SCS_RZ times run. */
extern "C" __global__ void scs_folded_solve(const scs::Number* vectors, const float* values, const scs::Number* in,
                                            scs::Number* out, float ridge, long long groups, long long run)
{
    const long long group = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (group >= groups) return;
    const long long z = group / run, place = group % run, outer = groups / run;
    const long long image = blockIdx.y * SCS_R * groups;
    scs::Number x[SCS_R], y[SCS_R];
#pragma unroll
    for (int k = 0; k < SCS_R; ++k)
        x[k] = in[image + (k / SCS_RY * outer + z) * SCS_RY * run + k % SCS_RY * run + place];
    scs::folded_solve<SCS_R>([=](int k, int j) { return vectors[(k * SCS_R + j) * groups + group]; },
                             [=](int j) { return values[j * groups + group]; }, ridge, x, y);
#pragma unroll
    for (int k = 0; k < SCS_R; ++k)
        out[image + (k / SCS_RY * outer + z) * SCS_RY * run + k % SCS_RY * run + place] = y[k];
}
