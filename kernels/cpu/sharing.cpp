/* The threads behind `share`. They sleep on a futex until a loop begins, and live as long as the process. */
#include "sharing.h"

#include <atomic>

#include <pthread.h>
#include <sched.h>
#include <signal.h>

namespace scs {
namespace {

constexpr int JOBS = 32;        /* loops at the same time; what is above runs in its caller alone */
constexpr int MOST_HELPERS = 255;
constexpr std::uint64_t MOST_CHUNKS = 0xffffffff;

/* What there is to take of a loop, in one word, so that a chunk is taken of the loop that was looked at or not at all: the number
   of the loop, how many helpers have joined it, and the next chunk. */
struct Ticket {
    std::uint64_t word;

    std::uint64_t next() const { return word & MOST_CHUNKS; }
    int helpers() const { return static_cast<int>(word >> 32 & 0xff); }
    std::uint64_t loop() const { return word >> 40; }
    Ticket taken(bool joining) const { return {word + 1 + (joining ? std::uint64_t(1) << 32 : 0)}; }
    Ticket following() const { return {(loop() + 1) << 40}; }
    Ticket closed() const { return {word | MOST_CHUNKS}; }
};

/* A place for a loop, used again and again. It never goes away, so that a thread which comes late looks at memory that is there. */
struct alignas(64) Job {
    std::atomic<bool> occupied{false};
    std::atomic<std::uint64_t> ticket{0};
    std::atomic<void (*)(const void*, std::int64_t)> run{nullptr};
    std::atomic<const void*> work{nullptr};
    std::atomic<std::uint64_t> count{0};
    std::atomic<int> places{0};
    alignas(64) std::atomic<std::uint32_t> done{0};

    bool occupy() { return !occupied.load(std::memory_order_relaxed) && !occupied.exchange(true, std::memory_order_acquire); }

    /* The ticket of the loop before goes first: whoever still holds it and already reads what follows cannot take anything by it.
       Each release here and acquire there carries that from one thread to the other. */
    void publish(const Chunks& chunks, int helpers)
    {
        const Ticket mine = Ticket{ticket.load(std::memory_order_relaxed)}.following();
        ticket.store(mine.closed().word, std::memory_order_relaxed);
        run.store(chunks.run, std::memory_order_release);
        work.store(chunks.work, std::memory_order_release);
        count.store(static_cast<std::uint64_t>(chunks.count), std::memory_order_release);
        places.store(helpers, std::memory_order_release);
        done.store(0, std::memory_order_relaxed);
        ticket.store(mine.word, std::memory_order_release);
    }

    /* Takes chunks until none is left, as a helper where there is a place for one more. Returns whether there were any. */
    bool take_part(bool helper)
    {
        std::uint64_t joined = ~std::uint64_t(0);
        bool any = false;
        Ticket seen{ticket.load(std::memory_order_acquire)};
        for (;;) {
            /* what is read here may be of a later loop; the exchange fails then */
            const auto own_run = run.load(std::memory_order_acquire);
            const void* own_work = work.load(std::memory_order_acquire);
            const std::uint64_t own_count = count.load(std::memory_order_acquire);
            const bool joining = helper && seen.loop() != joined;
            if (seen.next() >= own_count || (joining && seen.helpers() >= places.load(std::memory_order_acquire))) return any;
            if (!ticket.compare_exchange_weak(seen.word, seen.taken(joining).word, std::memory_order_acq_rel)) continue;
            joined = seen.loop();
            any = true;
            own_run(own_work, static_cast<std::int64_t>(seen.next()));
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(own_count)) done.notify_one();
            seen.word = ticket.load(std::memory_order_acquire);
        }
    }

    void finish()
    {
        const auto all = static_cast<std::uint32_t>(count.load(std::memory_order_relaxed));
        for (std::uint32_t now; (now = done.load(std::memory_order_acquire)) != all;) done.wait(now, std::memory_order_acquire);
        occupied.store(false, std::memory_order_release);
    }
};

Job jobs[JOBS];
std::atomic<std::uint32_t> calls{0};
std::atomic<int> helpers{0};
std::atomic<bool> growing{false};
std::atomic<pthread_t> helper[MOST_HELPERS];
std::atomic<int> avoided{-1}; /* processor that helpers keep off */

void* help(void*)
{
    for (;;) {
        const std::uint32_t seen = calls.load(std::memory_order_acquire);
        bool any = false;
        for (Job& job : jobs) any |= job.take_part(true);
        if (!any) calls.wait(seen, std::memory_order_acquire);
    }
}

/* The threads of the parent are not there in a child process, and nobody waits there for the loops that they were in. */
void begin_anew()
{
    helpers.store(0);
    growing.store(false);
    for (Job& job : jobs) {
        job.count.store(0);
        job.occupied.store(false);
    }
}

/* Signals are for the threads of the program that has loaded this. */
bool start_helper(int number)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, nullptr, help, nullptr) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return false;
    pthread_detach(thread);
    helper[number].store(thread, std::memory_order_relaxed);
    return true;
}

void have_helpers(int wanted)
{
    static const int registered = pthread_atfork(nullptr, nullptr, begin_anew);
    if (registered != 0 || helpers.load(std::memory_order_acquire) >= wanted || growing.exchange(true)) return;
    for (int number = helpers.load(std::memory_order_relaxed); number < wanted && start_helper(number); ++number)
        helpers.store(number + 1, std::memory_order_release);
    avoided.store(-1, std::memory_order_relaxed); /* new ones know nothing of it */
    growing.store(false);
}

/* A thread that is woken is often queued behind the one that woke it, on the same processor, for as long as that computes:
   helpers keep off the processor of the caller. */
void clear_the_way()
{
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || avoided.exchange(here, std::memory_order_relaxed) == here) return;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    CPU_CLR(here, &allowed);
    for (int i = 0; i < helpers.load(std::memory_order_acquire); ++i)
        pthread_setaffinity_np(helper[i].load(std::memory_order_relaxed), sizeof allowed, &allowed);
#endif
}

Job* free_job()
{
    for (Job& job : jobs)
        if (job.occupy()) return &job;
    return nullptr;
}

}  // namespace

void share(const Chunks& chunks, int threads)
{
    std::int64_t most = threads - 1 < MOST_HELPERS ? threads - 1 : MOST_HELPERS;
    if (most > chunks.count - 1) most = chunks.count - 1;
    const bool alone = most < 1 || static_cast<std::uint64_t>(chunks.count) > MOST_CHUNKS;
    Job* job = alone ? nullptr : free_job();
    if (!job) {
        for (std::int64_t i = 0; i < chunks.count; ++i) chunks.run(chunks.work, i);
        return;
    }
    have_helpers(static_cast<int>(most));
    job->publish(chunks, static_cast<int>(most));
    clear_the_way();
    calls.fetch_add(1, std::memory_order_release);
    for (std::int64_t i = 0; i < most; ++i) calls.notify_one();
    job->take_part(false);
    job->finish();
}

}  // namespace scs
