// The inner products: a block of rows times a packed panel of PANEL columns. AMX and AVX-512 BF16 for bfloat16, and one
// in vectors for float32, which also serves bfloat16 where the machine has no such unit.

#pragma once

#include "numbers.h"

namespace {

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
// a's unit (row, k) is at a[row * rs + k * ks], one of which is 1; the panel holds unit k of all its columns side by side.

// What becomes of c: it is set, added to, or written past the cache, whole lines that nobody reads soon. A tile of little
// depth is soon done, so the last two go straight from registers to rows `ld` apart; else they lie PANEL apart.
enum class Out { SET, ADD, STREAM };

// Meanwhile the weights of the next panel are asked for, 128 bytes a step: alone, the packing would wait for memory. A
// page's address must be known by then, or the request is dropped: one byte of each is read some steps before.

struct Ahead {
    const char* from;
    int64_t stride, steps, all;  // all: steps up to the end of what may be read
    void fetch(int64_t step) const {
        if (step >= steps) return;
        const char* at = from + step * stride;
        const int64_t early = stride < 1024 ? 4096 / stride : 16;
        const uintptr_t soon = (uintptr_t)(at + early * stride);
        if (step + early < all && soon / 4096 != (soon - stride) / 4096) (void)*(volatile const char*)soon;
        __builtin_prefetch(at, 0, 2);
        __builtin_prefetch(at + 64, 0, 2);
    }
    Ahead part(int64_t number, int64_t parts) const {
        const int64_t first = steps * number / parts;
        return {from + first * stride, stride, steps * (number + 1) / parts - first, all - first};
    }
};

// Where a unit of a lies decides how it is addressed: TURNED, its M rows lie side by side and rs is 1; else ks is 1.
// Unrolled, or the sums go to c by way of the stack.
template <int M, bool TURNED, Out OUT>
void multiply_f32(int64_t depth, const float* a, int64_t rs, int64_t ks, const float* panel, float* c, int64_t ld, Ahead ahead) {
    if (OUT == Out::SET) ld = PANEL;
    vec sum[M][VECTORS] = {};
    for (int64_t k = 0; k < depth; k++) {
        ahead.fetch(k);
        const float* at = TURNED ? a + k * ks : a + k;
        vec b[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) b[v] = load(panel + k * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) sum[m][v] += at[TURNED ? m : m * rs] * b[v];
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + m * ld + v * LANES;
#if LANES == 16
            if (OUT == Out::STREAM)
                _mm512_stream_ps(to, (__m512)sum[m][v]);
            else
#endif
                store(to, OUT == Out::ADD ? load(to) + sum[m][v] : sum[m][v]);
        }
}

#ifdef HAS_BF16
template <int M, bool TURNED, Out OUT>
void multiply_bf16(int64_t depth, const unit* a, int64_t rs, int64_t ks, const unit* panel, float* c, int64_t ld, Ahead ahead) {
    if (OUT == Out::SET) ld = PANEL;
    __m512 sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        ahead.fetch(k);
        const unit* at = TURNED ? a + k * ks : a + k;
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 16);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(at[TURNED ? m : m * rs]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, b0);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            float* to = c + m * ld + 16 * v;
            if (OUT == Out::STREAM)
                _mm512_stream_ps(to, sum[m][v]);
            else
                _mm512_storeu_ps(to, OUT == Out::ADD ? _mm512_add_ps(sum[m][v], _mm512_loadu_ps(to)) : sum[m][v]);
        }
}
#endif

typedef void (*MultiplyF32)(int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t, Ahead);
typedef void (*MultiplyBF16)(int64_t, const unit*, int64_t, int64_t, const unit*, float*, int64_t, Ahead);
struct Tables {  // the inner product for each way out, way in and number of rows
    MultiplyF32 f32[3][2][MOST_ROWS + 1];
    MultiplyBF16 b16[3][2][MOST_ROWS + 1];
    Tables() { fill<MOST_ROWS>(); }

   private:
    template <int M> void fill() {
        if constexpr (M > 0) {
            fill<M, false, Out::SET>(), fill<M, true, Out::SET>(), fill<M, false, Out::ADD>(), fill<M, true, Out::ADD>();
            fill<M, true, Out::STREAM>();  // gradients' only
            fill<M - 1>();
        }
    }
    template <int M, bool TURNED, Out OUT> void fill() {
        f32[(int)OUT][TURNED][M] = multiply_f32<M, TURNED, OUT>;
#ifdef HAS_BF16
        b16[(int)OUT][TURNED][M] = multiply_bf16<M, TURNED, OUT>;
#endif
    }
};
const Tables tables;

