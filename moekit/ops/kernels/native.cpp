// Native CPU kernels of the SwiGLU experts: forward, backward, and the combination of their rows.
//
// A plain C interface without torch's headers. One product is at the bottom, a block of rows times a packed panel of
// PANEL columns; what is around it (gather, SiLU * up, routing weights, gradients) works on its small float32 tile while
// that is in the cache. Three inner products exist, chosen when this file is compiled for the machine: AMX and AVX-512
// BF16 for bfloat16, and one in vectors that any compiler lowers (AVX-512, AVX2, NEON, SSE) for float32, which also serves
// bfloat16 where the machine has no such unit. No shape is special: blocks are fixed, what is left over is padded.
//
// Elements: S is what rows are stored in (activations), W what weights are stored in, P what is multiplied.
// A unit is 32 bits that lie together along the summed dimension: one float, or two bfloat16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_BF16 1
#include <immintrin.h>
#endif
#if defined(HAS_BF16) && (defined(__AMX_BF16__) || defined(EMULATE_AMX)) && defined(__linux__)
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
constexpr int64_t BLOCK = 256;      // rows of one expert that one task takes
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

inline vec splat(float x) { return x - vec{}; }

inline vec exponential(vec x) {  // Cephes' polynomial, relative error 2e-7
    const vec low = splat(-87.0f), high = splat(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
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
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)bits;
}
inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// Memory that a thread keeps between tasks; grows, never shrinks.
struct Scratch {
    char* data = nullptr;
    size_t size = 0, used = 0;
    ~Scratch() { free(data); }
    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        free(data);
        size = (bytes + 4095) / 4096 * 4096;
        data = (char*)aligned_alloc(4096, size);
    }
    template <class T> T* take(int64_t count) {
        T* p = (T*)(data + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};
thread_local Scratch scratch;
inline size_t room(int64_t count, size_t size) { return (count * size + 63) / 64 * 64; }

// ---- what is multiplied -------------------------------------------------------------------------------------------

template <class P> struct Units;
template <> struct Units<float> {
    static constexpr int each = 1;
    static int64_t padded(int64_t k) { return k; }
};
template <> struct Units<bf16> {
    static constexpr int each = 2;
    static int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }  // AMX sums 32 at a time
};

#ifdef HAS_BF16
template <class S> using Product = S;  // bfloat16 is multiplied as such
#else
template <class S> using Product = float;
#endif

typedef uint32_t unit;

// ---- the inner products: c[rows][PANEL] = a * panel ----------------------------------------------------------------
// a's unit (row, k) is at a[row * rs + k * ks]; the panel holds unit k of all its columns side by side.

// Meanwhile the weights of the next panel are asked for, 128 bytes a step: alone, the packing would wait for memory.

struct Ahead {
    const char* from;
    int64_t stride, steps;
    void fetch(int64_t step) const {
        if (step < steps) {
            __builtin_prefetch(from + step * stride, 0, 2);
            __builtin_prefetch(from + step * stride + 64, 0, 2);
        }
    }
    Ahead part(int64_t number, int64_t parts) const {
        const int64_t first = steps * number / parts;
        return {from + first * stride, stride, steps * (number + 1) / parts - first};
    }
};

template <int M>
void multiply_f32(int64_t depth, const float* a, int64_t rs, int64_t ks, const float* panel, float* c, Ahead ahead) {
    vec sum[M][VECTORS] = {};
    for (int64_t k = 0; k < depth; k++) {
        ahead.fetch(k);
        vec b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = load(panel + k * PANEL + v * LANES);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++) sum[m][v] += a[m * rs + k * ks] * b[v];
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) store(c + m * PANEL + v * LANES, sum[m][v]);
}

#ifdef HAS_BF16
template <int M>
void multiply_bf16(int64_t depth, const unit* a, int64_t rs, int64_t ks, const unit* panel, float* c, Ahead ahead) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        ahead.fetch(k);
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 16);
        for (int m = 0; m < M; m++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[m * rs + k * ks]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, b0);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, b1);
        }
    }
    for (int m = 0; m < M; m++) {
        _mm512_storeu_ps(c + m * PANEL, sum[m][0]);
        _mm512_storeu_ps(c + m * PANEL + 16, sum[m][1]);
    }
}
#endif

typedef void (*MultiplyF32)(int64_t, const float*, int64_t, int64_t, const float*, float*, Ahead);
typedef void (*MultiplyBF16)(int64_t, const unit*, int64_t, int64_t, const unit*, float*, Ahead);
template <int M> struct Fill {  // the inner product for each number of rows
    template <class F, class G> static void run(F* f32, G* b16) {
        f32[M] = multiply_f32<M>;
#ifdef HAS_BF16
        b16[M] = multiply_bf16<M>;
#endif
        Fill<M - 1>::run(f32, b16);
    }
};
template <> struct Fill<0> {
    template <class F, class G> static void run(F*, G*) {}
};
struct Tables {
    MultiplyF32 f32[MOST_ROWS + 1];
    MultiplyBF16 b16[MOST_ROWS + 1];
    Tables() { Fill<MOST_ROWS>::run(f32, b16); }
};
const Tables tables;

