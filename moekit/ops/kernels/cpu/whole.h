// Many rows times codes in 8-bit integers: rounded.h's products in panels. A group's sum is exact, and scaled by its two
// scales, so tiles (AMX) and vectors (VNNI) agree to the bit.

#pragma once

#include "packing.h"
#include "rounded.h"

namespace {

#ifdef HAS_VNNI
// Weights in codes of BITS bits and rows rounded to 8, both whole numbers: a kind of product beside float and bf16.
template <int BITS> struct Whole {
    static constexpr int raised = BITS == 8 ? 128 : 8;  // codes are taken with this added: units multiply unsigned by signed
    static constexpr int rows = 6;                      // that the registers hold
};

template <int BITS> struct Left<Whole<BITS>> {
    int64_t groups;
    int8_t* codes;    // (rows, groups, GROUP)
    float* scales;    // (rows, groups)
    int32_t* offset;  // (rows, groups): what the codes' raising adds to the sum, negative
    Left(char* memory, int64_t rows, int64_t k)
        : groups((k + GROUP - 1) / GROUP), codes((int8_t*)memory),
          scales((float*)(memory + room((rows + TILE_ROWS) * groups * GROUP, 1))), offset((int32_t*)(scales + (rows + TILE_ROWS) * groups)) {}
    static int step() { return use_amx ? TILE_ROWS : Whole<BITS>::rows; }
    static size_t bytes(int64_t rows, int64_t k) {
        const int64_t count = (rows + TILE_ROWS) * ((k + GROUP - 1) / GROUP);
        return room(count * GROUP, 1) + room(2 * count, 4);
    }
    template <class S> void take(int64_t first, const S* x, int64_t ld, const int64_t* rows, int64_t count, int64_t k) {
        alignas(64) float part[GROUP];
        for (int64_t i = 0; i < count; i++)
            for (int64_t g = 0; g < groups; g++) {
                gather(part, x + (rows ? rows[i] : i) * ld + g * GROUP, 0, (const int64_t*)nullptr, 1, std::min<int64_t>(GROUP, k - g * GROUP), GROUP);
                set(first + i, g * GROUP, part);
            }
    }
    void set(int64_t i, int64_t n, const float* c) {
        const int64_t at = i * groups + n / GROUP;
        scales[at] = round_group(c, codes + at * GROUP, codes + at * GROUP + LANES);
        const __m256i all = _mm256_loadu_si256((const __m256i*)(codes + at * GROUP));
        const __m512i sums = _mm512_madd_epi16(_mm512_cvtepi8_epi16(all), _mm512_set1_epi16(1));
        offset[at] = -Whole<BITS>::raised * _mm512_reduce_add_epi32(sums);
    }
};

template <int BITS> struct Right<Whole<BITS>> {
    uint8_t* codes;  // (groups, GROUP / 4, PANEL, 4)
    float* scales;   // (groups, PANEL)
    Right(char* memory, int64_t k) : codes((uint8_t*)memory), scales((float*)(memory + padded(k) * PANEL)) {}
    static int64_t padded(int64_t k) { return (k + 63) / 64 * 64; }  // packed two groups at a time
    static size_t bytes(int64_t k) { return room(padded(k) * PANEL, 1) + room((padded(k) / GROUP + LANES) * PANEL, 4); }

    void pack(const Groups<BITS>& w, int columns) {
        for (int half = 0; half < PANEL; half += LANES) {
            __m512i r[LANES];
            for (int64_t g = 0; g < w.groups; g += 2) {
                const int64_t bytes = std::min<int64_t>(2, w.groups - g) * w.each;
                const __mmask64 there = bytes == 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
                for (int i = 0; i < LANES; i++) r[i] = half + i < columns ? two(w.codes + (half + i) * w.bytes() + g * w.each, there) : __m512i{};
                transpose_16x16(r);
                for (int i = 0; i < LANES; i++) _mm512_store_si512(codes + ((g * GROUP / 4 + i) * PANEL + half) * 4, r[i]);
            }
            for (int64_t g = 0; g < w.groups; g += LANES) {
                const __mmask16 there = w.groups - g < LANES ? (1 << (w.groups - g)) - 1 : 0xffff;
                for (int i = 0; i < LANES; i++) {
                    const __mmask16 row = half + i < columns ? there : 0;
                    r[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row, w.scales + (half + i) * w.groups + g)), 16);
                }
                transpose_16x16(r);
                for (int i = 0; i < LANES; i++) _mm512_store_si512(scales + (g + i) * PANEL + half, r[i]);
            }
        }
    }

   private:
    // Two groups' codes, raised.
    static __m512i two(const char* from, __mmask64 there) {
        const __m512i raw = _mm512_maskz_loadu_epi8(there, from);
        if (BITS == 8) return _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
        const __m512i low = _mm512_and_si512(raw, _mm512_set1_epi8(15)), high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), _mm512_set1_epi8(15));
        return _mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high);
    }
};

// Adds a group's whole sums, scaled, to a row's.
inline void add_group(__m512 sum[2], __m512i first, __m512i second, const float* scales, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    sum[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), _mm512_load_ps(scales) * s, sum[0]);
    sum[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), _mm512_load_ps(scales + LANES) * s, sum[1]);
}

