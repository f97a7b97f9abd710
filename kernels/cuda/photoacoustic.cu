/* Delay-and-sum and its adjoint. SCS_WEIGHTING is one of scs::Weighting. */
#include "cuda.h"
#include "photoacoustic.h"

#if !defined(SCS_WEIGHTING)
#define SCS_WEIGHTING 0
#endif
#if !defined(SCS_SHARED)
#define SCS_SHARED 1
#endif

namespace scs {

/* Which two samples of an element's row a point has to do with, and how much. */
struct Reach {
    int k;
    float part, weight;
};

/* A coordinate: the sum of two floats. */
struct Place {
    float high, low;
    __device__ Place(const float* axis, long long n, long long i) : high(axis[i]), low(axis[n + i]) {}
    __device__ float from(float other_high, float other_low) const { return (high - other_high) + (low - other_low); }
};

/* When recording starts: see `arrival`. Where the row ends before the first sound could arrive, it does at any distance. */
struct Start {
    long long whole;
    float early, first, last;
    __device__ Start(long long whole_, float early_, long long samples)
        : whole(whole_ > samples + 1 ? samples + 1 : whole_), early(whole_ > samples + 1 ? 0 : early_),
          first(static_cast<float>(-whole)), last(static_cast<float>(samples + 1 - whole))
    {
    }
};

__device__ inline Reach reach(const Element& element, Place x, Place y, Place z, Start start)
{
    const float dx = x.from(element.x, element.low_x), dy = y.from(element.y, element.low_y), dz = z.from(element.z, element.low_z);
    const float squared = multiply_add(dx, dx, multiply_add(dy, dy, multiply_add(dz, dz, LEAST_SQUARED)));
    int k;
    float part, weight = 1;
    arrival(Sum<float>{squared, 0}, start.early, start.first, start.last, 1.f, k, part);
    if (SCS_WEIGHTING != PLAIN) {
        const float towards = dx * element.towards_x + dy * element.towards_y + dz * element.towards_z;
        weight = solid_angle<SCS_WEIGHTING>(squared, towards, 1e-6f);
    }
    return {k + static_cast<int>(start.whole), part, weight};
}

}  // namespace scs

/* rows: prepared, (batch, elements, samples + 3). image: (batch, nz, ny, nx). A block is 8 x 4 points by groups of elements,
   whose sums meet in shared memory, so the order of summation does not change from run to run. */
extern "C" __global__ void __launch_bounds__(256)
    scs_pat_gather(const float* rows, const scs::Element* elements, const float* x, const float* y, const float* z, float* image,
                   long long count, long long samples, long long nx, long long ny, long long nz, long long whole, float early)
{
    __shared__ float sums[8][4][8];
    const int tx = threadIdx.x, ty = threadIdx.y, group = threadIdx.z;
    const long long ix = blockIdx.x * 8ll + tx, iy = blockIdx.y * 4ll + ty, plane = blockIdx.z, iz = plane % nz;
    const bool inside = ix < nx && iy < ny;
    float sum = 0;
    if (inside) {
        const scs::Place px(x, nx, ix), py(y, ny, iy), pz(z, nz, iz);
        const scs::Start start(whole, early, samples);
        rows += plane / nz * count * (samples + 3);
        for (long long i = group; i < count; i += 8) {
            const scs::Reach at = scs::reach(elements[i], px, py, pz, start);
            const float* pair = rows + i * (samples + 3) + at.k;
            const float before = __ldg(pair), after = __ldg(pair + 1);
            sum = scs::multiply_add(at.weight, scs::multiply_add(at.part, after - before, before), sum);
        }
    }
    sums[group][ty][tx] = sum;
    __syncthreads();
    if (group != 0 || !inside) return;
    for (int other = 1; other < 8; ++other) sum += sums[other][ty][tx];
    image[(plane * ny + iy) * nx + ix] = sum;
}

/* image: (batch, nz, ny, nx). rows: (batch, elements, samples), zero before. A block makes one row. */
extern "C" __global__ void scs_pat_scatter(const float* image, const scs::Element* elements, const float* x, const float* y,
                                           const float* z, float* rows, long long samples, long long nx, long long ny,
                                           long long nz, long long whole, float early)
{
    SCS_DYNAMIC_SHARED(float, shared);
    const scs::Element element = elements[blockIdx.x];
    const long long points = nx * ny * nz, stride = blockDim.x;
    image += blockIdx.y * points;
    rows += (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * samples;
    if (SCS_SHARED) {
        for (long long k = threadIdx.x; k < samples + 2; k += stride) shared[k] = 0;
        __syncthreads();
    }
    const scs::Start start(whole, early, samples);
    for (long long point = threadIdx.x; point < points; point += stride) {
        const scs::Place px(x, nx, point % nx), py(y, ny, point / nx % ny), pz(z, nz, point / (nx * ny));
        const scs::Reach at = scs::reach(element, px, py, pz, start);
        const float value = image[point] * at.weight * element.weight, after = at.part * value;
        if (SCS_SHARED) {
            atomicAdd(shared + at.k, value - after);
            if (at.k <= samples) atomicAdd(shared + at.k + 1, after);
        } else {
            if (at.k >= 1 && at.k <= samples) atomicAdd(rows + at.k - 1, value - after);
            if (at.k < samples) atomicAdd(rows + at.k, after);
        }
    }
    if (!SCS_SHARED) return;
    __syncthreads();
    for (long long k = threadIdx.x; k < samples; k += stride) rows[k] = shared[k + 1];
}
