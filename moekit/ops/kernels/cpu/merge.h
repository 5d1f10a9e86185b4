// Products with matrices that are mixed from the experts' for each unit of tokens.
//
// No merged matrix is ever whole: a panel of it is mixed in float32, rounded once, and multiplied with the tokens of its
// unit, while the panels of all experts stay in the cache for the units that follow. The gradient of a merged matrix is
// formed tile by tile, each of which goes to the experts that made it and to their coefficients.

#pragma once

#include "packing.h"

namespace {

struct Merging {
    int64_t units, tokens, experts, rows, dim;  // weights are (experts, rows, dim)
    const float* mix;                           // (units, experts)
    int threads;
    int64_t all() const { return units * tokens; }
    int64_t matrix() const { return rows * dim; }
};

// The experts of each unit whose coefficient is not zero.
struct Shares {
    struct Share {
        int64_t expert;
        float weight;
    };
    std::vector<Share> found;
    std::vector<int64_t> first;
    Shares(const Merging& s) : first(s.units + 1) {
        for (int64_t u = 0; u < s.units; u++) {
            for (int64_t e = 0; e < s.experts; e++)
                if (const float weight = s.mix[u * s.experts + e]; weight != 0) found.push_back({e, weight});
            first[u + 1] = found.size();
        }
    }
    const Share* begin(int64_t u) const { return found.data() + first[u]; }
    const Share* end(int64_t u) const { return found.data() + first[u + 1]; }
};

// to = the sum over a unit's experts of weight * from, `stride` apart; `count` numbers.
template <class W>
void mix_experts(float* to, const W* from, int64_t stride, const Shares& shares, int64_t u, int64_t count) {
    int64_t n = 0;
    for (; n + 4 * LANES <= count; n += 4 * LANES) {
        vec sum[4] = {};
        for (const auto* s = shares.begin(u); s < shares.end(u); s++)
            for (int v = 0; v < 4; v++) sum[v] += s->weight * load(from + s->expert * stride + n + v * LANES);
        for (int v = 0; v < 4; v++) store(to + n + v * LANES, sum[v]);
    }
    for (; n + LANES <= count; n += LANES) {
        vec sum = {};
        for (const auto* s = shares.begin(u); s < shares.end(u); s++) sum += s->weight * load(from + s->expert * stride + n);
        store(to + n, sum);
    }
    for (; n < count; n++) {
        float sum = 0;
        for (const auto* s = shares.begin(u); s < shares.end(u); s++)
            sum += s->weight * to_float(from[s->expert * stride + n]);
        to[n] = sum;
    }
}

// y (units, tokens, rows) = x (units, tokens, dim) times each unit's matrix transposed.
template <class S, class W> void merged_forward(const Merging& s, const S* x, const W* w, S* y) {
    typedef Product<S> P;
    const Shares shares(s);
    const int64_t panels = (s.rows + PANEL - 1) / PANEL;
    const int64_t groups = std::max<int64_t>(1, std::min(s.units, 4 * s.threads / panels));  // of units: enough tasks
    Shared<P, S> in(x, s.dim, s.all(), s.dim);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(Right<P>::bytes(s.dim) + room(PANEL * s.dim, 4) + room(TILE_ROWS * PANEL, 4));
        Right<P> panel(scratch.bytes(Right<P>::bytes(s.dim)), s.dim);
        float* part = scratch.take<float>(PANEL * s.dim);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        const int64_t step = Left<P>::step();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < (in.in_place ? 0 : s.all()); t++) in.take(t);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < panels * groups; task++) {
            const int64_t n = task / groups * PANEL, columns = std::min<int64_t>(PANEL, s.rows - n), group = task % groups;
            for (int64_t u = s.units * group / groups; u < s.units * (group + 1) / groups; u++) {
                mix_experts(part, w + n * s.dim, s.matrix(), shares, u, columns * s.dim);
                pack_transposed(panel.at, part, s.dim, (int)columns, s.dim);
                for (int64_t t = u * s.tokens; t < (u + 1) * s.tokens; t += step) {
                    const int64_t taken = std::min(step, (u + 1) * s.tokens - t);
                    multiply(in.rows, t, taken, panel, c);
                    for (int64_t i = 0; i < taken; i++) store_row(y + (t + i) * s.rows + n, c + i * PANEL, columns);
                }
            }
        }
    }
}

