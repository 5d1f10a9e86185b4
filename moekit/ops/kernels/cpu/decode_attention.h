// Attention of a decoding step: each sequence's new token over what the cache keeps of it. All threads run it together and
// meet three times.

#pragma once

#include "decode_model.h"

namespace {

// x[j] = exp(scale x[j]) over their sum.
inline void softmax(float* x, int64_t n, float scale) {
    const float high = *std::max_element(x, x + n);
    vec sums = {};
    for (int64_t j = 0; j < n; j += LANES) {
        vec part = splat(-INFINITY);
        const int64_t width = std::min<int64_t>(LANES, n - j);
        memcpy(&part, x + j, width * 4);
        sums += part = decayed((part - high) * scale);
        memcpy(x + j, &part, width * 4);
    }
    const float inverse = 1 / total(sums);
    for (int64_t j = 0; j < n; j++) x[j] *= inverse;
}

constexpr int64_t AHEAD = 8;  // cached positions, or rows of a matrix, that are asked for before they are read

// Turns the pairs (x[i step], x[i step + apart]) by their angles.
inline void turn(float* x, int64_t step, int64_t apart, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float p = x[i * step], q = x[i * step + apart];
        x[i * step] = p * cos[i] - q * sin[i];
        x[i * step + apart] = q * cos[i] + p * sin[i];
    }
}

// out[m * ldo + i] += the sum of by[m * ldb + j] times number i of row j, for M rows of `by` and N of ours.
template <int M, int N, class T>
void add_rows(const T* rows, int64_t stride, int64_t width, const float* by, int64_t ldb, float* out, int64_t ldo) {
    vec factor[M][N];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < N; j++) factor[m][j] = splat(by[m * ldb + j]);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec b[N];
        for (int j = 0; j < N; j++) {
            b[j] = load(rows + j * stride + i);
            __builtin_prefetch(rows + (AHEAD + j) * stride + i, 0, 3);
        }
        for (int m = 0; m < M; m++) {
            vec sum = load(out + m * ldo + i);
            for (int j = 0; j < N; j++) sum += factor[m][j] * b[j];
            store(out + m * ldo + i, sum);
        }
    }
    for (; i < width; i++)
        for (int m = 0; m < M; m++)
            for (int j = 0; j < N; j++) out[m * ldo + i] += by[m * ldb + j] * to_float(rows[j * stride + i]);
}

template <int M, class T>
void mix_of(const T* rows, int64_t stride, int64_t count, int64_t width, const float* by, int64_t ldb, float* out, int64_t ldo) {
    for (int m = 0; m < M; m++) std::fill_n(out + m * ldo, width, 0.0f);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) add_rows<M, 4>(rows + j * stride, stride, width, by + j, ldb, out, ldo);
    for (; j < count; j++) add_rows<M, 1>(rows + j * stride, stride, width, by + j, ldb, out, ldo);
}

// The product of `by` (m, count) with rows that lie `stride` apart, each of them read once for FEW of `by`: any m.
template <class T>
void mix(const T* rows, int64_t stride, int64_t count, int64_t width, int64_t m, const float* by, int64_t ldb, float* out,
         int64_t ldo) {
    for (; m >= FEW; m -= FEW, by += FEW * ldb, out += FEW * ldo) mix_of<FEW>(rows, stride, count, width, by, ldb, out, ldo);
    if (m == 1) mix_of<1>(rows, stride, count, width, by, ldb, out, ldo);
    if (m == 2) mix_of<2>(rows, stride, count, width, by, ldb, out, ldo);
    if (m == 3) mix_of<3>(rows, stride, count, width, by, ldb, out, ldo);
}

