// The native CPU kernels as a library.
//
// A plain C interface without torch's headers. One product is at the bottom, a block of rows times a packed panel of
// PANEL columns; what is around it (gather, SiLU * up, routing weights, gradients) works on its small float32 tile while
// that is in the cache. Three inner products exist, chosen when these files are compiled for the machine: AMX and AVX-512
// BF16 for bfloat16, and one in vectors that any compiler lowers (AVX-512, AVX2, NEON, SSE) for float32, which also serves
// bfloat16 where the machine has no such unit. No shape is special: blocks are fixed, what is left over is padded.
//
// Elements: S is what rows are stored in (activations), W what weights are stored in, P what is multiplied.
// A unit is 32 bits that lie together along the summed dimension: one float, or two bfloat16.
//
// The functions lie in three files, which are compiled side by side: dense.cpp, experts.cpp and blocks.cpp.

#pragma once

#include <new>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What ends a function of the library: each returns whether memory was refused, in which case nothing that it writes is to
// be used.
#define REFUSED                     \
    catch (const std::bad_alloc&) { \
        return 1;                   \
    }

// What rows are, bfloat16 or float32.
#define BY_ROWS(bf16_rows, call) \
    if (bf16_rows) {             \
        typedef bf16 S; call;    \
    } else {                     \
        typedef float S; call;   \
    }
// s_bf16, w_bf16: whether rows and weights are bfloat16 (else float32); rows in float32 need weights in float32.
#define BY_TYPE(call)                          \
    if (s_bf16 && w_bf16) {                    \
        typedef bf16 S; typedef bf16 W; call;  \
    } else if (s_bf16) {                       \
        typedef bf16 S; typedef float W; call; \
    } else {                                   \
        typedef float S; typedef float W; call; \
    }
