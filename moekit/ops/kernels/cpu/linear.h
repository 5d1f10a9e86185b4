// The products of rows with one matrix or several, and their gradients.

#pragma once

#include "few.h"
#include "whole.h"

extern "C" {
struct Map {  // y (tokens, rows) = x (tokens, k) times w transposed; or the gradients of y and w in their places
    Matrix w;
    int64_t rows;
    void* y;
};
}

namespace {

struct Maps {
    int64_t count, tokens, k;
    const Map* map;
    int threads;
};

// Tasks of a product: panels of columns, each for a part of the rows. Where panels are few a thread takes less than one at
// a time, so that all end together.
struct Tasks {
    struct Panel {
        int64_t of, n, columns;  // of: whose columns these are
    };
    std::vector<Panel> panels;
    int64_t rows, step, parts;
    Tasks(int64_t rows, int64_t step) : rows(rows), step(up((std::min<int64_t>(rows, 256) + 1), step)), parts((rows + this->step - 1) / this->step) {}
    void add(int64_t of, int64_t columns) {
        for (int64_t n = 0; n < columns; n += PANEL) panels.push_back({of, n, std::min<int64_t>(PANEL, columns - n)});
    }
    int64_t count() const { return panels.size() * parts; }
    int64_t chunk(int threads) const { return std::min(parts, std::max<int64_t>(1, count() / (16 * threads))); }
    int64_t begin(int64_t t) const { return t % parts * step; }
    int64_t end(int64_t t) const { return std::min(rows, begin(t) + step); }
};

// At most FEW tokens; the threads share the rows of w.
template <class S, class W> void linear_few(const Maps& s, const S* x, int64_t ldx) {
    constexpr int64_t PART = 32;  // rows of w that a task takes
    const int64_t width = W::padded(s.k);
    std::vector<float> in(s.tokens * width);
    for (int64_t t = 0; t < s.tokens; t++)
        for (int64_t i = 0; i < s.k; i++) in[t * width + i] = to_float(x[t * ldx + i]);
#pragma omp parallel num_threads(s.threads)
    for (int64_t m = 0; m < s.count; m++) {
        const Map& map = s.map[m];
        const W w(map.w.data, map.w.scales, s.k);
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < (map.rows + PART - 1) / PART; part++) {
            const int64_t n = part * PART, taken = std::min(PART, map.rows - n);
            float out[FEW * PART];
            dots(s.tokens, w.rows(n), taken, in.data(), width, out, PART);
            for (int64_t t = 0; t < s.tokens; t++)
                for (int64_t j = 0; j < taken; j++) assign(((S*)map.y)[t * map.rows + n + j], out[t * PART + j]);
        }
    }
}

// The same in panels, multiplied as P.
template <class P, class S, class W> void linear_panels(const Maps& s, const S* x, int64_t ldx) {
    Shared<P, S> in(x, ldx, s.tokens, s.k);
    const int64_t step = Left<P>::step();
    Tasks tasks(s.tokens, step);
    for (int64_t m = 0; m < s.count; m++) tasks.add(m, s.map[m].rows);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles(!std::is_same<P, Product<S>>::value);
        scratch.reserve_in_loop(Right<P>::bytes(s.k) + room(TILE_ROWS * PANEL, 4));
        Right<P> panel(scratch.bytes(Right<P>::bytes(s.k)), s.k);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < (in.in_place ? 0 : s.tokens); t++) in.take(t);
#pragma omp for schedule(dynamic, tasks.chunk(s.threads))
        for (int64_t task = 0; task < tasks.count(); task++) {
            const auto [of, n, columns] = tasks.panels[task / tasks.parts];
            const Map map = s.map[of];
            if (packed != task / tasks.parts) panel.pack(W(map.w.data, map.w.scales, s.k).rows(n), columns);
            packed = task / tasks.parts;
            for (int64_t t = tasks.begin(task), end = tasks.end(task); t < end; t += step) {
                const int64_t taken = std::min(step, end - t);
                multiply(in.rows, t, taken, panel, c);
                S* y = (S*)map.y + t * map.rows + n;
                for (int64_t i = 0; i < taken; i++) store_row(y + i * map.rows, c + i * PANEL, columns);
            }
        }
    }
}

// The same for any number of tokens.
template <class S, class W> void linear(const Maps& s, const S* x, int64_t ldx) {
    if (s.tokens <= FEW)
        linear_few<S, W>(s, x, ldx);
    else if (Rounded<S, W>::pays(s.tokens))
        linear_panels<typename Rounded<S, W>::type, S, W>(s, x, ldx);
    else
        linear_panels<Product<S>, S, W>(s, x, ldx);
}

