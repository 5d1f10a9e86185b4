// Codes times activations in 8-bit integers (AVX-512 VNNI): four products an instruction instead of one, and no unpacking to
// float32. For that activations are rounded, as int8 weights are: a scale and whole numbers up to 127 for each group.

#pragma once

#include "weights.h"

#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define HAS_VNNI 1
#endif

namespace {

#ifdef HAS_VNNI
// Rounds a group: its whole numbers, 16 to each place, and the scale that is returned.
inline float round_group(const float* x, int8_t* first, int8_t* second) {
    const __m512 a = (__m512)load(x), b = (__m512)load(x + LANES);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const __m512 inverse = _mm512_set1_ps(most > 1e-30f ? 127 / most : 0);
    _mm_storeu_si128((__m128i*)first, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a * inverse)));
    _mm_storeu_si128((__m128i*)second, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(b * inverse)));
    const bool finite = !_mm512_fpclass_ps_mask(a, 0x99) && !_mm512_fpclass_ps_mask(b, 0x99);  // nan, inf
    return finite ? most / 127 : NAN;
}

// The activations beside 64 bytes of codes, in the order in which they lie there (ops/quantize.py). The unit multiplies
// unsigned by signed numbers, so codes are taken with 8 or 128 added, and `offset` takes that off each lane's sum again.
template <int BITS> struct alignas(64) Chunk {
    static constexpr int HALVES = 8 / BITS, GROUPS = 64 * HALVES / GROUP, EACH = LANES / GROUPS;  // EACH: lanes of a group
    int8_t codes[HALVES][64];
    int32_t offset[LANES];
    float scale[LANES];

    static int64_t count(int64_t k) { return (k / GROUP + GROUPS - 1) / GROUPS; }

    // `left` groups at x; a chunk's others are zero.
    void round(const float* x, int64_t left) {
        memset(this, 0, sizeof *this);
        for (int64_t g = 0; g < std::min<int64_t>(left, GROUPS); g++) {
            int8_t* second = BITS == 8 ? &codes[0][g * GROUP + LANES] : &codes[HALVES - 1][g * LANES];
            std::fill_n(scale + g * EACH, EACH, round_group(x + g * GROUP, &codes[0][g * 64 / GROUPS], second));
        }
        __m512i sum = _mm512_setzero_si512();
        for (int h = 0; h < HALVES; h++)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(BITS == 8 ? -128 : 8), _mm512_load_si512(codes[h]));
        _mm512_store_si512(offset, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
};

// The scales of the `count` groups of a chunk's weights, each in the lanes of its group.
template <int BITS> inline __m512 spread(const bf16* scales, int64_t count) {
    int64_t bits = 0;
    if (count == Chunk<BITS>::GROUPS)
        memcpy(&bits, scales, sizeof *scales * Chunk<BITS>::GROUPS);
    else
        for (int64_t g = 0; g < count; g++) bits |= (int64_t)scales[g].bits << 16 * g;
    const int64_t one = 0x0100808001008080, two = 0x0302808003028080, three = 0x0504808005048080, four = 0x0706808007068080;
    const __m512i lane = BITS == 8 ? _mm512_set_epi64(two, two, two, two, one, one, one, one)
                                   : _mm512_set_epi64(four, four, three, three, two, two, one, one);
    return (__m512)_mm512_shuffle_epi8(_mm512_set1_epi64(bits), lane);
}

template <int M, int N, int BITS>
void block(const Groups<BITS>& w, int64_t n, const Chunk<BITS>* x, int64_t ldx, float* out, int64_t ldo) {
    constexpr int halves = Chunk<BITS>::HALVES, groups = Chunk<BITS>::GROUPS;
    vec sum[M][N] = {};
    const char* next = w.rows(n + 2 * N).begin();
    const Groups<BITS> rows = w.rows(n);
    auto add = [&](int64_t c, int64_t count, __mmask64 bytes) __attribute__((always_inline)) {
        ask(next, c, N * 64);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const __m512i raw = _mm512_maskz_loadu_epi8(bytes, rows.codes + j * w.bytes() + c * 64);
            __m512i codes[halves];
            if constexpr (BITS == 8) {
                codes[0] = _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
            } else {
                codes[0] = _mm512_and_si512(raw, _mm512_set1_epi8(15));
                codes[1] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), _mm512_set1_epi8(15));
            }
            const __m512 scale = spread<BITS>(rows.scales + j * w.groups + c * groups, count);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const Chunk<BITS>& in = x[m * ldx + c];
                __m512i whole = _mm512_load_si512(in.offset);
                for (int h = 0; h < halves; h++) whole = _mm512_dpbusd_epi32(whole, codes[h], _mm512_load_si512(in.codes[h]));
                sum[m][j] += (vec)_mm512_cvtepi32_ps(whole) * (vec)(scale * _mm512_load_ps(in.scale));
            }
        }
    };
    const int64_t whole = w.groups / groups, rest = w.groups % groups;
    for (int64_t c = 0; c < whole; c++) add(c, groups, ~(__mmask64)0);
    if (rest) add(whole, rest, ((__mmask64)1 << rest * w.each) - 1);
    totals(sum, out + n, ldo);
}
#endif

}  // namespace
