// The SwiGLU experts of a layer: forward, backward, the weights' gradients, and the combination of rows.

#pragma once

#include "few.h"
#include "whole.h"

namespace {

struct Task {
    int64_t expert, begin, end;  // rows of the expert, or a part of its gradient
    int part;
};

// A block packs its expert's weights anew, so blocks are large where they are enough for all threads.
std::vector<Task> row_blocks(const int64_t* offsets, int64_t experts, int threads) {
    std::vector<Task> tasks;
    const int64_t most = offsets[experts] >= 8 * threads * BLOCK ? BLOCK : BLOCK / 2;
    for (int64_t e = 0; e < experts; e++) {
        int64_t rows = offsets[e + 1] - offsets[e], blocks = (rows + most - 1) / most;
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

// The weights of the next panel: PANEL of w's `rows` rows from `begin` on, or PANEL columns of it.
template <class W> Ahead next_rows(const W& w, int64_t begin, int64_t rows) {
    const int64_t taken = std::min<int64_t>(PANEL, rows - begin);
    const int64_t steps = taken > 0 ? taken * w.bytes() / 128 : 0;
    return {w.rows(begin).begin(), 128, steps, steps};
}
template <class W> Ahead next_columns(const W* w, int64_t begin, int64_t columns, int64_t rows) {
    const int64_t steps = begin < columns ? rows : 0;
    return {(const char*)(w + begin), columns * (int64_t)sizeof(W), steps, steps};
}

// A block of an expert's rows, multiplied as P. `hidden` and `y` as in `forward`.
template <class P, class S, class W>
void forward_block(const Shape& s, const Task& task, const S* x, int64_t ldx, const W& gate, const W& up, const W& down, S* hidden, S* y) {
    const int64_t d = s.dim, f = s.ff, count = task.end - task.begin;
    scratch.reserve_in_loop(Left<P>::bytes(BLOCK, d) + Left<P>::bytes(BLOCK, f) + 2 * Right<P>::bytes(std::max(d, f)) + 2 * room(TILE_ROWS * PANEL, 4));
    AmxTiles tiles(!std::is_same<P, Product<S>>::value);
    Left<P> rows(scratch.bytes(Left<P>::bytes(BLOCK, d)), BLOCK, d), act(scratch.bytes(Left<P>::bytes(BLOCK, f)), BLOCK, f);
    Right<P> panel_g(scratch.bytes(Right<P>::bytes(std::max(d, f))), std::max(d, f)), panel_u(scratch.bytes(Right<P>::bytes(std::max(d, f))), std::max(d, f));
    float* g = scratch.take<float>(TILE_ROWS * PANEL);
    float* u = scratch.take<float>(TILE_ROWS * PANEL);
    const int64_t step = Left<P>::step(), blocks = (count + step - 1) / step;
    rows.take(0, s.tokens ? x : x + task.begin * ldx, ldx, s.tokens ? s.tokens + task.begin : nullptr, count, d);
    for (int64_t n = 0; n < f; n += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, f - n);
        panel_g.pack(gate.rows(n), width);
        panel_u.pack(up.rows(n), width);
        const bool last = n + PANEL >= f;  // then the first of down
        const Ahead next_g = last ? next_rows(down, 0, d) : next_rows(gate, n + PANEL, f), next_u = next_rows(up, n + PANEL, f);
        for (int64_t m = 0; m < count; m += step) {
            const int64_t taken = std::min<int64_t>(step, count - m);
            for (int64_t row = task.begin + m; hidden && row < task.begin + m + taken; row++) {  // written behind the products
                __builtin_prefetch(hidden + row * 2 * f + n, 1);
                __builtin_prefetch(hidden + row * 2 * f + f + n, 1);
            }
            multiply(rows, m, taken, panel_g, g, next_g.part(m / step, blocks));
            multiply(rows, m, taken, panel_u, u, next_u.part(m / step, blocks));
            for (int64_t i = 0; i < taken; i++) {
                float *a = g + i * PANEL, *b = u + i * PANEL;
                if (hidden) {
                    S* kept = hidden + (task.begin + m + i) * 2 * f + n;
                    store_row(kept, a, width);
                    store_row(kept + f, b, width);
                }
                for (int j = 0; j < PANEL; j += LANES) {
                    vec v = load(a + j);
                    store(a + j, v * sigmoid(v) * load(b + j));
                }
                act.set(m + i, n, a);
            }
        }
    }
    for (int64_t n = 0; n < d; n += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, d - n);
        panel_g.pack(down.rows(n), width);
        const Ahead next = next_rows(down, n + PANEL, d);
        for (int64_t m = 0; m < count; m += step) {
            const int64_t taken = std::min<int64_t>(step, count - m);
            multiply(act, m, taken, panel_g, g, next.part(m / step, blocks));
            for (int64_t i = 0; i < taken; i++) store_row(y + (task.begin + m + i) * d + n, g + i * PANEL, width);
        }
    }
}

// A few rows, whose packing would cost more than the products.
template <class S, class W>
void forward_few(const Shape& s, const Task& task, const S* x, int64_t ldx, const W& gate, const W& up, const W& down, S* y) {
    const int64_t d = s.dim, f = s.ff, count = task.end - task.begin, in_d = W::padded(d), in_f = W::padded(f);
    const int64_t most = FEW * std::max(in_d, 2 * in_f);
    scratch.reserve_in_loop(2 * room(most, 4));
    float *in = scratch.take<float>(most), *out = scratch.take<float>(most);
    gather(in, s.tokens ? x : x + task.begin * ldx, ldx, s.tokens ? s.tokens + task.begin : nullptr, count, d, in_d);
    dots(count, gate, f, in, in_d, out, 2 * f);
    dots(count, up, f, in, in_d, out + f, 2 * f);
    for (int64_t i = 0; i < count; i++) {
        float* to = in + i * in_f;
        swiglu(out + i * 2 * f, f, f, to);
        std::fill(to + f, to + in_f, 0.0f);
    }
    dots(count, down, d, in, in_f, out, d);
    gather(y + task.begin * d, out, d, (const int64_t*)nullptr, count, d, d);
}

// hidden (rows, 2 ff) gets gate and up before SiLU unless it is null; y (rows, dim) gets the experts' outputs.
template <class S, class W>
void forward(const Shape& s, const S* x, int64_t ldx, const Expert* experts, S* hidden, S* y) {
    const std::vector<Task> tasks = row_blocks(s.offsets, s.experts, s.threads);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < (int64_t)tasks.size(); t++) {
        const Task task = tasks[t];
        const Expert& e = experts[task.expert];
        const W gate(e.gate.data, e.gate.scales, s.dim), up(e.up.data, e.up.scales, s.dim), down(e.down.data, e.down.scales, s.ff);
        if (task.end - task.begin <= FEW && !hidden)
            forward_few(s, task, x, ldx, gate, up, down, y);
        else if (Rounded<S, W>::pays(task.end - task.begin))
            forward_block<typename Rounded<S, W>::type>(s, task, x, ldx, gate, up, down, hidden, y);
        else
            forward_block<Product<S>>(s, task, x, ldx, gate, up, down, hidden, y);
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
    const std::vector<Task> tasks = row_blocks(s.offsets, s.experts, s.threads);
    const size_t bytes = room((BLOCK + TILE_ROWS) * dp, sizeof(P)) + room((BLOCK + TILE_ROWS) * fp, sizeof(P)) +
                         room(std::max(dp, fp) * PANEL, sizeof(P)) + 2 * room(TILE_ROWS * PANEL, 4) +
                         room(BLOCK * LANES, 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(bytes);
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
                    for (int64_t row = task.begin + m; row < task.begin + m + taken; row++) {  // read and written behind the product
                        __builtin_prefetch(hidden + row * 2 * f + n);
                        __builtin_prefetch(hidden + row * 2 * f + f + n);
                        __builtin_prefetch(act + row * f + n, 1);
                        __builtin_prefetch(d_hidden + row * 2 * f + n, 1);
                        __builtin_prefetch(d_hidden + row * 2 * f + f + n, 1);
                    }
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
    const int64_t group = flip ? TILE_ROWS : 16 * MOST_ROWS;  // columns of `left` that are packed side by side, whole cache lines
    const int64_t most = Units<P>::padded(std::min(deepest, DEPTH)), groups = (height + group - 1) / group;
    const size_t bytes = room(most * group * groups, sizeof(P)) + room(most * group, sizeof(P)) + room(most * PANEL, sizeof(P)) + room(TILE_ROWS * PANEL, 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(bytes);
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
                const int64_t count = std::min(DEPTH, task.end - begin);
                // only AMX reads the zeros behind the rows; else the next group overwrites them
                const int64_t depth = flip ? Units<P>::padded(count) / each : (count + each - 1) / each;
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
                        multiply_gradient<P>(taken, depth, (const unit*)a + m / group * group * depth + m % group * rs, rs, ks, (const unit*)panel,
                                             to + m * width + n, width, columns, begin > task.begin, c);
                    }
                }
            }
        }
    }
}