// dx (tokens, k) = the sum over maps of dy w. What is summed is taken a part of PART units at a time, whose panels stay in the
// cache while the rows of a task meet all of them: a head's dy, which is larger than the cache, is read once a task.
template <class S, class W> void linear_backward(const Maps& s, S* dx) {
    typedef Product<S> P;
    constexpr int64_t PART = 512, each = Units<P>::each, WHOLE = PART * each * PANEL;
    const int64_t step = Left<P>::step(), k = s.k, panels = (k + PANEL - 1) / PANEL;
    std::vector<Shared<P, S>> in;
    in.reserve(s.count);
    int64_t parts = 0;
    for (int64_t m = 0; m < s.count; m++) {
        in.emplace_back((const S*)s.map[m].y, s.map[m].rows, s.tokens, s.map[m].rows);
        parts += (s.map[m].rows + PART * each - 1) / (PART * each);
    }
    const int64_t group = std::min<int64_t>(2, (panels + s.threads - 1) / s.threads), groups = (panels + group - 1) / group;
    const int64_t fewest = std::max((4 * s.threads + groups - 1) / groups, (s.tokens + 2047) / 2048);  // parts of the rows
    const int64_t wanted = std::max<int64_t>(1, std::min(fewest, (s.tokens + 255) / 256));
    const int64_t most = up((s.tokens + wanted - 1) / wanted, step), blocks = (s.tokens + most - 1) / most;
    const int64_t kept = parts > 1 ? most + TILE_ROWS : TILE_ROWS;  // rows of sums
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(room(group * WHOLE, sizeof(P)) + room(group * kept * PANEL, 4));
        P* packed = scratch.take<P>(group * WHOLE);
        float* sums = scratch.take<float>(group * kept * PANEL);
        for (auto& rows : in)
#pragma omp for schedule(static)
            for (int64_t t = 0; t < (rows.in_place ? 0 : s.tokens); t++) rows.take(t);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * blocks; task++) {
            const int64_t first = task / blocks * group, last = std::min(panels, first + group);
            const int64_t begin = task % blocks * most, end = std::min(s.tokens, begin + most);
            int64_t part = 0;
            for (int64_t m = 0; m < s.count; m++) {
                const Left<P>& left = in[m].rows;
                for (int64_t row = 0; row < s.map[m].rows; row += PART * each, part++) {
                    const int64_t count = std::min(PART * each, s.map[m].rows - row), depth = Units<P>::padded(count) / each;
                    for (int64_t p = first; p < last; p++)
                        pack(packed + (p - first) * WHOLE, (const W*)s.map[m].w.data + row * k + p * PANEL, k, (const int64_t*)nullptr,
                             std::min<int64_t>(PANEL, k - p * PANEL), PANEL, count);
                    for (int64_t t = begin; t < end; t += step)
                        for (int64_t p = first; p < last; p++) {
                            const int64_t taken = std::min(step, end - t);
                            const unit *a = (const unit*)(left.at + t * left.stride + row), *panel = (const unit*)(packed + (p - first) * WHOLE);
                            float* c = sums + ((p - first) * kept + (parts > 1 ? t - begin : 0)) * PANEL;
                            if (part)
                                multiply<P, Out::ADD>(taken, depth, a, left.stride / each, 1, panel, c);
                            else
                                multiply<P>(taken, depth, a, left.stride / each, 1, panel, c);
                            if (part == parts - 1)
                                for (int64_t i = 0; i < taken; i++) store_row(dx + (t + i) * k + p * PANEL, c + i * PANEL, std::min<int64_t>(PANEL, k - p * PANEL));
                        }
                }
            }
        }
    }
}

thread_local Scratch packed_for_all;  // `scratch` is a thread's own

// The gradient of each w: dy transposed times x, over some of the tokens at a time. Of x all panels are packed, of dy a group
// of columns.
template <class S, class W> void linear_gradient(const Maps& s, const S* x, int64_t ldx) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    const bool flip = is_bf16<P>() && use_amx;
    const int64_t step = tile_rows<P>(), group = flip ? 4 * TILE_ROWS : 8 * MOST_ROWS;  // whole cache lines
    const int64_t k = s.k, panels = (k + PANEL - 1) / PANEL, most = Units<P>::padded(std::min(s.tokens, 2 * DEPTH));
    struct Group {
        int64_t of, first, columns;
    };
    std::vector<Group> groups;
    for (int64_t m = 0; m < s.count; m++)
        for (int64_t first = 0; first < s.map[m].rows; first += group) groups.push_back({m, first, std::min(group, s.map[m].rows - first)});
    const int64_t tasks = groups.size() * panels, chunk = std::min(panels, std::max<int64_t>(1, tasks / (16 * s.threads)));
    packed_for_all.reserve(room(panels * PANEL * most, sizeof(P)));  // not cleared first, as a vector would be
    P* const right = packed_for_all.take<P>(panels * PANEL * most);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop((flip ? 2 : 1) * room(most * group, sizeof(P)) + room(TILE_ROWS * PANEL, 4));
        unit* left = (unit*)scratch.take<P>(most * group);
        unit* unflipped = flip ? (unit*)scratch.take<P>(most * group) : left;
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        for (int64_t begin = 0; begin < s.tokens; begin += 2 * DEPTH) {
            const int64_t count = std::min(2 * DEPTH, s.tokens - begin), depth = Units<P>::padded(count) / each;
            const int64_t rs = flip ? depth : 1, ks = flip ? 1 : group;
            int64_t packed = -1;
#pragma omp for schedule(static)
            for (int64_t p = 0; p < panels; p++)
                pack(right + p * PANEL * depth * each, x + begin * ldx + p * PANEL, ldx, (const int64_t*)nullptr, std::min<int64_t>(PANEL, k - p * PANEL), PANEL, count);
#pragma omp for schedule(dynamic, chunk)
            for (int64_t task = 0; task < tasks; task++) {
                const auto [of, first, taken] = groups[task / panels];
                const Map map = s.map[of];
                const int64_t p = task % panels, columns = std::min<int64_t>(PANEL, k - p * PANEL);
                if (packed != task / panels) {
                    pack((P*)unflipped, (const S*)map.y + begin * map.rows + first, map.rows, (const int64_t*)nullptr, taken, group, count);
                    if (flip) transpose_units(left, unflipped, depth, group);
                }
                packed = task / panels;
                W* to = (W*)map.w.data + first * k + p * PANEL;
                for (int64_t m = 0; m < taken; m += step)
                    multiply_gradient<P>(std::min(step, taken - m), depth, left + m * rs, rs, ks, (const unit*)(right + p * PANEL * depth * each), to + m * k, k, columns, begin > 0, c);
            }
        }
    }
    packed_for_all.trim(MOST_KEPT);
}

}  // namespace
