// A few rows: dot products straight from the weights, which are read once; packing would cost more. SwiGLU and norm of them.

#pragma once

#include "rounded.h"

namespace {

// out[m * ldo + n] = w's row n times x's row m, for M rows of x and N of w.
template <int M, int N, class T> void block(const Plain<T>& w, int64_t n, const float* x, int64_t ldx, float* out, int64_t ldo) {
    vec sum[M][N] = {};
    const T* at = w.at + n * w.k;
    int64_t i = 0;
    for (; i + LANES <= w.k; i += LANES) {
        ask((const char*)(at + N * w.k), i / LANES, N * LANES * sizeof(T));
        vec a[M];
        for (int m = 0; m < M; m++) a[m] = load(x + m * ldx + i);
        for (int j = 0; j < N; j++) {
            const vec b = load(at + j * w.k + i);
            for (int m = 0; m < M; m++) sum[m][j] += a[m] * b;
        }
    }
    totals(sum, out + n, ldo);
    for (int m = 0; m < M; m++)
        for (int64_t r = i; r < w.k; r++)
            for (int j = 0; j < N; j++) out[m * ldo + n + j] += x[m * ldx + r] * to_float(at[j * w.k + r]);
}

#ifdef HAS_BF16
// Rows rounded to bfloat16, as a prompt's are: twice as many products an instruction, and no weight is unpacked.
template <int M, int N>
void block(const Plain<bf16>& w, int64_t n, const bf16* x, int64_t ldx, float* out, int64_t ldo) {
    constexpr int64_t WIDTH = 2 * LANES;
    vec sum[M][N] = {};
    const bf16* at = w.at + n * w.k;
    auto add = [&](int64_t i, __mmask32 there) __attribute__((always_inline)) {
        __m512bh a[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) a[m] = (__m512bh)_mm512_maskz_loadu_epi16(there, x + m * ldx + i);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(there, at + j * w.k + i);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) sum[m][j] = (vec)_mm512_dpbf16_ps((__m512)sum[m][j], a[m], b);
        }
    };
    const int64_t whole = w.k / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        ask((const char*)(at + N * w.k), i / WIDTH, N * WIDTH * sizeof(bf16));
        add(i, ~(__mmask32)0);
    }
    if (whole < w.k) add(whole, ((__mmask32)1 << (w.k - whole)) - 1);
    totals(sum, out + n, ldo);
}
#endif

template <int M, int N, int BITS>
void block(const Groups<BITS>& w, int64_t n, const float* x, int64_t ldx, float* out, int64_t ldo) {
    vec sum[M][N] = {};
    const char* next = w.rows(n + 2 * N).begin();
    for (int64_t g = 0; g < w.groups; g++) {
        ask(next, g, N * w.each);
        for (int j = 0; j < N; j++) {
            vec b[PARTS];
            if constexpr (M == 1 && BITS == 8) {  // one multiplication, of the group's sum
                const vec scale = w.read_codes(n + j, g, b);
                vec part = {};
                for (int p = 0; p < PARTS; p++) part += load(x + g * GROUP + p * LANES) * b[p];
                sum[0][j] += part * scale;
            } else {
                w.read(n + j, g, b);
                for (int p = 0; p < PARTS; p++)
                    for (int m = 0; m < M; m++) sum[m][j] += load(x + m * ldx + g * GROUP + p * LANES) * b[p];
            }
        }
    }
    totals(sum, out + n, ldo);
}

template <int M, class W, class X> void dots_of(const W& w, int64_t rows, const X* x, int64_t ldx, float* out, int64_t ldo) {
    int64_t n = 0;
    for (; n + 4 <= rows; n += 4) block<M, 4>(w, n, x, ldx, out, ldo);
    for (; n < rows; n++) block<M, 1>(w, n, x, ldx, out, ldo);
}

// x (m, ldx) is padded as the weights want it; m is at most FEW.
constexpr int FEW = 4;

// to[i] = silu(gate[i]) * gate[i + up]; `to` may be `gate`.
inline void swiglu(const float* gate, int64_t up, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += LANES) {
        vec a = {}, b = {};
        const int64_t width = std::min<int64_t>(LANES, count - i);
        memcpy(&a, gate + i, width * 4);
        memcpy(&b, gate + up + i, width * 4);
        a = a * sigmoid(a) * b;
        memcpy(to + i, &a, width * 4);
    }
}

