// A block of a model in one call, forward and back.

#pragma once

#include "layer.h"
#include "routed.h"

EXPORT int moekit_norm(int, int, int64_t, int64_t, const void*, const void*, const float*, float, void*, void*, void*, float*, int);
EXPORT int moekit_attention_layer_bytes(int, const AttentionLayer*, int64_t*);
EXPORT int moekit_attention_layer(int, const AttentionLayer*, const void*, char*, void*);
EXPORT int moekit_attention_layer_backward(int, const AttentionLayer*, const void*, char*, const void*, void*, const AttentionGradients*);
EXPORT int moekit_feed_forward_bytes(int, const FeedForward*, int64_t*);
EXPORT int moekit_feed_forward(int, const FeedForward*, const void*, char*, void*);
EXPORT int moekit_feed_forward_backward(int, const FeedForward*, const void*, char*, const void*, void*, const FeedForwardGradients*);
EXPORT int moekit_linear(int, int64_t, int64_t, int64_t, int, const void*, int64_t, const Map*);
EXPORT int moekit_linear_backward(int, int, int64_t, int64_t, int64_t, int, const Map*, void*);
EXPORT int moekit_linear_gradient(int, int, int64_t, int64_t, int64_t, int, const void*, int64_t, const Map*);
EXPORT int moekit_route(const int64_t*, float, int, const float*, const float*, float*, int64_t*, float*, float*, float*, float*, int64_t*);
EXPORT int moekit_route_backward(const int64_t*, float, int, const float*, const float*, const int64_t*, const float*, const float*, const float*, const float*, const float*, float*);
EXPORT int moekit_plan(int64_t, int64_t, const int64_t*, int64_t*, int64_t*, int64_t*);
EXPORT int moekit_routed_experts_bytes(int, const RoutedExperts*, int64_t*);
EXPORT int moekit_routed_experts(int, const RoutedExperts*, const void*, const Expert*, char*, const void*, void*);
EXPORT int moekit_routed_experts_backward(int, int, const RoutedExperts*, const void*, const void*, const void*, char*, const void*, void*, float*, void*, void*);

extern "C" {
struct Chosen {  // where the routing is written: `route`'s and `plan`'s, choice.h
    float *scores, *weights, *log_sums, *score_sums, *squared;
    int64_t *ids, *sequence_counts, *order, *inverse, *counts;
};
struct Block {
    AttentionLayer attention;
    FeedForward ffn;             // dense, or the shared experts as one; ff 0: there is none
    const Expert* experts;       // or null
    Matrix router;
    const float* bias;           // of the choice, or null
    int64_t count, ff, chosen, sigmoid, normed, mapped;  // of the routed experts
    const float *attention_norm, *ffn_norm;
    double factor, eps;
    Chosen to;

    RoutedExperts routed() const {
        return {attention.tokens(), chosen, count, attention.dim, ff, to.counts, to.order, to.inverse, to.weights, mapped, attention.threads};
    }
};
struct BlockGradients {
    const float *of_scores, *of_weights, *of_score_sums, *of_squared;  // given, or null: 0
    AttentionGradients attention;  // these and the others are written unless null
    FeedForwardGradients ffn;
    float *attention_norm, *ffn_norm, *router;
    void *gate_up, *down;
};
}

