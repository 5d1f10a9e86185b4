// Softmax attention, causal or not and within documents, by blocks of queries.
//
// No matrix of scores is kept, only each query's log-sum-exp: a thread holds what one block needs. All is done in tiles of
// TILE_ROWS queries and keys; those that lie ahead, or in other documents, are passed over. Sums have one order, whatever
// the number of threads.

#pragma once

#include "few.h"
#include "packing.h"

namespace {

constexpr int64_t KEYS = 256;     // keys that are packed at once
constexpr int64_t QUERY_BLOCK = 256;  // queries of one task
static_assert(KEYS % TILE_ROWS == 0 && QUERY_BLOCK % TILE_ROWS == 0 && TILE_ROWS % PANEL == 0, "blocks are whole tiles of whole panels");

struct Sizes {  // all of 64 bits: this comes as one array
    int64_t batch, length, keys, heads, kv_heads, d, dv;
    Strides q, k, v;
    int64_t causal;  // 0: a query sees the keys behind it too
    // Behind the last key that the query at a position sees.
    int64_t horizon(int64_t position) const { return causal ? std::min(keys, position + 1) : keys; }
    Strides rows(int64_t heads_of, int64_t width) const { return {length * heads_of * width, heads_of * width, width}; }
};

struct Attention : Sizes {
    float scale;
    const int64_t* offsets;   // (batch): the position of each sequence's first query among its keys; null: 0
    const int32_t* documents; // (batch, length): a query sees the keys of its own; null: of all
    int threads;
};

inline ivec counting(int64_t from) {
    ivec x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x + (int32_t)from;
}
inline ivec load(const int32_t* p) {
    ivec x;
    memcpy(&x, p, sizeof(x));
    return x;
}

// Whether no id of [a, a_end) is one of [b, b_end), told by their ranges.
inline bool strangers(const int32_t* ids, int64_t a, int64_t a_end, int64_t b, int64_t b_end) {
    if (!ids) return false;
    const auto x = std::minmax_element(ids + a, ids + a_end), y = std::minmax_element(ids + b, ids + b_end);
    return *x.second < *y.first || *y.second < *x.first;
}

// The document ids of a sequence, with what vectors read behind them.
inline const int32_t* padded_ids(int32_t* to, const Attention& s, int64_t b) {
    if (!s.documents) return nullptr;
    memcpy(to, s.documents + b * s.length, s.length * 4);
    std::fill(to + s.length, to + up(s.length, TILE_ROWS), 0);
    return to;
}

// A row of floats, padded to panels, to where it belongs.
template <class S> void store_wide(S* to, const float* row, int64_t width) {
    for (int64_t n = 0; n < width; n += PANEL) store_row(to + n, row + n, width - n);
}

// A few queries a sequence (decoding): keys and values are read as they lie, for packing would cost more than it saves.
template <class S> void attention_few(const Attention& s, const S* q, const S* k, const S* v, S* y) {
    constexpr int together = 4;  // keys
    static_assert(LANES % together == 0, "the last keys are made up with shares of zero");
    const int64_t whole_k = s.d / LANES * LANES, whole_v = s.dv / LANES * LANES;
    const Strides at_y = s.rows(s.heads, s.dv);
#pragma omp parallel num_threads(s.threads)
    {
        scratch.reserve_in_loop(room(s.d, 4) + room(up(s.keys, LANES), 4));
        float* query = scratch.take<float>(s.d);
        float* shares = scratch.take<float>(up(s.keys, LANES));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < s.batch * s.heads * s.length; t++) {
            const int64_t b = t / (s.heads * s.length), h = t / s.length % s.heads, i = t % s.length;
            const int64_t kv = h * s.kv_heads / s.heads;
            const int64_t end = s.horizon((s.offsets ? s.offsets[b] : 0) + i), last = end - 1;
            gather(query, q + s.q.at(b, i, h), s.q.row, (const int64_t*)nullptr, 1, s.d, s.d);
            float high = -INFINITY;
            for (int64_t j = 0; j < end; j += together) {
                vec sums[together] = {};
                const S* key[together];
                for (int u = 0; u < together; u++) key[u] = k + s.k.at(b, std::min(j + u, last), kv);
                for (int64_t n = 0; n < whole_k; n += LANES)
                    for (int u = 0; u < together; u++) sums[u] += load(query + n) * load(key[u] + n);
                for (int u = 0; u < together; u++) {
                    float sum = total(sums[u]);
                    for (int64_t n = whole_k; n < s.d; n++) sum += query[n] * to_float(key[u][n]);
                    shares[j + u] = j + u < end ? sum * s.scale : -INFINITY;
                    high = std::max(high, shares[j + u]);
                }
            }
            std::fill(shares + up(end, together), shares + up(end, LANES), -INFINITY);
            vec sums = {};
            for (int64_t j = 0; j < end; j += LANES) {
                const vec x = decayed(load(shares + j) - high);
                sums += x;
                store(shares + j, x);
            }
            const float inverse = 1 / total(sums);
            S* to = y + at_y.at(b, i, h);
            for (int64_t n = 0; n < s.dv; n += 4 * LANES) {  // four vectors of the output at a time, in registers
                vec out[4] = {};
                const int64_t vectors = std::min<int64_t>(4, (whole_v - n) / LANES);
                for (int64_t j = 0; j < end; j++) {
                    const S* value = v + s.v.at(b, j, kv) + n;
                    if (vectors == 4)
                        for (int w = 0; w < 4; w++) out[w] += shares[j] * load(value + w * LANES);
                    else
                        for (int64_t w = 0; w < vectors; w++) out[w] += shares[j] * load(value + w * LANES);
                }
                for (int64_t w = 0; w < vectors; w++) store(to + n + w * LANES, out[w] * inverse);
            }
            for (int64_t n = whole_v; n < s.dv; n++) {
                float sum = 0;
                for (int64_t j = 0; j < end; j++) sum += shares[j] * to_float(v[s.v.at(b, j, kv) + n]);
                assign(to[n], sum * inverse);
            }
        }
    }
}