#ifdef HAS_AMX
#ifdef EMULATE_AMX  // the same steps in plain code, to test the layouts where there is no such unit
struct Tile {
    uint32_t rows[16][16];
};
thread_local Tile tile_registers[8];
void tile_load(int t, const void* from, int64_t bytes) {
    for (int i = 0; i < 16; i++) memcpy(tile_registers[t].rows[i], (const char*)from + i * bytes, 64);
}
void tile_zero(int t) { memset(&tile_registers[t], 0, sizeof(Tile)); }
void tile_store(int t, void* to, int64_t bytes) {
    for (int i = 0; i < 16; i++) memcpy((char*)to + i * bytes, tile_registers[t].rows[i], 64);
}
void tile_multiply(int c, int a, int b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum;
            memcpy(&sum, &tile_registers[c].rows[i][j], 4);
            for (int k = 0; k < 16; k++) {
                bf16 x[2], y[2];
                memcpy(x, &tile_registers[a].rows[i][k], 4);
                memcpy(y, &tile_registers[b].rows[k][j], 4);
                sum += to_float(x[0]) * to_float(y[0]) + to_float(x[1]) * to_float(y[1]);
            }
            memcpy(&tile_registers[c].rows[i][j], &sum, 4);
        }
}
#define tile_load_(t, p, s) tile_load(t, p, s)
#define tile_zero_(t) tile_zero(t)
#define tile_store_(t, p, s) tile_store(t, p, s)
#define tile_multiply_(c, a, b) tile_multiply(c, a, b)
#else
#define tile_load_(t, p, s) _tile_loadd(t, p, s)
#define tile_zero_(t) _tile_zero(t)
#define tile_store_(t, p, s) _tile_stored(t, p, s)
#define tile_multiply_(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

bool use_amx = false;

struct AmxTiles {  // a thread's tiles, all of 16 rows of 64 bytes
    AmxTiles() {
#ifndef EMULATE_AMX
        if (!use_amx) return;
        alignas(64) uint8_t config[64] = {1};
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        _tile_loadconfig(config);
#endif
    }
    ~AmxTiles() {
#ifndef EMULATE_AMX
        if (use_amx) _tile_release();
#endif
    }
};

void multiply_amx(int64_t depth, const unit* a, int64_t rs, const unit* panel, float* c, Ahead ahead) {
    tile_zero_(0);
    tile_zero_(1);
    tile_zero_(2);
    tile_zero_(3);
    for (int64_t k = 0; k < depth; k += 16) {
        for (int64_t i = k / 4; i < k / 4 + 4; i++) ahead.fetch(i);
        tile_load_(6, panel + k * PANEL, 4 * PANEL);
        tile_load_(7, panel + k * PANEL + 16, 4 * PANEL);
        tile_load_(4, a + k, 4 * rs);
        tile_multiply_(0, 4, 6);
        tile_multiply_(1, 4, 7);
        tile_load_(5, a + 16 * rs + k, 4 * rs);
        tile_multiply_(2, 5, 6);
        tile_multiply_(3, 5, 7);
    }
    tile_store_(0, c, 4 * PANEL);
    tile_store_(1, c + 16, 4 * PANEL);
    tile_store_(2, c + 16 * PANEL, 4 * PANEL);
    tile_store_(3, c + 16 * PANEL + 16, 4 * PANEL);
}
#else
struct AmxTiles {
    AmxTiles() {}
};
constexpr bool use_amx = false;
#endif

template <class P> constexpr bool is_bf16() { return Units<P>::each == 2; }

template <class P> int tile_rows() { return is_bf16<P>() && use_amx ? TILE_ROWS : MOST_ROWS; }

// `depth` counts units. Where AMX multiplies, a is contiguous along k (ks 1) and has memory behind its last row.
template <class P>
void multiply(int64_t rows, int64_t depth, const unit* a, int64_t rs, int64_t ks, const unit* panel, float* c,
              Ahead ahead = {nullptr, 0, 0}) {
    if constexpr (is_bf16<P>()) {
#ifdef HAS_AMX
        if (use_amx) return multiply_amx(depth, a, rs, panel, c, ahead);
#endif
        tables.b16[rows](depth, a, rs, ks, panel, c, ahead);
    } else {
        tables.f32[rows](depth, (const float*)a, rs, ks, (const float*)panel, c, ahead);
    }
}

// ---- packing ------------------------------------------------------------------------------------------------------

#if LANES == 16
inline void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}
inline __m512i load_units(const float* p, float) { return _mm512_loadu_si512(p); }
#ifdef HAS_BF16
inline __m512i load_units(const bf16* p, bf16) { return _mm512_loadu_si512(p); }
inline __m512i load_units(const float* p, bf16) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
}
#endif
#endif

