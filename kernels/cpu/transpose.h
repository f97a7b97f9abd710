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

SCS_HD Complex<Vector> load_numbers(const char* from)
{
    Vector low, high;
    std::memcpy(&low, from, sizeof(low));
    std::memcpy(&high, from + sizeof(low), sizeof(high));
    return {shuffled<even_of_pair>(low, high), shuffled<odd_of_pair>(low, high)};
}

SCS_HD Complex<Vector> load_numbers(const float* from) { return load_numbers(reinterpret_cast<const char*>(from)); }

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

/* `height` rows of n interleaved numbers, which begin at in[0], in[1], ... at any address, to n elements of LANES rows; missing
   rows are 0. */
inline void rows_to_lanes(const char* const* in, int height, int n, float* elements)
{
    int at = 0;
    for (; at + LANES <= n && height == LANES; at += LANES) {
        Vector re[LANES], im[LANES];
        SCS_UNROLL
        for (int row = 0; row < LANES; ++row) {
            const Complex<Vector> z = load_numbers(in[row] + sizeof(float) * 2 * at);
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
            float number[2] = {};
            if (row < height) std::memcpy(number, in[row] + sizeof(number) * at, sizeof(number));
            element[row] = number[0];
            element[row + LANES] = number[1];
        }
    }
}

/* The same for rows `stride` numbers apart. */
inline void rows_to_lanes(const float* in, std::int64_t stride, int height, int n, float* elements)
{
    const char* rows[LANES];
    for (int row = 0; row < LANES; ++row) rows[row] = reinterpret_cast<const char*>(in + 2 * row * stride);
    rows_to_lanes(rows, height, n, elements);
}

/* And back, to rows that begin at out[0], out[1], ... */
inline void lanes_to_rows(const float* elements, int height, int n, float* const* out)
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
        for (int row = 0; row < LANES; ++row) store_numbers(out[row] + 2 * at, {re[row], im[row]});
    }
    for (; at < n; ++at) {
        const float* element = elements + at * ELEMENT;
        for (int row = 0; row < height; ++row) {
            out[row][2 * at] = element[row];
            out[row][2 * at + 1] = element[row + LANES];
        }
    }
}

inline void lanes_to_rows(const float* elements, std::int64_t stride, int height, int n, float* out)
{
    float* rows[LANES];
    for (int row = 0; row < LANES; ++row) rows[row] = out + 2 * row * stride;
    lanes_to_rows(elements, height, n, rows);
}

}  // namespace scs
