// The library's functions for what all tokens go through.

#include "interface.h"

#include "choice.h"
#include "layer.h"
#include "merge.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Whether this is AMD's family 26 (Zen 5) or a later one: their vectors of 16 floats are one step, not two.
bool is_wide_amd() {
#if defined(__x86_64__) && LANES == 16
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 15) + (a >> 20 & 255) >= 26;
#else
    return false;
#endif
}

// What the file was compiled for: bit 0 bfloat16 products, bit 1 AMX, bit 2 codes in 8-bit integers, bit 3 as above, the
// lanes of a float32 vector from bit 8 on.
EXPORT int moekit_features() {
    int features = LANES << 8 | is_wide_amd() << 3;
#ifdef HAS_BF16
    features |= 1;
#endif
#ifdef HAS_AMX
#ifdef EMULATE_AMX
    use_amx = true;
#else
    use_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
    if (use_amx) features |= 2;
#endif
#ifdef HAS_VNNI
    features |= 4;
#endif
    return features;
}

EXPORT int moekit_linear(int s_bf16, int64_t count, int64_t tokens, int64_t k, int threads, const void* x, int64_t ldx, const Map* maps) try {
    const Maps s{count, tokens, k, maps, threads};
    BY_WEIGHTS(maps->w.kind, (s_bf16 ? linear<bf16, W>(s, (const bf16*)x, ldx) : linear<float, W>(s, (const float*)x, ldx)))
    return 0;
} REFUSED

EXPORT int moekit_linear_backward(int s_bf16, int w_bf16, int64_t count, int64_t tokens, int64_t k, int threads, const Map* maps, void* dx) try {
    const Maps s{count, tokens, k, maps, threads};
    BY_TYPE((linear_backward<S, W>(s, (S*)dx)))
    return 0;
} REFUSED

EXPORT int moekit_linear_gradient(int s_bf16, int w_bf16, int64_t count, int64_t tokens, int64_t k, int threads, const void* x,
                                  int64_t ldx, const Map* maps) try {
    const Maps s{count, tokens, k, maps, threads};
    BY_TYPE((linear_gradient<S, W>(s, (const S*)x, ldx)))
    return 0;
} REFUSED

// sizes: the numbers of `Merging` (merge.h), in their order. back: dy to dx.
EXPORT int moekit_merged(int s_bf16, int w_bf16, const int64_t* sizes, const float* mix, int threads, int back, const void* x,
                         const void* w, void* y) try {
    const Merging s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], mix, threads};
    BY_TYPE((back ? merged_backward<S, W>(s, (const S*)x, (const W*)w, (S*)y)
                  : merged_forward<S, W>(s, (const S*)x, (const W*)w, (S*)y)))
    return 0;
} REFUSED

EXPORT int moekit_merged_gradient(int s_bf16, int w_bf16, const int64_t* sizes, const float* mix, int threads, const void* x,
                                  const void* dy, const void* w, void* dw, float* d_mix) try {
    const Merging s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], mix, threads};
    BY_TYPE((merged_gradient<S, W>(s, (const S*)x, (const S*)dy, (const W*)w, (W*)dw, d_mix)))
    return 0;
} REFUSED

EXPORT int moekit_largest(int64_t rows, int64_t width, int64_t k, const float* x, int64_t* ids, int threads) try {
    largest(rows, width, k, x, ids, threads);
    return 0;
} REFUSED

// sizes: the numbers of `Routes` (choice.h), in their order.
Routes routes(const int64_t* sizes, float factor, int threads) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] != 0, sizes[5] != 0, factor, threads};
}

EXPORT int moekit_route(const int64_t* sizes, float factor, int threads, const float* logits, const float* bias, float* scores,
                        int64_t* ids, float* weights, float* log_sums, float* score_sums, float* squared, int64_t* counts) try {
    route(routes(sizes, factor, threads), logits, bias, scores, ids, weights, log_sums, score_sums, squared, counts);
    return 0;
} REFUSED

EXPORT int moekit_route_backward(const int64_t* sizes, float factor, int threads, const float* logits, const float* scores,
                                 const int64_t* ids, const float* log_sums, const float* d_scores, const float* d_weights,
                                 const float* d_sums, const float* d_squared, float* d_logits) try {
    route_backward(routes(sizes, factor, threads), logits, scores, ids, log_sums, d_scores, d_weights, d_sums, d_squared, d_logits);
    return 0;
} REFUSED

EXPORT int moekit_plan(int64_t pairs, int64_t experts, const int64_t* ids, int64_t* order, int64_t* inverse, int64_t* counts) try {
    plan(pairs, experts, ids, order, inverse, counts);
    return 0;
} REFUSED

EXPORT int moekit_cross_entropy(int bf16_logits, int64_t rows, int64_t vocab, void* logits, const int64_t* targets,
                                float* losses, int differentiate, int threads) try {
    BY_ROWS(bf16_logits, (cross_entropy(rows, vocab, (S*)logits, targets, losses, differentiate, threads)))
    return 0;
} REFUSED

EXPORT int moekit_swiglu(int bf16_rows, int64_t count, const void* gate, const void* up, void* y, int threads) try {
    BY_ROWS(bf16_rows, (swiglu(count, (const S*)gate, (const S*)up, (S*)y, threads)))
    return 0;
} REFUSED

