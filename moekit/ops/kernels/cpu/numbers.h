// Vectors of floats that any compiler lowers, bfloat16 beside them, exp, and rows of them.

#pragma once

#include "memory.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_BF16 1
#include <immintrin.h>
#endif
#if defined(HAS_BF16) && ((defined(__AMX_BF16__) && defined(__AMX_INT8__)) || defined(EMULATE_AMX)) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define MOST_ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define MOST_ROWS 6
#else
#define LANES 4
#define MOST_ROWS 6
#endif

namespace {

constexpr int PANEL = 2 * LANES < 16 ? 16 : 2 * LANES;  // columns of a panel
constexpr int VECTORS = PANEL / LANES;
constexpr int TILE_ROWS = 32;       // rows of a tile, the most that any inner product takes at once
constexpr int64_t BLOCK = 512;      // rows of one expert that one task takes at most
constexpr int64_t DEPTH = 2048;     // rows summed at once in the weights' gradients

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_u __attribute__((vector_size(4 * LANES), aligned(4)));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec load(const float* p) { return *(const vec_u*)p; }
inline void store(float* p, vec x) { *(vec_u*)p = x; }
#if LANES == 16
inline vec load(const bf16* p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
#else
inline vec load(const bf16* p) {
    vec x;
    for (int i = 0; i < LANES; i++) x[i] = to_float(p[i]);
    return x;
}
#endif
#ifdef HAS_BF16
inline void store(bf16* p, vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
inline void store(bf16* p, vec x) {
    for (int i = 0; i < LANES; i++) assign(p[i], x[i]);
}
#endif

// Of a row's last `left` numbers those that a vector holds, zero behind; and back.
template <class T> inline vec load(const T* p, int64_t left) {
    if (left >= LANES) return load(p);
    float part[LANES] = {};
    for (int64_t i = 0; i < left; i++) part[i] = to_float(p[i]);
    return load(part);
}
template <class T> inline void store(T* p, vec x, int64_t left) {
    if (left >= LANES) return store(p, x);
    float part[LANES];
    store(part, x);
    for (int64_t i = 0; i < left; i++) assign(p[i], part[i]);
}

// step(i, left) for each vector of a row of `count` numbers: the one at i, of which `left` are the row's.
template <class F> inline void by_vector(int64_t count, F step) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) step(i, LANES);
    if (i < count) step(i, count - i);
}

inline vec splat(float x) { return x - vec{}; }

inline vec exponential(vec x) {  // Cephes' polynomial, relative error 2e-7
    const vec low = splat(-87.0f), high = splat(88.0f);
#if LANES == 16
    x = (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
    x = x < low ? low : x;
    x = x > high ? high : x;
#endif
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if LANES == 16
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)bits;
#endif
}
inline vec decayed(vec x) {  // exp of what is not above 0, with a true zero at its end
    const vec e = exponential(x), none = {};
    return x <= -87.0f ? none : e;  // no number stays none
}
inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

inline float total(vec x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

#if LANES == 16
inline __m128 totals(vec a, vec b, vec c, vec d) {  // four at a time, by turning them
    const __m512 x = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b), y = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd((__m512d)x, (__m512d)y), high = _mm512_unpackhi_pd((__m512d)x, (__m512d)y);
    const __m512 z = (__m512)low + (__m512)high;
    const __m256 half = _mm512_castps512_ps256(z) + (__m256)_mm512_extractf64x4_pd((__m512d)z, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
#endif

// out[m * ldo + j] = total(x[m][j]). Unrolled, or the sums go by way of the stack.
template <int M, int N> inline void totals(const vec (&x)[M][N], float* out, int64_t ldo) {
#if LANES == 16
    if constexpr (N == 4) {
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) _mm_storeu_ps(out + m * ldo, totals(x[m][0], x[m][1], x[m][2], x[m][3]));
        return;
    }
#endif
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
        for (int j = 0; j < N; j++) out[m * ldo + j] = total(x[m][j]);
}

inline float greatest(vec x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
#endif
}

// Copies rows of x (row rows[i], or i), `width` of each, to rows of `stride`, zero behind.
template <class P, class T>
void gather(P* to, const T* x, int64_t ld, const int64_t* rows, int64_t count, int64_t width, int64_t stride) {
    for (int64_t i = 0; i < count; i++) {
        const T* from = x + (rows ? rows[i] : i) * ld;
        int64_t n = 0;
        if constexpr (std::is_same<P, T>::value) {
            memcpy((void*)(to + i * stride), from, width * sizeof(T));
            n = width;
        }
        for (; n + LANES <= width; n += LANES) store(to + i * stride + n, load(from + n));
        for (; n < width; n++) assign(to[i * stride + n], to_float(from[n]));
        for (; n < stride; n++) assign(to[i * stride + n], 0.0f);
    }
}

// Where the heads of rows lie.
struct Strides {
    int64_t batch, row, head;
    int64_t at(int64_t b, int64_t i, int64_t h) const { return b * batch + i * row + h * head; }
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
