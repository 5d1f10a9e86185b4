// What of a training step is not a product: cross-entropy, SwiGLU, RMSNorm and rotary embedding, each row once through the
// cache.

#pragma once

#include "numbers.h"

namespace {

// losses (rows) = logsumexp - logit of the target, 0 where the target is negative; with `differentiate` the logits
// become their gradient, softmax - one-hot.
template <class T>
void cross_entropy(int64_t rows, int64_t vocab, T* logits, const int64_t* targets, float* losses, bool differentiate, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* x = logits + r * vocab;
        losses[r] = 0;
        if (targets[r] < 0) {
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
        for (int64_t i = 0; i < whole; i += LANES) sums += exponential(load(x + i) - high);
        float sum = total(sums);
        for (int64_t i = whole; i < vocab; i++) sum += std::exp(to_float(x[i]) - high);
        losses[r] = high + std::log(sum) - to_float(x[targets[r]]);
        if (!differentiate) continue;
        const float scale = 1 / sum, at_target = std::exp(to_float(x[targets[r]]) - high) * scale - 1;
        for (int64_t i = 0; i < whole; i += LANES) store(x + i, exponential(load(x + i) - high) * scale);
        for (int64_t i = whole; i < vocab; i++) assign(x[i], std::exp(to_float(x[i]) - high) * scale);
        assign(x[targets[r]], at_target);
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

// y = x / rms(x) * weight; scales (rows) gets 1 / rms(x).
template <class T>
void norm(int64_t rows, int64_t dim, const T* x, const float* weight, float eps, T* y, float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* a = x + r * dim;
        const int64_t whole = dim / LANES * LANES;
        vec sums = {};
        for (int64_t i = 0; i < whole; i += LANES) sums += load(a + i) * load(a + i);
        float sum = total(sums);
        for (int64_t i = whole; i < dim; i++) sum += to_float(a[i]) * to_float(a[i]);
        const float scale = scales[r] = 1 / std::sqrt(sum / dim + eps);
        for (int64_t i = 0; i < whole; i += LANES) store(y + r * dim + i, load(a + i) * scale * load(weight + i));
        for (int64_t i = whole; i < dim; i++) assign(y[r * dim + i], to_float(a[i]) * scale * weight[i]);
    }
}

// dx, and d_weight summed over fixed parts of the rows, `parts` of them, one row of d_weights each.
template <class T>
void norm_backward(int64_t rows, int64_t dim, const T* x, const float* weight, const float* scales, const T* dy, T* dx,
                   float* d_weights, int64_t parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        float* dw = d_weights + p * dim;
        std::fill(dw, dw + dim, 0.0f);
        for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; r++) {
            const T *a = x + r * dim, *b = dy + r * dim;
            const int64_t whole = dim / LANES * LANES;
            const float scale = scales[r];
            vec sums = {};
            for (int64_t i = 0; i < whole; i += LANES) {
                const vec g = load(b + i), n = load(a + i) * scale;
                sums += g * load(weight + i) * n;
                store(dw + i, load(dw + i) + g * n);
            }
            float sum = total(sums);
            for (int64_t i = whole; i < dim; i++) {
                const float g = to_float(b[i]), n = to_float(a[i]) * scale;
                sum += g * weight[i] * n;
                dw[i] += g * n;
            }
            const float mean = sum / dim * scale;
            for (int64_t i = 0; i < whole; i += LANES)
                store(dx + r * dim + i, load(b + i) * load(weight + i) * scale - load(a + i) * scale * mean);
            for (int64_t i = whole; i < dim; i++)
                assign(dx[r * dim + i], to_float(b[i]) * weight[i] * scale - to_float(a[i]) * scale * mean);
        }
    }
}

// y (positions, heads, 2 half) = x with each pair turned by its position's angle, or back; a pair is (2i, 2i + 1) when
// interleaved, else (i, i + half). x's head h at position b * length + i is at b * batch + i * row + h * head.
template <class S>
void rotate(int64_t batches, int64_t length, int64_t heads, int64_t half, const S* x, int64_t batch, int64_t row, int64_t head,
            const float* cos, const float* sin, S* y, bool interleaved, bool back, int threads) {
#pragma omp parallel num_threads(threads)
    {
        scratch.reserve(2 * room(2 * half, 4));
        float* __restrict in = scratch.take<float>(2 * half);
        float* __restrict out = scratch.take<float>(2 * half);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < batches * length; p++)
            for (int64_t h = 0; h < heads; h++) {
                const S* from = x + p / length * batch + p % length * row + h * head;
                const float *c = cos + p * half, *s = sin + p * half, sign = back ? -1 : 1;
                int64_t n = 0;
                for (; n + LANES <= 2 * half; n += LANES) store(in + n, load(from + n));
                for (; n < 2 * half; n++) in[n] = to_float(from[n]);
                if (interleaved)
                    for (int64_t i = 0; i < half; i++) {
                        out[2 * i] = in[2 * i] * c[i] - in[2 * i + 1] * s[i] * sign;
                        out[2 * i + 1] = in[2 * i + 1] * c[i] + in[2 * i] * s[i] * sign;
                    }
                else
                    for (int64_t i = 0; i < half; i++) {
                        out[i] = in[i] * c[i] - in[half + i] * s[i] * sign;
                        out[half + i] = in[half + i] * c[i] + in[i] * s[i] * sign;
                    }
                S* to = y + (p * heads + h) * 2 * half;
                for (n = 0; n + LANES <= 2 * half; n += LANES) store(to + n, load(out + n));
                for (; n < 2 * half; n++) assign(to[n], out[n]);
            }
    }
}

}  // namespace
