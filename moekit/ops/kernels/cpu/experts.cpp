// The library's functions for experts, and for decoding, which goes through all of a model.

#include "interface.h"

#include "decode.h"
#include "routed.h"

template <class S>
void forward_of(const Shape& s, const S* x, int64_t ldx, const Expert* matrices, void* hidden, void* y) {
    BY_WEIGHTS(matrices->gate.kind, (forward<S, W>(s, x, ldx, matrices, (S*)hidden, (S*)y)))
}

// matrices: one an expert, all of one kind.
EXPORT int moekit_forward(int s_bf16, int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets, const int64_t* tokens,
                          int threads, const void* x, int64_t ldx, const Expert* matrices, void* hidden, void* y) try {
    const Shape s{experts, dim, ff, offsets, tokens, threads};
    BY_ROWS(s_bf16, (forward_of(s, (const S*)x, ldx, matrices, hidden, y)))
    return 0;
} REFUSED

EXPORT int moekit_fetch(int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets, const Expert* matrices) try {
    fetch(experts, dim, ff, offsets, matrices);
    return 0;
} REFUSED

EXPORT int moekit_backward_rows(int s_bf16, int w_bf16, int64_t experts, int64_t dim, int64_t ff, const int64_t* offsets,
                                const int64_t* tokens, int threads, const void* dy, int64_t ldy, const void* gate_up,
                                const void* down, const float* weights, const void* hidden, void* d_hidden, void* act,
                                void* dx, float* d_weights) try {
    const Shape s{experts, dim, ff, offsets, tokens, threads};
    BY_TYPE((backward_rows<S, W>(s, (const S*)dy, ldy, (const W*)gate_up, (const W*)down, weights, (const S*)hidden,
                                 (S*)d_hidden, (S*)act, (S*)dx, d_weights)))
    return 0;
} REFUSED

EXPORT int moekit_weight_gradient(int s_bf16, int w_bf16, int64_t experts, const int64_t* offsets, const int64_t* tokens,
                                  int threads, const void* left, int64_t ldl, int left_is_gathered, int64_t height,
                                  const void* right, int64_t ldr, int right_is_gathered, int64_t width, void* gradient) try {
    const Shape s{experts, 0, 0, offsets, tokens, threads};
    BY_TYPE((weight_gradient<S, W>(s, (const S*)left, ldl, left_is_gathered, height, (const S*)right, ldr,
                                   right_is_gathered, width, (W*)gradient)))
    return 0;
} REFUSED

EXPORT int moekit_routed_experts_bytes(int s_bf16, const RoutedExperts* s, int64_t* bytes) try {
    *bytes = s_bf16 ? KeptExperts<bf16>(*s, nullptr).bytes : KeptExperts<float>(*s, nullptr).bytes;
    return 0;
} REFUSED

// matrices: one an expert, all of one kind.
EXPORT int moekit_routed_experts(int s_bf16, const RoutedExperts* s, const void* x, const Expert* matrices, char* kept, const void* plus, void* y) try {
    BY_ROWS(s_bf16, (routed_experts(*s, (const S*)x, matrices, kept, (const S*)plus, (S*)y)))
    return 0;
} REFUSED

EXPORT int moekit_routed_experts_backward(int s_bf16, int w_bf16, const RoutedExperts* s, const void* x, const void* gate_up, const void* down,
                                          char* kept, const void* dy, void* dx, float* d_weights, void* d_gate_up, void* d_down) try {
    BY_TYPE((routed_experts_backward<S, W>(*s, (const S*)x, (const W*)gate_up, (const W*)down, kept, (const S*)dy, (S*)dx, d_weights,
                                           (W*)d_gate_up, (W*)d_down)))
    return 0;
} REFUSED

EXPORT int moekit_decode(const DecodeModel* model, int64_t batch, const int64_t* ids, const int64_t* lengths, float* logits,
                         int threads) try {
    BY_ROWS(model->cache_bf16, (decode_step<S>(*model, batch, ids, lengths, logits, threads)))
    return 0;
} REFUSED
