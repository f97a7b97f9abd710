/* Loops whose chunks several threads take, and whose caller waits for work, never for a thread: one that the system wakes late
   finds nothing left to do. */
#pragma once

#include <cstdint>

namespace scs {

/* run(work, i) for i = 0 ... count - 1, in any order and in any thread. */
struct Chunks {
    void (*run)(const void* work, std::int64_t i);
    const void* work;
    std::int64_t count;
};

/* Returns when all chunks are done. The calling thread takes part; at most threads - 1 others do. */
void share(const Chunks& chunks, int threads);

template <class Work>
void share(std::int64_t count, int threads, const Work& work)
{
    share(Chunks{[](const void* it, std::int64_t i) { (*static_cast<const Work*>(it))(i); }, &work, count}, threads);
}

}  // namespace scs
