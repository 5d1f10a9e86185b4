// The library's functions for blocks of a model. Alone in a file: beside them the compiler lays out the experts' products worse.

#include "interface.h"

#include "block.h"

// x_bf16, s_bf16: of what kind the stream is, and the rows that are multiplied.
#define BY_STREAM(call)                        \
    if (x_bf16) {                              \
        typedef bf16 X; typedef bf16 S; call;  \
    } else if (s_bf16) {                       \
        typedef float X; typedef bf16 S; call; \
    } else {                                   \
        typedef float X; typedef float S; call; \
    }

EXPORT int moekit_block_bytes(int x_bf16, int s_bf16, const Block* b, int64_t* bytes) try {
    BY_STREAM((*bytes = KeptBlock<X, S>(*b, nullptr, true).bytes))
    return 0;
} REFUSED

// One block after another; one alone where something is kept.
EXPORT int moekit_blocks(int x_bf16, int s_bf16, int64_t count, const Block* b, const void* x, const void* delta, char* kept, void* stream, void* y) try {
    for (int64_t i = 0; i < count; i++, x = stream, delta = y) BY_STREAM((block(b[i], (const X*)x, (const S*)delta, kept, (X*)stream, (S*)y)))
    return 0;
} REFUSED

// x: null where something was added to it.
EXPORT int moekit_block_backward(int x_bf16, int s_bf16, int w_bf16, const Block* b, const void* x, const void* stream, char* kept,
                                 const void* d_stream, const void* dy, void* dx, void* d_delta, const BlockGradients* gradients) try {
    BY_STREAM((block_backward(*b, w_bf16, (const X*)x, (const X*)stream, kept, (const X*)d_stream, (const S*)dy, (X*)dx, (S*)d_delta, *gradients)))
    return 0;
} REFUSED
