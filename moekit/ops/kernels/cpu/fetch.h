// Weights in mapped files, asked for before they are read: a thread of its own waits for the disk, the computing ones go
// on. What is in memory already costs a question to the system for one page of each matrix, and no more.

#pragma once

#include "weights.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

class Fetcher {
    struct Range {
        const char* begin;
        int64_t bytes;
    };
    std::mutex mutex;
    std::condition_variable filled;
    std::deque<Range> ranges;
    const int64_t page = sysconf(_SC_PAGESIZE);

    void run() {
        for (;;) {
            Range range;
            {
                std::unique_lock<std::mutex> lock(mutex);
                filled.wait(lock, [&] { return !ranges.empty(); });
                range = ranges.front();
                ranges.pop_front();
            }
            madvise((void*)range.begin, range.bytes, MADV_WILLNEED);
        }
    }

    bool resident(const char* at) const {
#ifdef __linux__
        unsigned char there = 0;
        return mincore((void*)at, 1, &there) == 0 && there & 1;
#else
        return false;
#endif
    }

public:
    static constexpr size_t MOST = 4096;  // ranges that wait; what is beyond is read when it is touched

    void ask(const void* data, int64_t bytes, bool urgent) {
        const int64_t begin = (int64_t)data / page * page, end = (int64_t)data + bytes;
        if (!data || resident((const char*)((begin + end) / 2 / page * page))) return;
        std::lock_guard<std::mutex> lock(mutex);
        if (ranges.size() >= MOST) return;
        ranges.insert(urgent ? ranges.begin() : ranges.end(), {(const char*)begin, end - begin});
        filled.notify_one();
    }

    // Never destroyed: its thread waits until the process ends. A forked child has no such thread and makes its own.
    static Fetcher& get() {
        static std::atomic<Fetcher*> one;
        static const int told = pthread_atfork(nullptr, nullptr, [] { one = nullptr; });
        (void)told;
        if (Fetcher* found = one) return *found;
        Fetcher *made = new Fetcher, *other = nullptr;
        if (!one.compare_exchange_strong(other, made)) return delete made, *other;
        try {
            std::thread([made] { made->run(); }).detach();
        } catch (const std::system_error&) {  // no more threads: weights are read when they are touched
        }
        return *made;
    }
};

inline void fetch(const void* data, int64_t bytes, bool urgent) { Fetcher::get().ask(data, bytes, urgent); }

}  // namespace
#else
namespace {
inline void fetch(const void*, int64_t, bool) {}
}  // namespace
#endif

namespace {

inline void fetch(const Matrix& m, int64_t rows, int64_t columns, bool urgent) {
    const int64_t groups = (columns + GROUP - 1) / GROUP;
    const int64_t row[] = {4 * columns, 2 * columns, GROUP * groups, GROUP / 2 * groups};
    fetch(m.data, rows * row[m.kind], urgent);
    if (m.scales) fetch(m.scales, rows * 2 * groups, urgent);
}

// An expert that is needed now (`urgent`), or likely soon.
inline void fetch(const Expert& e, int64_t dim, int64_t ff, bool urgent) {
    fetch(e.gate, ff, dim, urgent);
    fetch(e.up, ff, dim, urgent);
    fetch(e.down, dim, ff, urgent);
}

// Asks for the experts that have rows.
inline void fetch(int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets, const Expert* matrices) {
    for (int64_t e = experts; e-- > 0;)  // the first at the front
        if (offsets[e + 1] > offsets[e]) fetch(matrices[e], dim, ff, true);
}

}  // namespace
