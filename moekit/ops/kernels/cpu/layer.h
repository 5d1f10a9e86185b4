// Attention and SwiGLU with all that lies around their products, each in one call, forward and back.
//
// Between these products nothing is asked of anybody else, so nothing need come back to Python there. What a way back
// needs is written into memory of the caller's (`Kept`), and read again.

#pragma once

#include "attention_backward.h"
#include "linear.h"
#include "step.h"

// What weights a kind means for rows in S, where gradients are formed.
#define BY_NUMBERS(S, kind, call)              \
    if (kind == 1) {                           \
        typedef bf16 W;                        \
        if constexpr (sizeof(S) == 2) call;    \
    } else {                                   \
        typedef float W;                       \
        call;                                  \
    }

extern "C" {
struct AttentionLayer {  // of multi-head attention; of latent attention where rank is not 0 (DeepSeek-V2, section 2.1)
    int64_t batch, length, dim, heads, kv_heads, head_dim, value_dim;
    int64_t turned;        // of a head: all of it, or the last of it in latent attention
    int64_t rank, q_rank;  // widths of the latents
    int64_t causal;
    Matrix q, k, v, o, q_a;         // latent: q_proj or q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj
    const float *kv_norm, *q_norm;  // of latents
    const float *cos, *sin;         // (batch, length, turned / 2)
    const int32_t* documents;       // (batch, length) or null
    double scale, eps;
    int64_t threads;
    void* cache;  // (batch, cache_length, entry), whose first `length` entries are written; or null
    int64_t cache_length, cache_bf16;

    int64_t tokens() const { return batch * length; }
    int64_t plain() const { return head_dim - turned; }        // of a head of latent attention
    int64_t pair() const { return plain() + value_dim; }       // what kv_b_proj makes for a head
};
struct AttentionGradients {  // of the weights; null: not wanted
    void *q, *k, *v, *o, *q_a;
    float *kv_norm, *q_norm;
};
struct FeedForward {
    int64_t tokens, dim, ff;
    Matrix gate, up, down;
    int64_t threads;
};
struct FeedForwardGradients {
    void *gate, *up, *down;
};
}

