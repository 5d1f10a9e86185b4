// What the inner products read: panels of weights, rows that lie together; and rows written back.

#pragma once

#include "products.h"
#include "weights.h"

namespace {

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
// Numbers of two rows in turn, as units; a row that is null counts as zeros.
inline __m512i in_turn(__m512i rows) {  // 16 of the first, then 16 of the second
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}
inline __m512i side_by_side(const bf16* a, const bf16* b) {
    const __m256i none = _mm256_setzero_si256(), x = a ? _mm256_loadu_si256((const __m256i*)a) : none;
    return in_turn(_mm512_inserti64x4(_mm512_castsi256_si512(x), b ? _mm256_loadu_si256((const __m256i*)b) : none, 1));
}
inline __m512i side_by_side(const float* a, const float* b) {
    const __m512 none = _mm512_setzero_ps(), x = a ? _mm512_loadu_ps(a) : none;
    return in_turn((__m512i)_mm512_cvtne2ps_pbh(b ? _mm512_loadu_ps(b) : none, x));
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

template <class P, class T> void pack_transposed(P* panel, const Plain<T>& w, int columns) {
    pack_transposed(panel, w.at, w.k, columns, w.k);
}
template <class P, int BITS> void pack_transposed(P* panel, const Groups<BITS>& w, int columns) {
    constexpr int64_t WIDTH = 4 * GROUP;  // dequantised a part at a time, which stays in the nearest cache
    alignas(64) float part[PANEL * WIDTH];
    for (int64_t at = 0; at < w.k; at += WIDTH) {
        const int64_t groups = std::min(WIDTH / GROUP, w.groups - at / GROUP);
        for (int n = 0; n < columns; n++)
            for (int64_t g = 0; g < groups; g++) {
                vec x[PARTS];
                w.read(n, at / GROUP + g, x);
                for (int p = 0; p < PARTS; p++) store(part + n * WIDTH + g * GROUP + p * LANES, x[p]);
            }
        pack_transposed(panel + at * PANEL, part, WIDTH, columns, std::min(WIDTH, w.k - at));
    }
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
                _mm512_storeu_si512((unit*)to + n, side_by_side(from[0] ? from[0] + n : nullptr, from[1] ? from[1] + n : nullptr));
            }
#endif
        }
#endif
        for (; n < stride; n++)
            for (int i = 0; i < each; i++)
                assign(to[n * each + i], from[i] && n < width ? to_float(from[i][n]) : 0.0f);
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

// A tile's row past the cache, where the row in memory allows it: nobody reads a gradient soon.
template <class T> void stream_row(T* to, const float* c, int64_t width) {
#if LANES == 16
    if (width >= PANEL && (uintptr_t)to % 64 == 0) {
        if constexpr (sizeof(T) == 4) {
            for (int v = 0; v < PANEL; v += LANES) _mm512_stream_ps((float*)to + v, (__m512)load(c + v));
            return;
        }
#ifdef HAS_BF16
        if constexpr (sizeof(T) == 2)
            return _mm512_stream_si512((__m512i*)to, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(c + LANES), (__m512)load(c)));
#endif
    }
#endif
    store_row(to, c, width);
}

// c = a * panel for the rows of a tile, in equal parts of what the inner product takes at once.
template <class P, Out OUT = Out::SET>
void multiply_tile(int64_t rows, int64_t depth, const P* a, int64_t rs, int64_t ks, const P* panel, float* c, int64_t ld = PANEL) {
    const unit *left = (const unit*)a, *right = (const unit*)panel;
    const int64_t parts = (rows + tile_rows<P>() - 1) / tile_rows<P>();
    for (int64_t p = 0; p < parts; p++) {
        const int64_t begin = rows * p / parts, end = rows * (p + 1) / parts;
        multiply<P, OUT>(end - begin, depth / Units<P>::each, left + begin * rs, rs, ks, right, c + begin * ld, {}, ld);
    }
}

