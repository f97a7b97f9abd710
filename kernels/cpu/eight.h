/* Eight floats at a time, whatever the register holds: for work that looks numbers up, where loads and not arithmetic set the
   pace. The bodies in kernels/include take `Eight` in the place of float. */
#pragma once

#include <cmath>

#include "native.h"

#if defined(__AVX2__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* of what these functions leave undefined (GCC bug 105593) */
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace scs {

SCS_HD float multiply_add(float a, float b, float sum) { return a * b + sum; }
SCS_HD float square_root(float x) { return std::sqrt(x); }
SCS_HD float least(float a, float b) { return a < b ? a : b; }
SCS_HD float most(float a, float b) { return a > b ? a : b; }

constexpr int EIGHT = 8;
typedef float Eight __attribute__((vector_size(32)));
typedef float PackedEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef std::int32_t Whole __attribute__((vector_size(32)));

SCS_HD Eight load8(const float* from) { return *reinterpret_cast<const PackedEight*>(from); }
SCS_HD void store8(float* to, Eight value) { *reinterpret_cast<PackedEight*>(to) = value; }
SCS_HD Eight eight(float value) { return value - Eight{}; } /* the compiler must keep 0 + x, for x may be -0 */

#if defined(__AVX2__)

SCS_HD Eight multiply_add(Eight a, Eight b, Eight sum) { return _mm256_fmadd_ps(a, b, sum); }
SCS_HD Eight square_root(Eight x) { return _mm256_sqrt_ps(x); }
SCS_HD Eight least(Eight a, Eight b) { return _mm256_min_ps(a, b); }
SCS_HD Eight most(Eight a, Eight b) { return _mm256_max_ps(a, b); }
SCS_HD Whole truncated(Eight x) { return reinterpret_cast<Whole>(_mm256_cvttps_epi32(x)); }
SCS_HD Eight minus_square(Eight x, Eight y) { return _mm256_fnmadd_ps(y, y, x); }
SCS_HD Eight half_inverse_root(Eight x) { return 0.5f * _mm256_rsqrt_ps(x); }
SCS_HD bool all(Whole truth) { return _mm256_movemask_epi8(reinterpret_cast<__m256i>(truth)) == -1; }
SCS_HD Eight number(Whole x) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x)); }

/* row[k] and row[k + 1] for eight k that are not negative: one load each, which beats two gathers. */
SCS_HD void load_pairs(const float* row, Whole k, Eight& first, Eight& second)
{
    const __m256i index = reinterpret_cast<__m256i>(k);
    const __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    const auto two = [row](std::uint64_t both) {
        const auto at = [row](std::uint64_t i) { return reinterpret_cast<const double*>(row + i); };
        return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(at(both & 0xffffffffu)), at(both >> 32)));
    };
    const auto part = [](__m128i x, int i) { return static_cast<std::uint64_t>(i ? _mm_extract_epi64(x, 1) : _mm_cvtsi128_si64(x)); };
    const __m128 a = two(part(low, 0)), b = two(part(low, 1)), c = two(part(high, 0)), d = two(part(high, 1));
    const __m256 ac = _mm256_insertf128_ps(_mm256_castps128_ps256(a), c, 1);
    const __m256 bd = _mm256_insertf128_ps(_mm256_castps128_ps256(b), d, 1);
    first = _mm256_shuffle_ps(ac, bd, 0x88);
    second = _mm256_shuffle_ps(ac, bd, 0xdd);
}

/* pairs[k] += (first, second) for eight k, one after the other: equal k add up. */
SCS_HD void add_pairs(float* pairs, Whole k, Eight first, Eight second)
{
    alignas(32) std::int32_t at[EIGHT];
    std::memcpy(at, &k, sizeof at);
    const __m256 low = _mm256_unpacklo_ps(first, second), high = _mm256_unpackhi_ps(first, second);
    const auto add = [pairs](std::int32_t i, __m128 value) {
        __m64* place = reinterpret_cast<__m64*>(pairs + 2 * static_cast<std::int64_t>(i));
        _mm_storel_pi(place, _mm_add_ps(_mm_loadl_pi(_mm_setzero_ps(), place), value));
    };
    const auto both = [add](std::int32_t i, std::int32_t j, __m128 value) {
        add(i, value);
        add(j, _mm_movehl_ps(value, value));
    };
    both(at[0], at[1], _mm256_castps256_ps128(low));
    both(at[2], at[3], _mm256_castps256_ps128(high));
    both(at[4], at[5], _mm256_extractf128_ps(low, 1));
    both(at[6], at[7], _mm256_extractf128_ps(high, 1));
}

/* to[0] += pair[0], to[1] += pair[1] */
SCS_HD void add_pair(float* to, const float* pair)
{
    const auto both = [](const float* from) { return _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(from))); };
    _mm_store_sd(reinterpret_cast<double*>(to), _mm_castps_pd(_mm_add_ps(both(to), both(pair))));
}

SCS_HD void store_pairs(float* to, Eight first, Eight second)
{
    const __m256 low = _mm256_unpacklo_ps(first, second), high = _mm256_unpackhi_ps(first, second);
    store8(to, _mm256_permute2f128_ps(low, high, 0x20));
    store8(to + EIGHT, _mm256_permute2f128_ps(low, high, 0x31));
}

#else

