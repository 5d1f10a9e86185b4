// The gradients of attention, by blocks of keys; a thread also holds those of the queries of the heads that it works on.

#pragma once

#include "attention.h"

namespace {

constexpr int64_t QUERIES = 128;  // queries that meet a block of keys at once
static_assert(QUERIES % TILE_ROWS == 0 && KEYS % QUERIES == 0, "blocks of queries begin where blocks of keys do");

// The gradients of q, k and v, laid out as y is: one task a head of keys, with all heads of queries that share it.
// Scores are formed keys by queries, so that both products over queries read them as they lie.
template <class S>
void attention_backward(const Attention& s, const S* q, const S* k, const S* v, const S* y, const float* log_sums, const S* dy,
                        S* dq, S* dk, S* dv) {
    typedef Product<S> P;
    constexpr int each = Units<P>::each;
    const int64_t dp = Units<P>::padded(s.d), vp = Units<P>::padded(s.dv), dc = up(s.d, PANEL), vc = up(s.dv, PANEL);
    const int64_t group = s.heads / s.kv_heads, length = up(s.length, TILE_ROWS);
    const Strides at_y = s.rows(s.heads, s.dv), at_dq = s.rows(s.heads, s.d);
    const Strides at_dk = s.rows(s.kv_heads, s.d), at_dv = s.rows(s.kv_heads, s.dv);
    const bool flip = is_bf16<P>() && use_amx;
    const size_t bytes = room(group * length * dc, 4) + 2 * room(group * length, 4) + room(length, 4) + room(KEYS * dc, 4) +
                         room(KEYS * vc, 4) + 2 * room(TILE_ROWS * PANEL, 4) + room((KEYS + TILE_ROWS) * dp, sizeof(P)) +
                         room((KEYS + TILE_ROWS) * vp, sizeof(P)) + room(KEYS * dc, sizeof(P)) + room(QUERIES * dc, sizeof(P)) +
                         room(QUERIES * vc, sizeof(P)) + room(TILE_ROWS * dp, sizeof(P)) + room(TILE_ROWS * vp, sizeof(P)) +
                         4 * room(KEYS * QUERIES, sizeof(P));
#pragma omp parallel num_threads(s.threads)
    {
        AmxTiles tiles;
        scratch.reserve_in_loop(bytes);
        float* d_queries = scratch.take<float>(group * length * dc);
        float* highs = scratch.take<float>(group * length);   // log-sum-exp; infinite behind the end: no share
        float* deltas = scratch.take<float>(group * length);  // y dy, what every score's gradient loses
        int32_t* own = scratch.take<int32_t>(length);
        float* d_keys = scratch.take<float>(KEYS * dc);
        float* d_values = scratch.take<float>(KEYS * vc);
        float* c = scratch.take<float>(TILE_ROWS * PANEL);
        float* e = scratch.take<float>(TILE_ROWS * PANEL);
        P* keys = scratch.take<P>((KEYS + TILE_ROWS) * dp);
        P* values = scratch.take<P>((KEYS + TILE_ROWS) * vp);
        P* key_panels = scratch.take<P>(KEYS * dc);
        P* query_panels = scratch.take<P>(QUERIES * dc);
        P* dy_panels = scratch.take<P>(QUERIES * vc);
        P* turned_q = scratch.take<P>(TILE_ROWS * dp);
        P* turned_dy = scratch.take<P>(TILE_ROWS * vp);
        P* shares = scratch.take<P>(KEYS * QUERIES);
        P* d_scores = scratch.take<P>(KEYS * QUERIES);
        unit* paired = (unit*)scratch.take<P>(KEYS * QUERIES);
        unit* flipped = (unit*)scratch.take<P>(KEYS * QUERIES);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < s.batch * s.kv_heads; t++) {
            const int64_t b = t / s.kv_heads, kv = t % s.kv_heads;
            const int32_t* ids = padded_ids(own, s, b);
            std::fill(d_queries, d_queries + group * length * dc, 0.0f);
            for (int64_t g = 0; g < group; g++)
                for (int64_t i = 0; i < length; i++) {
                    const int64_t h = kv * group + g, from = at_y.at(b, i, h);
                    highs[g * length + i] = i < s.length ? log_sums[(b * s.heads + h) * s.length + i] : INFINITY;
                    vec sum = {};
                    float rest = 0;
                    int64_t n = 0;
                    for (; i < s.length && n + LANES <= s.dv; n += LANES) sum += load(y + from + n) * load(dy + from + n);
                    for (; i < s.length && n < s.dv; n++) rest += to_float(y[from + n]) * to_float(dy[from + n]);
                    deltas[g * length + i] = total(sum) + rest;
                }
            for (int64_t key = 0; key < s.length; key += KEYS) {
                const int64_t taken = std::min(KEYS, s.length - key), deep = Units<P>::padded(taken);
                gather(keys, k + s.k.at(b, key, kv), s.k.row, (const int64_t*)nullptr, taken, s.d, dp);
                gather(values, v + s.v.at(b, key, kv), s.v.row, (const int64_t*)nullptr, taken, s.dv, vp);
                pack_panels(key_panels, k + s.k.at(b, key, kv), s.k.row, s.d, taken);
                std::fill(d_keys, d_keys + KEYS * dc, 0.0f);
                std::fill(d_values, d_values + KEYS * vc, 0.0f);
                for (int64_t g = 0; g < group; g++)
                    for (int64_t begin = s.causal ? key : 0; begin < s.length; begin += QUERIES) {
                        const int64_t count = std::min(QUERIES, s.length - begin), wide = Units<P>::padded(count);
                        const int64_t h = kv * group + g;
                        if (strangers(ids, key, key + taken, begin, begin + count)) continue;
                        const S *from_q = q + s.q.at(b, begin, h), *from_dy = dy + at_y.at(b, begin, h);
                        pack_panels(query_panels, from_q, s.q.row, s.d, count);
                        pack_panels(dy_panels, from_dy, at_y.row, s.dv, count);
                        for (int64_t i = 0; i < count; i += PANEL) {  // a panel of queries with all keys that it may see
                            const int width = (int)std::min<int64_t>(PANEL, count - i);
                            const int64_t seen = s.causal ? std::min(taken, up(begin + i + 1, TILE_ROWS) - key) : taken;
                            pack_transposed(turned_q, from_q + i * s.q.row, s.q.row, width, s.d);
                            pack_transposed(turned_dy, from_dy + i * at_y.row, at_y.row, width, s.dv);
                            const float *high = highs + g * length + begin + i, *delta = deltas + g * length + begin + i;
                            for (int64_t m = 0; m < seen; m += TILE_ROWS) {
                                const int64_t height = std::min<int64_t>(TILE_ROWS, taken - m);
                                P *share = shares + m * QUERIES + i, *d_score = d_scores + m * QUERIES + i;
                                if (strangers(ids, key + m, key + m + height, begin + i, begin + i + width)) {
                                    for (int64_t j = 0; j < height; j++)
                                        for (int w = 0; w < PANEL; w += LANES) {
                                            store(share + j * QUERIES + w, vec{});
                                            store(d_score + j * QUERIES + w, vec{});
                                        }
                                    continue;
                                }
                                multiply_tile(height, dp, keys + m * dp, dp / each, 1, turned_q, c);
                                multiply_tile(height, vp, values + m * vp, vp / each, 1, turned_dy, e);
                                const bool all = !s.causal || key + m + height - 1 <= begin + i;
                                for (int64_t j = 0; j < height; j++)
                                    for (int w = 0; w < PANEL; w += LANES) {
                                        vec p = decayed(load(c + j * PANEL + w) * s.scale - load(high + w));
                                        if (!all) p = counting(begin + i + w) >= (int32_t)(key + m + j) ? p : vec{};
                                        if (ids) p = load(ids + begin + i + w) == ids[key + m + j] ? p : vec{};
                                        store(share + j * QUERIES + w, p);
                                        p *= (load(e + j * PANEL + w) - load(delta + w)) * s.scale;
                                        store(d_score + j * QUERIES + w, p);
                                    }
                            }
                        }
                        for (int64_t m = 0; m < taken; m += TILE_ROWS) {
                            const int64_t first = s.causal ? std::max<int64_t>(0, key + m - begin) : 0;  // before it no query sees these
                            if (first >= count) break;
                            const P *share = shares + m * QUERIES + first, *d_score = d_scores + m * QUERIES + first;
                            const int64_t height = std::min<int64_t>(TILE_ROWS, taken - m), rs = QUERIES / each;
                            for (int64_t n = 0; n < s.dv; n += PANEL) {
                                multiply_tile<P, Out::ADD>(height, wide - first, share, rs, 1, dy_panels + n * wide + first * PANEL, d_values + m * vc + n, vc);
                            }
                            for (int64_t n = 0; n < s.d; n += PANEL) {
                                multiply_tile<P, Out::ADD>(height, wide - first, d_score, rs, 1, query_panels + n * wide + first * PANEL, d_keys + m * dc + n, dc);
                            }
                        }
                        const unit* left = (const unit*)d_scores;
                        const int64_t below = s.causal ? std::min(deep, up(begin + count, TILE_ROWS) - key) : deep;
                        if (each > 1) {
                            const int64_t rows = std::min(taken, below);
                            pack((P*)paired, d_scores, QUERIES, (const int64_t*)nullptr, QUERIES, QUERIES, rows);
                            left = paired;
                        }
                        if (flip) {
                            transpose_units(flipped, paired, below / each, QUERIES);
                            left = flipped;
                        }
                        const int64_t rs = flip ? below / each : 1, ks = flip ? 1 : QUERIES;
                        for (int64_t i = 0; i < count; i += TILE_ROWS) {
                            const int64_t height = std::min<int64_t>(TILE_ROWS, count - i);
                            const int64_t depth = s.causal ? std::min(below, begin + i + TILE_ROWS - key) : below;
                            float* d_query = d_queries + (g * length + begin + i) * dc;
                            for (int64_t n = 0; n < s.d; n += PANEL) {
                                multiply_tile<P, Out::ADD>(height, depth, (const P*)(left + i * rs), rs, ks, key_panels + n * deep, d_query + n, dc);
                            }
                        }
                    }
                for (int64_t m = 0; m < taken; m++) {
                    store_wide(dk + at_dk.at(b, key + m, kv), d_keys + m * dc, s.d);
                    store_wide(dv + at_dv.at(b, key + m, kv), d_values + m * vc, s.dv);
                }
            }
            for (int64_t g = 0; g < group; g++)
                for (int64_t i = 0; i < s.length; i++)
                    store_wide(dq + at_dq.at(b, i, kv * group + g), d_queries + (g * length + i) * dc, s.d);
        }
    }
}

}  // namespace
