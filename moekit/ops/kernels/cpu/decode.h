// One decoding step of a whole model: a token per sequence in, its logits out. Every weight that is needed is read once,
// by the thread that owns its rows; the sums are float32. Norms and routing every thread does for itself, which takes less
// than waiting for one that does it: threads meet six times a layer, seven with routed experts.

#pragma once

#include "decode_attention.h"
#include "fetch.h"

namespace {

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
        if (choice[e] != choice[e]) choice[e] = INFINITY;  // NaN is the greatest, as for torch and in `largest`
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
    Rows in{n.data(), dim, batch, dim};
    rows_of({next.router, nullptr, 0}, 0, next.experts, in, affinity.data(), next.experts);
    for (int64_t b = 0; b < batch; b++) choose(next, affinity.data() + b * next.experts, b, likely);
    for (const Choice& choice : likely) fetch(next.routed[choice.expert], dim, next.ff, false);
}

template <class C>
void decode_step(const DecodeModel& model, int64_t batch, const int64_t* ids, const int64_t* lengths, float* logits, int threads) {
    const int64_t d = model.dim, wide = model.heads * model.value_dim;
    int64_t longest = 0, widest = d, most = 0;
    for (int64_t b = 0; b < batch; b++) longest = std::max(longest, lengths[b] + 1);
    for (int64_t i = 0; i < model.layers; i++) {
        const DecodeLayer& l = model.layer[i];
        widest = std::max(widest, std::max(2 * l.dense_ff * batch, 2 * l.ff * l.chosen * batch));
        most = std::max(most, l.experts);
    }
    std::vector<float> x(batch * d), made(batch * model.row()), y(batch * wide), hidden(widest), routed(widest);
    std::vector<float> affinity(batch * (most + 1)), scores(threads * FEW * longest);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int64_t me = 0, all = 1;
#endif
        auto part = [&](int64_t rows, int64_t who) { return part_of(rows, who, all); };
        std::vector<float> n(batch * d), out(batch * d), inputs;
        std::vector<Choice> choices;
        std::vector<int64_t> starts;  // where each visited expert's choices begin
        const Step step{batch, lengths, longest, me, all, n.data(), made.data(), y.data(), scores.data() + me * FEW * longest};
#pragma omp single
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < d; i++)
                x[b * d + i] = model.embedding.kind ? to_float(((const bf16*)model.embedding.data)[ids[b] * d + i])
                                                    : ((const float*)model.embedding.data)[ids[b] * d + i];
        for (int64_t at = 0; at < model.layers; at++) {
            const DecodeLayer& l = model.layer[at];
            normed(x.data(), l.attention_norm, model.eps, d, batch, n.data());
            if (!model.rank)
                head_attention<C>(model, l, step);
            else if (l.v.kind)
                latent_attention<C, bf16>(model, l, step);
            else
                latent_attention<C, float>(model, l, step);
            const int64_t first = part(d, me), last = part(d, me + 1);
            Rows attended = step.rows(y.data(), wide, wide);
            step.product(l.o, d, attended, out.data(), d, l.o_bias);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = first; i < last; i++) x[b * d + i] += out[b * d + i];
#pragma omp barrier
            normed(x.data(), l.ffn_norm, model.eps, d, batch, n.data());
            Rows in = step.rows(n.data(), d, d);
            if (l.experts) {
                step.product({l.router, nullptr, 0}, l.experts, in, affinity.data(), l.experts);
#pragma omp barrier
                choices.clear();
                for (int64_t b = 0; b < batch; b++) choose(l, affinity.data() + b * l.experts, b, choices);
                std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
                starts.clear();
                for (size_t i = 0; i < choices.size(); i++)
                    if (!i || choices[i].expert != choices[i - 1].expert) starts.push_back(i);
                starts.push_back(choices.size());
                if (!me && l.mapped)
                    for (size_t s = 0; s + 1 < starts.size(); s++) fetch(l.routed[choices[starts[s]].expert], d, l.ff, true);
                if (!me && at + 1 < model.layers && model.layer[at + 1].mapped)
                    fetch_likely(model.layer[at + 1], x.data(), model.eps, d, batch);
                inputs.resize(batch > 1 ? choices.size() * d : 0);
                for (size_t i = 0; batch > 1 && i < choices.size(); i++)
                    std::copy_n(n.data() + choices[i].token * d, d, inputs.data() + i * d);
                const int64_t f = l.ff, begin = part(f, me), end = part(f, me + 1);
                for (size_t s = 0; s + 1 < starts.size(); s++) {
                    const int64_t c = starts[s], count = starts[s + 1] - c;
                    const Expert& expert = l.routed[choices[c].expert];
                    float* h = routed.data() + c * 2 * f;
                    Rows its = {inputs.data() + c * d, d, count, d}, &of = batch > 1 ? its : in;  // one token: all read the same
                    rows_of(expert.gate, begin, end, of, h, 2 * f);
                    rows_of(expert.up, begin, end, of, h + f, 2 * f);
                    for (int64_t m = 0; m < count; m++) swiglu(h + m * 2 * f + begin, f, end - begin, h + m * 2 * f + begin);
                }
            }
            const int64_t f = l.dense_ff, begin = part(f, me), end = part(f, me + 1);
            if (f) {
                step.product(l.dense.gate, f, in, hidden.data(), 2 * f);
                step.product(l.dense.up, f, in, hidden.data() + f, 2 * f);
                for (int64_t b = 0; b < batch; b++) swiglu(hidden.data() + b * 2 * f + begin, f, end - begin, hidden.data() + b * 2 * f + begin);
            }
#pragma omp barrier
            if (f) {
                Rows inner = step.rows(hidden.data(), 2 * f, f);
                step.product(l.dense.down, d, inner, out.data(), d);
                for (int64_t b = 0; b < batch; b++) {
                    const float share = l.shared_gate ? 1 / (1 + std::exp(-dot(n.data() + b * d, l.shared_gate, d))) : 1;
                    for (int64_t i = first; i < last; i++) x[b * d + i] += share * out[b * d + i];
                }
            }
            for (size_t s = 0; l.experts && s + 1 < starts.size(); s++) {
                const int64_t c = starts[s], count = starts[s + 1] - c;
                Rows inner = {routed.data() + c * 2 * l.ff, 2 * l.ff, count, l.ff};
                rows_of(l.routed[choices[c].expert].down, first, last, inner, out.data(), d);
                for (int64_t m = 0; m < count; m++)
                    for (int64_t i = first; i < last; i++)
                        x[choices[c + m].token * d + i] += choices[c + m].weight * out[m * d + i];
            }
#pragma omp barrier
        }
        normed(x.data(), model.norm, model.eps, d, batch, n.data());
        Rows last = step.rows(n.data(), d, d);
        step.product(model.head, model.vocab, last, logits, model.vocab);
    }
}

}  // namespace