// Packs `columns` (at most PANEL) rows of w, each `k` long, as the columns of a panel: the product with w transposed.
template <class P, class W> void pack_transposed(P* panel, const W* w, int64_t ld, int columns, int64_t k) {
    constexpr int each = Units<P>::each;
    const int64_t padded = Units<P>::padded(k);
    int64_t done = 0;
#if LANES == 16
    if constexpr (sizeof(P) <= sizeof(W))
        if (columns == PANEL)
            for (; done + 16 * each <= k; done += 16 * each)
                for (int half = 0; half < PANEL; half += 16) {
                    __m512i r[16];
                    for (int i = 0; i < 16; i++) r[i] = load_units(w + (half + i) * ld + done, P{});
                    transpose_16x16(r);
                    for (int i = 0; i < 16; i++)
                        _mm512_storeu_si512((unit*)panel + (done / each + i) * PANEL + half, r[i]);
                }
#endif
    for (int64_t at = done; at < padded; at++)
        for (int n = 0; n < PANEL; n++)
            assign(panel[(at / each * PANEL + n) * each + at % each],
                   n < columns && at < k ? to_float(w[n * ld + at]) : 0.0f);
}

// Packs rows of b, `width` columns of each, unit after unit: the panel [units][stride] of a product with b itself.
// Row i is b's row rows[i], or i where `rows` is null; columns up to `stride` are zero.
template <class P, class T>
void pack(P* panel, const T* b, int64_t ld, const int64_t* rows, int64_t width, int64_t stride, int64_t k) {
    constexpr int each = Units<P>::each;
    const int64_t padded = Units<P>::padded(k);
    for (int64_t at = 0; at < padded; at += each) {
        const T* from[2] = {};
        for (int i = 0; i < each; i++)
            if (at + i < k) from[i] = b + (rows ? rows[at + i] : at + i) * ld;
        P* to = panel + at * stride;
        int64_t n = 0;
#if LANES == 16
        for (; n + LANES <= width; n += LANES) {
            if constexpr (each == 1) {
                store((float*)to + n, load(from[0] + n));
            }
#ifdef HAS_BF16
            else {
                vec x = from[0] ? load(from[0] + n) : vec{}, y = from[1] ? load(from[1] + n) : vec{};
                __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
                __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
                _mm512_storeu_si512((unit*)to + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
#endif
        }
#endif
        for (; n < stride; n++)
            for (int i = 0; i < each; i++)
                assign(to[n * each + i], from[i] && n < width ? to_float(from[i][n]) : 0.0f);
    }
}

// Copies rows of x (row rows[i], or i), `width` of each, to rows of `stride`, zero behind.
template <class P, class T>
void gather(P* to, const T* x, int64_t ld, const int64_t* rows, int64_t count, int64_t width, int64_t stride) {
    for (int64_t i = 0; i < count; i++) {
        const T* from = x + (rows ? rows[i] : i) * ld;
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) store(to + i * stride + n, load(from + n));
        for (; n < width; n++) assign(to[i * stride + n], to_float(from[n]));
        for (; n < stride; n++) assign(to[i * stride + n], 0.0f);
    }
}

// (depth, width) units to (width, depth), both multiples of 16: what AMX takes as its left side.
inline void transpose_units(unit* to, const unit* from, int64_t depth, int64_t width) {
#ifdef HAS_AMX
    for (int64_t n = 0; n < width; n += 16)
        for (int64_t k = 0; k < depth; k += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + (k + i) * width + n);
            transpose_16x16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (n + i) * depth + k, r[i]);
        }
#endif
}

// Stores `width` (at most PANEL) columns of a tile's row.
template <class T> void store_row(T* to, const float* c, int64_t width) {
    if (width >= PANEL)
        for (int v = 0; v < PANEL; v += LANES) store(to + v, load(c + v));
    else
        for (int64_t n = 0; n < width; n++) assign(to[n], c[n]);
}

// The same past the cache, where the row allows it: nobody reads a gradient soon.
template <class T> void stream_row(T* to, const float* c, int64_t width) {
#if LANES == 16
    if constexpr (sizeof(T) == 4)
        if (width >= PANEL && (uintptr_t)to % 64 == 0) {
            for (int v = 0; v < PANEL; v += LANES) _mm512_stream_ps((float*)to + v, (__m512)load(c + v));
            return;
        }
#endif
    store_row(to, c, width);
}

// ---- a few rows: dot products straight from the weights, which are read once --------------------------------------

