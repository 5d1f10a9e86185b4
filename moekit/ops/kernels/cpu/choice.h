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

// Where the first number is that equals one of them.
inline int64_t first(const int32_t* x, int32_t number) {
    int64_t at = 0;
#if LANES == 16
    for (;; at += LANES)
        if (const __mmask16 equal = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(x + at), _mm512_set1_epi32(number))) return at + __builtin_ctz(equal);
#endif
    while (x[at] != number) at++;
    return at;
}

// ids (k): the columns of the k largest of `width` numbers, best first; among equals the lower wins. `left` is memory for
// whole vectors.
inline void largest(int64_t width, int64_t k, const float* x, int64_t* ids, int32_t* left) {
    const int64_t padded = up(width, LANES);
    by_vector(width, [&](int64_t i, int64_t rest) {
        const ivec order = order_of(load(x + i, rest));
        memcpy(left + i, &order, sizeof order);
    });
    std::fill(left + width, left + padded, INT32_MIN);
    for (int64_t j = 0; j < k; j++) {
        const int64_t at = ids[j] = first(left, greatest(left, padded));
        left[at] = INT32_MIN;
    }
}

inline void largest(int64_t rows, int64_t width, int64_t k, const float* x, int64_t* ids, int threads) {
#pragma omp parallel num_threads(threads)
    {
        scratch.reserve_in_loop(room(up(width, LANES), 4));
        int32_t* left = scratch.take<int32_t>(up(width, LANES));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) largest(width, k, x + r * width, ids + r * k, left);
    }
}

// How rows, `sequences` equal runs of them, choose k of `width` experts each.
struct Routes {
    int64_t sequences, length, width, k;
    bool sigmoid, normed;  // affinities: sigmoid or softmax; weights: divided by the sum of those chosen
    float factor;
    int threads;
};
constexpr float SMALLEST_SUM = 1e-20f;  // is added to sums that are divided by

// scores (rows, width), affinities of the logits; ids and weights (rows, k), chosen by scores + bias (null: 0), with their own
// scores times the factor; log_sums (rows), log-sum-exp of the logits. Of each sequence, sums of scores (as shares of
// their row's), of squared log_sums, and how often each expert was chosen.
inline void route(const Routes& s, const float* logits, const float* bias, float* scores, int64_t* ids, float* weights, float* log_sums,
                  float* score_sums, float* squared, int64_t* counts) {
    const int64_t width = s.width, k = s.k;
#pragma omp parallel num_threads(s.threads)
    {
        scratch.reserve_in_loop(3 * room(up(width, LANES), 4));
        int32_t* left = scratch.take<int32_t>(up(width, LANES));
        float *choice = scratch.take<float>(up(width, LANES)), *part = scratch.take<float>(up(width, LANES));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s.sequences * s.length; r++) {
            const float* x = logits + r * width;
            float *p = scores + r * width, weight = SMALLEST_SUM;
            const int64_t whole = width / LANES * LANES;
            vec most = splat(-INFINITY), sums = {};
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec a = load(x + i);
                most = a > most ? a : most;
            }
            float high = greatest(most);
            for (int64_t i = whole; i < width; i++) high = std::max(high, x[i]);
            by_vector(width, [&](int64_t i, int64_t rest) {
                const vec e = decayed(load(x + i, rest) - high);
                store(p + i, e, rest);
                if (rest >= LANES) sums += e;
            });
            float sum = total(sums);
            for (int64_t i = whole; i < width; i++) sum += p[i];
            log_sums[r] = high + std::log(sum);
            const float scale = 1 / sum;
            by_vector(width, [&](int64_t i, int64_t rest) { store(p + i, s.sigmoid ? sigmoid(load(x + i, rest)) : load(p + i, rest) * scale, rest); });
            if (bias) by_vector(width, [&](int64_t i, int64_t rest) { store(choice + i, load(p + i, rest) + load(bias + i, rest), rest); });
            largest(width, k, bias ? choice : p, ids + r * k, left);
            for (int64_t j = 0; j < k; j++) weight += p[ids[r * k + j]];
            for (int64_t j = 0; j < k; j++) weights[r * k + j] = p[ids[r * k + j]] / (s.normed ? weight : 1.0f) * s.factor;
        }