// dx (units, tokens, dim) = dy (units, tokens, rows) times each unit's matrix: some columns of some units are summed over
// all rows of the weights, a block of which stays in the cache for these units.
template <class S, class W> void merged_backward(const Merging& s, const S* dy, const W* w, S* dx) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    constexpr int64_t STRIP = 4 * PANEL, DEEP = 4 * TILE_ROWS;  // columns and rows of a block
    const Shares shares(s);
    const int64_t strips = (s.dim + STRIP - 1) / STRIP;
    const int64_t near = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, s.tokens * STRIP));  // units: their sums stay too
    const int64_t enough = std::min(s.units, 4 * s.threads / strips);
    const int64_t groups = std::max<int64_t>(1, std::max((s.units + near - 1) / near, enough));
    Shared<P, S> in(dy, s.rows, s.all(), s.rows);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        const int64_t most = (s.units + groups - 1) / groups * s.tokens;
        scratch.reserve_in_loop(room(most * STRIP, 4) + room(DEEP * STRIP, sizeof(P)) + room(TILE_ROWS * STRIP, 4));
        float* sums = scratch.take<float>(most * STRIP);
        P* panels = scratch.take<P>(DEEP * STRIP);
        float* part = scratch.take<float>(TILE_ROWS * STRIP);
        const int64_t step = Left<P>::step(), rs = in.rows.stride / each;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < (in.in_place ? 0 : s.all()); t++) in.take(t);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < strips * groups; task++) {
            const int64_t first = task / groups * STRIP, columns = std::min(STRIP, s.dim - first), group = task % groups;
            const int64_t begin = s.units * group / groups, end = s.units * (group + 1) / groups;
            std::fill(sums, sums + (end - begin) * s.tokens * STRIP, 0.0f);
            for (int64_t m = 0; m < s.rows; m += DEEP) {
                const int64_t deep = std::min(DEEP, s.rows - m), depth = Units<P>::padded(deep);
                for (int64_t u = begin; u < end; u++) {
                    for (int64_t k = 0; k < deep; k += TILE_ROWS) {
                        const int64_t rows = std::min<int64_t>(TILE_ROWS, deep - k);
                        for (int64_t i = 0; i < rows; i++)
                            mix_experts(part + i * STRIP, w + (m + k + i) * s.dim + first, s.matrix(), shares, u, columns);
                        for (int64_t n = 0; n < columns; n += PANEL)
                            pack(panels + n * depth + k * PANEL, part + n, STRIP, (const int64_t*)nullptr,
                                 std::min<int64_t>(PANEL, columns - n), PANEL, rows);
                    }
                    for (int64_t t = 0; t < s.tokens; t += step) {
                        const int64_t taken = std::min(step, s.tokens - t);
                        const unit* left = (const unit*)(in.rows.at + (u * s.tokens + t) * in.rows.stride + m);
                        for (int64_t n = 0; n < columns; n += PANEL) {
                            float* to = sums + ((u - begin) * s.tokens + t) * STRIP + n;
                            multiply<P, Out::ADD>(taken, depth / each, left, rs, 1, (const unit*)(panels + n * depth), to, {}, STRIP);
                        }
                    }
                }
            }
            for (int64_t t = 0; t < (end - begin) * s.tokens; t++)
                for (int64_t n = 0; n < columns; n += PANEL)
                    store_row(dx + (begin * s.tokens + t) * s.dim + first + n, sums + t * STRIP + n, columns - n);
        }
    }
}

constexpr int TOGETHER = 4;                           // units whose tiles of gradients are held at once
constexpr int64_t TILE = int64_t(TILE_ROWS) * PANEL;  // numbers of a tile

// out[u] += the dot product of w's tile with that of unit u.
inline void tile_dots(const float* tiles, const float* w, int units, float* out, int64_t stride) {
    if (units == TOGETHER) {
        vec sum[TOGETHER] = {};
        for (int64_t n = 0; n < TILE; n += LANES) {
            const vec one = load(w + n);
            for (int u = 0; u < TOGETHER; u++) sum[u] += load(tiles + u * TILE + n) * one;
        }
        for (int u = 0; u < TOGETHER; u++) out[u * stride] += total(sum[u]);
        return;
    }
    for (int u = 0; u < units; u++) {
        vec sum = {};
        for (int64_t n = 0; n < TILE; n += LANES) sum += load(tiles + u * TILE + n) * load(w + n);
        out[u * stride] += total(sum);
    }
}

template <int N> void add_tiles_of(float* to, const float* const* tiles, const float* by, int64_t count) {
    for (int64_t n = 0; n < count; n += LANES) {
        vec sum = load(to + n);
        for (int i = 0; i < N; i++) sum += by[i] * load(tiles[i] + n);
        store(to + n, sum);
    }
}

// to += the sum over units of mix[unit] times its tile; most experts have no part in most units.
inline void add_tiles(float* to, const float* c, const float* mix, int64_t stride, int units, int64_t count) {
    const float* tiles[TOGETHER];
    float by[TOGETHER];
    int found = 0;
    for (int u = 0; u < units; u++)
        if (mix[u * stride] != 0) tiles[found] = c + u * TILE, by[found++] = mix[u * stride];
    static_assert(TOGETHER == 4, "one case for each number of units");
    if (found == 1) add_tiles_of<1>(to, tiles, by, count);
    if (found == 2) add_tiles_of<2>(to, tiles, by, count);
    if (found == 3) add_tiles_of<3>(to, tiles, by, count);
    if (found == 4) add_tiles_of<4>(to, tiles, by, count);
}

