/* Multi-coil data consistency along one axis: a block takes SCS_COLUMNS columns through all coils, and through all iterations.
   Images are (batch, outer, n, inner), maps (coils, outer, n, inner), weights (n), k-space (batch, coils, outer, n, inner). Grid:
   column tiles, outer, batch. */
#include "fft.h"
#include "kspace_step.h"

#if !defined(SCS_N)
#define SCS_N 256
#define SCS_COLUMNS 4
#define SCS_THREADS 128
#endif
#if !defined(SCS_DATA)
#define SCS_DATA 1 /* whether a step moves towards data; without it is its linear part */
#endif
#define SCS_EACH ((SCS_N * SCS_COLUMNS + SCS_THREADS - 1) / SCS_THREADS)

namespace {

using scs::Number;

/* The numbers of this block's columns that belong to one thread: item = threadIdx.x + SCS_THREADS i. */
struct Place {
    long long inner, first;

    __device__ long long columns_left() const { return inner - first; }
    __device__ bool there(int i) const
    {
        const int item = threadIdx.x + SCS_THREADS * i;
        return item < SCS_N * SCS_COLUMNS && item % SCS_COLUMNS < columns_left();
    }
    __device__ long long address(int i) const
    {
        const int item = threadIdx.x + SCS_THREADS * i;
        return item / SCS_COLUMNS * inner + first + item % SCS_COLUMNS;
    }
    __device__ int frequency(int i) const
    {
        return scs::frequency<SCS_N>((threadIdx.x + SCS_THREADS * i) / SCS_COLUMNS);
    }
    /* Of the frequency that lies at the place of number i. */
    __device__ long long address_in_kspace(int i) const
    {
        return frequency(i) * inner + first + (threadIdx.x + SCS_THREADS * i) % SCS_COLUMNS;
    }
};

/* sum = sum over coils of maps^H F^H weights F maps image, all in the threads' own numbers. */
__device__ void gram(const Place& place, const Number* maps, long long coils, long long coil_stride, const float* weights,
                     const Number* roots, Number* work, const Number* image, Number* sum)
{
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) sum[i] = Number{0, 0};
    for (long long c = 0; c < coils; ++c, maps += coil_stride) {
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            const int item = threadIdx.x + SCS_THREADS * i;
            if (item < SCS_N * SCS_COLUMNS)
                work[item] = place.there(i) ? maps[place.address(i)] * image[i] : Number{0, 0};
        }
        __syncthreads();
        scs::transform<SCS_N, SCS_COLUMNS>(work, roots);
        for (int item = threadIdx.x; item < SCS_N * SCS_COLUMNS; item += SCS_THREADS)
            work[item] = scs::scale(work[item], weights[scs::frequency<SCS_N>(item / SCS_COLUMNS)]);
        __syncthreads();
        scs::transform_back<SCS_N, SCS_COLUMNS>(work, roots);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i)
            if (place.there(i))
                sum[i] = scs::conj_multiply_add(sum[i], maps[place.address(i)], work[threadIdx.x + SCS_THREADS * i]);
        /* the next coil overwrites only numbers that this thread has read */
    }
}

/* Real part of <a, b> of this thread's column. SCS_THREADS is a power of 2 and a multiple of SCS_COLUMNS. */
__device__ float inner_product(const Number* a, const Number* b, float* sums)
{
    float own = 0;
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) own += a[i].re * b[i].re + a[i].im * b[i].im;
    sums[threadIdx.x] = own;
    __syncthreads();
    for (int half = SCS_THREADS / 2; half >= SCS_COLUMNS; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    const float total = sums[threadIdx.x % SCS_COLUMNS];
    __syncthreads();
    return total;
}

__device__ float ratio(float above, float below) { return below > 0 ? above / below : 0; }

}  // namespace

extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_gram(const Number* maps, const float* weights, const Number* roots, const Number* x, Number* out,
                   long long coils, long long inner)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long plane = SCS_N * inner, at = (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * plane;
    Number image[SCS_EACH], sum[SCS_EACH];
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) image[i] = place.there(i) ? x[at + place.address(i)] : Number{0, 0};
    gram(place, maps + blockIdx.y * plane, coils, gridDim.y * plane, weights, roots, work, image, sum);
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i)
        if (place.there(i)) out[at + place.address(i)] = sum[i];
}

/* x + share (of_data - gram x), where of_data is the image A^H y. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_descend(const Number* maps, const float* weights, const Number* roots, const Number* x, const Number* of_data,
                      Number* out, long long coils, long long inner, float share)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long plane = SCS_N * inner, from = blockIdx.y * plane;
    const long long at = (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * plane;
    Number image[SCS_EACH], sum[SCS_EACH];
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) image[i] = place.there(i) ? x[at + place.address(i)] : Number{0, 0};
    gram(place, maps + from, coils, gridDim.y * plane, weights, roots, work, image, sum);
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i)
        if (place.there(i))
            out[at + place.address(i)] = scs::descended(image[i], of_data[from + place.address(i)], sum[i], share);
}

/* Coil by coil: F^H [(1 - t) factor F x + t data], t = share sampled. Grid: column tiles, outer, batch times coils; data: (coils,
   outer, n, inner), sampled: (1 or outer, n). */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_step(const Number* x, const float* sampled, const Number* data, const Number* roots, Number* out,
                   long long coils, long long inner, long long sampled_outer, float share, float factor)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long plane = SCS_N * inner, at = (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * plane;
    const float* known = sampled + (sampled_outer == 1 ? 0 : blockIdx.y) * SCS_N;
    const Number* measured = data + (blockIdx.z % coils * gridDim.y + blockIdx.y) * plane;
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        const int item = threadIdx.x + SCS_THREADS * i;
        if (item < SCS_N * SCS_COLUMNS) work[item] = place.there(i) ? x[at + place.address(i)] : Number{0, 0};
    }
    __syncthreads();
    scs::transform<SCS_N, SCS_COLUMNS>(work, roots);
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        const int item = threadIdx.x + SCS_THREADS * i;
        if (!place.there(i)) continue;
        const float taken = share * known[place.frequency(i)];
        work[item] = SCS_DATA ? scs::towards(work[item], taken, factor, measured[place.address_in_kspace(i)])
                              : scs::away(work[item], taken, factor);
    }
    __syncthreads();
    scs::transform_back<SCS_N, SCS_COLUMNS>(work, roots);
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i)
        if (place.there(i)) out[at + place.address(i)] = work[threadIdx.x + SCS_THREADS * i];
}

