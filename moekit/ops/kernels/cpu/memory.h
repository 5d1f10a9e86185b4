// Memory that a thread keeps between tasks. There is one of each in the library, whichever of its files asks.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

inline size_t room(int64_t count, size_t size) { return (count * size + 63) / 64 * 64; }

// It grows, and shrinks only where a caller trims it. Where it is refused the caller throws, but not in a loop of threads,
// which no exception may leave: what these ask for is a few MiB each, once.
struct Scratch {
    char* data = nullptr;
    size_t size = 0, used = 0;
    ~Scratch() { free(data); }
    bool grow(size_t bytes) {
        used = 0;
        if (bytes <= size) return true;
        free(data);
        size = (bytes + 4095) / 4096 * 4096;
        data = (char*)aligned_alloc(4096, size);
        if (!data) size = 0;
        return data;
    }
    void reserve(size_t bytes) {
        if (!grow(bytes)) throw std::bad_alloc();
    }
    void reserve_in_loop(size_t bytes) {
        if (grow(bytes)) return;
        fprintf(stderr, "moekit: out of memory: a thread of the kernels can't allocate %zu bytes\n", bytes);
        abort();
    }
    char* bytes(size_t count) {
        used += (count + 63) / 64 * 64;
        return data + used - (count + 63) / 64 * 64;
    }
    template <class T> T* take(int64_t count) { return (T*)bytes(count * sizeof(T)); }
    void trim(size_t most) {
        if (size <= most) return;
        free(data);
        data = nullptr, size = 0;
    }
};
inline thread_local Scratch scratch;  // a task's
inline thread_local Scratch between;  // the calls of one layer's, which have tasks

constexpr size_t MOST_KEPT = 1 << 28;  // by a thread beside its scratch: what large batches need is given back
struct Between {
    explicit Between(size_t bytes) { between.reserve(bytes); }
    ~Between() { between.trim(MOST_KEPT); }
};

// Memory given out piece by piece; with none at all, its size is told.
struct Pieces {
    char* at;
    size_t used = 0;
    template <class T> T* take(int64_t count) {
        T* piece = at ? (T*)(at + used) : nullptr;
        used += room(count, sizeof(T));
        return piece;
    }
};