template <class W, class X> void dots(int64_t m, const W& w, int64_t rows, const X* x, int64_t ldx, float* out, int64_t ldo) {
    if (m == 1) dots_of<1>(w, rows, x, ldx, out, ldo);
    if (m == 2) dots_of<2>(w, rows, x, ldx, out, ldo);
    if (m == 3) dots_of<3>(w, rows, x, ldx, out, ldo);
    if (m == 4) dots_of<4>(w, rows, x, ldx, out, ldo);
}

// The same for any m: some rows of w at a time, so that the next FEW of x find them in the cache.
template <class W, class X>
void rows_with(const W& w, int64_t first, int64_t last, const X* x, int64_t ldx, int64_t count, float* out, int64_t ldo) {
    constexpr int64_t PART = 32;
    const int64_t each = count > FEW ? PART : std::max<int64_t>(PART, last - first);
    for (int64_t n = first; n < last; n += each)
        for (int64_t m = 0; m < count; m += FEW)
            dots(std::min<int64_t>(FEW, count - m), w.rows(n), std::min(each, last - n), x + m * ldx, ldx,
                 out + m * ldo + n - first, ldo);
}

// Rows of activations for products with several matrices, rounded when the first one that wants them so asks.
struct Rows {
    const float* x;
    int64_t ld, count, k;
#ifdef HAS_BF16
    std::vector<bf16> in16 = {};

    void product(const Plain<bf16>& w, int64_t first, int64_t last, float* out, int64_t ldo) {
        if (in16.empty()) {
            in16.resize(count * k);
            gather(in16.data(), x, ld, (const int64_t*)nullptr, count, k, k);
        }
        rows_with(w, first, last, in16.data(), k, count, out, ldo);
    }
#else
    void product(const Plain<bf16>& w, int64_t first, int64_t last, float* out, int64_t ldo) {
        rows_with(w, first, last, x, ld, count, out, ldo);
    }
#endif
#ifdef HAS_VNNI
    std::vector<Chunk<8>> in8 = {};
    std::vector<Chunk<4>> in4 = {};

    template <int BITS> void product(const Groups<BITS>& w, int64_t first, int64_t last, std::vector<Chunk<BITS>>& in, float* out, int64_t ldo) {
        const int64_t chunks = Chunk<BITS>::count(k);
        if (in.empty()) {
            in.resize(count * chunks);
            for (int64_t i = 0; i < count * chunks; i++) {
                const int64_t done = i % chunks * Chunk<BITS>::GROUPS;
                in[i].round(x + i / chunks * ld + done * GROUP, w.groups - done);
            }
        }
        rows_with(w, first, last, in.data(), chunks, count, out, ldo);
    }
#endif
};

// out[m * ldo + n] = row n of a matrix times row m of `in`, for rows `first` to `last` of the matrix.
void rows_of(const Matrix& w, int64_t first, int64_t last, Rows& in, float* out, int64_t ldo) {
    const Groups<8> bytes(w.data, w.scales, in.k);
    const Groups<4> halves(w.data, w.scales, in.k);
    if (w.kind == 0) rows_with(Plain<float>(w.data, w.scales, in.k), first, last, in.x, in.ld, in.count, out + first, ldo);
    if (w.kind == 1) in.product(Plain<bf16>(w.data, w.scales, in.k), first, last, out + first, ldo);
#ifdef HAS_VNNI
    if (w.kind == 2) in.product(bytes, first, last, in.in8, out + first, ldo);
    if (w.kind == 3) in.product(halves, first, last, in.in4, out + first, ldo);
#else
    if (w.kind == 2) rows_with(bytes, first, last, in.x, in.ld, in.count, out + first, ldo);
    if (w.kind == 3) rows_with(halves, first, last, in.x, in.ld, in.count, out + first, ldo);
#endif
}

template <class T> inline float dot(const float* a, const T* b, int64_t n) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float rest = total(sum);
    for (; i < n; i++) rest += a[i] * to_float(b[i]);
    return rest;
}

void normed(const float* x, const float* weight, float eps, int64_t dim, int64_t batch, float* y) {
    for (int64_t b = 0; b < batch; b++) {
        const float scale = 1 / std::sqrt(dot(x + b * dim, x + b * dim, dim) / dim + eps);
        for (int64_t i = 0; i < dim; i++) y[b * dim + i] = x[b * dim + i] * scale * weight[i];
    }
}

}  // namespace
