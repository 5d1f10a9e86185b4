// A block of a model in one call, for tokens whose way back is not wanted.

#pragma once

#include "layer.h"
#include "routed.h"

EXPORT void moekit_norm(int, int, int64_t, int64_t, const void*, const void*, const float*, float, void*, void*, void*, float*, int);
EXPORT void moekit_attention_layer(int, const AttentionLayer*, const void*, char*, void*);
EXPORT void moekit_feed_forward(int, const FeedForward*, const void*, char*, void*);
EXPORT void moekit_linear(int, int64_t, int64_t, int64_t, int, const void*, int64_t, const Map*);
EXPORT void moekit_route(const int64_t*, float, int, const float*, const float*, float*, int64_t*, float*, float*, float*, float*, int64_t*);
EXPORT void moekit_plan(int64_t, int64_t, const int64_t*, int64_t*, int64_t*, int64_t*);
EXPORT void moekit_routed_experts(int, const RoutedExperts*, const void*, const Expert*, char*, const void*, void*);

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
};
}

namespace {

inline thread_local Scratch of_block;

// stream (tokens, dim) = x + delta (null: 0) + attention of its norm, y = the feed-forward network of stream's norm. All rows
// are of one kind, bfloat16 if `low`; the router reads float32.
inline void block(int low, const Block& b, const void* x, const void* delta, void* stream, void* y) {
    const int64_t t = b.attention.tokens(), d = b.attention.dim, size = low ? 2 : 4;
    const int threads = (int)b.attention.threads;
    of_block.reserve(2 * room(t * d, size) + room(t, 4) + (b.experts ? room(t * d, 4) + room(t * b.count, 4) : 0));
    char *normed = of_block.bytes(t * d * size), *between = of_block.bytes(t * d * size);
    float* scales = of_block.take<float>(t);
    moekit_norm(low, low, t, d, x, delta, b.attention_norm, (float)b.eps, stream, normed, nullptr, scales, threads);
    moekit_attention_layer(low, &b.attention, normed, nullptr, between);
    moekit_norm(low, low, t, d, delta ? stream : x, between, b.ffn_norm, (float)b.eps, stream, normed, nullptr, scales, threads);
    if (b.ffn.ff) moekit_feed_forward(low, &b.ffn, normed, nullptr, b.experts ? between : y);
    if (b.experts) {
        const Chosen& to = b.to;
        float *exact = (float*)normed, *logits = of_block.take<float>(t * b.count);
        if (low) {
            exact = of_block.take<float>(t * d);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < t; i++) gather(exact + i * d, (const bf16*)normed + i * d, 0, (const int64_t*)nullptr, 1, d, d);
        }
        const Map router{b.router, b.count, logits};
        moekit_linear(0, 1, t, d, threads, exact, d, &router);
        const int64_t sizes[] = {b.attention.batch, b.attention.length, b.count, b.chosen, b.sigmoid, b.normed};
        moekit_route(sizes, (float)b.factor, threads, logits, b.bias, to.scores, to.ids, to.weights, to.log_sums, to.score_sums, to.squared, to.sequence_counts);
        moekit_plan(t * b.chosen, b.count, to.ids, to.order, to.inverse, to.counts);
        const RoutedExperts routed{t, b.chosen, b.count, d, b.ff, to.counts, to.order, to.inverse, to.weights, b.mapped, threads};
        moekit_routed_experts(low, &routed, normed, b.experts, nullptr, b.ffn.ff ? between : nullptr, y);
    }
    of_block.trim(MOST_KEPT);
}

}  // namespace
