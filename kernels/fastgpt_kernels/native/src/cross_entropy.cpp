// Cross-entropy over rows of bfloat16 logits, and its gradient, which may lie over them.
//
//     loss = log sum_n e^{z_n} - z_t     dz_n = (softmax(z)_n - [n = t]) dloss
//
// A row stays in the cache for its passes: the maximum, the sum, and for the gradient one more. All sums are float32 in
// an order that depends on the number of columns alone. Where a target does not count, loss and gradient are 0.

#include <math.h>

#include "vectors.h"

using namespace fastgpt;

namespace {

struct Statistics {
    float maximum, sum;  // sum of e^{z - maximum}
};

// e^{z - maximum}; 1 at the maximum itself.
inline Vec power_of(Vec z, float maximum) {
    return exp2(_mm512_mul_ps(_mm512_sub_ps(z, broadcast(maximum)), broadcast(LOG2_E)));
}

// Lanes that are left out do not count.
inline Vec larger(Vec a, Vec b, All) { return _mm512_max_ps(a, b); }
inline Vec larger(Vec a, Vec b, __mmask16 lanes) { return _mm512_mask_max_ps(a, lanes, a, b); }

Statistics statistics(const uint16_t* z, int64_t V) {
    Vec maxima = broadcast(-INFINITY), sums = _mm512_setzero_ps();
    each(V, [&](int64_t n, auto lanes) { maxima = larger(maxima, load(z + n, lanes), lanes); });
    float maximum = _mm512_reduce_max_ps(maxima);
    each(V, [&](int64_t n, auto lanes) {
        sums = _mm512_add_ps(sums, only(lanes, power_of(load(z + n, lanes), maximum)));
    });
    return {maximum, _mm512_reduce_add_ps(sums)};
}

float loss(Statistics row, float z) { return row.maximum - z + logf(row.sum); }

void write_gradient(const uint16_t* z, int64_t V, Statistics row, int64_t target, float dloss, uint16_t* dz) {
    Vec factor = broadcast(dloss / row.sum);
    // before its logit may be overwritten, and with one rounding
    float p = exp2f((widened(z[target]) - row.maximum) * LOG2_E) / row.sum;
    each(V, [=](int64_t n, auto lanes) {
        store(dz + n, _mm512_mul_ps(power_of(load(z + n, lanes), row.maximum), factor), lanes);
    });
    store(dz + target, broadcast((p - 1) * dloss), first_lanes(1));
}

void clear(uint16_t* row, int64_t V) {
    for (int64_t n = 0; n < V; n++) row[n] = 0;
}

}  // namespace

extern "C" {

// logits (rows, V), the rows z_row elements apart; targets (rows,); losses (rows,).
void fastgpt_losses(const uint16_t* logits, int64_t z_row, const int64_t* targets, float* losses, int64_t rows,
                    int64_t V, int64_t ignored, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t* z = logits + i * z_row;
        losses[i] = targets[i] == ignored ? 0 : loss(statistics(z, V), widened(z[targets[i]]));
    }
}

// dlosses (rows,), or one for all rows where their step is 0; with `losses`, those are written as well.
void fastgpt_loss_gradient(const uint16_t* logits, int64_t z_row, const int64_t* targets, const float* dlosses,
                           int64_t dlosses_step, float* losses, uint16_t* gradient, int64_t g_row, int64_t rows,
                           int64_t V, int64_t ignored, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t* z = logits + i * z_row;
        bool counts = targets[i] != ignored;
        if (!counts) {
            if (losses) losses[i] = 0;
            clear(gradient + i * g_row, V);
            continue;
        }
        Statistics row = statistics(z, V);
        if (losses) losses[i] = loss(row, widened(z[targets[i]]));
        write_gradient(z, V, row, targets[i], dlosses[i * dlosses_step], gradient + i * g_row);
    }
}
}
