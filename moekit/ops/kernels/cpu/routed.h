// A layer's routed experts with all that lies around their products, in one call, forward and back.

#pragma once

#include "experts.h"
#include "fetch.h"

extern "C" {
struct RoutedExperts {  // tokens k choices, sorted into rows by expert (`plan`, choice.h)
    int64_t tokens, chosen, experts, dim, ff;
    const int64_t *counts, *order, *inverse;  // (experts); (tokens chosen): row -> pair, pair -> row. On the way back inverse only
    const float* weights;                     // (tokens, chosen)
    int64_t mapped;                           // whether the experts are asked for first
    int64_t threads;

    int64_t pairs() const { return tokens * chosen; }
};
}

namespace {

template <class S> struct KeptExperts {
    int64_t *tokens, *offsets;
    S* hidden;
    size_t bytes;
    KeptExperts(const RoutedExperts& s, char* memory) {
        Pieces pieces{memory};
        tokens = pieces.take<int64_t>(s.pairs()), offsets = pieces.take<int64_t>(s.experts + 1);
        hidden = pieces.take<S>(s.pairs() * 2 * s.ff);
        bytes = pieces.used;
    }
    Shape shape(const RoutedExperts& s) const { return {s.experts, s.dim, s.ff, offsets, tokens, (int)s.threads}; }
    int64_t computed(const RoutedExperts& s) const { return offsets[s.experts]; }
};

template <class S> void routed_of(const Shape& s, const S* x, const Expert* experts, S* hidden, S* y) {
    BY_WEIGHTS(experts->gate.kind, (forward<S, W>(s, x, s.dim, experts, hidden, y)))
}

// y (tokens, dim) = plus, unless null, + the sum over choices of weight * expert(x).
template <class S> void routed_experts(const RoutedExperts& s, const S* x, const Expert* experts, char* memory, const S* plus, S* y) {
    const size_t rows = room(s.pairs() * s.dim, sizeof(S)), alone = 2 * room(s.pairs() + s.experts + 1, 8);
    const Between memory_between(rows + (memory ? 0 : alone));
    S* out = between.take<S>(s.pairs() * s.dim);
    KeptExperts<S> kept(s, memory ? memory : between.data + rows);
    if (!memory) kept.hidden = nullptr;
    for (int64_t e = kept.offsets[0] = 0; e < s.experts; e++) kept.offsets[e + 1] = kept.offsets[e] + s.counts[e];
    for (int64_t i = 0; i < s.pairs(); i++) kept.tokens[i] = s.order[i] / s.chosen;
    if (s.mapped) fetch(s.experts, s.dim, s.ff, kept.offsets, experts);
    routed_of(kept.shape(s), x, experts, kept.hidden, out);
    combine(s.tokens, s.chosen, s.dim, out, s.inverse, s.weights, kept.computed(s), plus, y, (int)s.threads);
}

// The gradients of x, of the weights (tokens, chosen) and of the stacked matrices; null ones are not wanted.
template <class S, class W>
void routed_experts_backward(const RoutedExperts& s, const S* x, const W* gate_up, const W* down, char* memory, const S* dy, S* dx,
                             float* d_weights, W* d_gate_up, W* d_down) {
    const KeptExperts<S> kept(s, memory);
    const Shape shape = kept.shape(s);
    const int64_t pairs = s.pairs(), computed = kept.computed(s);
    const Between memory_between(2 * room(pairs, 4) + room(pairs * 2 * s.ff, sizeof(S)) + room(pairs * s.ff, sizeof(S)) + room(pairs * s.dim, sizeof(S)));
    float *by_row = between.take<float>(pairs), *d_by_row = between.take<float>(pairs);
    S *d_hidden = between.take<S>(pairs * 2 * s.ff), *act = between.take<S>(pairs * s.ff), *d_rows = between.take<S>(pairs * s.dim);
    for (int64_t i = 0; i < pairs; i++) by_row[s.inverse[i]] = s.weights[i];
    backward_rows(shape, dy, s.dim, gate_up, down, by_row, kept.hidden, d_hidden, act, dx ? d_rows : nullptr, d_by_row);
    if (d_gate_up) weight_gradient(shape, d_hidden, 2 * s.ff, false, 2 * s.ff, x, s.dim, true, s.dim, d_gate_up);
    if (d_down) weight_gradient(shape, dy, s.dim, true, s.dim, act, s.ff, false, s.ff, d_down);
    for (int64_t i = 0; d_weights && i < pairs; i++) d_weights[i] = s.inverse[i] < computed ? d_by_row[s.inverse[i]] : 0;
    if (dx) combine(s.tokens, s.chosen, s.dim, d_rows, s.inverse, (const float*)nullptr, computed, (const S*)nullptr, dx, (int)s.threads);
}

}  // namespace