// y (batch, length, heads, dv) and the log-sum-exp of each query's scores (batch, heads, length), which may be null.
template <class S> void attention(const Attention& s, const S* q, const S* k, const S* v, S* y, float* log_sums) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    if (s.length <= FEW && !s.documents && !log_sums) return attention_few(s, q, k, v, y);
    const int64_t dp = Units<P>::padded(s.d), vp = up(s.dv, PANEL), blocks = (s.length + QUERY_BLOCK - 1) / QUERY_BLOCK;
    const Strides at_y = s.rows(s.heads, s.dv);
    const size_t bytes = room((QUERY_BLOCK + TILE_ROWS) * dp, sizeof(P)) + room(KEYS * dp, sizeof(P)) + room(KEYS * vp, sizeof(P)) +
                         room(TILE_ROWS * KEYS, sizeof(P)) + room(TILE_ROWS * KEYS, 4) + room(TILE_ROWS * PANEL, 4) +
                         room(QUERY_BLOCK * vp, 4) + 2 * room(QUERY_BLOCK, 4) + room(TILE_ROWS * LANES, 4) + room(TILE_ROWS, 4) +
                         room(up(s.length, TILE_ROWS), 4);
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(bytes);
        P* rows = scratch.take<P>((QUERY_BLOCK + TILE_ROWS) * dp);
        P* key_panels = scratch.take<P>(KEYS * dp);
        P* value_panels = scratch.take<P>(KEYS * vp);
        P* shares = scratch.take<P>(TILE_ROWS * KEYS);
        float* scores = scratch.take<float>(TILE_ROWS * KEYS);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        float* out = scratch.take<float>(QUERY_BLOCK * vp);
        float* highs = scratch.take<float>(QUERY_BLOCK);
        float* sums = scratch.take<float>(QUERY_BLOCK);
        float* tops = scratch.take<float>(TILE_ROWS * LANES);
        float* factors = scratch.take<float>(TILE_ROWS);
        int32_t* own = scratch.take<int32_t>(up(s.length, TILE_ROWS));
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < blocks * s.batch * s.heads; t++) {
            const int64_t b = t / s.heads % s.batch, h = t % s.heads, kv = h * s.kv_heads / s.heads;
            const int64_t begin = (blocks - 1 - t / (s.batch * s.heads)) * QUERY_BLOCK;  // who sees most comes first
            const int64_t count = std::min(QUERY_BLOCK, s.length - begin), offset = s.offsets ? s.offsets[b] : 0;
            const int64_t end = s.horizon(offset + begin + count - 1);
            const int32_t* ids = padded_ids(own, s, b);
            gather(rows, q + s.q.at(b, begin, h), s.q.row, (const int64_t*)nullptr, count, s.d, dp);
            std::fill(out, out + QUERY_BLOCK * vp, 0.0f);
            std::fill(sums, sums + QUERY_BLOCK, 0.0f);
            std::fill(highs, highs + QUERY_BLOCK, -INFINITY);
            for (int64_t key = 0; key < end; key += KEYS) {
                const int64_t taken = std::min(KEYS, end - key), deep = Units<P>::padded(taken);
                if (strangers(ids, key, key + taken, begin, begin + count)) continue;
                for (int64_t n = 0; n < taken; n += PANEL) {
                    const int columns = (int)std::min<int64_t>(PANEL, taken - n);
                    pack_transposed(key_panels + n * dp, k + s.k.at(b, key + n, kv), s.k.row, columns, s.d);
                }
                pack_panels(value_panels, v + s.v.at(b, key, kv), s.v.row, s.dv, taken);
                for (int64_t m = 0; m < count; m += TILE_ROWS) {
                    const int64_t height = std::min<int64_t>(TILE_ROWS, count - m), position = offset + begin + m;
                    const int64_t seen = std::min(taken, s.horizon(position + height - 1) - key);
                    const int64_t depth = std::min(up(seen, PANEL), deep);
                    if (seen <= 0 || strangers(ids, key, key + seen, begin + m, begin + m + height)) continue;
                    std::fill(tops, tops + TILE_ROWS * LANES, -INFINITY);
                    for (int64_t n = 0; n < seen; n += PANEL) {
                        multiply_tile(height, dp, rows + m * dp, dp / each, 1, key_panels + n * dp, c);
                        const bool all = key + n + PANEL <= s.horizon(position) && !ids;
                        for (int64_t i = 0; i < height; i++)
                            for (int64_t w = 0; w < PANEL; w += LANES) {
                                vec x = load(c + i * PANEL + w) * s.scale, top = load(tops + i * LANES);
                                if (!all) x = counting(key + n + w) < (int32_t)s.horizon(position + i) ? x : splat(-INFINITY);
                                if (ids) x = load(ids + key + n + w) == ids[position + i] ? x : splat(-INFINITY);
                                store(tops + i * LANES, x > top ? x : top);
                                store(scores + i * KEYS + n + w, x);
                            }
                    }
                    for (int64_t i = 0; i < height; i++) {
                        const float before = highs[m + i], high = std::max(before, greatest(load(tops + i * LANES)));
                        const float base = high == -INFINITY ? 0 : high;
                        vec sum = {};
                        for (int64_t n = 0; n < up(seen, PANEL); n += LANES) {
                            const vec x = decayed(load(scores + i * KEYS + n) - base);
                            sum += x;
                            store(shares + i * KEYS + n, x);
                        }
                        factors[i] = std::exp(before - base);
                        sums[m + i] = sums[m + i] * factors[i] + total(sum);
                        highs[m + i] = high;
                    }
                    for (int64_t n = 0; n < s.dv; n += PANEL) {
                        multiply_tile(height, depth, shares, KEYS / each, 1, value_panels + n * deep, c);
                        for (int64_t i = 0; i < height; i++)
                            for (int w = 0; w < PANEL; w += LANES) {
                                float* to = out + (m + i) * vp + n + w;
                                store(to, load(to) * factors[i] + load(c + i * PANEL + w));
                            }
                    }
                }
            }
            for (int64_t i = 0; i < count; i++) {
                const float inverse = 1 / sums[i];
                float* row = out + i * vp;
                for (int64_t n = 0; n < vp; n += LANES) store(row + n, load(row + n) * inverse);
                store_wide(y + at_y.at(b, begin + i, h), row, s.dv);
                if (log_sums) log_sums[(b * s.heads + h) * s.length + begin + i] = highs[i] + std::log(sums[i]);
            }
        }
    }
}

}  // namespace