EXPORT int moekit_swiglu_backward(int bf16_rows, int64_t count, const void* gate, const void* up, const void* dy, void* d_gate,
                                  void* d_up, int threads) try {
    BY_ROWS(bf16_rows, (swiglu_backward(count, (const S*)gate, (const S*)up, (const S*)dy, (S*)d_gate, (S*)d_up, threads)))
    return 0;
} REFUSED

EXPORT int moekit_norm(int x_bf16, int delta_bf16, int64_t rows, int64_t dim, const void* x, const void* delta, const float* weight,
                       float eps, void* sum, void* y, void* low, float* scales, int threads) try {
    if (x_bf16)
        norm(rows, dim, (const bf16*)x, (const bf16*)delta, weight, eps, (bf16*)sum, (bf16*)y, (bf16*)low, scales, threads);
    else if (delta_bf16)
        norm(rows, dim, (const float*)x, (const bf16*)delta, weight, eps, (float*)sum, (float*)y, (bf16*)low, scales, threads);
    else
        norm(rows, dim, (const float*)x, (const float*)delta, weight, eps, (float*)sum, (float*)y, (bf16*)low, scales, threads);
    return 0;
} REFUSED

EXPORT int moekit_norm_backward(int x_bf16, int64_t rows, int64_t dim, const void* sum, const float* weight, const float* scales,
                                const void* d_sum, const void* dy, const void* d_low, void* dx, void* d_delta, float* d_weight,
                                int threads) try {
    const bf16* low = (const bf16*)d_low;
    BY_ROWS(x_bf16, (norm_backward(rows, dim, (const S*)sum, weight, scales, (const S*)d_sum, sum_of((const S*)dy, low),
                                   (S*)dx, (bf16*)d_delta, d_weight, threads)))
    return 0;
} REFUSED

// sizes: the numbers of `Sizes` (attention.h), in their order.
EXPORT int moekit_attention(int s_bf16, const int64_t* sizes, float scale, const int64_t* offsets, const int32_t* documents,
                            int threads, const void* q, const void* k, const void* v, void* y, float* log_sums) try {
    const Attention s{*(const Sizes*)sizes, scale, offsets, documents, threads};
    BY_ROWS(s_bf16, (attention(s, (const S*)q, (const S*)k, (const S*)v, (S*)y, log_sums)))
    return 0;
} REFUSED

EXPORT int moekit_attention_backward(int s_bf16, const int64_t* sizes, float scale, const int32_t* documents, int threads,
                                     const void* q, const void* k, const void* v, const void* y, const float* log_sums,
                                     const void* dy, void* dq, void* dk, void* dv) try {
    const Attention s{*(const Sizes*)sizes, scale, nullptr, documents, threads};
    BY_ROWS(s_bf16, (attention_backward(s, (const S*)q, (const S*)k, (const S*)v, (const S*)y, log_sums, (const S*)dy,
                                        (S*)dq, (S*)dk, (S*)dv)))
    return 0;
} REFUSED

EXPORT int moekit_rotate(int s_bf16, int64_t batches, int64_t length, int64_t heads, int64_t half, const void* x, int64_t batch,
                         int64_t row, int64_t head, const float* cos, const float* sin, void* y, int interleaved, int back,
                         int threads) try {
    const Strides at_x{batch, row, head}, at_y{length * heads * 2 * half, heads * 2 * half, 2 * half};
    BY_ROWS(s_bf16, (rotate(batches, length, heads, half, (const S*)x, at_x, cos, sin, (S*)y, at_y, interleaved, back,
                            threads)))
    return 0;
} REFUSED

// bytes: what `kept` must hold; kept null: nothing is kept.
EXPORT int moekit_attention_layer_bytes(int s_bf16, const AttentionLayer* s, int64_t* bytes) try {
    *bytes = s_bf16 ? KeptAttention<bf16>(*s, nullptr).bytes : KeptAttention<float>(*s, nullptr).bytes;
    return 0;
} REFUSED

EXPORT int moekit_attention_layer(int s_bf16, const AttentionLayer* s, const void* x, char* kept, void* y) try {
    BY_ROWS(s_bf16, (attention_layer(*s, (const S*)x, kept, (S*)y)))
    return 0;
} REFUSED

EXPORT int moekit_attention_layer_backward(int s_bf16, const AttentionLayer* s, const void* x, char* kept, const void* dy, void* dx,
                                           const AttentionGradients* gradients) try {
    BY_ROWS(s_bf16, (attention_layer_backward(*s, (const S*)x, kept, (const S*)dy, (S*)dx, *gradients)))
    return 0;
} REFUSED

EXPORT int moekit_feed_forward_bytes(int s_bf16, const FeedForward* s, int64_t* bytes) try {
    *bytes = s_bf16 ? KeptFeedForward<bf16>(*s, nullptr).bytes : KeptFeedForward<float>(*s, nullptr).bytes;
    return 0;
} REFUSED

EXPORT int moekit_feed_forward(int s_bf16, const FeedForward* s, const void* x, char* kept, void* y) try {
    BY_ROWS(s_bf16, (feed_forward(*s, (const S*)x, kept, (S*)y)))
    return 0;
} REFUSED

EXPORT int moekit_feed_forward_backward(int s_bf16, const FeedForward* s, const void* x, char* kept, const void* dy, void* dx,
                                        const FeedForwardGradients* gradients) try {
    BY_ROWS(s_bf16, (feed_forward_backward(*s, (const S*)x, kept, (const S*)dy, (S*)dx, *gradients)))
    return 0;
} REFUSED
