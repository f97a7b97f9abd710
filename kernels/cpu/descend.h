/* The step of a combined image, over arrays in the layout of the transforms. */
#pragma once

#include "fft.h"
#include "kspace_step.h"

namespace scs {

/* sum, which is the gram of the image, becomes image + share (of_data - sum). */
inline void descend(const float* image, const float* of_data, float* sum, float share, std::int64_t floats)
{
    for (std::int64_t i = 0; i < floats; i += ELEMENT)
        put(sum + i, descended(get(image + i), get(of_data + i), get(sum + i), broadcast(share)));
}

}  // namespace scs
