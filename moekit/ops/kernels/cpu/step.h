// What of a training step is not a product: cross-entropy, SwiGLU, RMSNorm and rotary embedding, each row once through the
// cache.

#pragma once

#include "numbers.h"

namespace {

// losses (rows) = logsumexp - logit of the target, 0 where the target is negative; with `differentiate` the logits
// become their gradient, softmax - one-hot.
template <class T>
void cross_entropy(int64_t rows, int64_t vocab, T* logits, const int64_t* targets, float* losses, bool differentiate, int threads) {
#pragma omp parallel num_threads(threads)
    {
        scratch.reserve_in_loop(room(vocab, 4));
        float* exps = scratch.take<float>(vocab);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            T* x = logits + r * vocab;
            losses[r] = 0;
            if (targets[r] < 0 || targets[r] >= vocab) {
                if (targets[r] >= vocab) losses[r] = NAN;
                if (differentiate) memset((void*)x, 0, vocab * sizeof(T));
                continue;
            }
            const int64_t whole = vocab / LANES * LANES;
            vec most = splat(-INFINITY);
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec a = load(x + i);
                most = a > most ? a : most;
            }
            float high = greatest(most);
            for (int64_t i = whole; i < vocab; i++) high = std::max(high, to_float(x[i]));
            vec sums = {};
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec e = exponential(load(x + i) - high);
                sums += e;
                store(exps + i, e);
            }
            float sum = total(sums);
            for (int64_t i = whole; i < vocab; i++) sum += exps[i] = std::exp(to_float(x[i]) - high);
            losses[r] = high + std::log(sum) - to_float(x[targets[r]]);
            if (!differentiate) continue;
            const float scale = 1 / sum;
            exps[targets[r]] -= sum;
            for (int64_t i = 0; i < whole; i += LANES) store(x + i, load(exps + i) * scale);
            for (int64_t i = whole; i < vocab; i++) assign(x[i], exps[i] * scale);
        }
    }
}

// y = silu(gate) * up.
template <class T> void swiglu(int64_t count, const T* gate, const T* up, T* y, int threads) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
    }
    for (int64_t i = whole; i < count; i++) {
        const float g = to_float(gate[i]);
        assign(y[i], g / (1 + std::exp(-g)) * to_float(up[i]));
    }
}

template <class T> void swiglu_backward(int64_t count, const T* gate, const T* up, const T* dy, T* d_gate, T* d_up, int threads) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec g = load(gate + i), d = load(dy + i), s = sigmoid(g), silu = g * s;
        store(d_gate + i, d * load(up + i) * (s + silu * (1.0f - s)));
        store(d_up + i, d * silu);
    }
    for (int64_t i = whole; i < count; i++) {
        const float g = to_float(gate[i]), d = to_float(dy[i]), s = 1 / (1 + std::exp(-g)), silu = g * s;
        assign(d_gate[i], d * to_float(up[i]) * (s + silu * (1 - s)));
        assign(d_up[i], d * silu);
    }
}

// sum = x + delta, and y = sum / rms(sum) * weight, in x's numbers, in bfloat16 (`low`), or both; scales (rows) gets
// 1 / rms(sum). A null delta is 0 and sum then x itself; what is null of y and low is not wanted.
template <class X, class D>
void norm(int64_t rows, int64_t dim, const X* x, const D* delta, const float* weight, float eps, X* sum, X* y, bf16* low, float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r * dim;
        const X* a = x + at;
        if (delta) {
            by_vector(dim, [&](int64_t i, int64_t left) { store(sum + at + i, load(a + i, left) + load(delta + at + i, left), left); });
            a = sum + at;
        }
        vec squares = {};
        by_vector(dim, [&](int64_t i, int64_t left) { squares += load(a + i, left) * load(a + i, left); });
        const float scale = scales[r] = 1 / std::sqrt(total(squares) / dim + eps);
        by_vector(dim, [&](int64_t i, int64_t left) {
            const vec scaled = load(a + i, left) * scale * load(weight + i, left);
            if (y) store(y + at + i, scaled, left);
            if (low) store(low + at + i, scaled, left);
        });
    }
}

// The sum of rows of several kinds; null ones are 0.
template <class... T> auto sum_of(const T*... rows) {
    return [=](int64_t i, int64_t left) {
        vec sum = {};
        ((rows ? (void)(sum += load(rows + i, left)) : (void)0), ...);
        return sum;
    };
}

