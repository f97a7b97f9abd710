/* Rows of interleaved numbers to lanes and back, by transposing LANES x LANES blocks in registers. */
#pragma once

#include "fft.h"

namespace scs {

/* Swap the blocks off the diagonal of pairs of lanes that lie Distance apart. */
template <int Distance>
constexpr int keep_low(int lane) { return lane & Distance ? lane - Distance + LANES : lane; }

template <int Distance>
constexpr int keep_high(int lane) { return lane & Distance ? lane + LANES : lane + Distance; }

template <int Distance>
SCS_HD void transpose_stage(Vector* rows)
{
    SCS_UNROLL
    for (int i = 0; i < LANES; ++i) {
        if (i & Distance) continue;
        const Vector a = rows[i], b = rows[i + Distance];
        rows[i] = shuffled<keep_low<Distance>>(a, b);
        rows[i + Distance] = shuffled<keep_high<Distance>>(a, b);
    }
    if constexpr (Distance > 1) transpose_stage<Distance / 2>(rows);
}

/* rows[i][j] becomes rows[j][i] */
SCS_HD void transpose(Vector* rows) { transpose_stage<LANES / 2>(rows); }

/* In the order of lanes that memory has; two more instructions than `load_mixed`. */
constexpr int even_of_pair(int lane) { return 2 * lane; }
constexpr int odd_of_pair(int lane) { return 2 * lane + 1; }
constexpr int first_of_zip(int lane) { return lane / 2 + (lane % 2 ? LANES : 0); }
constexpr int second_of_zip(int lane) { return first_of_zip(lane) + LANES / 2; }

SCS_HD Complex<Vector> load_numbers(const float* from)
{
    const Vector low = load(from), high = load(from + LANES);
    return {shuffled<even_of_pair>(low, high), shuffled<odd_of_pair>(low, high)};
}

SCS_HD void store_numbers(float* to, Complex<Vector> value)
{
    store(to, shuffled<first_of_zip>(value.re, value.im));
    store(to + LANES, shuffled<second_of_zip>(value.re, value.im));
}

/* The first `width` lanes in the order of `load_mixed`, 0 in the others; and their counterpart. */
SCS_HD Complex<Vector> load_some(const float* from, int width)
{
    float numbers[ELEMENT] = {};
    std::memcpy(numbers, from, sizeof(float) * 2 * width);
    return load_mixed(numbers);
}

SCS_HD void store_some(float* to, Complex<Vector> value, int width)
{
    float numbers[ELEMENT];
    store_mixed(numbers, value);
    std::memcpy(to, numbers, sizeof(float) * 2 * width);
}

/* `height` rows of n interleaved numbers, `stride` numbers apart, to n elements of LANES rows; missing rows are 0. */
inline void rows_to_lanes(const float* in, std::int64_t stride, int height, int n, float* elements)
{
    int at = 0;
    for (; at + LANES <= n && height == LANES; at += LANES) {
        Vector re[LANES], im[LANES];
        SCS_UNROLL
        for (int row = 0; row < LANES; ++row) {
            const Complex<Vector> z = load_numbers(in + 2 * (row * stride + at));
            re[row] = z.re, im[row] = z.im;
        }
        transpose(re);
        transpose(im);
        SCS_UNROLL
        for (int i = 0; i < LANES; ++i) put(elements + (at + i) * ELEMENT, {re[i], im[i]});
    }
    for (; at < n; ++at) {
        float* element = elements + at * ELEMENT;
        for (int row = 0; row < LANES; ++row) {
            element[row] = row < height ? in[2 * (row * stride + at)] : 0;
            element[row + LANES] = row < height ? in[2 * (row * stride + at) + 1] : 0;
        }
    }
}

inline void lanes_to_rows(const float* elements, std::int64_t stride, int height, int n, float* out)
{
    int at = 0;
    for (; at + LANES <= n && height == LANES; at += LANES) {
        Vector re[LANES], im[LANES];
        SCS_UNROLL
        for (int i = 0; i < LANES; ++i) {
            const Complex<Vector> z = get(elements + (at + i) * ELEMENT);
            re[i] = z.re, im[i] = z.im;
        }
        transpose(re);
        transpose(im);
        SCS_UNROLL
        for (int row = 0; row < LANES; ++row) store_numbers(out + 2 * (row * stride + at), {re[row], im[row]});
    }
    for (; at < n; ++at) {
        const float* element = elements + at * ELEMENT;
        for (int row = 0; row < height; ++row) {
            out[2 * (row * stride + at)] = element[row];
            out[2 * (row * stride + at) + 1] = element[row + LANES];
        }
    }
}

}  // namespace scs
