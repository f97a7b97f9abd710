/* What every CUDA source includes. NVRTC has no system headers, so none stand here. */
#pragma once

#include "scs.h"

/* Shared memory whose size the launch gives. The emulation of the tests defines its own. */
#if !defined(SCS_DYNAMIC_SHARED)
#define SCS_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace scs {

typedef Complex<float> Number;

/* What the bodies call by these names on a float; kernels/cpu/eight.h has them for vectors. */
SCS_HD float multiply_add(float a, float b, float sum) { return fmaf(a, b, sum); }
SCS_HD float square_root(float x) { return sqrtf(x); }
SCS_HD float least(float a, float b) { return fminf(a, b); }
SCS_HD float most(float a, float b) { return fmaxf(a, b); }
SCS_HD float minus_square(float x, float y) { return fmaf(-y, y, x); }
SCS_HD float half_inverse_root(float x) { return 0.5f / sqrtf(x); }
SCS_HD int truncated(float x) { return static_cast<int>(x); }
SCS_HD float number(int x) { return static_cast<float>(x); }

}  // namespace scs