#ifdef HAS_AMX
#ifdef EMULATE_AMX  // what the unit does, in plain code: where it would refuse, this ends the process by the same signal
struct Tiles {
    uint8_t config[64];
    uint32_t at[8][16][16];
    int rows(int t) const { return config[48 + t]; }
    int bytes(int t) const { return config[16 + 2 * t]; }
    void need(bool met) const {
        if (!met) __builtin_trap();
    }
    uint32_t (*cleared(int t))[16] {
        need(config[0] == 1 && rows(t) && rows(t) <= 16 && bytes(t) && bytes(t) <= 64);
        memset(at[t], 0, sizeof at[t]);
        return at[t];
    }
    void load(int t, const void* from, int64_t stride) {
        uint32_t(*to)[16] = cleared(t);
        for (int i = 0; i < rows(t); i++) memcpy(to[i], (const char*)from + i * stride, bytes(t));
    }
    void store(int t, void* to, int64_t stride) const {
        need(config[0] == 1 && rows(t));
        for (int i = 0; i < rows(t); i++) memcpy((char*)to + i * stride, at[t][i], bytes(t));
    }
    template <class T, class F> void multiply(int c, int a, int b, F add) {
        need(config[0] == 1 && rows(c) && rows(a) == rows(c) && bytes(b) == bytes(c) && bytes(a) == 4 * rows(b));
        for (int i = 0; i < rows(c); i++)
            for (int j = 0; j < bytes(c) / 4; j++)
                for (int k = 0; k < rows(b); k++) {
                    T sum;
                    memcpy(&sum, &at[c][i][j], 4);
                    sum = add(sum, &at[a][i][k], &at[b][k][j]);
                    memcpy(&at[c][i][j], &sum, 4);
                }
    }
};
thread_local Tiles tile_unit;
inline float add_pair(float sum, const uint32_t* a, const uint32_t* b) {
    bf16 x[2], y[2];
    memcpy(x, a, 4), memcpy(y, b, 4);
    return sum + to_float(x[0]) * to_float(y[0]) + to_float(x[1]) * to_float(y[1]);
}
inline int32_t add_four(int32_t sum, const uint32_t* a, const uint32_t* b) {  // signed by unsigned
    for (int i = 0; i < 4; i++) sum += ((const int8_t*)a)[i] * ((const uint8_t*)b)[i];
    return sum;
}
#define tile_configure_(config_) memcpy(tile_unit.config, config_, 64)
#define tile_release_() memset(tile_unit.config, 0, 64)
#define tile_load_(t, p, s) tile_unit.load(t, p, s)
#define tile_zero_(t) tile_unit.cleared(t)
#define tile_store_(t, p, s) tile_unit.store(t, p, s)
#define tile_multiply_(c, a, b) tile_unit.multiply<float>(c, a, b, add_pair)
#define tile_multiply_bytes_(c, a, b) tile_unit.multiply<int32_t>(c, a, b, add_four)
#else
// GCC's intrinsics do not say what they read: of a configuration its first 8 bytes, of a tile nothing (GCC 12). Nothing that
// was written before may wait behind them, or be left out.
inline void tile_written() { __asm__ volatile("" ::: "memory"); }
#define tile_configure_(config_) (tile_written(), _tile_loadconfig(config_))
#define tile_release_() _tile_release()
#define tile_load_(t, p, s) tile_written(); _tile_loadd(t, p, s)
#define tile_zero_(t) _tile_zero(t)
#define tile_store_(t, p, s) _tile_stored(t, p, s)
#define tile_multiply_(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_multiply_bytes_(c, a, b) _tile_dpbsud(c, a, b)
#endif

}  // namespace
inline bool use_amx = false;  // one in the library, set where it is loaded
namespace {

struct AmxTiles {  // a thread's tiles, all of 16 rows of 64 bytes; for codes, a group of 32 fills half of those multiplied
    AmxTiles(bool codes = false) {
        if (!use_amx) return;
        alignas(64) uint8_t config[64] = {1};
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = codes && (t == 4 || t == 5) ? 32 : 64;
            config[48 + t] = codes && t > 5 ? 8 : 16;
        }
        tile_configure_(config);
    }
    ~AmxTiles() {
        if (use_amx) tile_release_();
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
    AmxTiles(bool = false) {}
};
constexpr bool use_amx = false;
#endif

template <class P> constexpr bool is_bf16() { return Units<P>::each == 2; }

template <class P> int tile_rows() { return is_bf16<P>() && use_amx ? TILE_ROWS : MOST_ROWS; }

// `depth` counts units. Where AMX multiplies, a is contiguous along k (ks 1) and has memory behind its last row.
template <class P, Out OUT = Out::SET>
void multiply(int64_t rows, int64_t depth, const unit* a, int64_t rs, int64_t ks, const unit* panel, float* c,
              Ahead ahead = {}, int64_t ld = PANEL) {
    if constexpr (is_bf16<P>()) {
#ifdef HAS_AMX
        if (use_amx) {
            if (OUT == Out::SET) return multiply_amx(depth, a, rs, panel, c, ahead);
            alignas(64) float tile[TILE_ROWS * PANEL];
            multiply_amx(depth, a, rs, panel, tile, ahead);
            for (int64_t i = 0; i < rows; i++)
                for (int v = 0; v < PANEL; v += LANES) {
                    const vec x = load(tile + i * PANEL + v);
                    store(c + i * ld + v, OUT == Out::ADD ? load(c + i * ld + v) + x : x);
                }
            return;
        }
#endif
        tables.b16[(int)OUT][ks != 1][rows](depth, a, rs, ks, panel, c, ld, ahead);
    } else {
        tables.f32[(int)OUT][ks != 1][rows](depth, (const float*)a, rs, ks, (const float*)panel, c, ld, ahead);
    }
}

}  // namespace