namespace {

// Rows of a matrix from number `first` on.
inline Matrix rows_from(Matrix w, int64_t first, int64_t k) {
    const int64_t groups = (k + GROUP - 1) / GROUP, bytes[] = {4 * k, 2 * k, groups * GROUP, groups * GROUP / 2};
    w.data = (const char*)w.data + first * bytes[w.kind];
    if (w.scales) w.scales = (const bf16*)w.scales + first * groups;
    return w;
}

template <class S> void product(int64_t tokens, int64_t k, int threads, const S* x, std::initializer_list<Map> maps) {
    const Maps s{(int64_t)maps.size(), tokens, k, maps.begin(), threads};
    BY_WEIGHTS(maps.begin()->w.kind, (linear<S, W>(s, x, k)))
}
template <class S> void product_backward(int64_t tokens, int64_t k, int threads, std::initializer_list<Map> maps, S* dx) {
    const Maps s{(int64_t)maps.size(), tokens, k, maps.begin(), threads};
    BY_NUMBERS(S, maps.begin()->w.kind, (linear_backward<S, W>(s, dx)))
}
// Into those places for gradients that are not null.
template <class S> void product_gradient(int64_t tokens, int64_t k, int threads, const S* x, std::initializer_list<Map> maps) {
    std::vector<Map> wanted;
    for (const Map& map : maps)
        if (map.w.data) wanted.push_back(map);
    if (wanted.empty()) return;
    const Maps s{(int64_t)wanted.size(), tokens, k, wanted.data(), threads};
    BY_NUMBERS(S, wanted[0].w.kind, (linear_gradient<S, W>(s, x, k)))
}
inline Matrix to(void* gradient, const Matrix& of) { return {gradient, nullptr, of.kind}; }

// ---- attention -----------------------------------------------------------------------------------------------------

template <class S> struct KeptAttention {
    S *q, *k, *v, *y;
    S *q_raw, *q_latent, *raw, *latent, *key;  // of latent attention; raw: before its norm; v then is kv_b_proj's output
    float *log_sums, *scales, *q_scales;
    size_t bytes;
    KeptAttention(const AttentionLayer& s, char* memory) {
        Pieces pieces{memory};
        const int64_t t = s.tokens(), heads = s.rank ? s.heads : s.kv_heads;
        q = pieces.take<S>(t * s.heads * s.head_dim);
        k = pieces.take<S>(t * heads * s.head_dim);
        v = pieces.take<S>(t * heads * (s.rank ? s.pair() : s.value_dim));
        y = pieces.take<S>(t * s.heads * s.value_dim);
        log_sums = pieces.take<float>(t * s.heads);
        raw = pieces.take<S>(t * s.rank);
        latent = pieces.take<S>(t * s.rank);
        scales = pieces.take<float>(s.rank ? t : 0);
        key = pieces.take<S>(s.rank ? t * s.turned : 0);
        q_raw = pieces.take<S>(t * s.q_rank);
        q_latent = pieces.take<S>(t * s.q_rank);
        q_scales = pieces.take<float>(s.q_rank ? t : 0);
        bytes = pieces.used;
    }
};

// Attention's own numbers.
inline Attention attention_of(const AttentionLayer& s) {
    const int64_t kv_heads = s.rank ? s.heads : s.kv_heads, wide = s.rank ? s.pair() : s.value_dim;
    Attention a{};
    a.batch = s.batch, a.length = a.keys = s.length, a.heads = s.heads, a.kv_heads = kv_heads, a.d = s.head_dim, a.dv = s.value_dim;
    a.q = a.rows(s.heads, s.head_dim), a.k = a.rows(kv_heads, s.head_dim), a.v = a.rows(kv_heads, wide), a.causal = s.causal;
    a.scale = (float)s.scale, a.documents = s.documents, a.threads = (int)s.threads;
    return a;
}

// Turns what is turned of `heads` heads of a row each, in its place.
template <class S> void turn(const AttentionLayer& s, S* x, int64_t heads, int64_t width, bool back) {
    const Strides at{s.length * heads * width, heads * width, width};
    S* first = x + width - s.turned;
    rotate(s.batch, s.length, heads, s.turned / 2, first, at, s.cos, s.sin, first, at, s.rank != 0, back, (int)s.threads);
}

// Writes what later tokens need into the cache: of each token a row of `first` and one of `second`.
template <class C, class S> void remember(const AttentionLayer& s, const S* first, int64_t wide, const S* second, int64_t narrow) {
    C* const cache = (C*)s.cache;
#pragma omp parallel for num_threads((int)s.threads) schedule(static)
    for (int64_t i = 0; i < s.tokens(); i++) {
        C* entry = cache + (i / s.length * s.cache_length + i % s.length) * (wide + narrow);
        gather(entry, first + i * wide, wide, (const int64_t*)nullptr, 1, wide, wide);
        gather(entry + wide, second + i * narrow, narrow, (const int64_t*)nullptr, 1, narrow, narrow);
    }
}
template <class S> void remember(const AttentionLayer& s, const KeptAttention<S>& kept) {
    const S *first = s.rank ? kept.latent : kept.k, *second = s.rank ? kept.key : kept.v;
    const int64_t wide = s.rank ? s.rank : s.kv_heads * s.head_dim, narrow = s.rank ? s.turned : s.kv_heads * s.value_dim;
    if (s.cache_bf16)
        remember<bf16>(s, first, wide, second, narrow);
    else
        remember<float>(s, first, wide, second, narrow);
}

// y (tokens, dim). Without memory for what a way back needs there is none.
template <class S> void attention_layer(const AttentionLayer& s, const S* x, char* memory, S* y) {
    const Between memory_between(memory ? 0 : KeptAttention<S>(s, nullptr).bytes);
    const KeptAttention<S> kept(s, memory ? memory : between.data);
    const int threads = (int)s.threads;
    const int64_t t = s.tokens(), wide = s.heads * s.head_dim, pair = s.pair(), plain = s.plain();
    Attention a = attention_of(s);
    const S* values = kept.v;
    if (!s.rank) {
        product(t, s.dim, threads, x, {{s.q, wide, kept.q}, {s.k, s.kv_heads * s.head_dim, kept.k}, {s.v, s.kv_heads * s.value_dim, kept.v}});
        turn(s, kept.q, s.heads, s.head_dim, false);
        turn(s, kept.k, s.kv_heads, s.head_dim, false);
    } else {
        const Map latent{s.k, s.rank, kept.raw}, key{rows_from(s.k, s.rank, s.dim), s.turned, kept.key};
        product(t, s.dim, threads, x, {{s.q_rank ? s.q_a : s.q, s.q_rank ? s.q_rank : wide, s.q_rank ? kept.q_raw : kept.q}, latent, key});
        if (s.q_rank) {
            norm(t, s.q_rank, kept.q_raw, (const S*)nullptr, s.q_norm, (float)s.eps, (S*)nullptr, kept.q_latent, (bf16*)nullptr, kept.q_scales, threads);
            product(t, s.q_rank, threads, kept.q_latent, {{s.q, wide, kept.q}});
        }
        norm(t, s.rank, kept.raw, (const S*)nullptr, s.kv_norm, (float)s.eps, (S*)nullptr, kept.latent, (bf16*)nullptr, kept.scales, threads);
        product(t, s.rank, threads, kept.latent, {{s.v, s.heads * pair, kept.v}});
        turn(s, kept.q, s.heads, s.head_dim, false);
        turn(s, kept.key, 1, s.turned, false);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < t * s.heads; i++) {  // a head's keys: its own, and the one that all share
            memcpy((void*)(kept.k + i * s.head_dim), kept.v + i * pair, plain * sizeof(S));
            memcpy((void*)(kept.k + i * s.head_dim + plain), kept.key + i / s.heads * s.turned, s.turned * sizeof(S));
        }
        values += plain;
    }
    if (s.cache) remember(s, kept);
    attention(a, kept.q, kept.k, values, kept.y, memory ? kept.log_sums : nullptr);
    product(t, s.heads * s.value_dim, threads, kept.y, {{s.o, s.dim, y}});
}

