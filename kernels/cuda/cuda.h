/* What every CUDA source includes. NVRTC has no system headers, so none stand here. */
#pragma once

#include "scs.h"

/* Shared memory whose size the launch gives. The emulation of the tests defines its own. */
#if !defined(SCS_DYNAMIC_SHARED)
#define SCS_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace scs {

typedef Complex<float> Number;

}  // namespace scs
