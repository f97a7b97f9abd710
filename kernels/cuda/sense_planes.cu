/* A^H A, A and A^H of multi-coil imaging with transforms along y and x, in two or three passes over memory: rows of maps times
   image; columns, with the weights, and for A^H A back; rows back and the sum over coils. Images are (batch, slices, y, x), maps
   (coils, slices, y, x), weights (1 or slices, y, x), k-space outside (batch, coils, slices, y, x). Between the passes it is
   (batch slices, coils, y, x), along x in the order of places (fft.h). */
#include "fft.h"
#include "kspace_step.h"

#if !defined(SCS_Y)
#define SCS_Y 256
#define SCS_X 256
#define SCS_LINES 4
#define SCS_THREADS 128
#endif
#if !defined(SCS_MAPS)
#define SCS_MAPS 1 /* without maps each plane is an image of its own: one coil, as many slices as planes */
#define SCS_DATA 1 /* whether a step moves towards data; without it is its linear part */
#endif
#define SCS_EACH ((SCS_X * SCS_LINES + SCS_THREADS - 1) / SCS_THREADS)

namespace {

using scs::Number;

constexpr long long PLANE = static_cast<long long>(SCS_Y) * SCS_X;

/* Number `item` of SCS_LINES neighboring rows, and where it lies in shared memory, where rows are columns of a transform. */
struct InRow {
    int x, row;
    __device__ explicit InRow(int item) : x(item % SCS_X), row(item / SCS_X) {}
    __device__ int shared() const { return x * SCS_LINES + row; }
    __device__ long long address() const { return (blockIdx.x * SCS_LINES + row) * static_cast<long long>(SCS_X) + x; }
    __device__ bool there() const { return static_cast<int>(blockIdx.x) * SCS_LINES + row < SCS_Y; }
};

/* Number `item` of SCS_LINES neighboring columns: where it lies between the passes, and which frequency it is. */
struct InColumn {
    int y, x;
    __device__ explicit InColumn(int item) : y(item / SCS_LINES), x(blockIdx.x * SCS_LINES + item % SCS_LINES) {}
    __device__ bool there() const { return x < SCS_X; }
    __device__ long long address() const { return y * static_cast<long long>(SCS_X) + x; }
    __device__ long long frequency() const
    {
        return scs::frequency<SCS_Y>(y) * static_cast<long long>(SCS_X) + scs::frequency<SCS_X>(x);
    }
};

/* The plane of this block's coil and slice, between the passes and outside. */
__device__ long long plane_between() { return (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * PLANE; }
__device__ long long plane_outside(long long slices)
{
    return ((blockIdx.z / slices * gridDim.y + blockIdx.y) * slices + blockIdx.z % slices) * PLANE;
}

template <class Weight>
__device__ const Weight* weights_here(const Weight* weights, long long slices, long long weight_slices)
{
    return weights + (weight_slices == 1 ? 0 : blockIdx.z % slices) * PLANE;
}

__device__ void load_columns(const Number* plane, Number* work)
{
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        work[item] = at.there() ? plane[at.address()] : Number{0, 0};
    }
}

__device__ void store_columns(const Number* work, Number* plane)
{
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        if (at.there()) plane[at.address()] = work[item];
    }
}

}  // namespace