inline float total(vec x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

// out[m * ldo + n] = w's row n times x's row m, for M rows of x and `rows` rows of w, each `k` long.
template <int M, class W> void dots_of(const W* w, int64_t rows, int64_t k, const float* x, int64_t ldx, float* out, int64_t ldo) {
    constexpr int N = 4;
    int64_t n = 0;
    for (; n + N <= rows; n += N) {
        vec sum[M][N] = {};
        const W* at = w + n * k;
        int64_t i = 0;
        for (; i + LANES <= k; i += LANES) {
            vec a[M];
            for (int m = 0; m < M; m++) a[m] = load(x + m * ldx + i);
            for (int j = 0; j < N; j++) {
                const vec b = load(at + j * k + i);
                for (int m = 0; m < M; m++) sum[m][j] += a[m] * b;
            }
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < N; j++) {
                float rest = total(sum[m][j]);
                for (int64_t r = i; r < k; r++) rest += x[m * ldx + r] * to_float(at[j * k + r]);
                out[m * ldo + n + j] = rest;
            }
    }
    for (; n < rows; n++)
        for (int m = 0; m < M; m++) {
            float sum = 0;
            for (int64_t i = 0; i < k; i++) sum += x[m * ldx + i] * to_float(w[n * k + i]);
            out[m * ldo + n] = sum;
        }
}

constexpr int FEW = 4;
template <class W>
void dots(int64_t m, const W* w, int64_t rows, int64_t k, const float* x, int64_t ldx, float* out, int64_t ldo) {
    if (m == 1) dots_of<1>(w, rows, k, x, ldx, out, ldo);
    if (m == 2) dots_of<2>(w, rows, k, x, ldx, out, ldo);
    if (m == 3) dots_of<3>(w, rows, k, x, ldx, out, ldo);
    if (m == 4) dots_of<4>(w, rows, k, x, ldx, out, ldo);
}

// ---- work ---------------------------------------------------------------------------------------------------------

struct Task {
    int64_t expert, begin, end;  // rows of the expert, or a part of its gradient
    int part;
};

std::vector<Task> row_blocks(const int64_t* offsets, int64_t experts) {
    std::vector<Task> tasks;
    for (int64_t e = 0; e < experts; e++) {
        int64_t rows = offsets[e + 1] - offsets[e], blocks = (rows + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; b++)  // equal parts, not a full block and a crumb
            tasks.push_back({e, offsets[e] + rows * b / blocks, offsets[e] + rows * (b + 1) / blocks, 0});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; });
    return tasks;
}

struct Shape {
    int64_t experts, dim, ff;
    const int64_t* offsets;  // experts + 1: where each expert's rows begin
    const int64_t* tokens;   // row -> row of x and dy; null: the same
    int threads;
};

// The weights of the next panel: PANEL rows of w (rows, length) from `begin` on, or PANEL columns of it.
template <class W> Ahead next_rows(const W* w, int64_t begin, int64_t rows, int64_t length) {
    const int64_t taken = std::min<int64_t>(PANEL, rows - begin);
    return {(const char*)(w + begin * length), 128, taken > 0 ? taken * length * (int64_t)sizeof(W) / 128 : 0};
}
template <class W> Ahead next_columns(const W* w, int64_t begin, int64_t columns, int64_t rows) {
    return {(const char*)(w + begin), columns * (int64_t)sizeof(W), begin < columns ? rows : 0};
}

// hidden (rows, 2 ff) gets gate and up before SiLU unless it is null; y (rows, dim) gets the experts' outputs.
template <class S, class W>
void forward(const Shape& s, const S* x, int64_t ldx, const W* gate_up, const W* down, S* hidden, S* y) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    const int64_t d = s.dim, f = s.ff, dp = Units<P>::padded(d), fp = Units<P>::padded(f);
    const std::vector<Task> tasks = row_blocks(s.offsets, s.experts);
    const size_t bytes = room((BLOCK + TILE_ROWS) * dp, sizeof(P)) + room((BLOCK + TILE_ROWS) * fp, sizeof(P)) +
                         2 * room(std::max(dp, fp) * PANEL, sizeof(P)) + 2 * room(TILE_ROWS * PANEL, 4) +
                         2 * room(FEW * std::max(d, 2 * f), 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve(bytes);
        P* rows = scratch.take<P>((BLOCK + TILE_ROWS) * dp);
        P* act = scratch.take<P>((BLOCK + TILE_ROWS) * fp);
        P* panel_g = scratch.take<P>(std::max(dp, fp) * PANEL);
        P* panel_u = scratch.take<P>(std::max(dp, fp) * PANEL);
        float* g = scratch.take<float>(TILE_ROWS * PANEL);
        float* u = scratch.take<float>(TILE_ROWS * PANEL);
        float* in = scratch.take<float>(FEW * std::max(d, 2 * f));
        float* out = scratch.take<float>(FEW * std::max(d, 2 * f));
        const int step = tile_rows<P>();
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < (int64_t)tasks.size(); t++) {
            const Task task = tasks[t];
            const int64_t count = task.end - task.begin, blocks = (count + step - 1) / step;
            const W *w = gate_up + task.expert * 2 * f * d, *v = down + task.expert * d * f;
            if (count <= FEW && !hidden) {  // packing would cost more than the products
                gather(in, s.tokens ? x : x + task.begin * ldx, ldx, s.tokens ? s.tokens + task.begin : nullptr, count, d, d);
                dots(count, w, 2 * f, d, in, d, out, 2 * f);
                for (int64_t i = 0; i < count; i++)
                    for (int64_t n = 0; n < f; n += LANES) {
                        vec a = {}, b = {};
                        const int64_t width = std::min<int64_t>(LANES, f - n);
                        memcpy(&a, out + i * 2 * f + n, width * 4);
                        memcpy(&b, out + i * 2 * f + f + n, width * 4);
                        a = a * sigmoid(a) * b;
                        memcpy(in + i * f + n, &a, width * 4);
                    }
                dots(count, v, d, f, in, f, out, d);
                gather(y + task.begin * d, out, d, (const int64_t*)nullptr, count, d, d);
                continue;
            }
            gather(rows, s.tokens ? x : x + task.begin * ldx, ldx, s.tokens ? s.tokens + task.begin : nullptr, count, d, dp);
            for (int64_t n = 0; n < f; n += PANEL) {
                const int64_t width = std::min<int64_t>(PANEL, f - n);
                pack_transposed(panel_g, w + n * d, d, width, d);
                pack_transposed(panel_u, w + (f + n) * d, d, width, d);
                const Ahead next_g = next_rows(w, n + PANEL, f, d), next_u = next_rows(w + f * d, n + PANEL, f, d);
                for (int64_t m = 0; m < count; m += step) {
                    const int64_t taken = std::min<int64_t>(step, count - m);
                    const unit* a = (const unit*)(rows + m * dp);
                    multiply<P>(taken, dp / each, a, dp / each, 1, (const unit*)panel_g, g, next_g.part(m / step, blocks));
                    multiply<P>(taken, dp / each, a, dp / each, 1, (const unit*)panel_u, u, next_u.part(m / step, blocks));
                    for (int64_t i = 0; i < taken; i++) {
                        float *gate = g + i * PANEL, *up = u + i * PANEL;
                        if (hidden) {
                            S* kept = hidden + (task.begin + m + i) * 2 * f + n;
                            store_row(kept, gate, width);
                            store_row(kept + f, up, width);
                        }
                        for (int j = 0; j < PANEL; j += LANES) {
                            vec a = load(gate + j);
                            store(gate + j, a * sigmoid(a) * load(up + j));
                        }
                        store_row(act + (m + i) * fp + n, gate, std::min<int64_t>(PANEL, fp - n));
                    }
                }
            }
            for (int64_t n = 0; n < d; n += PANEL) {
                const int64_t width = std::min<int64_t>(PANEL, d - n);
                pack_transposed(panel_g, v + n * f, f, width, f);
                const Ahead next = next_rows(v, n + PANEL, d, f);
                for (int64_t m = 0; m < count; m += step) {
                    const int64_t taken = std::min<int64_t>(step, count - m);
                    multiply<P>(taken, fp / each, (const unit*)(act + m * fp), fp / each, 1, (const unit*)panel_g, g, next.part(m / step, blocks));
                    for (int64_t i = 0; i < taken; i++) store_row(y + (task.begin + m + i) * d + n, g + i * PANEL, width);
                }
            }
        }
    }
}