#pragma omp for schedule(static)
        for (int64_t q = 0; q < s.sequences; q++) {
            float* to = score_sums + q * width;
            double squares = 0;
            std::fill(to, to + width, 0.0f);
            std::fill(counts + q * width, counts + (q + 1) * width, 0);
            for (int64_t begin = 0; begin < s.length; begin += 64) {  // sums of sums: a long one would lose its last digits
                std::fill(part, part + width, 0.0f);
                for (int64_t r = q * s.length + begin; r < q * s.length + std::min(begin + 64, s.length); r++) {
                    const float* p = scores + r * width;
                    float sum = SMALLEST_SUM;
                    for (int64_t i = 0; s.sigmoid && i < width; i++) sum += p[i];
                    const float share = s.sigmoid ? 1 / sum : 1.0f;
                    by_vector(width, [&](int64_t i, int64_t rest) { store(part + i, load(part + i, rest) + load(p + i, rest) * share, rest); });
                    for (int64_t j = 0; j < k; j++) counts[q * width + ids[r * k + j]]++;
                    squares += (double)log_sums[r] * log_sums[r];
                }
                by_vector(width, [&](int64_t i, int64_t rest) { store(to + i, load(to + i, rest) + load(part + i, rest), rest); });
            }
            squared[q] = (float)squares;
        }
    }
}

// d_logits from the gradients of scores, weights, score_sums and squared; null ones are 0.
inline void route_backward(const Routes& s, const float* logits, const float* scores, const int64_t* ids, const float* log_sums,
                           const float* d_scores, const float* d_weights, const float* d_sums, const float* d_squared, float* d_logits) {
    const int64_t width = s.width, k = s.k;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t r = 0; r < s.sequences * s.length; r++) {
        const int64_t q = r / s.length, *chosen = ids + r * k;
        const float *p = scores + r * width, *d_share = d_sums ? d_sums + q * width : nullptr;
        float *d = d_logits + r * width, sum = SMALLEST_SUM, along = 0, weight = SMALLEST_SUM, dot = 0;
        if (d_scores)
            memcpy(d, d_scores + r * width, width * sizeof(float));
        else
            std::fill(d, d + width, 0.0f);
        for (int64_t i = 0; s.sigmoid && d_share && i < width; i++) {
            sum += p[i];
            along += p[i] * d_share[i];
        }
        if (d_share) {
            const float scale = s.sigmoid ? 1 / sum : 1.0f, loss = s.sigmoid ? along / sum : 0.0f;
            by_vector(width, [&](int64_t i, int64_t rest) { store(d + i, load(d + i, rest) + (load(d_share + i, rest) - loss) * scale, rest); });
        }
        for (int64_t j = 0; d_weights && s.normed && j < k; j++) {
            weight += p[chosen[j]];
            dot += p[chosen[j]] * d_weights[r * k + j];
        }
        for (int64_t j = 0; d_weights && j < k; j++)
            d[chosen[j]] += (s.normed ? (d_weights[r * k + j] - dot / weight) / weight : d_weights[r * k + j]) * s.factor;
        const float twice = d_squared ? 2 * log_sums[r] * d_squared[q] : 0.0f;  // of log_sums
        float mean = 0;
        for (int64_t i = 0; !s.sigmoid && i < width; i++) mean += p[i] * d[i];
        by_vector(width, [&](int64_t i, int64_t rest) {
            const vec a = load(p + i, rest), from = load(d + i, rest);
            const vec to = s.sigmoid ? from * a * (1.0f - a) + twice * decayed(load(logits + r * width + i, rest) - log_sums[r]) : a * (from - mean + twice);
            store(d + i, to, rest);
        });
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
