// The product of rows with one matrix.

#pragma once

#include "few.h"
#include "whole.h"

namespace {

// y (tokens, rows) = x (tokens, k) times w transposed; the threads share the rows of w. At most FEW tokens.
template <class S, class W>
void linear_few(int64_t tokens, int64_t rows, int64_t k, const S* x, int64_t ldx, const W& w, S* y, int threads) {
    constexpr int64_t PART = 32;  // rows of w that a task takes
    const int64_t width = W::padded(k);
    std::vector<float> in(tokens * width);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) in[t * width + i] = to_float(x[t * ldx + i]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < (rows + PART - 1) / PART; part++) {
        const int64_t n = part * PART, taken = std::min(PART, rows - n);
        float out[FEW * PART];
        dots(tokens, w.rows(n), taken, in.data(), width, out, PART);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = 0; j < taken; j++) assign(y[t * rows + n + j], out[t * PART + j]);
    }
}

// The same in panels, multiplied as P.
template <class P, class S, class W>
void linear_panels(int64_t tokens, int64_t rows, int64_t k, const S* x, int64_t ldx, const W& w, S* y, int threads) {
    Shared<P> in(tokens, k);
#pragma omp parallel num_threads(threads)
    {
        AmxTiles tiles(!std::is_same<P, Product<S>>::value);
        scratch.reserve(Right<P>::bytes(k) + room(TILE_ROWS * PANEL, 4));
        Right<P> panel(scratch.bytes(Right<P>::bytes(k)), k);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        const int64_t step = Left<P>::step();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) in.rows.take(t, x + t * ldx, ldx, nullptr, 1, k);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < (rows + PANEL - 1) / PANEL; part++) {
            const int64_t n = part * PANEL, width = std::min<int64_t>(PANEL, rows - n);
            panel.pack(w.rows(n), width);
            for (int64_t t = 0; t < tokens; t += step) {
                const int64_t taken = std::min<int64_t>(step, tokens - t);
                multiply(in.rows, t, taken, panel, c);
                for (int64_t i = 0; i < taken; i++) store_row(y + (t + i) * rows + n, c + i * PANEL, width);
            }
        }
    }
}

// The same for any number of tokens.
template <class S, class W>
void linear(int64_t tokens, int64_t rows, int64_t k, const S* x, int64_t ldx, const W& w, S* y, int threads) {
    if (tokens <= FEW)
        linear_few(tokens, rows, k, x, ldx, w, y, threads);
    else if (Rounded<S, W>::pays(tokens))
        linear_panels<typename Rounded<S, W>::type>(tokens, rows, k, x, ldx, w, y, threads);
    else
        linear_panels<Product<S>>(tokens, rows, k, x, ldx, w, y, threads);
}

}  // namespace
