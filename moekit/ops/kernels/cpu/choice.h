// Who computes what: each token's best experts, and the rows of each expert.

#pragma once

#include "numbers.h"

namespace {

// A whole number that orders as x does, no number before all; INT32_MIN is behind all.
inline ivec order_of(vec x) {
    ivec bits;
    x += 0.0f;  // -0 is 0
    memcpy(&bits, &x, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX;
    return x != x ? bits * 0 + INT32_MAX : bits;
}

inline int32_t greatest(const int32_t* x, int64_t width) {
    ivec most;
    memcpy(&most, x, sizeof most);
    for (int64_t i = LANES; i < width; i += LANES) {
        ivec next;
        memcpy(&next, x + i, sizeof next);
        most = most > next ? most : next;
    }
#if LANES == 16
    return _mm512_reduce_max_epi32((__m512i)most);
#else
    int32_t best = most[0];
    for (int j = 1; j < LANES; j++) best = std::max(best, most[j]);
    return best;
#endif
}

// ids (rows, k): the columns of each row's k largest, best first; among equals the lower wins.
inline void largest(int64_t rows, int64_t width, int64_t k, const float* x, int64_t* ids, int threads) {
    const int64_t padded = (width + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
    {
        scratch.reserve(room(padded, 4));
        int32_t* left = scratch.take<int32_t>(padded);  // those not yet taken
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < padded; i += LANES) {
                float part[LANES] = {};
                if (width - i < LANES) memcpy(part, x + r * width + i, (width - i) * 4);
                const ivec order = order_of(load(width - i < LANES ? part : x + r * width + i));
                memcpy(left + i, &order, sizeof order);
            }
            std::fill(left + width, left + padded, INT32_MIN);
            for (int64_t j = 0; j < k; j++) {
                const int32_t best = greatest(left, padded);
                int64_t at = 0;
                while (left[at] != best) at++;
                ids[r * k + j] = at;
                left[at] = INT32_MIN;
            }
        }
    }
}

// The stable sort of pairs by expert: order (pairs), row -> pair; inverse (pairs), pair -> row; counts (experts + 2), pairs of
// each expert, those that are dropped (id -1), which come last, and those of no such expert, which have no row.
inline void plan(int64_t pairs, int64_t experts, const int64_t* ids, int64_t* order, int64_t* inverse, int64_t* counts) {
    const auto slot = [&](int64_t pair) { return ids[pair] == -1 ? experts : (uint64_t)ids[pair] < (uint64_t)experts ? ids[pair] : experts + 1; };
    std::fill(counts, counts + experts + 2, 0);
    for (int64_t p = 0; p < pairs; p++) counts[slot(p)]++;
    std::vector<int64_t> next(experts + 2);
    for (int64_t e = 0; e <= experts; e++) next[e + 1] = next[e] + counts[e];
    for (int64_t p = 0; p < pairs; p++) {
        const int64_t row = next[slot(p)]++;
        order[row] = p;
        inverse[p] = row;
    }
}

}  // namespace