// The gradients of what lies between.
template <class S> struct GradientsInAttention {
    S *y, *q, *k, *v, *pair, *latent, *key, *q_latent;
    size_t bytes;
    GradientsInAttention(const AttentionLayer& s, char* memory) {
        Pieces pieces{memory};
        const int64_t t = s.tokens(), heads = s.rank ? s.heads : s.kv_heads;
        y = pieces.take<S>(t * s.heads * s.value_dim);
        q = pieces.take<S>(t * s.heads * s.head_dim);
        k = pieces.take<S>(t * heads * s.head_dim);
        v = pieces.take<S>(t * heads * s.value_dim);
        pair = pieces.take<S>(s.rank ? t * heads * s.pair() : 0);
        latent = pieces.take<S>(t * s.rank);
        key = pieces.take<S>(s.rank ? t * s.turned : 0);
        q_latent = pieces.take<S>(t * s.q_rank);
        bytes = pieces.used;
    }
};

// dx (tokens, dim) unless null, and the gradients of the weights that are wanted.
template <class S>
void attention_layer_backward(const AttentionLayer& s, const S* x, char* memory, const S* dy, S* dx, const AttentionGradients& d) {
    const KeptAttention<S> kept(s, memory);
    const int threads = (int)s.threads;
    const int64_t t = s.tokens(), wide = s.heads * s.head_dim, out = s.heads * s.value_dim;
    const int64_t pair = s.pair(), plain = s.plain();
    const Between memory_between(GradientsInAttention<S>(s, nullptr).bytes);
    const GradientsInAttention<S> in(s, between.data);
    S *dq = in.q, *dk = in.k, *dv = in.v;
    product_backward(t, out, threads, {{s.o, s.dim, (void*)dy}}, in.y);
    product_gradient(t, out, threads, kept.y, {{to(d.o, s.o), s.dim, (void*)dy}});
    attention_backward(attention_of(s), kept.q, kept.k, kept.v + (s.rank ? plain : 0), kept.y, kept.log_sums, in.y, dq, dk, dv);
    turn(s, dq, s.heads, s.head_dim, true);
    if (!s.rank) {
        turn(s, dk, s.kv_heads, s.head_dim, true);
        const int64_t k_rows = s.kv_heads * s.head_dim, v_rows = s.kv_heads * s.value_dim;
        if (dx) product_backward(t, s.dim, threads, {{s.q, wide, dq}, {s.k, k_rows, dk}, {s.v, v_rows, dv}}, dx);
        return product_gradient(t, s.dim, threads, x, {{to(d.q, s.q), wide, dq}, {to(d.k, s.k), k_rows, dk}, {to(d.v, s.v), v_rows, dv}});
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++) {
        for (int64_t h = 0; h < s.heads; h++) {
            S* both = in.pair + (i * s.heads + h) * pair;
            memcpy((void*)both, dk + (i * s.heads + h) * s.head_dim, plain * sizeof(S));
            memcpy((void*)(both + plain), dv + (i * s.heads + h) * s.value_dim, s.value_dim * sizeof(S));
        }
        by_vector(s.turned, [&](int64_t n, int64_t left) {
            vec sum = {};
            for (int64_t h = 0; h < s.heads; h++) sum += load(dk + (i * s.heads + h) * s.head_dim + plain + n, left);
            store(in.key + i * s.turned + n, sum, left);
        });
    }
    turn(s, in.key, 1, s.turned, true);
    product_backward(t, s.rank, threads, {{s.v, s.heads * pair, in.pair}}, in.latent);
    product_gradient(t, s.rank, threads, kept.latent, {{to(d.v, s.v), s.heads * pair, in.pair}});
    norm_backward(t, s.rank, kept.raw, s.kv_norm, kept.scales, (const S*)nullptr, sum_of((const S*)in.latent), in.latent, (S*)nullptr, d.kv_norm, threads);
    if (s.q_rank) {
        product_backward(t, s.q_rank, threads, {{s.q, wide, dq}}, in.q_latent);
        product_gradient(t, s.q_rank, threads, kept.q_latent, {{to(d.q, s.q), wide, dq}});
        norm_backward(t, s.q_rank, kept.q_raw, s.q_norm, kept.q_scales, (const S*)nullptr, sum_of((const S*)in.q_latent), in.q_latent, (S*)nullptr, d.q_norm, threads);
    }
    const Matrix &first = s.q_rank ? s.q_a : s.q, into = to(s.q_rank ? d.q_a : d.q, first), k_into = to(d.k, s.k);
    const int64_t rows = s.q_rank ? s.q_rank : wide;
    S* d_first = s.q_rank ? in.q_latent : dq;
    if (dx) product_backward(t, s.dim, threads, {{first, rows, d_first}, {s.k, s.rank, in.latent}, {rows_from(s.k, s.rank, s.dim), s.turned, in.key}}, dx);
    product_gradient(t, s.dim, threads, x, {{into, rows, d_first}, {k_into, s.rank, in.latent}, {d.k ? rows_from(k_into, s.rank, s.dim) : k_into, s.turned, in.key}});
}

