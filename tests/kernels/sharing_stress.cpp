/* Loops from many threads at once, over memory that is gone when `share` returns. Ends with 0 when each chunk ran once, in no more
   threads than were allowed, and when a loop ended although its helper was held up elsewhere. */
#include "sharing.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace {

std::atomic<int> wrong{0};

void once(unsigned& random, int depth)
{
    random = random * 1664525u + 1013904223u;
    const int count = static_cast<int>(random >> 24) % 40, threads = 1 + static_cast<int>(random >> 20) % 5;
    std::vector<int> times(static_cast<std::size_t>(count));
    std::set<std::thread::id> seen;
    std::mutex guard;
    unsigned inner = random;
    scs::share(count, threads, [&](std::int64_t i) {
        ++times[static_cast<std::size_t>(i)];
        std::lock_guard<std::mutex> lock(guard);
        seen.insert(std::this_thread::get_id());
        if (depth > 0 && i == 0) once(inner, depth - 1);
    });
    for (int n : times) wrong += n != 1;
    wrong += static_cast<int>(seen.size()) > threads;
}

void storm(int callers, int loops)
{
    std::vector<std::thread> crowd;
    for (int c = 0; c < callers; ++c)
        crowd.emplace_back([=] {
            unsigned random = static_cast<unsigned>(c) * 7919u + 1;
            for (int i = 0; i < loops; ++i) once(random, 1);
        });
    for (std::thread& caller : crowd) caller.join();
}

/* The helper is in a chunk of a loop that does not end before another loop has. */
void held_up()
{
    std::atomic<int> inside{0};
    std::atomic<bool> over{false};
    std::thread other([&] {
        scs::share(2, 2, [&](std::int64_t) {
            ++inside;
            while (!over) std::this_thread::yield();
        });
    });
    while (inside < 2) std::this_thread::yield();
    std::atomic<int> sum{0};
    scs::share(8, 2, [&](std::int64_t i) { sum += static_cast<int>(i); });
    wrong += sum != 28;
    over = true;
    other.join();
}

}  // namespace

int main()
{
    held_up();
    storm(6, 400);
    storm(40, 20); /* more loops at once than there are places */
    if (wrong) std::printf("%d wrong\n", wrong.load());
    return wrong ? 1 : 0;
}
