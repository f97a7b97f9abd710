/* Joseph projector, its exact adjoint, and pixel-driven back-projection. Lines of images and sinograms carry one zero before and
   two after their numbers where that is said. */
#include "cuda.h"
#include "tomography.h"

namespace scs {

/* As the second kernel of the adjoint reads a ray; `length` is negative where it steps along axis 1. */
struct PackedRay {
    float start, slope, length, unused;
};

__device__ inline float between(const float* line, float at)
{
    const int k = static_cast<int>(at);
    const float before = __ldg(line + k), after = __ldg(line + k + 1);
    return multiply_add(at - static_cast<float>(k), after - before, before);
}

/* How much of pixel `pixel`, counted with the zero before the line, a ray reads that passes at `at`. */
__device__ inline float share(float at, float pixel) { return fmaxf(1 - fabsf(at - pixel), 0.0f); }

}  // namespace scs

/* image: (batch, n0, n1 + 3), turned: (batch, n1, n0 + 3), both with zeros around. sinogram: (batch, count, bins). */
extern "C" __global__ void scs_ct_project(const float* image, const float* turned, const scs::View* views, float* sinogram,
                                          long long n0, long long n1, long long count, long long bins, float size0, float size1)
{
    const long long bin = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long view = blockIdx.y * static_cast<long long>(blockDim.y) + threadIdx.y;
    if (bin >= bins || view >= count) return;
    const scs::Ray ray = scs::ray_of(views[view], bin, size0, size1);
    const long long steps = ray.axis == 0 ? n0 : n1, across = ray.axis == 0 ? n1 : n0;
    const float* line = ray.axis == 0 ? image + blockIdx.z * n0 * (n1 + 3) : turned + blockIdx.z * n1 * (n0 + 3);
    const float last = static_cast<float>(across + 1);
    float sum = 0;
    for (long long i = 0; i < steps; ++i, line += across + 3)
        sum += scs::between(line, scs::passes(ray.start, ray.slope, static_cast<float>(i), last));
    sinogram[(blockIdx.z * count + view) * bins + bin] = sum * ray.length;
}

/* rays: (count, bins) of PackedRay. */
extern "C" __global__ void scs_ct_rays(const scs::View* views, scs::PackedRay* rays, long long count, long long bins, float size0,
                                       float size1)
{
    const long long bin = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long view = blockIdx.y * static_cast<long long>(blockDim.y) + threadIdx.y;
    if (bin >= bins || view >= count) return;
    const scs::Ray ray = scs::ray_of(views[view], bin, size0, size1);
    rays[view * bins + bin] = {ray.start, ray.slope, ray.axis == 0 ? ray.length : -ray.length, 0};
}

/* A pixel looks for its rays between the shadows of its four neighbours, and one bin further for what rounding may do; the share
   of each is computed as the projector computes it, so that the two are adjoint to the last bit. shadows: (count, 6). */
extern "C" __global__ void scs_ct_adjoint(const float* sinogram, const scs::PackedRay* rays, const float* shadows, float* image,
                                          long long n0, long long n1, long long count, long long bins)
{
    const long long j = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long i = blockIdx.y * static_cast<long long>(blockDim.y) + threadIdx.y;
    if (i >= n0 || j >= n1) return;
    const float at0 = static_cast<float>(i) - 0.5f * static_cast<float>(n0 - 1);
    const float at1 = static_cast<float>(j) - 0.5f * static_cast<float>(n1 - 1);
    const float last0 = static_cast<float>(n0 + 1), last1 = static_cast<float>(n1 + 1);
    sinogram += blockIdx.z * count * bins;
    float sum = 0;
    for (long long view = 0; view < count; ++view) {
        float low = 1e30f, high = -1e30f;
        for (int side = 0; side < 4; ++side) {
            const float step = side & 1 ? 1.0f : -1.0f;
            const scs::Shadow<float> on = scs::shadow(shadows + 6 * view, side < 2 ? at0 + step : at0, side < 2 ? at1 : at1 + step);
            const float u = on.numerator / on.denominator;
            low = fminf(low, u), high = fmaxf(high, u);
        }
        const int from = static_cast<int>(fmaxf(floorf(low) - 1, 0.0f));
        const int to = static_cast<int>(fminf(ceilf(high) + 1, static_cast<float>(bins - 1)));
        for (int bin = from; bin <= to; ++bin) {
            const scs::PackedRay ray = rays[view * bins + bin];
            const bool rows = ray.length > 0;
            const float at = scs::passes(ray.start, ray.slope, static_cast<float>(rows ? i : j), rows ? last1 : last0);
            const float part = scs::share(at, static_cast<float>(rows ? j + 1 : i + 1));
            sum = scs::multiply_add(part * fabsf(ray.length), __ldg(sinogram + view * bins + bin), sum);
        }
    }
    image[(blockIdx.z * n0 + i) * n1 + j] = sum;
}

/* rows: (batch, count, bins + 3), zeros around. */
extern "C" __global__ void scs_ct_pixel_driven(const float* rows, const float* shadows, float* image, long long n0, long long n1,
                                               long long count, long long bins)
{
    const long long j = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long i = blockIdx.y * static_cast<long long>(blockDim.y) + threadIdx.y;
    if (i >= n0 || j >= n1) return;
    const float at0 = static_cast<float>(i) - 0.5f * static_cast<float>(n0 - 1);
    const float at1 = static_cast<float>(j) - 0.5f * static_cast<float>(n1 - 1);
    const float last = static_cast<float>(bins + 1);
    const float* row = rows + blockIdx.z * count * (bins + 3);
    float sum = 0;
    for (long long view = 0; view < count; ++view, row += bins + 3) {
        const scs::Shadow<float> on = scs::shadow(shadows + 6 * view, at0, at1);
        const float inverse = 1 / on.denominator, at = fminf(fmaxf(on.numerator * inverse + 1, 0.0f), last);
        sum = scs::multiply_add(scs::between(row, at), inverse * inverse, sum);
    }
    image[(blockIdx.z * n0 + i) * n1 + j] = sum;
}
