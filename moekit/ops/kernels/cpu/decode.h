// One decoding step of a whole model: a token per sequence in, its logits out. Every weight that is needed is read once,
// by the thread that owns its rows; the sums are float32. Threads meet six times a layer.

#pragma once

#include "few.h"
#include "fetch.h"

extern "C" {
struct DecodeLayer {
    const float *attention_norm, *ffn_norm;
    Matrix q, k, v, o;
    void* cache;  // (batch, cache_length, 2 kv_heads head_dim): keys, then values
    Expert dense;  // a dense layer's FFN, or the shared experts as one
    int64_t dense_ff;  // 0: there is none
    const Expert* routed;
    const float *router, *bias;  // (experts, dim), (experts) or null
    int64_t mapped, experts, ff, chosen, groups, chosen_groups, group_best, sigmoid, normalise;
    float scale;
};
struct DecodeModel {
    int64_t layers, dim, vocab, heads, kv_heads, head_dim, cache_length, cache_bf16;
    float eps, softmax_scale;
    const DecodeLayer* layer;
    Matrix embedding, head;
    const float *norm, *cos, *sin;  // cos and sin: (positions, head_dim / 2)
};
}

namespace {

template <class W>
void rows_with(const W& w, int64_t first, int64_t last, const float* x, int64_t ldx, int64_t count, float* out, int64_t ldo) {
    for (int64_t m = 0; m < count; m += FEW)
        dots(std::min<int64_t>(FEW, count - m), w.rows(first), last - first, x + m * ldx, ldx, out + m * ldo, ldo);
}

// out[m * ldo + n] = row n of a matrix times x's row m, for rows `first` to `last`, any m.
void rows_of(const Matrix& w, int64_t first, int64_t last, int64_t k, const float* x, int64_t ldx, int64_t count, float* out,
             int64_t ldo) {
    if (w.kind == 0) rows_with(Plain<float>(w.data, w.scales, k), first, last, x, ldx, count, out + first, ldo);
    if (w.kind == 1) rows_with(Plain<bf16>(w.data, w.scales, k), first, last, x, ldx, count, out + first, ldo);
    if (w.kind == 2) rows_with(Groups<8>(w.data, w.scales, k), first, last, x, ldx, count, out + first, ldo);
    if (w.kind == 3) rows_with(Groups<4>(w.data, w.scales, k), first, last, x, ldx, count, out + first, ldo);
}

inline float dot(const float* a, const float* b, int64_t n) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float rest = total(sum);
    for (; i < n; i++) rest += a[i] * b[i];
    return rest;
}

void normed(const float* x, const float* weight, float eps, int64_t dim, int64_t batch, float* y) {
    for (int64_t b = 0; b < batch; b++) {
        const float scale = 1 / std::sqrt(dot(x + b * dim, x + b * dim, dim) / dim + eps);
        for (int64_t i = 0; i < dim; i++) y[b * dim + i] = x[b * dim + i] * scale * weight[i];
    }
}

struct Choice {
    int64_t expert, token;
    float weight;
};

// The routing of ops/routing.py for one token: the best `chosen`, the lower id among equals.
void choose(const DecodeLayer& l, const float* logits, int64_t token, std::vector<Choice>& out) {
    const int64_t n = l.experts;
    std::vector<float> scores(n), choice(n);
    float high = -INFINITY, sum = 0;
    for (int64_t e = 0; e < n; e++) high = std::max(high, logits[e]);
    for (int64_t e = 0; e < n; e++)
        sum += scores[e] = l.sigmoid ? 1 / (1 + std::exp(-logits[e])) : std::exp(logits[e] - high);
    for (int64_t e = 0; e < n; e++) {
        if (!l.sigmoid) scores[e] /= sum;
        choice[e] = scores[e] + (l.bias ? l.bias[e] : 0);
    }
    const int64_t size = n / l.groups;
    auto best = [](std::vector<float>& values, std::vector<char>& taken) {
        int64_t at = -1;
        for (int64_t i = 0; i < (int64_t)values.size(); i++)
            if (!taken[i] && (at < 0 || values[i] > values[at])) at = i;
        taken[at] = 1;
        return at;
    };
    if (l.chosen_groups < l.groups) {
        std::vector<float> of_group(l.groups);
        std::vector<char> kept(l.groups, 0);
        for (int64_t g = 0; g < l.groups; g++) {
            std::vector<float> members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
            std::partial_sort(members.begin(), members.begin() + l.group_best, members.end(), std::greater<float>());
            for (int64_t i = 0; i < l.group_best; i++) of_group[g] += members[i];
        }
        for (int64_t i = 0; i < l.chosen_groups; i++) best(of_group, kept);
        for (int64_t e = 0; e < n; e++)
            if (!kept[e / size]) choice[e] = -INFINITY;
    }
    std::vector<char> taken(n, 0);
    float chosen_sum = 1e-20f;
    const size_t first = out.size();
    for (int64_t i = 0; i < l.chosen; i++) {
        const int64_t e = best(choice, taken);
        out.push_back({e, token, scores[e]});
        chosen_sum += scores[e];
    }
    for (size_t i = first; i < out.size(); i++) out[i].weight *= l.scale / (l.normalise ? chosen_sum : 1);
}