// y[t] from columns n on = plus + the sum of weight * row, N vectors of it.
template <int N, class S>
void combine_part(int64_t k, int64_t d, int64_t n, const S* rows, const int64_t* row_of, const float* weights, int64_t computed, const S* plus, S* y) {
    vec sums[N] = {};
    for (int i = 0; plus && i < N; i++) sums[i] = load(plus + n + i * LANES);
    for (int64_t j = 0; j < k; j++)
        if (row_of[j] < computed)
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) sums[i] += (weights ? weights[j] : 1.0f) * load(rows + row_of[j] * d + n + i * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) store(y + n + i * LANES, sums[i]);
}

// y (tokens, dim) = plus, unless null, + the sum over choices of weight * row; a pair whose row is not below `computed`
// counts nothing.
template <class S>
void combine(int64_t tokens, int64_t k, int64_t d, const S* rows, const int64_t* row_of, const float* weights, int64_t computed,
             const S* plus, S* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *own = row_of + t * k, *next = own + (t + 1 < tokens ? k : 0);  // rows lie anywhere: the next are asked for
        const float* by = weights ? weights + t * k : nullptr;
        const S* more = plus ? plus + t * d : nullptr;
        for (int64_t j = 0; j < k; j++)
            for (int64_t n = 0; next[j] < computed && n < d; n += 64 / sizeof(S)) __builtin_prefetch(rows + next[j] * d + n);
        int64_t n = 0;
        for (; n + 4 * LANES <= d; n += 4 * LANES) combine_part<4>(k, d, n, rows, own, by, computed, more, y + t * d);
        for (; n + LANES <= d; n += LANES) combine_part<1>(k, d, n, rows, own, by, computed, more, y + t * d);
        for (; n < d; n++) {
            float sum = more ? to_float(more[n]) : 0;
            for (int64_t j = 0; j < k; j++)
                if (own[j] < computed) sum += (by ? by[j] : 1.0f) * to_float(rows[own[j] * d + n]);
            assign(y[t * d + n], sum);
        }
    }
}

}  // namespace