// The rows of a tile of a weights' gradient, or what more rows add to them.
template <class P, class W>
void multiply_gradient(int64_t rows, int64_t depth, const unit* a, int64_t rs, int64_t ks, const unit* panel, W* to, int64_t ld, int64_t columns, bool more, float* c) {
    if constexpr (sizeof(W) == 4 && LANES == 16) {
        if (columns == PANEL && more) return multiply<P, Out::ADD>(rows, depth, a, rs, ks, panel, (float*)to, {}, ld);
        if (columns == PANEL && (uintptr_t)to % 64 == 0 && ld % 16 == 0) return multiply<P, Out::STREAM>(rows, depth, a, rs, ks, panel, (float*)to, {}, ld);
    }
    multiply<P>(rows, depth, a, rs, ks, panel, c);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; more && j < columns; j++) c[i * PANEL + j] += to_float(to[i * ld + j]);
        stream_row(to + i * ld, c + i * PANEL, columns);
    }
}

// `count` rows of x as panels of all their columns, one behind the other: a product's right side.
template <class P, class S> void pack_panels(P* panels, const S* x, int64_t ld, int64_t width, int64_t count) {
    const int64_t depth = Units<P>::padded(count);
    for (int64_t n = 0; n < width; n += PANEL)
        pack(panels + n * depth, x + n, ld, (const int64_t*)nullptr, std::min<int64_t>(PANEL, width - n), PANEL, count);
}

// The two sides of a product in numbers P: rows with memory for a tile behind them, and a panel of weights. Each lies in
// memory that is given, bytes(...) of it.

template <class P> struct Left {
    P* at;
    int64_t stride;
    Left(char* memory, int64_t, int64_t k) : at((P*)memory), stride(Units<P>::padded(k)) {}
    static int step() { return tile_rows<P>(); }  // rows of a product
    static size_t bytes(int64_t rows, int64_t k) { return room((rows + TILE_ROWS) * Units<P>::padded(k), sizeof(P)); }

    // Rows `first` on are x's rows[i], or i.
    template <class S> void take(int64_t first, const S* x, int64_t ld, const int64_t* rows, int64_t count, int64_t k) {
        gather(at + first * stride, x, ld, rows, count, k, stride);
    }
    // PANEL columns of row i from n on.
    void set(int64_t i, int64_t n, const float* c) { store_row(at + i * stride + n, c, std::min<int64_t>(PANEL, stride - n)); }
};

template <class P> struct Right {
    P* at;
    Right(char* memory, int64_t) : at((P*)memory) {}
    static size_t bytes(int64_t k) { return room(Units<P>::padded(k) * PANEL, sizeof(P)); }
    template <class W> void pack(const W& w, int columns) { pack_transposed(at, w, columns); }
};

// Rows of x as the left side of products, all of them for all threads: where they lie if they can be read there, else in a
// copy, of which each thread takes its rows.
template <class P, class S> struct Shared {
    const S* x;
    int64_t ld, k;
    bool in_place;
    std::vector<char> memory;
    Left<P> rows;
    Shared(const S* x, int64_t ld, int64_t count, int64_t k)
        : x(x), ld(ld), k(k), in_place(readable(ld, k)), memory(in_place ? 0 : Left<P>::bytes(count, k) + 64),
          rows(in_place ? (char*)x : memory.data() + 64 - (uintptr_t)memory.data() % 64, count, k) {}
    void take(int64_t t) { rows.take(t, x + t * ld, ld, nullptr, 1, k); }

   private:
    static bool readable(int64_t ld, int64_t k) {
        if constexpr (std::is_same<P, S>::value) return ld == k && Units<P>::padded(k) == k && !use_amx;  // AMX reads on behind them
        return false;
    }
};

// c[rows][PANEL] = rows `first` on of a times the panel.
template <class P> void multiply(const Left<P>& a, int64_t first, int64_t rows, const Right<P>& panel, float* c, Ahead ahead = {}) {
    const int64_t depth = a.stride / Units<P>::each;
    multiply<P>(rows, depth, (const unit*)(a.at + first * a.stride), depth, 1, (const unit*)panel.at, c, ahead);
}

}  // namespace