// dx (rows, dim), d_weights (rows), d_hidden (rows, 2 ff) and act (rows, ff), the activation times the routing weight,
// which the weights' gradients need. `weights` (rows) null: all 1.
template <class S, class W>
void backward_rows(const Shape& s, const S* dy, int64_t ldy, const W* gate_up, const W* down, const float* weights,
                   const S* hidden, S* d_hidden, S* act, S* dx, float* d_weights) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    const int64_t d = s.dim, f = s.ff, dp = Units<P>::padded(d), fp = Units<P>::padded(2 * f);
    const std::vector<Task> tasks = row_blocks(s.offsets, s.experts);
    const size_t bytes = room((BLOCK + TILE_ROWS) * dp, sizeof(P)) + room((BLOCK + TILE_ROWS) * fp, sizeof(P)) +
                         room(std::max(dp, fp) * PANEL, sizeof(P)) + 2 * room(TILE_ROWS * PANEL, 4) +
                         room(BLOCK * LANES, 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve(bytes);
        float* dots = scratch.take<float>(BLOCK * LANES);  // of each row's activation with its gradient
        P* rows = scratch.take<P>((BLOCK + TILE_ROWS) * dp);
        P* dh = scratch.take<P>((BLOCK + TILE_ROWS) * fp);
        P* panel = scratch.take<P>(std::max(dp, fp) * PANEL);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        float* g = scratch.take<float>(TILE_ROWS * PANEL);  // a row each of gate, up, and their gradients
        float *u = g + PANEL, *dg = u + PANEL, *du = dg + PANEL, *ac = du + PANEL;
        const int step = tile_rows<P>();
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < (int64_t)tasks.size(); t++) {
            const Task task = tasks[t];
            const int64_t count = task.end - task.begin, blocks = (count + step - 1) / step;
            const W *w = gate_up + task.expert * 2 * f * d, *v = down + task.expert * d * f;
            gather(rows, s.tokens ? dy : dy + task.begin * ldy, ldy, s.tokens ? s.tokens + task.begin : nullptr, count, d, dp);
            std::fill(dots, dots + count * LANES, 0.0f);
            for (int64_t i = 0; i < count; i++)
                for (int64_t n = 2 * f; n < fp; n++) assign(dh[i * fp + n], 0.0f);
            for (int64_t n = 0; n < f; n += PANEL) {
                const int64_t width = std::min<int64_t>(PANEL, f - n);
                pack(panel, v + n, f, (const int64_t*)nullptr, width, PANEL, d);
                const Ahead next = next_columns(v, n + PANEL, f, d);
                for (int64_t m = 0; m < count; m += step) {
                    const int64_t taken = std::min<int64_t>(step, count - m);
                    multiply<P>(taken, dp / each, (const unit*)(rows + m * dp), dp / each, 1, (const unit*)panel, c, next.part(m / step, blocks));
                    for (int64_t i = 0; i < taken; i++) {
                        const int64_t row = task.begin + m + i;
                        const float weight = weights ? weights[row] : 1.0f;
                        const S* kept = hidden + row * 2 * f + n;
                        if (width < PANEL)
                            for (int j = 0; j < PANEL; j++) {
                                g[j] = j < width ? to_float(kept[j]) : 0.0f;
                                u[j] = j < width ? to_float(kept[f + j]) : 0.0f;
                            }
                        vec sum = load(dots + (m + i) * LANES);
                        for (int j = 0; j < PANEL; j += LANES) {
                            vec a = width < PANEL ? load(g + j) : load(kept + j);
                            vec b = width < PANEL ? load(u + j) : load(kept + f + j);
                            vec s = sigmoid(a), silu = a * s, da = load(c + i * PANEL + j);
                            sum += silu * b * da;
                            da *= weight;
                            store(ac + j, silu * b * weight);
                            store(dg + j, da * b * (s + silu * (1.0f - s)));
                            store(du + j, da * silu);
                        }
                        store(dots + (m + i) * LANES, sum);
                        store_row(act + row * f + n, ac, width);
                        store_row(d_hidden + row * 2 * f + n, dg, width);
                        store_row(d_hidden + row * 2 * f + f + n, du, width);
                        store_row(dh + (m + i) * fp + n, dg, width);
                        store_row(dh + (m + i) * fp + f + n, du, width);
                    }
                }
            }
            for (int64_t i = 0; d_weights && i < count; i++) {
                float sum = 0;
                for (int j = 0; j < LANES; j++) sum += dots[i * LANES + j];
                d_weights[task.begin + i] = sum;
            }
            for (int64_t n = 0; dx && n < d; n += PANEL) {
                const int64_t width = std::min<int64_t>(PANEL, d - n);
                pack(panel, w + n, d, (const int64_t*)nullptr, width, PANEL, 2 * f);
                const Ahead next = next_columns(w, n + PANEL, d, 2 * f);
                for (int64_t m = 0; m < count; m += step) {
                    const int64_t taken = std::min<int64_t>(step, count - m);
                    multiply<P>(taken, fp / each, (const unit*)(dh + m * fp), fp / each, 1, (const unit*)panel, c, next.part(m / step, blocks));
                    for (int64_t i = 0; i < taken; i++) store_row(dx + (task.begin + m + i) * d + n, c + i * PANEL, width);
                }
            }
        }
    }
}