SCS_HD Eight multiply_add(Eight a, Eight b, Eight sum) { return a * b + sum; }
SCS_HD Eight least(Eight a, Eight b) { return a < b ? a : b; }
SCS_HD Eight most(Eight a, Eight b) { return a > b ? a : b; }
SCS_HD Whole truncated(Eight x) { return __builtin_convertvector(x, Whole); }
SCS_HD bool all(Whole truth)
{
    std::int32_t both = -1;
    for (int i = 0; i < EIGHT; ++i) both &= truth[i];
    return both == -1;
}
SCS_HD Eight number(Whole x) { return __builtin_convertvector(x, Eight); }

/* x - y^2, rounded once. */
SCS_HD Eight minus_square(Eight x, Eight y)
{
    typedef double Doubles __attribute__((vector_size(64)));
    const Doubles wide = __builtin_convertvector(y, Doubles);
    return __builtin_convertvector(__builtin_convertvector(x, Doubles) - wide * wide, Eight);
}

SCS_HD Eight square_root(Eight x)
{
    for (int i = 0; i < EIGHT; ++i) x[i] = std::sqrt(x[i]);
    return x;
}

/* 1 / (2 sqrt(x)) to some digits. */
SCS_HD Eight half_inverse_root(Eight x) { return 0.5f / square_root(x); }

SCS_HD void load_pairs(const float* row, Whole k, Eight& first, Eight& second)
{
    for (int i = 0; i < EIGHT; ++i) first[i] = row[k[i]], second[i] = row[k[i] + 1];
}

SCS_HD void add_pairs(float* pairs, Whole k, Eight first, Eight second)
{
    for (int i = 0; i < EIGHT; ++i) {
        float* place = pairs + 2 * static_cast<std::int64_t>(k[i]);
        place[0] += first[i], place[1] += second[i];
    }
}

SCS_HD void add_pair(float* to, const float* pair) { to[0] += pair[0], to[1] += pair[1]; }

SCS_HD void store_pairs(float* to, Eight first, Eight second)
{
    for (int i = 0; i < EIGHT; ++i) to[2 * i] = first[i], to[2 * i + 1] = second[i];
}

#endif

/* What a loop reads and computes at once, before it looks numbers up eight at a time: the register, where that is wider. */
#if defined(__AVX512F__)

constexpr int WIDE = 16;
typedef float Wide __attribute__((vector_size(64)));
typedef float PackedWide __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::int32_t WideWhole __attribute__((vector_size(64)));

SCS_HD Wide load_wide(const float* from) { return *reinterpret_cast<const PackedWide*>(from); }
SCS_HD void store_wide(float* to, Wide value) { *reinterpret_cast<PackedWide*>(to) = value; }
SCS_HD Wide multiply_add(Wide a, Wide b, Wide sum) { return _mm512_fmadd_ps(a, b, sum); }
SCS_HD Wide square_root(Wide x) { return _mm512_sqrt_ps(x); }
SCS_HD Wide least(Wide a, Wide b) { return _mm512_min_ps(a, b); }
SCS_HD Wide most(Wide a, Wide b) { return _mm512_max_ps(a, b); }
SCS_HD Wide minus_square(Wide x, Wide y) { return _mm512_fnmadd_ps(y, y, x); }
SCS_HD Wide half_inverse_root(Wide x) { return 0.5f * _mm512_rsqrt14_ps(x); }
SCS_HD WideWhole truncated(Wide x) { return reinterpret_cast<WideWhole>(_mm512_cvttps_epi32(x)); }
SCS_HD Wide number(WideWhole x) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)); }

SCS_HD void load_pairs(const float* row, WideWhole k, Wide& first, Wide& second)
{
    Eight low[2], high[2];
    const __m512i index = reinterpret_cast<__m512i>(k);
    load_pairs(row, reinterpret_cast<Whole>(_mm512_castsi512_si256(index)), low[0], high[0]);
    load_pairs(row, reinterpret_cast<Whole>(_mm512_extracti64x4_epi64(index, 1)), low[1], high[1]);
    const auto joined = [](Eight a, Eight b) {
        return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(a)), _mm256_castps_pd(b), 1));
    };
    first = joined(low[0], low[1]), second = joined(high[0], high[1]);
}

SCS_HD void store_pairs(float* to, Wide first, Wide second)
{
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), high = low + _mm512_set1_epi64(0x800000008);
    store_wide(to, _mm512_permutex2var_ps(first, low, second));
    store_wide(to + WIDE, _mm512_permutex2var_ps(first, high, second));
}

constexpr bool WINDOWS = true; /* whether there is `take_pairs` */

/* from[k] and from[k + 1] for k = 0 ... 30, out of two registers: where numbers to look up lie so close, this beats a load of each. */
SCS_HD void take_pairs(const float* from, WideWhole k, Wide& first, Wide& second)
{
    const Wide low = load_wide(from), high = load_wide(from + WIDE);
    first = _mm512_permutex2var_ps(low, reinterpret_cast<__m512i>(k), high);
    second = _mm512_permutex2var_ps(low, reinterpret_cast<__m512i>(k + 1), high);
}

#else

constexpr int WIDE = EIGHT;
typedef Eight Wide;
typedef Whole WideWhole;

SCS_HD Wide load_wide(const float* from) { return load8(from); }
SCS_HD void store_wide(float* to, Wide value) { store8(to, value); }
constexpr bool WINDOWS = false;
SCS_HD void take_pairs(const float* from, WideWhole k, Wide& first, Wide& second) { load_pairs(from, k, first, second); }

#endif

template <class V>
SCS_HD V spread_over(float value) { return value - V{}; } /* see `eight` */

}  // namespace scs
