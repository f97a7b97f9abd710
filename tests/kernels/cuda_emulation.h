/* Runs real CUDA sources on a processor: every thread of a block is a std::thread, __syncthreads() a std::barrier, shared
   memory one array, blocks follow each other. Shows wrong indices, missing barriers and races (with ThreadSanitizer), and
   says nothing about time. Warp intrinsics are not here. Include it before the source; compile with -std=c++20 -pthread. */
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define SCS_EMULATION 1
#define SCS_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::shared.data())

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

using Line = struct alignas(64) { std::byte bytes[64]; };
inline std::vector<Line> shared;
inline std::unique_ptr<std::barrier<>> block_barrier;

}  // namespace emulation

inline dim3 gridDim, blockDim;
inline thread_local dim3 blockIdx, threadIdx;

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }

template <class T>
inline T __ldg(const T* from) { return *from; }

template <class T>
inline T atomicAdd(T* to, T value)
{
    return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

/* Whether any thread of the block says so; a barrier, as on the device. */
inline int __syncthreads_or(int own)
{
    static std::atomic<int> any[3];
    static thread_local unsigned turn = 0;
    const unsigned now = turn++ % 3;
    if (own) any[now] = 1;
    any[(now + 1) % 3] = 0;
    __syncthreads();
    return any[now];
}

namespace emulation {

/* The threads of a block live for the whole launch and meet after every block. */
template <class Body>
void run(dim3 grid, dim3 block, std::size_t bytes, Body body)
{
    gridDim = grid, blockDim = block;
    shared.assign(bytes / sizeof(Line) + 1, Line{});
    const unsigned threads = block.x * block.y * block.z;
    block_barrier = std::make_unique<std::barrier<>>(threads);
    const auto member = [&](unsigned index) {
        threadIdx = {index % block.x, index / block.x % block.y, index / block.x / block.y};
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = {x, y, z};
                    body();
                    __syncthreads();
                }
    };
    std::vector<std::thread> members;
    for (unsigned index = 0; index < threads; ++index) members.emplace_back(member, index);
    for (std::thread& one : members) one.join();
}

/* An argument as the file holds it: 8 bytes of size, then that many bytes. Pointers get the bytes themselves. */
using Argument = std::vector<std::byte>;

template <class T>
T value(Argument& argument)
{
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(argument.data());
    } else {
        T result;
        std::memcpy(&result, argument.data(), sizeof result);
        return result;
    }
}

template <class... T, std::size_t... I>
void call(void (*kernel)(T...), dim3 grid, dim3 block, std::size_t bytes, std::vector<Argument>& arguments,
          std::index_sequence<I...>)
{
    if (sizeof...(T) != arguments.size()) std::exit(3);
    const std::tuple<T...> values{value<T>(arguments[I])...};
    run(grid, block, bytes, [&] { std::apply(kernel, values); });
}

/* The program's whole work: launch description and arguments from one file, the arguments afterwards into another. */
template <class... T>
int main(void (*kernel)(T...), const char* from, const char* to)
{
    std::ifstream in(from, std::ios::binary);
    std::int64_t head[8];
    in.read(reinterpret_cast<char*>(head), sizeof head);
    std::vector<Argument> arguments(static_cast<std::size_t>(head[7]));
    for (Argument& argument : arguments) {
        std::int64_t size = 0;
        in.read(reinterpret_cast<char*>(&size), sizeof size);
        argument.resize(static_cast<std::size_t>(size));
        in.read(reinterpret_cast<char*>(argument.data()), size);
    }
    if (!in) return 2;
    const auto unsigned_ = [&](int i) { return static_cast<unsigned>(head[i]); };
    call(kernel, {unsigned_(0), unsigned_(1), unsigned_(2)}, {unsigned_(3), unsigned_(4), unsigned_(5)},
         static_cast<std::size_t>(head[6]), arguments, std::index_sequence_for<T...>{});
    std::ofstream out(to, std::ios::binary);
    for (const Argument& argument : arguments)
        out.write(reinterpret_cast<const char*>(argument.data()), static_cast<std::streamsize>(argument.size()));
    return out ? 0 : 2;
}

}  // namespace emulation
