/* The library's own account of itself, and memory that threads keep. */
#include "native.h"

#include <cstdlib>

#ifndef SCS_LEVEL
#define SCS_LEVEL "base"
#endif

namespace scs {

namespace {

/* Raised whenever an exported function is added or means something else; kernels/native.py refuses another number. */
constexpr int ABI = 7;
constexpr int SLOTS = 4;
constexpr std::size_t LINE = 64;

struct Scratch {
    void* memory[SLOTS] = {};
    std::size_t bytes[SLOTS] = {};
    ~Scratch()
    {
        for (void* block : memory) std::free(block);
    }
};

thread_local Scratch kept;

}  // namespace

void* scratch(int slot, std::size_t bytes)
{
    if (kept.bytes[slot] >= bytes) return kept.memory[slot];
    std::free(kept.memory[slot]);
    bytes = (bytes + LINE - 1) / LINE * LINE;
    kept.memory[slot] = std::aligned_alloc(LINE, bytes);
    kept.bytes[slot] = kept.memory[slot] ? bytes : 0;
    return kept.memory[slot];
}

}  // namespace scs

SCS_API int scs_abi() { return scs::ABI; }

SCS_API const char* scs_level() { return SCS_LEVEL; }

SCS_API int scs_lanes() { return scs::LANES; }

/* Whether it was built with OpenMP; else every thread count means one. */
SCS_API int scs_parallel()
{
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* The best library that this processor and its system run: 0 base, 1 avx2, 2 avx512. Asked of the base library. */
SCS_API int scs_best_level()
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 2 : v3 ? 1 : 0;
#else
    return 0;
#endif
}
