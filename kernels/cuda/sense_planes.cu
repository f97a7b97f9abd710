/* A^H A of multi-coil imaging with transforms along y and x, in three passes over memory: rows of maps times image; columns,
   weights, columns back; rows back and the sum over coils. Images are (batch, slices, y, x), maps (coils, slices, y, x),
   weights (1 or slices, y, x). Between the passes k-space along x stays in the order of places (fft.h). */
#include "fft.h"

#if !defined(SCS_Y)
#define SCS_Y 256
#define SCS_X 256
#define SCS_LINES 4
#define SCS_THREADS 128
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
        work[at.shared()] = at.there() ? sees[at.address()] * image[at.address()] : Number{0, 0};
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
    Number* plane = kspace + (blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y) * PLANE;
    const float* own = weights + (weight_slices == 1 ? 0 : blockIdx.z % slices) * PLANE;
    const int first = blockIdx.x * SCS_LINES;
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const int column = first + item % SCS_LINES;
        work[item] = column < SCS_X ? plane[item / SCS_LINES * static_cast<long long>(SCS_X) + column] : Number{0, 0};
    }
    __syncthreads();
    scs::transform<SCS_Y, SCS_LINES>(work, roots);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const int column = first + item % SCS_LINES;
        if (column >= SCS_X) continue;
        const int y = scs::frequency<SCS_Y>(item / SCS_LINES), x = scs::frequency<SCS_X>(column);
        work[item] = scs::scale(work[item], own[y * static_cast<long long>(SCS_X) + x]);
    }
    __syncthreads();
    scs::transform_back<SCS_Y, SCS_LINES>(work, roots);
    for (int item = threadIdx.x; item < SCS_Y * SCS_LINES; item += SCS_THREADS) {
        const int column = first + item % SCS_LINES;
        if (column < SCS_X) plane[item / SCS_LINES * static_cast<long long>(SCS_X) + column] = work[item];
    }
}

/* Grid: row tiles, 1, batch times slices. The sum over coils stays in registers and is written once. */
extern "C" __global__ void __launch_bounds__(SCS_THREADS)
    scs_rows_back(const Number* maps, const Number* roots, const Number* kspace, Number* out, long long coils,
                  long long slices)
{
    SCS_DYNAMIC_SHARED(Number, work);
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
            if (at.row < SCS_LINES && at.there())
                sum[i] = scs::conj_multiply_add(sum[i], sees[at.address()], work[at.shared()]);
        }
        /* the next coil overwrites only numbers that this thread has read */
    }
    SCS_UNROLL
    for (int i = 0; i < SCS_EACH; ++i) {
        const InRow at(threadIdx.x + SCS_THREADS * i);
        if (at.row < SCS_LINES && at.there()) out[blockIdx.z * PLANE + at.address()] = sum[i];
    }
}
