/* What every kernel source includes: compiled by g++, nvcc and NVRTC alike, so without any system header. */
#pragma once

#if defined(__CUDACC__)
#define SCS_HD __host__ __device__ __forceinline__
#else
#define SCS_HD inline __attribute__((always_inline))
#endif

namespace scs {

/* A complex number; Real is float or double, or on the CPU a vector of floats with one number per lane. */
template <class Real>
struct Complex {
    Real re, im;
};

template <class R>
SCS_HD Complex<R> operator+(Complex<R> a, Complex<R> b) { return {a.re + b.re, a.im + b.im}; }

template <class R>
SCS_HD Complex<R> operator-(Complex<R> a, Complex<R> b) { return {a.re - b.re, a.im - b.im}; }

template <class R>
SCS_HD Complex<R> operator*(Complex<R> a, Complex<R> b)
{
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

/* conj(a) b */
template <class R>
SCS_HD Complex<R> conj_times(Complex<R> a, Complex<R> b)
{
    return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

template <class R>
SCS_HD Complex<R> conj(Complex<R> a) { return {a.re, -a.im}; }

template <class R>
SCS_HD Complex<R> scale(Complex<R> a, R factor) { return {a.re * factor, a.im * factor}; }

/* sum + a b */
template <class R>
SCS_HD Complex<R> multiply_add(Complex<R> sum, Complex<R> a, Complex<R> b) { return sum + a * b; }

/* sum + conj(a) b */
template <class R>
SCS_HD Complex<R> conj_multiply_add(Complex<R> sum, Complex<R> a, Complex<R> b) { return sum + conj_times(a, b); }

}  // namespace scs
