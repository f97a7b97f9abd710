/* How a length is taken apart into the radices of its stages; the same on the processor and on the device. */
#pragma once

#include "scs.h"

namespace scs {

constexpr int MOST_STAGES = 12;

struct Factors {
    int count = 0;
    int radix[MOST_STAGES] = {};
};

/* Few stages of even size: 2^8 is 16 16, 2^9 is 8 8 8. Powers of 2 stand at both ends, other primes between them. The count is
   0 for a length with other factors than 2, 3 and 5. */
#if defined(__CUDACC__)
__host__ __device__
#endif
constexpr Factors take_apart(int n)
{
    Factors result;
    int twos = 0;
    for (; n > 1 && n % 2 == 0; n /= 2) ++twos;
    int parts = (twos + 3) / 4;
    const bool lead = parts > 0;
    if (lead) {
        const int bits = (twos + parts - 1) / parts;
        result.radix[result.count++] = 1 << bits;
        twos -= bits;
        --parts;
    }
    for (; n > 1 && n % 5 == 0; n /= 5) result.radix[result.count++] = 5;
    for (; n > 1 && n % 3 == 0; n /= 3) result.radix[result.count++] = 3;
    for (; parts > 0; --parts) {
        const int bits = (twos + parts - 1) / parts;
        result.radix[result.count++] = 1 << bits;
        twos -= bits;
    }
    if (n != 1) result.count = 0;
    else if (result.count == 0) result.radix[result.count++] = 1;
    return result;
}

}  // namespace scs