// Asks for the experts that the next layer will likely choose: what its router says of the present state, which one
// layer changes little.
void fetch_likely(const DecodeLayer& next, const float* x, float eps, int64_t dim, int64_t batch) {
    std::vector<float> n(batch * dim), affinity(batch * next.experts);
    std::vector<Choice> likely;
    normed(x, next.ffn_norm, eps, dim, batch, n.data());
    rows_of({next.router, nullptr, 0}, 0, next.experts, dim, n.data(), dim, batch, affinity.data(), next.experts);
    for (int64_t b = 0; b < batch; b++) choose(next, affinity.data() + b * next.experts, b, likely);
    for (const Choice& choice : likely) fetch(next.routed[choice.expert], dim, next.ff, false);
}

// Softmax attention of one head's query over `length` cached keys.
template <class C>
void attend(const C* keys, const C* values, int64_t stride, int64_t length, int64_t width, const float* q, float scale,
            float* scores, float* y) {
    float high = -INFINITY;
    for (int64_t j = 0; j < length; j++) {
        vec sum = {};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) sum += load(q + i) * load(keys + j * stride + i);
        float rest = total(sum);
        for (; i < width; i++) rest += q[i] * to_float(keys[j * stride + i]);
        scores[j] = rest * scale;
        high = std::max(high, scores[j]);
    }
    float sum = 0;
    for (int64_t j = 0; j < length; j++) sum += scores[j] = std::exp(scores[j] - high);
    std::fill(y, y + width, 0.0f);
    for (int64_t j = 0; j < length; j++) {
        const float p = scores[j] / sum;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(y + i, load(y + i) + p * load(values + j * stride + i));
        for (; i < width; i++) y[i] += p * to_float(values[j * stride + i]);
    }
}

