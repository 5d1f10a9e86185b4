// A few rows: dot products straight from the weights, which are read once; packing would cost more.

#pragma once

#include "numbers.h"

namespace {

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

}  // namespace