// dx, what sum's own gradient and that of its norm (gradient(i, left), `sum_of`) make of it, and the same as d_delta; null
// ones are 0, or not wanted; dx may be what `gradient` reads. The weight's gradient is summed over fixed parts of the rows,
// whatever the number of threads.
template <class X, class D, class G>
void norm_backward(int64_t rows, int64_t dim, const X* sum, const float* weight, const float* scales, const X* d_sum, const G& gradient,
                   X* dx, D* d_delta, float* d_weight, int threads) {
    constexpr int64_t PARTS = 64;
    std::vector<float> d_weights(PARTS * dim);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < PARTS; p++) {
        float* dw = d_weights.data() + p * dim;
        for (int64_t r = rows * p / PARTS; r < rows * (p + 1) / PARTS; r++) {
            const int64_t at = r * dim;
            const float scale = scales[r];
            vec sums = {};
            by_vector(dim, [&](int64_t i, int64_t left) {
                const vec g = gradient(at + i, left), n = load(sum + at + i, left) * scale;
                sums += g * load(weight + i, left) * n;
                store(dw + i, load(dw + i, left) + g * n, left);
            });
            const float mean = total(sums) / dim * scale;
            by_vector(dim, [&](int64_t i, int64_t left) {
                vec d = gradient(at + i, left) * load(weight + i, left) * scale - load(sum + at + i, left) * scale * mean;
                if (d_sum) d += load(d_sum + at + i, left);
                store(dx + at + i, d, left);
                if (d_delta) store(d_delta + at + i, d, left);
            });
        }
    }
    for (int64_t p = 0; d_weight && p < PARTS; p++)
        by_vector(dim, [&](int64_t i, int64_t left) {
            const vec none = {};
            store(d_weight + i, (p ? load(d_weight + i, left) : none) + load(d_weights.data() + p * dim + i, left), left);
        });
}

// A vector of pairs' first numbers and one of their second ones, of pairs that lie side by side; and back.
inline void read_pairs(const float* x, vec& a, vec& b) {
    for (int i = 0; i < LANES; i++) a[i] = x[2 * i], b[i] = x[2 * i + 1];
}
inline void write_pairs(float* x, vec a, vec b) {
    for (int i = 0; i < LANES; i++) x[2 * i] = a[i], x[2 * i + 1] = b[i];
}
#ifdef HAS_BF16
inline void read_pairs(const bf16* x, vec& a, vec& b) {
    const __m512i pairs = _mm512_loadu_si512(x);
    a = (vec)_mm512_slli_epi32(pairs, 16);
    b = (vec)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
}
inline void write_pairs(bf16* x, vec a, vec b) {
    const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a)), second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    _mm512_storeu_si512(x, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
#else
inline void read_pairs(const bf16* x, vec& a, vec& b) {
    for (int i = 0; i < LANES; i++) a[i] = to_float(x[2 * i]), b[i] = to_float(x[2 * i + 1]);
}
inline void write_pairs(bf16* x, vec a, vec b) {
    for (int i = 0; i < LANES; i++) assign(x[2 * i], a[i]), assign(x[2 * i + 1], b[i]);
}
#endif

// y, each head 2 half long, = x with each pair turned by its position's angle, or back; a pair is (2i, 2i + 1) when
// interleaved, else (i, i + half). y may be x.
template <class S>
void rotate(int64_t batches, int64_t length, int64_t heads, int64_t half, const S* x, Strides at_x, const float* cos, const float* sin,
            S* y, Strides at_y, bool interleaved, bool back, int threads) {
    const float sign = back ? -1 : 1;
    const int64_t whole = half / LANES * LANES, second = interleaved ? 1 : half, step = interleaved ? 2 : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < batches * length; p++)
        for (int64_t h = 0; h < heads; h++) {
            const S* from = x + at_x.at(p / length, p % length, h);
            S* to = y + at_y.at(p / length, p % length, h);
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec c = load(cos + p * half + i), s = load(sin + p * half + i) * sign;
                vec a, b;
                if (interleaved) {
                    read_pairs(from + 2 * i, a, b);
                    write_pairs(to + 2 * i, a * c - b * s, b * c + a * s);
                } else {
                    a = load(from + i), b = load(from + half + i);
                    store(to + i, a * c - b * s);
                    store(to + half + i, b * c + a * s);
                }
            }
            for (int64_t i = whole; i < half; i++) {
                const float c = cos[p * half + i], s = sin[p * half + i] * sign;
                const float a = to_float(from[step * i]), b = to_float(from[step * i + second]);
                assign(to[step * i], a * c - b * s);
                assign(to[step * i + second], b * c + a * s);
            }
        }
}

}  // namespace