// gradient (experts, height, width) = left^T right over each expert's rows; zero for experts without rows.
template <class S, class W>
void weight_gradient(const Shape& s, const S* left, int64_t ldl, bool left_is_gathered, int64_t height, const S* right,
                     int64_t ldr, bool right_is_gathered, int64_t width, W* gradient) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    std::vector<Task> tasks;
    const int64_t panels = (width + PANEL - 1) / PANEL;
    int64_t parts = 1;
    while (parts * s.experts < 8 * s.threads && parts * 4 <= panels) parts *= 2;
    for (int64_t e = 0; e < s.experts; e++)
        for (int64_t p = 0; p < parts; p++) tasks.push_back({e, s.offsets[e], s.offsets[e + 1], (int)p});
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; });
    int64_t deepest = 0;
    for (int64_t e = 0; e < s.experts; e++) deepest = std::max(deepest, s.offsets[e + 1] - s.offsets[e]);
    const bool flip = is_bf16<P>() && use_amx;
    const int64_t group = flip ? TILE_ROWS : 4 * MOST_ROWS;  // columns of `left` that are packed side by side
    const int64_t most = Units<P>::padded(std::min(deepest, DEPTH)), groups = (height + group - 1) / group;
    const size_t bytes = room(most * group * groups, sizeof(P)) + room(most * group, sizeof(P)) + room(most * PANEL, sizeof(P)) + room(TILE_ROWS * PANEL, 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve(bytes);
        P* a = scratch.take<P>(most * group * groups);
        unit* unflipped = (unit*)scratch.take<P>(most * group);
        P* panel = scratch.take<P>(most * PANEL);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        const int step = tile_rows<P>();
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < (int64_t)tasks.size(); t++) {
            const Task task = tasks[t];
            const int64_t first = panels * task.part / parts * PANEL, last = std::min(width, panels * (task.part + 1) / parts * PANEL);
            W* to = gradient + task.expert * height * width;
            if (task.begin == task.end)
                for (int64_t m = 0; m < height; m++) memset((void*)(to + m * width + first), 0, (last - first) * sizeof(W));
            for (int64_t begin = task.begin; begin < task.end; begin += DEPTH) {
                const int64_t count = std::min(DEPTH, task.end - begin), depth = Units<P>::padded(count) / each;
                const int64_t* rows = s.tokens ? s.tokens + begin : nullptr;
                const S* from = left_is_gathered && rows ? left : left + begin * ldl;
                const int64_t rs = flip ? depth : 1, ks = flip ? 1 : group;
                for (int64_t g = 0; g < groups; g++) {
                    unit* to_group = (unit*)a + g * group * depth;
                    const int64_t columns = std::min(group, height - g * group);
                    pack((P*)(flip ? unflipped : to_group), from + g * group, ldl, left_is_gathered ? rows : nullptr, columns, group, count);
                    if (flip) transpose_units(to_group, unflipped, depth, group);
                }
                for (int64_t n = first; n < last; n += PANEL) {
                    const int64_t columns = std::min<int64_t>(PANEL, width - n);
                    pack(panel, (right_is_gathered && rows ? right : right + begin * ldr) + n, ldr, right_is_gathered ? rows : nullptr, columns, PANEL, count);
                    for (int64_t m = 0; m < height; m += step) {
                        const int64_t taken = std::min<int64_t>(step, height - m);
                        multiply<P>(taken, depth, (const unit*)a + m / group * group * depth + m % group * rs, rs, ks, (const unit*)panel, c);
                        for (int64_t i = 0; i < taken; i++) {
                            W* row = to + (m + i) * width + n;
                            if (begin > task.begin)
                                for (int64_t j = 0; j < columns; j++) c[i * PANEL + j] += to_float(row[j]);
                            stream_row(row, c + i * PANEL, columns);
                        }
                    }
                }
            }
        }
    }
}