// ---- SwiGLU --------------------------------------------------------------------------------------------------------

template <class S> struct KeptFeedForward {
    S *gate, *up, *act;
    size_t bytes;
    KeptFeedForward(const FeedForward& s, char* memory) {
        Pieces pieces{memory};
        gate = pieces.take<S>(s.tokens * s.ff), up = pieces.take<S>(s.tokens * s.ff), act = pieces.take<S>(s.tokens * s.ff);
        bytes = pieces.used;
    }
};

template <class S> void feed_forward(const FeedForward& s, const S* x, char* memory, S* y) {
    const Between memory_between(memory ? 0 : KeptFeedForward<S>(s, nullptr).bytes);
    const KeptFeedForward<S> kept(s, memory ? memory : between.data);
    const int threads = (int)s.threads;
    product(s.tokens, s.dim, threads, x, {{s.gate, s.ff, kept.gate}, {s.up, s.ff, kept.up}});
    swiglu(s.tokens * s.ff, kept.gate, kept.up, kept.act, threads);
    product(s.tokens, s.ff, threads, kept.act, {{s.down, s.dim, y}});
}

template <class S>
void feed_forward_backward(const FeedForward& s, const S* x, char* memory, const S* dy, S* dx, const FeedForwardGradients& d) {
    const KeptFeedForward<S> kept(s, memory);
    const int threads = (int)s.threads;
    const int64_t count = s.tokens * s.ff;
    const Between memory_between(3 * room(count, sizeof(S)));
    S *d_act = between.take<S>(count), *d_gate = between.take<S>(count), *d_up = between.take<S>(count);
    product_backward(s.tokens, s.ff, threads, {{s.down, s.dim, (void*)dy}}, d_act);
    product_gradient(s.tokens, s.ff, threads, kept.act, {{to(d.down, s.down), s.dim, (void*)dy}});
    swiglu_backward(count, kept.gate, kept.up, d_act, d_gate, d_up, threads);
    if (dx) product_backward(s.tokens, s.dim, threads, {{s.gate, s.ff, d_gate}, {s.up, s.ff, d_up}}, dx);
    product_gradient(s.tokens, s.dim, threads, x, {{to(d.gate, s.gate), s.ff, d_gate}, {to(d.up, s.up), s.ff, d_up}});
}

}  // namespace
