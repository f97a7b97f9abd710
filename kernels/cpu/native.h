/* What every C++ source of the native libraries includes: exports, error codes, threads, vectors. */
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "scs.h"

/* An exported function returns one of the codes below and lets no exception out (the build has none). */
#define SCS_API extern "C" __attribute__((visibility("default")))

namespace scs {

enum Status { OK = 0, BAD_ARGUMENT = 1, NO_MEMORY = 2 };

/* Floats per vector register. */
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

/* A vector of floats, one arithmetic instruction each; `Packed` may lie at any address that floats may. */
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Packed __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

SCS_HD Vector load(const float* from) { return *reinterpret_cast<const Packed*>(from); }
SCS_HD void store(float* to, Vector value) { *reinterpret_cast<Packed*>(to) = value; }
SCS_HD Vector broadcast(float value) { return Vector{} + value; }

/* The lanes F(0), F(1), ... of a and b, those of b counted on from LANES. */
template <int (*F)(int), int... I>
SCS_HD Vector shuffled(Vector a, Vector b, std::integer_sequence<int, I...>)
{
    return __builtin_shufflevector(a, b, F(I)...);
}

template <int (*F)(int)>
SCS_HD Vector shuffled(Vector a, Vector b)
{
    return shuffled<F>(a, b, std::make_integer_sequence<int, LANES>{});
}

/* Where the numbers of two registers go so that real and imaginary parts part within each 128 bits: one instruction each. */
constexpr int even_of_both(int lane) { return lane / 4 * 4 + lane % 2 * 2 + (lane % 4 < 2 ? 0 : LANES); }
constexpr int odd_of_both(int lane) { return even_of_both(lane) + 1; }
constexpr int low_of_both(int lane) { return lane / 4 * 4 + lane % 4 / 2 + (lane % 2 ? LANES : 0); }
constexpr int high_of_both(int lane) { return low_of_both(lane) + 2; }

/* LANES interleaved complex numbers, in an order of lanes that only `store_mixed` undoes: for work number by number. */
SCS_HD Complex<Vector> load_mixed(const float* from)
{
    const Vector low = load(from), high = load(from + LANES);
    return {shuffled<even_of_both>(low, high), shuffled<odd_of_both>(low, high)};
}

SCS_HD void store_mixed(float* to, Complex<Vector> value)
{
    store(to, shuffled<low_of_both>(value.re, value.im));
    store(to + LANES, shuffled<high_of_both>(value.re, value.im));
}

/* Memory of the calling thread that stays until the thread ends: aligned to a cache line, at least `bytes`; null if there is
   none. `slot` tells apart what one function needs at the same time. What it holds is undefined. */
void* scratch(int slot, std::size_t bytes);

}  // namespace scs