// y (tokens, dim) = sum over choices of weight * row; a pair whose row is not below `computed` counts nothing.
template <class S>
void combine(int64_t tokens, int64_t k, int64_t d, const S* rows, const int64_t* row_of, const float* weights,
             int64_t computed, S* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t n = 0; n < d; n += LANES) {
            vec sum = {};
            float tail[LANES] = {};
            const int64_t width = std::min<int64_t>(LANES, d - n);
            for (int64_t j = 0; j < k; j++) {
                const int64_t row = row_of[t * k + j];
                if (row >= computed) continue;
                const float weight = weights ? weights[t * k + j] : 1.0f;
                if (width == LANES)
                    sum += weight * load(rows + row * d + n);
                else
                    for (int64_t i = 0; i < width; i++) tail[i] += weight * to_float(rows[row * d + n + i]);
            }
            if (width == LANES)
                store(y + t * d + n, sum);
            else
                for (int64_t i = 0; i < width; i++) assign(y[t * d + n + i], tail[i]);
        }
}

// ---- the rest of a training step that is not a product --------------------------------------------------------------

inline float greatest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

// losses (rows) = logsumexp - logit of the target, 0 where the target is negative; with `differentiate` the logits
// become their gradient, softmax - one-hot.
template <class T>
void cross_entropy(int64_t rows, int64_t vocab, T* logits, const int64_t* targets, float* losses, bool differentiate, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* x = logits + r * vocab;
        losses[r] = 0;
        if (targets[r] < 0) {
            if (differentiate) memset((void*)x, 0, vocab * sizeof(T));
            continue;
        }
        const int64_t whole = vocab / LANES * LANES;
        vec most = splat(-INFINITY);
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec a = load(x + i);
            most = a > most ? a : most;
        }
        float high = greatest(most);
        for (int64_t i = whole; i < vocab; i++) high = std::max(high, to_float(x[i]));
        vec sums = {};
        for (int64_t i = 0; i < whole; i += LANES) sums += exponential(load(x + i) - high);
        float sum = total(sums);
        for (int64_t i = whole; i < vocab; i++) sum += std::exp(to_float(x[i]) - high);
        losses[r] = high + std::log(sum) - to_float(x[targets[r]]);
        if (!differentiate) continue;
        const float scale = 1 / sum, at_target = std::exp(to_float(x[targets[r]]) - high) * scale - 1;
        for (int64_t i = 0; i < whole; i += LANES) store(x + i, exponential(load(x + i) - high) * scale);
        for (int64_t i = whole; i < vocab; i++) assign(x[i], std::exp(to_float(x[i]) - high) * scale);
        assign(x[targets[r]], at_target);
    }
}

// y = x / rms(x) * weight; scales (rows) gets 1 / rms(x).
void norm(int64_t rows, int64_t dim, const float* x, const float* weight, float eps, float* y, float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* a = x + r * dim;
        const int64_t whole = dim / LANES * LANES;
        vec sums = {};
        for (int64_t i = 0; i < whole; i += LANES) sums += load(a + i) * load(a + i);
        float sum = total(sums);
        for (int64_t i = whole; i < dim; i++) sum += a[i] * a[i];
        const float scale = scales[r] = 1 / std::sqrt(sum / dim + eps);
        for (int64_t i = 0; i < whole; i += LANES) store(y + r * dim + i, load(a + i) * scale * load(weight + i));
        for (int64_t i = whole; i < dim; i++) y[r * dim + i] = a[i] * scale * weight[i];
    }
}

