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
#ifdef EMULATE_AMX  // the same steps in plain code, to test the layouts where there is no such unit
struct Tile {
    uint32_t rows[16][16];
};
thread_local Tile tile_registers[8];
void tile_load(int t, const void* from, int64_t stride, int rows = 16, int bytes = 64) {
    for (int i = 0; i < rows; i++) memcpy(tile_registers[t].rows[i], (const char*)from + i * stride, bytes);
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
void tile_multiply_bytes(int c, int a, int b) {  // signed by unsigned, 32 of them
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
            for (int k = 0; k < 32; k++)
                tile_registers[c].rows[i][j] += ((const int8_t*)tile_registers[a].rows[i])[k] *
                                                ((const uint8_t*)&tile_registers[b].rows[k / 4][j])[k % 4];
}
#define tile_load_(t, p, s) tile_load(t, p, s)
#define tile_load_left_(t, p, s) tile_load(t, p, s, 16, 32)
#define tile_load_right_(t, p, s) tile_load(t, p, s, 8, 64)
#define tile_zero_(t) tile_zero(t)
#define tile_store_(t, p, s) tile_store(t, p, s)
#define tile_multiply_(c, a, b) tile_multiply(c, a, b)
#define tile_multiply_bytes_(c, a, b) tile_multiply_bytes(c, a, b)
#else
#define tile_load_(t, p, s) _tile_loadd(t, p, s)
#define tile_load_left_(t, p, s) _tile_loadd(t, p, s)
#define tile_load_right_(t, p, s) _tile_loadd(t, p, s)
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
#ifndef EMULATE_AMX
        if (!use_amx) return;
        alignas(64) uint8_t config[64] = {1};
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = codes && (t == 4 || t == 5) ? 32 : 64;
            config[48 + t] = codes && t > 5 ? 8 : 16;
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