namespace {

inline thread_local Scratch of_block;

inline void accepted(int refused) {
    if (refused) throw std::bad_alloc();
}

// What lies between the parts of a block. A way back needs all of it; without one (`keeps` false) little is made.
template <class X, class S> struct KeptBlock {
    S *normed, *again;       // what attention and what the feed-forward network reads
    X* first;                // x + delta; without a way back the output, which is written again
    float *scales, *scales_again, *exact, *logits;  // exact: what the router reads
    char *attention, *ffn, *experts;
    size_t bytes;
    KeptBlock(const Block& b, char* memory, bool keeps) {
        Pieces pieces{memory};
        const int64_t t = b.attention.tokens(), d = b.attention.dim, low = sizeof(S) == 2;
        int64_t in_attention = 0, in_ffn = 0, in_experts = 0;
        if (keeps) {
            const RoutedExperts routed = b.routed();
            accepted(moekit_attention_layer_bytes(low, &b.attention, &in_attention));
            if (b.ffn.ff) accepted(moekit_feed_forward_bytes(low, &b.ffn, &in_ffn));
            if (b.experts) accepted(moekit_routed_experts_bytes(low, &routed, &in_experts));
        }
        normed = pieces.take<S>(t * d), again = keeps ? pieces.take<S>(t * d) : normed;
        first = keeps ? pieces.take<X>(t * d) : nullptr;
        scales = pieces.take<float>(t), scales_again = keeps ? pieces.take<float>(t) : scales;
        exact = b.experts && low ? pieces.take<float>(t * d) : (float*)again;
        logits = pieces.take<float>(b.experts ? t * b.count : 0);
        attention = keeps ? pieces.take<char>(in_attention) : nullptr;
        ffn = keeps ? pieces.take<char>(in_ffn) : nullptr;
        experts = keeps ? pieces.take<char>(in_experts) : nullptr;
        bytes = pieces.used;
    }
};

// stream (tokens, dim) = x + delta (null: 0) + attention of its norm, y = the feed-forward network of stream's norm. The
// stream is in X, rows that are multiplied are in S; the router reads float32. Without memory there is no way back, and stream
// may be x, y delta.
template <class X, class S> void block(const Block& b, const X* x, const S* delta, char* memory, X* stream, S* y) {
    constexpr bool low = sizeof(S) == 2, same = sizeof(X) == sizeof(S);
    const int64_t t = b.attention.tokens(), d = b.attention.dim;
    const int threads = (int)b.attention.threads;
    of_block.reserve(room(t * d, sizeof(S)) + (memory ? 0 : KeptBlock<X, S>(b, nullptr, false).bytes));
    S* between = of_block.take<S>(t * d);
    const KeptBlock<X, S> kept(b, memory ? memory : of_block.data + of_block.used, memory != nullptr);
    X* first = kept.first ? kept.first : stream;
    void* const normed = kept.normed;
    void* const again = kept.again;
    accepted(moekit_norm(sizeof(X) == 2, low, t, d, x, delta, b.attention_norm, (float)b.eps, first, same ? normed : nullptr, same ? nullptr : normed, kept.scales, threads));
    accepted(moekit_attention_layer(low, &b.attention, normed, kept.attention, between));
    void* const y_again = same ? again : b.experts ? kept.exact : nullptr;
    accepted(moekit_norm(sizeof(X) == 2, low, t, d, delta ? first : x, between, b.ffn_norm, (float)b.eps, stream, y_again, same ? nullptr : again, kept.scales_again, threads));
    if (b.ffn.ff) accepted(moekit_feed_forward(low, &b.ffn, again, kept.ffn, b.experts ? between : y));
    if (b.experts) {
        const Chosen& to = b.to;
        if (low && same) {
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < t; i++) gather(kept.exact + i * d, kept.again + i * d, 0, (const int64_t*)nullptr, 1, d, d);
        }
        const Map router{b.router, b.count, kept.logits};
        accepted(moekit_linear(0, 1, t, d, threads, kept.exact, d, &router));
        const int64_t sizes[] = {b.attention.batch, b.attention.length, b.count, b.chosen, b.sigmoid, b.normed};
        accepted(moekit_route(sizes, (float)b.factor, threads, kept.logits, b.bias, to.scores, to.ids, to.weights, to.log_sums, to.score_sums, to.squared, to.sequence_counts));
        accepted(moekit_plan(t * b.chosen, b.count, to.ids, to.order, to.inverse, to.counts));
        const RoutedExperts routed = b.routed();
        accepted(moekit_routed_experts(low, &routed, again, b.experts, kept.experts, b.ffn.ff ? between : nullptr, y));
    }
    of_block.trim(MOST_KEPT);
}