// Softmax attention of `heads` queries, at most FEW, over `length` cached keys; head h reads a key or value at h's `from`.
// Position by position, all heads of it: what lies side by side is read together.
template <class C>
void attend(const C* keys, const C* values, int64_t stride, int64_t length, int64_t width, int64_t heads, const int64_t* from,
            const float* q, float scale, float* scores, int64_t lds, float* y) {
    const int64_t span = from[heads - 1] + width - from[0];
    for (int64_t j = 0; j < length; j++) {
        ask((const char*)(keys + (j + AHEAD) * stride + from[0]), 0, span * sizeof(C));
        for (int64_t h = 0; h < heads; h++) scores[h * lds + j] = dot(q + h * width, keys + j * stride + from[h], width);
    }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * lds, length, scale);
    std::fill_n(y, heads * width, 0.0f);
    for (int64_t j = 0; j < length; j += 4)
        for (int64_t h = 0; h < heads; h++) {
            const C* rows = values + j * stride + from[h];
            const int64_t taken = std::min<int64_t>(4, length - j);
            if (taken == 4)
                add_rows<1, 4>(rows, stride, width, scores + h * lds + j, lds, y + h * width, width);
            else
                for (int64_t i = 0; i < taken; i++)
                    add_rows<1, 1>(rows + i * stride, stride, width, scores + h * lds + j + i, lds, y + h * width, width);
        }
}

// Multi-head and grouped-query attention.
template <class C> void head_attention(const DecodeModel& model, const DecodeLayer& l, const Step& s) {
    const int64_t d = model.dim, hd = model.head_dim, half = hd / 2, all_heads = model.heads + model.kv_heads;
    const int64_t wide = model.heads * hd, narrow = model.kv_heads * hd, entry = model.entry(), row = model.row();
    Rows in = s.rows(s.x, d, d);
    s.product(l.q, wide, in, s.made, row, l.q_bias);
    s.product(l.k, narrow, in, s.made + wide, row, l.k_bias);
    s.product(l.v, narrow, in, s.made + wide + narrow, row, l.v_bias);
#pragma omp barrier
    std::vector<float> scales;  // of all heads as one: known before any of them is written
    if (model.qk_norm == 2) {
        for (int64_t b = 0; b < s.batch; b++) {
            const float *q = s.made + b * row, *k = q + wide;
            scales.push_back(1 / std::sqrt(dot(q, q, wide) / wide + model.eps));
            scales.push_back(1 / std::sqrt(dot(k, k, narrow) / narrow + model.eps));
        }
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < s.batch * all_heads; job++) {  // norm, rotate, and keep
        const int64_t b = job / all_heads, h = job % all_heads, at = s.lengths[b];
        const bool key = h >= model.heads;
        const float* norm = key ? l.kv_norm : l.q_norm;
        float* head = s.made + b * row + h * hd;
        if (model.qk_norm == 1) normed(head, norm, model.eps, hd, 1, head);
        if (model.qk_norm == 2)
            for (int64_t i = 0; i < hd; i++) head[i] *= scales[2 * b + key] * norm[(key ? h - model.heads : h) * hd + i];
        turn(head, 1, half, model.cos + at * half, model.sin + at * half, half);
        if (!key) continue;
        C* kept = (C*)l.cache + (b * model.cache_length + at) * entry + (h - model.heads) * hd;
        for (int64_t i = 0; i < hd; i++) {
            assign(kept[i], head[i]);
            assign(kept[narrow + i], head[narrow + i]);
        }
    }
    const int64_t jobs = s.batch * model.heads, last = jobs * (s.me + 1) / s.all;
    for (int64_t job = jobs * s.me / s.all, taken; job < last; job += taken) {
        const int64_t b = job / model.heads, h = job % model.heads;
        taken = std::min({(int64_t)FEW, last - job, model.heads - h});
        int64_t from[FEW];
        for (int64_t i = 0; i < taken; i++) from[i] = (h + i) * model.kv_heads / model.heads * hd;
        const C* keys = (const C*)l.cache + b * model.cache_length * entry;
        attend(keys, keys + narrow, entry, s.lengths[b] + 1, hd, taken, from, s.made + b * row + h * hd, model.softmax_scale,
               s.scores, s.longest, s.y + b * wide + h * hd);
    }
#pragma omp barrier
}

// Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), its up-projections absorbed; W is what they are in. From
// the absorbed query on a thread has its heads to itself, so that it reads their up-projections once, the cache once for
// FEW of them, and waits for nobody. Threads beyond the number of heads have none.
template <class C, class W> void latent_attention(const DecodeModel& model, const DecodeLayer& l, const Step& s) {
    const int64_t d = model.dim, heads = model.heads, hd = model.head_dim, rope = model.rope, half = rope / 2;
    const int64_t rank = model.rank, q_rank = model.q_rank, nope = hd - rope, vd = model.value_dim;
    const int64_t entry = model.entry(), row = model.row();
    float *q = s.made, *fresh = q + heads * hd, *low = fresh + entry, *absorbed = low + q_rank;
    Rows in = s.rows(s.x, d, d);
    s.product(l.k, entry, in, fresh, row, l.k_bias);
    if (q_rank)
        s.product(l.q_a, q_rank, in, low, row, l.q_bias);
    else
        s.product(l.q, heads * hd, in, q, row);
#pragma omp barrier
    for (int64_t b = s.me; b < s.batch; b += s.all) {  // norm, rotate, and keep
        float* x = fresh + b * row;
        normed(x, l.kv_norm, model.latent_eps, rank, 1, x);
        turn(x + rank, 2, 1, model.cos + s.lengths[b] * half, model.sin + s.lengths[b] * half, half);
        C* kept = (C*)l.cache + (b * model.cache_length + s.lengths[b]) * entry;
        for (int64_t i = 0; i < entry; i++) assign(kept[i], x[i]);
    }
    if (q_rank) {  // every thread for itself: that is less than meeting once more
        std::vector<float> x(s.batch * q_rank);
        for (int64_t b = 0; b < s.batch; b++) normed(low + b * row, l.q_norm, model.latent_eps, q_rank, 1, x.data() + b * q_rank);
        Rows in = s.rows(x.data(), q_rank, q_rank);
        s.product(l.q, heads * hd, in, q, row);
    }
#pragma omp barrier
    const int64_t first = heads * s.me / s.all, last = heads * (s.me + 1) / s.all;
    const W* up = (const W*)l.v.data;  // each head's (nope + value_dim, rank)
    for (int64_t h = first; h < last; h++) {
        mix(up + h * (nope + vd) * rank, rank, nope, rank, s.batch, q + h * hd, row, absorbed + h * entry, row);
        for (int64_t b = 0; b < s.batch; b++) {
            float* x = absorbed + b * row + h * entry + rank;
            std::copy_n(q + b * row + h * hd + nope, rope, x);
            turn(x, 2, 1, model.cos + s.lengths[b] * half, model.sin + s.lengths[b] * half, half);
        }
    }
    for (int64_t b = 0; b < s.batch; b++) {
        const C* keys = (const C*)l.cache + b * model.cache_length * entry;
        const int64_t length = s.lengths[b] + 1;
        for (int64_t h = first; h < last; h += FEW) {
            const int64_t together = std::min<int64_t>(FEW, last - h);
            float* x = absorbed + b * row + h * entry;
            rows_with(Plain<C>(keys, nullptr, entry), 0, length, x, entry, together, s.scores, s.longest);
            for (int64_t i = 0; i < together; i++) softmax(s.scores + i * s.longest, length, model.softmax_scale);
            mix(keys, entry, length, rank, together, s.scores, s.longest, x, entry);
        }
    }
    for (int64_t h = first; h < last; h++) {
        const Plain<W> values(up + (h * (nope + vd) + nope) * rank, nullptr, rank);
        rows_with(values, 0, vd, absorbed + h * entry, row, s.batch, s.y + h * vd, heads * vd);
    }
#pragma omp barrier
}

}  // namespace