template <class C>
void decode_step(const DecodeModel& model, int64_t batch, const int64_t* ids, const int64_t* lengths, float* logits, int threads) {
    const int64_t d = model.dim, hd = model.head_dim, half = hd / 2;
    const int64_t wide = model.heads * hd, narrow = model.kv_heads * hd, entry = 2 * narrow, row = wide + entry;
    int64_t longest = 0, widest = d, most = 0;
    for (int64_t b = 0; b < batch; b++) longest = std::max(longest, lengths[b] + 1);
    for (int64_t i = 0; i < model.layers; i++) {
        const DecodeLayer& l = model.layer[i];
        widest = std::max(widest, std::max(2 * l.dense_ff * batch, 2 * l.ff * l.chosen * batch));
        most = std::max(most, l.experts);
    }
    std::vector<float> x(batch * d), n(batch * d), qkv(batch * row), y(batch * wide), hidden(widest), routed(widest);
    std::vector<float> affinity(batch * (most + 1)), scores(threads * longest);
    std::vector<Choice> choices;
    std::vector<int64_t> starts;  // where each visited expert's choices begin
    std::vector<float> inputs, weights;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int64_t me = 0, all = 1;
#endif
        auto part = [&](int64_t rows, int64_t who) { return std::min(rows, (rows * who / all + 3) / 4 * 4); };
        std::vector<float> out(batch * d);
#pragma omp single
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < d; i++)
                x[b * d + i] = model.embedding.kind ? to_float(((const bf16*)model.embedding.data)[ids[b] * d + i])
                                                    : ((const float*)model.embedding.data)[ids[b] * d + i];
        for (int64_t at = 0; at < model.layers; at++) {
            const DecodeLayer& l = model.layer[at];
#pragma omp single
            normed(x.data(), l.attention_norm, model.eps, d, batch, n.data());
            rows_of(l.q, part(wide, me), part(wide, me + 1), d, n.data(), d, batch, qkv.data(), row);
            rows_of(l.k, part(narrow, me), part(narrow, me + 1), d, n.data(), d, batch, qkv.data() + wide, row);
            rows_of(l.v, part(narrow, me), part(narrow, me + 1), d, n.data(), d, batch, qkv.data() + wide + narrow, row);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t job = 0; job < batch * (model.heads + model.kv_heads); job++) {  // rotate, and keep
                const int64_t b = job / (model.heads + model.kv_heads), h = job % (model.heads + model.kv_heads);
                float* head = qkv.data() + b * row + h * hd;
                const float *cos = model.cos + lengths[b] * half, *sin = model.sin + lengths[b] * half;
                for (int64_t i = 0; i < half; i++) {
                    const float p = head[i], q = head[i + half];
                    head[i] = p * cos[i] - q * sin[i];
                    head[i + half] = q * cos[i] + p * sin[i];
                }
                if (h < model.heads) continue;
                C* kept = (C*)l.cache + (b * model.cache_length + lengths[b]) * entry + (h - model.heads) * hd;
                for (int64_t i = 0; i < hd; i++) {
                    assign(kept[i], head[i]);
                    assign(kept[narrow + i], head[narrow + i]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t job = 0; job < batch * model.heads; job++) {
                const int64_t b = job / model.heads, h = job % model.heads;
                const C* keys = (const C*)l.cache + b * model.cache_length * entry + h * model.kv_heads / model.heads * hd;
                attend(keys, keys + narrow, entry, lengths[b] + 1, hd, qkv.data() + b * row + h * hd, model.softmax_scale,
                       scores.data() + me * longest, y.data() + b * wide + h * hd);
            }
            const int64_t first = part(d, me), last = part(d, me + 1);
            rows_of(l.o, first, last, wide, y.data(), wide, batch, out.data(), d);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = first; i < last; i++) x[b * d + i] += out[b * d + i];
#pragma omp barrier
#pragma omp single
            normed(x.data(), l.ffn_norm, model.eps, d, batch, n.data());
            if (l.experts) {
                const Matrix router{l.router, nullptr, 0};
                rows_of(router, part(l.experts, me), part(l.experts, me + 1), d, n.data(), d, batch, affinity.data(), l.experts);
#pragma omp barrier
#pragma omp single
                {
                    choices.clear();
                    for (int64_t b = 0; b < batch; b++) choose(l, affinity.data() + b * l.experts, b, choices);
                    std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
                    starts.clear();
                    for (size_t i = 0; i < choices.size(); i++)
                        if (!i || choices[i].expert != choices[i - 1].expert) starts.push_back(i);
                    starts.push_back(choices.size());
                    if (l.mapped)
                        for (size_t s = 0; s + 1 < starts.size(); s++) fetch(l.routed[choices[starts[s]].expert], d, l.ff, true);
                    if (at + 1 < model.layers && model.layer[at + 1].mapped)
                        fetch_likely(model.layer[at + 1], x.data(), model.eps, d, batch);
                    inputs.resize(choices.size() * d);
                    for (size_t i = 0; i < choices.size(); i++)
                        std::copy_n(n.data() + choices[i].token * d, d, inputs.data() + i * d);
                }
                const int64_t f = l.ff, begin = part(f, me), end = part(f, me + 1);
                for (size_t s = 0; s + 1 < starts.size(); s++) {
                    const int64_t c = starts[s], count = starts[s + 1] - c;
                    const Expert& expert = l.routed[choices[c].expert];
                    float* h = routed.data() + c * 2 * f;
                    rows_of(expert.gate, begin, end, d, inputs.data() + c * d, d, count, h, 2 * f);
                    rows_of(expert.up, begin, end, d, inputs.data() + c * d, d, count, h + f, 2 * f);
                    for (int64_t m = 0; m < count; m++) swiglu(h + m * 2 * f + begin, f, end - begin, h + m * 2 * f + begin);
                }
            }
            const int64_t f = l.dense_ff, begin = part(f, me), end = part(f, me + 1);
            if (f) {
                rows_of(l.dense.gate, begin, end, d, n.data(), d, batch, hidden.data(), 2 * f);
                rows_of(l.dense.up, begin, end, d, n.data(), d, batch, hidden.data() + f, 2 * f);
                for (int64_t b = 0; b < batch; b++) swiglu(hidden.data() + b * 2 * f + begin, f, end - begin, hidden.data() + b * 2 * f + begin);
            }
#pragma omp barrier
            if (f) {
                rows_of(l.dense.down, first, last, f, hidden.data(), 2 * f, batch, out.data(), d);
                for (int64_t b = 0; b < batch; b++)
                    for (int64_t i = first; i < last; i++) x[b * d + i] += out[b * d + i];
            }
            for (size_t s = 0; l.experts && s + 1 < starts.size(); s++) {
                const int64_t c = starts[s], count = starts[s + 1] - c;
                rows_of(l.routed[choices[c].expert].down, first, last, l.ff, routed.data() + c * 2 * l.ff, 2 * l.ff, count, out.data(), d);
                for (int64_t m = 0; m < count; m++)
                    for (int64_t i = first; i < last; i++)
                        x[choices[c + m].token * d + i] += choices[c + m].weight * out[m * d + i];
            }
#pragma omp barrier
        }
#pragma omp single
        normed(x.data(), model.norm, model.eps, d, batch, n.data());
        rows_of(model.head, part(model.vocab, me), part(model.vocab, me + 1), d, n.data(), d, batch, logits, model.vocab);
    }
}

}  // namespace
