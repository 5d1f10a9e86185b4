// A model as a decoding step reads it, and the step as one of its threads sees it.

#pragma once

#include "few.h"

extern "C" {
struct DecodeLayer {
    const float *attention_norm, *ffn_norm;
    Matrix q, k, v, o;              // latent: q_proj or q_b_proj, kv_a_proj_with_mqa, kv_b_proj (in numbers), o_proj
    Matrix q_a;                     // of latent attention with a q_rank, as is q_norm
    const float *q_norm, *kv_norm;  // of latents; of multi-head attention's queries and keys (`qk_norm`)
    const float *q_bias, *k_bias, *v_bias, *o_bias;  // or null; latent: of q_a, k and o
    void* cache;                    // (batch, cache_length, entry()): keys, then values; or the latent, then the key
    Expert dense;                   // a dense layer's FFN, or the shared experts as one
    int64_t dense_ff;               // 0: there is none
    const float* shared_gate;       // (dim): the shared experts' output times sigmoid(x w); or null
    const Expert* routed;
    const float *router, *bias;  // (experts, dim), (experts) or null
    int64_t mapped, experts, ff, chosen, groups, chosen_groups, group_best, sigmoid, normalise;
    float scale;
};
struct DecodeModel {
    int64_t layers, dim, vocab, heads, kv_heads, head_dim, value_dim;
    int64_t rope, rank, q_rank;  // rope: what is turned of head_dim; rank: the latent's width, 0 for multi-head attention
    int64_t qk_norm;                // of multi-head attention: 0 none, 1 of each head, 2 of all heads as one
    int64_t cache_length, cache_bf16;
    float eps, latent_eps, softmax_scale;  // latent_eps: of the norms of latents
    const DecodeLayer* layer;
    Matrix embedding, head;
    const float *norm, *cos, *sin;  // cos and sin: (positions, rope / 2)

    int64_t entry() const { return rank ? rank + rope : 2 * kv_heads * head_dim; }
    // What attention makes of a token: queries and the cache's entry; then latent attention's compressed query, and its
    // absorbed queries, as wide as an entry.
    int64_t row() const { return heads * head_dim + entry() + (rank ? q_rank + heads * entry() : 0); }
};
}

namespace {

// Where the part of `rows` of thread number `who` begins.
inline int64_t part_of(int64_t rows, int64_t who, int64_t all) { return std::min(rows, (rows * who / all + 3) / 4 * 4); }

struct Step {
    int64_t batch;
    const int64_t* lengths;  // of each sequence before this step
    int64_t longest, me, all;
    const float* x;          // (batch, dim), what attention reads
    float *made, *y;         // (batch, row()), (batch, heads value_dim)
    float* scores;           // (FEW, longest), this thread's own

    Rows rows(const float* from, int64_t ld, int64_t k) const { return {from, ld, batch, k}; }
    // This thread's part of `in` W^T, plus `bias` unless null.
    void product(const Matrix& w, int64_t rows, Rows& in, float* to, int64_t ldo, const float* bias = nullptr) const {
        const int64_t first = part_of(rows, me, all), last = part_of(rows, me + 1, all);
        rows_of(w, first, last, in, to, ldo);
        for (int64_t b = 0; bias && b < batch; b++)
            for (int64_t i = first; i < last; i++) to[b * ldo + i] += bias[i];
    }
};

}  // namespace