// The gradients of the weights and of the coefficients, either of which may be null. Sums have one order, whatever the
// number of threads.
template <class S, class W>
void merged_gradient(const Merging& s, const S* x, const S* dy, const W* w, W* dw, float* d_mix) {
    typedef Product<S> P;
    const int64_t depth = Units<P>::padded(s.tokens), units_deep = depth / Units<P>::each, width = up(s.dim, PANEL);
    const int64_t height = up(s.rows, TILE_ROWS), across = width / PANEL, down = height / TILE_ROWS;
    // panels that a task takes: the tiles of all experts, weights and gradients, stay in the cache
    const int64_t most = std::max<int64_t>(1, std::min(across, (1 << 16) / (s.experts * TILE)));
    const int64_t parts = (across + most - 1) / most;
    const bool flip = is_bf16<P>() && use_amx;
    std::vector<P> rights(s.units * depth * width), lefts(s.units * depth * height);
    std::vector<float> partial(d_mix ? down * parts * s.units * s.experts : 0);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(room(depth * TILE_ROWS, sizeof(P)) + 2 * room(s.experts * most * TILE, 4) + room(TOGETHER * TILE, 4));
        unit* turned = (unit*)scratch.take<P>(depth * TILE_ROWS);
        float* weights = scratch.take<float>(s.experts * most * TILE);
        float* sums = scratch.take<float>(s.experts * most * TILE);
        float* c = scratch.take<float>(TOGETHER * TILE);
        const int64_t rs = flip ? units_deep : 1, ks = flip ? 1 : TILE_ROWS;
#pragma omp for schedule(static)
        for (int64_t u = 0; u < s.units; u++) {
            pack_panels(rights.data() + u * depth * width, x + u * s.tokens * s.dim, s.dim, s.dim, s.tokens);
            for (int64_t m = 0; m < s.rows; m += TILE_ROWS) {
                P* to = lefts.data() + (u * height + m) * depth;
                const int64_t taken = std::min<int64_t>(TILE_ROWS, s.rows - m);
                pack(flip ? (P*)turned : to, dy + u * s.tokens * s.rows + m, s.rows, (const int64_t*)nullptr, taken, TILE_ROWS, s.tokens);
                if (flip) transpose_units((unit*)to, turned, units_deep, TILE_ROWS);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < down * parts; task++) {
            const int64_t m = task / parts * TILE_ROWS, rows = std::min<int64_t>(TILE_ROWS, s.rows - m);
            const int64_t first = task % parts * most, panels = std::min(most, across - first);
            for (int64_t e = 0; d_mix && e < s.experts; e++)
                for (int64_t p = 0; p < panels; p++) {
                    const int64_t n = (first + p) * PANEL;
                    gather(weights + (e * most + p) * TILE, w + e * s.matrix() + m * s.dim + n, s.dim, (const int64_t*)nullptr, rows,
                           std::min<int64_t>(PANEL, s.dim - n), PANEL);
                    std::fill(weights + (e * most + p) * TILE + rows * PANEL, weights + (e * most + p + 1) * TILE, 0.0f);
                }
            if (dw) std::fill(sums, sums + s.experts * most * TILE, 0.0f);
            if (rows < TILE_ROWS) std::fill(c, c + TOGETHER * TILE, 0.0f);
            for (int64_t u = 0; u < s.units; u += TOGETHER)
                for (int64_t p = 0; p < panels; p++) {
                    const int together = (int)std::min<int64_t>(TOGETHER, s.units - u);
                    for (int i = 0; i < together; i++) {
                        const P* left = lefts.data() + ((u + i) * height + m) * depth;
                        const P* right = rights.data() + (u + i) * depth * width + (first + p) * PANEL * depth;
                        multiply_tile(rows, depth, left, rs, ks, right, c + i * TILE);
                    }
                    for (int64_t e = 0; dw && e < s.experts; e++)
                        add_tiles(sums + (e * most + p) * TILE, c, s.mix + u * s.experts + e, s.experts, together, rows * PANEL);
                    for (int64_t e = 0; d_mix && e < s.experts; e++)
                        tile_dots(c, weights + (e * most + p) * TILE, together, partial.data() + (task * s.units + u) * s.experts + e, s.experts);
                }
            for (int64_t e = 0; dw && e < s.experts; e++)
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t p = 0; p < panels; p++) {
                        const int64_t n = (first + p) * PANEL;
                        stream_row(dw + e * s.matrix() + (m + i) * s.dim + n, sums + (e * most + p) * TILE + i * PANEL, s.dim - n);
                    }
        }
    }
    for (int64_t i = 0; d_mix && i < s.units * s.experts; i++) {
        float sum = 0;
        for (int64_t task = 0; task < down * parts; task++) sum += partial[task * s.units * s.experts + i];
        d_mix[i] = sum;
    }
}

}  // namespace