/* weights F maps x. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_forward(const Number* maps, const Number* weights, const Number* roots, const Number* x, Number* kspace,
                      long long coils, long long inner)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long outer = gridDim.y, plane = SCS_N * inner;
    const Number* image = x + (blockIdx.z * outer + blockIdx.y) * plane;
    for (long long c = 0; c < coils; ++c) {
        const Number* sees = maps + (c * outer + blockIdx.y) * plane;
        Number* out = kspace + ((blockIdx.z * coils + c) * outer + blockIdx.y) * plane;
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            const int item = threadIdx.x + SCS_THREADS * i;
            if (item < SCS_N * SCS_COLUMNS)
                work[item] = place.there(i) ? sees[place.address(i)] * image[place.address(i)] : Number{0, 0};
        }
        __syncthreads();
        scs::transform<SCS_N, SCS_COLUMNS>(work, roots);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i)
            if (place.there(i))
                out[place.address_in_kspace(i)] = weights[place.frequency(i)] * work[threadIdx.x + SCS_THREADS * i];
        /* the next coil overwrites only numbers that this thread has read */
    }
}

/* maps^H F^H conj(weights) kspace. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_adjoint(const Number* maps, const Number* weights, const Number* roots, const Number* kspace, Number* x,
                      long long coils, long long inner)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long outer = gridDim.y, plane = SCS_N * inner;
    Number sum[SCS_EACH];
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) sum[i] = Number{0, 0};
    for (long long c = 0; c < coils; ++c) {
        const Number* sees = maps + (c * outer + blockIdx.y) * plane;
        const Number* given = kspace + ((blockIdx.z * coils + c) * outer + blockIdx.y) * plane;
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            const int item = threadIdx.x + SCS_THREADS * i;
            if (item >= SCS_N * SCS_COLUMNS) continue;
            work[item] = place.there(i) ? scs::conj_times(weights[place.frequency(i)], given[place.address_in_kspace(i)])
                                        : Number{0, 0};
        }
        __syncthreads();
        scs::transform_back<SCS_N, SCS_COLUMNS>(work, roots);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i)
            if (place.there(i))
                sum[i] = scs::conj_multiply_add(sum[i], sees[place.address(i)], work[threadIdx.x + SCS_THREADS * i]);
    }
    Number* image = x + (blockIdx.z * outer + blockIdx.y) * plane;
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i)
        if (place.there(i)) image[place.address(i)] = sum[i];
}

/* x after conjugate gradients for (gram + ridge) x = right_side, each column with step sizes of its own; x holds the start. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_lines_solve(const Number* maps, const float* weights, const Number* roots, const Number* right_side, Number* x,
                    long long coils, long long inner, float ridge, long long iterations)
{
    SCS_DYNAMIC_SHARED(Number, work);
    float* sums = reinterpret_cast<float*>(work + SCS_N * SCS_COLUMNS);
    const Place place{inner, blockIdx.x * static_cast<long long>(SCS_COLUMNS)};
    const long long plane = SCS_N * inner, at = (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * plane;
    const Number* of_slice = maps + blockIdx.y * plane;
    Number estimate[SCS_EACH], residual[SCS_EACH], direction[SCS_EACH], image[SCS_EACH];
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        estimate[i] = place.there(i) ? x[at + place.address(i)] : Number{0, 0};
        residual[i] = place.there(i) ? right_side[at + place.address(i)] : Number{0, 0};
    }
    gram(place, of_slice, coils, gridDim.y * plane, weights, roots, work, estimate, image);
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        residual[i] = residual[i] - image[i] - scs::scale(estimate[i], ridge);
        direction[i] = residual[i];
    }
    float energy = inner_product(residual, residual, sums);
    for (long long iteration = 0; iteration < iterations; ++iteration) {
        gram(place, of_slice, coils, gridDim.y * plane, weights, roots, work, direction, image);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) image[i] = image[i] + scs::scale(direction[i], ridge);
        const float step = ratio(energy, inner_product(direction, image, sums));
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            estimate[i] = estimate[i] + scs::scale(direction[i], step);
            residual[i] = residual[i] - scs::scale(image[i], step);
        }
        const float before = energy;
        energy = inner_product(residual, residual, sums);
        const float share = ratio(energy, before);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) direction[i] = residual[i] + scs::scale(direction[i], share);
    }
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i)
        if (place.there(i)) x[at + place.address(i)] = estimate[i];
}