/* Grid: row tiles, coils, batch times slices. kspace: (batch slices, coils, y, x). */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_rows_forward(const Number* maps, const Number* roots, const Number* x, Number* kspace, long long slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Number* sees = maps + (blockIdx.y * slices + blockIdx.z % slices) * PLANE;
    const Number* image = x + blockIdx.z * PLANE;
    for (int item = threadIdx.x; item < SCS_X * SCS_LINES; item += SCS_THREADS) {
        const InRow at(item);
        if (!at.there()) work[at.shared()] = Number{0, 0};
        else work[at.shared()] = SCS_MAPS ? sees[at.address()] * image[at.address()] : image[at.address()];
    }
    __syncthreads();
    scs::transform<SCS_X, SCS_LINES>(work, roots);
    Number* out = kspace + (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * PLANE;
    for (int item = threadIdx.x; item < SCS_X * SCS_LINES; item += SCS_THREADS) {
        const InRow at(item);
        if (at.there()) out[at.address()] = work[at.shared()];
    }
}

/* Grid: column tiles, coils, batch times slices. weight_slices: 1 or slices. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_columns(const float* weights, const Number* roots, Number* kspace, long long slices, long long weight_slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
    Number* plane = kspace + plane_between();
    const float* own = weights_here(weights, slices, weight_slices);
    load_columns(plane, work);
    __syncthreads();
    scs::transform<SCS_Y, SCS_LINES>(work, roots);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        if (at.there()) work[item] = scs::scale(work[item], own[at.frequency()]);
    }
    __syncthreads();
    scs::transform_back<SCS_Y, SCS_LINES>(work, roots);
    store_columns(work, plane);
}

/* The same grid. kspace, between the passes, to out = weights times k-space. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_columns_forward(const Number* weights, const Number* roots, const Number* kspace, Number* out, long long slices,
                        long long weight_slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Number* own = weights_here(weights, slices, weight_slices);
    load_columns(kspace + plane_between(), work);
    __syncthreads();
    scs::transform<SCS_Y, SCS_LINES>(work, roots);
    Number* plane = out + plane_outside(slices);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        if (at.there()) plane[at.frequency()] = own[at.frequency()] * work[item];
    }
}

/* The same grid. conj(weights) times k-space to `between`, ready for scs_rows_back. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_columns_back(const Number* weights, const Number* roots, const Number* kspace, Number* between, long long slices,
                     long long weight_slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Number* own = weights_here(weights, slices, weight_slices);
    const Number* plane = kspace + plane_outside(slices);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        work[item] = at.there() ? scs::conj_times(own[at.frequency()], plane[at.frequency()]) : Number{0, 0};
    }
    __syncthreads();
    scs::transform_back<SCS_Y, SCS_LINES>(work, roots);
    store_columns(work, between + plane_between());
}

/* Grid: column tiles, 1, batch times planes; planes: coils times slices. kspace stays between the passes; data: (planes, y, x),
   sampled: (sampled_slices, y, x). k becomes (1 - t) factor k + t data with t = share sampled. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_columns_step(const float* sampled, const Number* data, const Number* roots, Number* kspace, long long planes,
                     long long slices, long long sampled_slices, float share, float factor)
{
    SCS_DYNAMIC_SHARED(Number, work);
    Number* plane = kspace + plane_between();
    const float* known = weights_here(sampled, slices, sampled_slices);
    const Number* measured = data + blockIdx.z % planes * PLANE;
    load_columns(plane, work);
    __syncthreads();
    scs::transform<SCS_Y, SCS_LINES>(work, roots);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const InColumn at(item);
        if (!at.there()) continue;
        const float taken = share * known[at.frequency()];
        work[item] = SCS_DATA ? scs::towards(work[item], taken, factor, measured[at.frequency()])
                              : scs::away(work[item], taken, factor);
    }
    __syncthreads();
    scs::transform_back<SCS_Y, SCS_LINES>(work, roots);
    store_columns(work, plane);
}

namespace {

/* Rows back, and out(address in all images, address in the plane, sum over coils), which stays in registers until then. */
template <class Out>
__device__ void rows_back(const Number* maps, const Number* roots, const Number* kspace, long long coils, long long slices,
                          Number* work, Out out)
{
    Number sum[SCS_EACH];
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) sum[i] = Number{0, 0};
    for (long long c = 0; c < coils; ++c) {
        const Number* plane = kspace + (blockIdx.z * coils + c) * PLANE;
        const Number* sees = maps + (c * slices + blockIdx.z % slices) * PLANE;
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            const InRow at(threadIdx.x + SCS_THREADS * i);
            if (at.row < SCS_LINES) work[at.shared()] = at.there() ? plane[at.address()] : Number{0, 0};
        }
        __syncthreads();
        scs::transform_back<SCS_X, SCS_LINES>(work, roots);
        SCS_UNROLL
        for (int i = 0; i < SCS_EACH; ++i) {
            const InRow at(threadIdx.x + SCS_THREADS * i);
            if (at.row >= SCS_LINES || !at.there()) continue;
            const Number z = work[at.shared()];
            sum[i] = SCS_MAPS ? scs::conj_multiply_add(sum[i], sees[at.address()], z) : z;
        }
        /* the next coil overwrites only numbers that this thread has read */
    }
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        const InRow at(threadIdx.x + SCS_THREADS * i);
        if (at.row < SCS_LINES && at.there()) out(blockIdx.z * PLANE + at.address(), at.address(), sum[i]);
    }
}

}  // namespace

/* Grid: row tiles, 1, batch times slices. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_rows_back(const Number* maps, const Number* roots, const Number* kspace, Number* out, long long coils,
                  long long slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
    rows_back(maps, roots, kspace, coils, slices, work, [=](long long at, long long, Number sum) { out[at] = sum; });
}

/* The same, and a step on: x + share (of_data - sum). of_data: the image A^H y, (slices, y, x). */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_rows_descend(const Number* maps, const Number* roots, const Number* kspace, const Number* x, const Number* of_data,
                     Number* out, long long coils, long long slices, float share)
{
    SCS_DYNAMIC_SHARED(Number, work);
    const Number* constant = of_data + blockIdx.z % slices * PLANE;
    rows_back(maps, roots, kspace, coils, slices, work, [=](long long at, long long in_plane, Number sum) {
        out[at] = scs::descended(x[at], constant[in_plane], sum, share);
    });
}