// The gradients of x and of delta (null ones are not wanted) and of the weights; a null delta was 0. Of the matrices all are
// one after another, those of experts of W; the router is in float32.
template <class X, class S>
void block_backward(const Block& b, int w_bf16, const X* x, const X* stream, char* memory, const X* d_stream, const S* dy, X* dx,
                    S* d_delta, const BlockGradients& d) {
    constexpr bool low = sizeof(S) == 2, same = sizeof(X) == sizeof(S);
    const int64_t t = b.attention.tokens(), dim = b.attention.dim;
    const int threads = (int)b.attention.threads;
    const KeptBlock<X, S> kept(b, memory, true);
    of_block.reserve((same ? 2 : 3) * room(t * dim, sizeof(S)) + room(t * dim, sizeof(X)) + (b.experts ? room(t * dim, 4) + room(t * b.count, 4) + room(t * b.chosen, 4) : 0));
    S *d_ffn = of_block.take<S>(t * dim), *d_experts = of_block.take<S>(t * dim), *d_normed = d_ffn;  // which is read by then
    X* d_between = of_block.take<X>(t * dim);
    S* d_attended = same ? (S*)d_between : of_block.take<S>(t * dim);
    float* d_exact = nullptr;
    if (b.ffn.ff) accepted(moekit_feed_forward_backward(low, &b.ffn, kept.again, kept.ffn, dy, d_ffn, &d.ffn));
    if (b.experts) {
        d_exact = of_block.take<float>(t * dim);
        float *d_logits = of_block.take<float>(t * b.count), *d_weights = of_block.take<float>(t * b.chosen);
        const RoutedExperts routed = b.routed();
        accepted(moekit_routed_experts_backward(low, w_bf16, &routed, kept.again, b.experts->gate.data, b.experts->down.data, kept.experts, dy, d_experts, d_weights, d.gate_up, d.down));
        for (int64_t i = 0; d.of_weights && i < t * b.chosen; i++) d_weights[i] += d.of_weights[i];
        const int64_t sizes[] = {b.attention.batch, b.attention.length, b.count, b.chosen, b.sigmoid, b.normed};
        accepted(moekit_route_backward(sizes, (float)b.factor, threads, b.sigmoid ? kept.logits : nullptr, b.to.scores, b.to.ids, b.to.log_sums, d.of_scores, d_weights, d.of_score_sums, d.of_squared, d_logits));
        const Map router{b.router, b.count, d_logits}, into{to(d.router, b.router), b.count, d_logits};
        accepted(moekit_linear_backward(0, 0, 1, t, dim, threads, &router, d_exact));
        if (d.router) accepted(moekit_linear_gradient(0, 0, 1, t, dim, threads, kept.exact, dim, &into));
    }
    const auto of_again = sum_of((const S*)(b.ffn.ff ? d_ffn : nullptr), (const S*)(b.experts ? d_experts : nullptr), (const float*)d_exact);
    norm_backward(t, dim, stream, b.ffn_norm, kept.scales_again, d_stream, of_again, d_between, same ? (S*)nullptr : d_attended, d.ffn_norm, threads);
    const AttentionGradients& a = d.attention;
    if (dx || d.attention_norm || a.q || a.k || a.v || a.o || a.q_a || a.kv_norm || a.q_norm)
        accepted(moekit_attention_layer_backward(low, &b.attention, kept.normed, kept.attention, d_attended, d_normed, &a));
    if (dx || d.attention_norm) {
        X* const to_x = dx ? dx : d_between;
        norm_backward(t, dim, x ? x : kept.first, b.attention_norm, kept.scales, d_between, sum_of((const S*)d_normed), to_x, d_delta, d.attention_norm, threads);
    }
    of_block.trim(MOST_KEPT);
}

}  // namespace