template <int M, int BITS>
void multiply_whole(const Left<Whole<BITS>>& a, int64_t first, const Right<Whole<BITS>>& panel, float* c, Ahead ahead) {
    __m512 sum[M][2] = {};
    for (int64_t g = 0; g < a.groups; g++) {
        ahead.fetch(g);
        __m512i whole[M][2];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) whole[m][0] = whole[m][1] = _mm512_set1_epi32(a.offset[(first + m) * a.groups + g]);
        const uint8_t* b = panel.codes + g * GROUP * PANEL;
        const int8_t* x = a.codes + (first * a.groups + g) * GROUP;
#pragma GCC unroll 8
        for (int u = 0; u < GROUP / 4; u++) {
            const __m512i b0 = _mm512_load_si512(b + u * 4 * PANEL), b1 = _mm512_load_si512(b + u * 4 * PANEL + 64);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, x + m * a.groups * GROUP + u * 4, 4);
                whole[m][0] = _mm512_dpbusd_epi32(whole[m][0], b0, _mm512_set1_epi32(four));
                whole[m][1] = _mm512_dpbusd_epi32(whole[m][1], b1, _mm512_set1_epi32(four));
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
            add_group(sum[m], whole[m][0], whole[m][1], panel.scales + g * PANEL, a.scales[(first + m) * a.groups + g]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        _mm512_storeu_ps(c + m * PANEL, sum[m][0]);
        _mm512_storeu_ps(c + m * PANEL + LANES, sum[m][1]);
    }
}

#ifdef HAS_AMX
template <int BITS>
void multiply_tiles(const Left<Whole<BITS>>& a, int64_t first, int64_t rows, const Right<Whole<BITS>>& panel, float* c, Ahead ahead) {
    alignas(64) int32_t whole[TILE_ROWS][PANEL];
    memset(c, 0, rows * PANEL * sizeof *c);
    const int64_t stride = a.groups * GROUP;
    for (int64_t g = 0; g < a.groups; g++) {
        ahead.fetch(g);
        const int8_t* x = a.codes + first * stride + g * GROUP;
        const uint8_t* b = panel.codes + g * GROUP * PANEL;
        tile_load_(6, b, 4 * PANEL);
        tile_load_(7, b + 64, 4 * PANEL);
        for (int64_t m = 0; m < rows; m += 16) {
            tile_zero_(0);
            tile_zero_(1);
            tile_load_(4, x + m * stride, stride);
            tile_multiply_bytes_(0, 4, 6);
            tile_multiply_bytes_(1, 4, 7);
            tile_store_(0, whole[m], 4 * PANEL);
            tile_store_(1, whole[m] + 16, 4 * PANEL);
        }
        for (int64_t m = 0; m < rows; m++) {
            const int64_t at = (first + m) * a.groups + g;
            const __m512i offset = _mm512_set1_epi32(a.offset[at]);
            __m512 sum[2] = {_mm512_loadu_ps(c + m * PANEL), _mm512_loadu_ps(c + m * PANEL + LANES)};
            add_group(sum, _mm512_add_epi32(_mm512_load_si512(whole[m]), offset), _mm512_add_epi32(_mm512_load_si512(whole[m] + LANES), offset),
                      panel.scales + g * PANEL, a.scales[at]);
            _mm512_storeu_ps(c + m * PANEL, sum[0]);
            _mm512_storeu_ps(c + m * PANEL + LANES, sum[1]);
        }
    }
}
#endif

template <int BITS>
void multiply(const Left<Whole<BITS>>& a, int64_t first, int64_t rows, const Right<Whole<BITS>>& panel, float* c, Ahead ahead = {}) {
#ifdef HAS_AMX
    if (use_amx) return multiply_tiles(a, first, rows, panel, c, ahead);
#endif
    if (rows == 1) return multiply_whole<1>(a, first, panel, c, ahead);
    if (rows == 2) return multiply_whole<2>(a, first, panel, c, ahead);
    if (rows == 3) return multiply_whole<3>(a, first, panel, c, ahead);
    if (rows == 4) return multiply_whole<4>(a, first, panel, c, ahead);
    if (rows == 5) return multiply_whole<5>(a, first, panel, c, ahead);
    multiply_whole<6>(a, first, panel, c, ahead);
}
#endif

// What rows in S and weights W are multiplied as: numbers, or whole ones where `rows` of them, of an expert at once, make
// that pay. Tiles do as many products of half their width in 8 bits as in bfloat16, and each group's sums must be scaled
// besides; what 8 bits save there is the packing, which is shared by few rows.
template <class S, class W> struct Rounded {
    typedef Product<S> type;
    static bool pays(int64_t) { return false; }
};
#ifdef HAS_VNNI
template <int BITS> struct Rounded<bf16, Groups<BITS>> {
    typedef Whole<BITS> type;
    static bool pays(int64_t rows) { return !use_amx || rows <= TILE_ROWS; }
};
#endif

}  // namespace
