// What weights are read from: rows of numbers, or rows of groups of codes with a scale each (ops/quantize.py).
//
// A type of weights has rows(n), itself from row n on; begin() and bytes(), where its first row lies and how long it is;
// and padded(k), the length of a row of activations beside it, zero behind k.

#pragma once

#include "numbers.h"

// `kind` of the weights: 0 float32, 1 bfloat16, 2 int8, 3 int4, the last two with scales.
#define BY_WEIGHTS(kind, call)            \
    if (kind == 0) {                      \
        typedef Plain<float> W; call;     \
    } else if (kind == 1) {               \
        typedef Plain<bf16> W; call;      \
    } else if (kind == 2) {               \
        typedef Groups<8> W; call;        \
    } else {                              \
        typedef Groups<4> W; call;        \
    }

extern "C" {
struct Matrix {  // (rows, columns), one row after another; columns in codes are whole groups
    const void *data, *scales;
    int64_t kind;  // as `BY_WEIGHTS` tells them apart
};
struct Expert {  // gate and up (ff, dim), down (dim, ff), wherever each of them lies
    Matrix gate, up, down;
};
}

namespace {

constexpr int GROUP = 32, PARTS = GROUP / LANES;

// Asks for part `number` of the rows at `from`, which are read soon, `bytes` a part: several rows read side by side are
// more than the machine's own prefetching follows. Twice as fast where weights come from memory.
inline void ask(const char* from, int64_t number, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + number * bytes + b, 0, 3);
}

template <class T> struct Plain {
    const T* at;
    int64_t k;
    Plain(const void* data, const void*, int64_t k) : at((const T*)data), k(k) {}
    Plain rows(int64_t n) const { return {at + n * k, nullptr, k}; }
    const char* begin() const { return (const char*)at; }
    int64_t bytes() const { return k * sizeof(T); }
    static int64_t padded(int64_t k) { return k; }
};

#if LANES == 16
inline vec splat(const bf16& x) { return (vec)_mm512_slli_epi32(_mm512_set1_epi16(x.bits), 16); }
#else
inline vec splat(const bf16& x) { return splat(to_float(x)); }
typedef int8_t bytes_of __attribute__((vector_size(LANES)));
inline ivec widen(const void* from) {
    bytes_of x;
    memcpy(&x, from, LANES);
    return __builtin_convertvector(x, ivec);
}
#endif

#if LANES == 16
const vec LEVELS = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
inline void look_up(const __m128i* bytes, vec levels, vec w[2]) {  // which reads the lowest 4 bits of each index
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
    w[0] = (vec)_mm512_permutexvar_ps(both, (__m512)levels);
    w[1] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)levels);
}
#endif

template <int BITS> struct Groups {
    static constexpr int64_t each = GROUP * BITS / 8;  // bytes of a group's codes
    const char* codes;
    const bf16* scales;
    int64_t k, groups;
    Groups(const void* codes, const void* scales, int64_t k)
        : codes((const char*)codes), scales((const bf16*)scales), k(k), groups((k + GROUP - 1) / GROUP) {}
    Groups rows(int64_t n) const { return {begin() + n * bytes(), scales + n * groups, k}; }
    const char* begin() const { return codes; }
    int64_t bytes() const { return groups * each; }
    static int64_t padded(int64_t k) { return (k + GROUP - 1) / GROUP * GROUP; }

    // The scale of one group of row n; its codes in float32.
    vec read_codes(int64_t n, int64_t group, vec w[PARTS]) const {
        const char* from = codes + (n * groups + group) * each;
#if LANES == 16
        const __m128i* lanes = (const __m128i*)from;
        if (BITS == 8) {
            w[0] = (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(lanes)));
            w[1] = (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(lanes + 1)));
        } else {
            look_up(lanes, LEVELS, w);
        }
#else
        for (int p = 0; p < (BITS == 8 ? PARTS : PARTS / 2); p++) {
            const ivec x = widen(from + p * LANES);
            w[p] = __builtin_convertvector(BITS == 8 ? x : (x & 15) - 8, vec);
            if (BITS == 4) w[p + PARTS / 2] = __builtin_convertvector(((x >> 4) & 15) - 8, vec);
        }
#endif
        return splat(scales[n * groups + group]);
    }

    // One group of row n in float32.
    void read(int64_t n, int64_t group, vec w[PARTS]) const {
#if LANES == 16
        if (BITS == 4)  // one multiplication, of the table
            return look_up((const __m128i*)(codes + (n * groups + group) * each), LEVELS * splat(scales[n * groups + group]), w);
#endif
        const vec scale = read_codes(n, group, w);
        for (int p = 0; p < PARTS; p++) w[p] *= scale;
    }
};

}  // namespace
