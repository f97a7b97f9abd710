/* The threads of one parallel region that work through phases together. */
#pragma once

#include "native.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace scs {

struct Team {
    int member = 0, members = 1;

    /* A part of 0 ... n - 1, the same for the same member every time. */
    std::int64_t first(std::int64_t n) const { return n * member / members; }
    std::int64_t last(std::int64_t n) const { return n * (member + 1) / members; }

    void meet() const
    {
#if defined(_OPENMP)
        if (members == 1) return; /* others of the region may be somewhere else */
#pragma omp barrier
#endif
    }
};

/* Calls run(team) in each of at most `threads` threads. */
template <class Run>
void as_team(int threads, Run run)
{
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    run(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    (void)threads;
    run(Team{});
#endif
}

}  // namespace scs