// dx, and d_weight summed over fixed parts of the rows, `parts` of them, one row of d_weights each.
void norm_backward(int64_t rows, int64_t dim, const float* x, const float* weight, const float* scales, const float* dy,
                   float* dx, float* d_weights, int64_t parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        float* dw = d_weights + p * dim;
        std::fill(dw, dw + dim, 0.0f);
        for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; r++) {
            const float *a = x + r * dim, *b = dy + r * dim;
            const int64_t whole = dim / LANES * LANES;
            const float scale = scales[r];
            vec sums = {};
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec g = load(b + i), n = load(a + i) * scale;
                sums += g * load(weight + i) * n;
                store(dw + i, load(dw + i) + g * n);
            }
            float sum = total(sums);
            for (int64_t i = whole; i < dim; i++) {
                sum += b[i] * weight[i] * a[i] * scale;
                dw[i] += b[i] * a[i] * scale;
            }
            const float mean = sum / dim * scale;
            for (int64_t i = 0; i < whole; i += LANES)
                store(dx + r * dim + i, load(b + i) * load(weight + i) * scale - load(a + i) * scale * mean);
            for (int64_t i = whole; i < dim; i++) dx[r * dim + i] = b[i] * weight[i] * scale - a[i] * scale * mean;
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the file was compiled for: bit 0 bfloat16 products, bit 1 AMX, the lanes of a float32 vector from bit 8 on.
EXPORT int moekit_features() {
    int features = LANES << 8;
#ifdef HAS_BF16
    features |= 1;
#endif
#ifdef HAS_AMX
#ifdef EMULATE_AMX
    use_amx = true;
#else
    use_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
    if (use_amx) features |= 2;
#endif
    return features;
}

// s_bf16, w_bf16: whether rows and weights are bfloat16 (else float32); rows in float32 need weights in float32.
#define BY_TYPE(call)                          \
    if (s_bf16 && w_bf16) {                    \
        typedef bf16 S; typedef bf16 W; call;  \
    } else if (s_bf16) {                       \
        typedef bf16 S; typedef float W; call; \
    } else {                                   \
        typedef float S; typedef float W; call; \
    }

EXPORT void moekit_forward(int s_bf16, int w_bf16, int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets,
                           const int64_t* tokens, int threads, const void* x, int64_t ldx, const void* gate_up,
                           const void* down, void* hidden, void* y) {
    const Shape s{experts, dim, ff, offsets, tokens, threads};
    BY_TYPE((forward<S, W>(s, (const S*)x, ldx, (const W*)gate_up, (const W*)down, (S*)hidden, (S*)y)))
}

EXPORT void moekit_backward_rows(int s_bf16, int w_bf16, int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets,
                                 const int64_t* tokens, int threads, const void* dy, int64_t ldy, const void* gate_up,
                                 const void* down, const float* weights, const void* hidden, void* d_hidden, void* act,
                                 void* dx, float* d_weights) {
    const Shape s{experts, dim, ff, offsets, tokens, threads};
    BY_TYPE((backward_rows<S, W>(s, (const S*)dy, ldy, (const W*)gate_up, (const W*)down, weights, (const S*)hidden,
                                 (S*)d_hidden, (S*)act, (S*)dx, d_weights)))
}

EXPORT void moekit_weight_gradient(int s_bf16, int w_bf16, int64_t experts, const int64_t* offsets, const int64_t* tokens,
                                   int threads, const void* left, int64_t ldl, int left_is_gathered, int64_t height,
                                   const void* right, int64_t ldr, int right_is_gathered, int64_t width, void* gradient) {
    const Shape s{experts, 0, 0, offsets, tokens, threads};
    BY_TYPE((weight_gradient<S, W>(s, (const S*)left, ldl, left_is_gathered, height, (const S*)right, ldr,
                                   right_is_gathered, width, (W*)gradient)))
}

EXPORT void moekit_combine(int s_bf16, int64_t tokens, int64_t k, int64_t dim, const void* rows, const int64_t* row_of,
                           const float* weights, int64_t computed, void* y, int threads) {
    if (s_bf16)
        combine<bf16>(tokens, k, dim, (const bf16*)rows, row_of, weights, computed, (bf16*)y, threads);
    else
        combine<float>(tokens, k, dim, (const float*)rows, row_of, weights, computed, (float*)y, threads);
}

EXPORT void moekit_cross_entropy(int bf16_logits, int64_t rows, int64_t vocab, void* logits, const int64_t* targets,
                                 float* losses, int differentiate, int threads) {
    if (bf16_logits)
        cross_entropy(rows, vocab, (bf16*)logits, targets, losses, differentiate, threads);
    else
        cross_entropy(rows, vocab, (float*)logits, targets, losses, differentiate, threads);
}

EXPORT void moekit_norm(int64_t rows, int64_t dim, const float* x, const float* weight, float eps, float* y, float* scales,
                        int threads) {
    norm(rows, dim, x, weight, eps, y, scales, threads);
}

EXPORT void moekit_norm_backward(int64_t rows, int64_t dim, const float* x, const float* weight, const float* scales,
                                 const float* dy, float* dx, float* d_weights, int64_t parts, int threads) {
    norm_backward(rows, dim, x, weight, scales, dy, dx, d_weights, parts, threads);
}
