// Dropout, residual sums and layer norms of bfloat16 rows: one pass forward, one backward.
//
//     s = residual + kept x / (1 - r)     y = (s - mean) rstd w + b     rstd = 1 / sqrt(variance + eps)
//     g = dy w     c = (s - mean) rstd     ds' = rstd (g - mean(g) - c mean(g c)) + ds
//     dresidual = ds'     dx = kept ds' / (1 - r)     dw = sum over rows of dy c     db = sum over rows of dy
//
// s is rounded to bfloat16 and normalised as rounded. The sums over rows go through chunks of rows that do not depend
// on the number of threads.
//
// Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.

#include <math.h>

#include "chunks.h"
#include "memory.h"
#include "vectors.h"

using namespace fastgpt;

namespace {

constexpr int64_t BLOCK = 8192;

// Numbers of a mask go on from row to row, with 4 elements to each.
int64_t words(int64_t N) { return (N + 3) / 4; }

struct Kept {
    const Mask& mask;
    int64_t number;  // of the first element

    // x where the mask keeps it, scaled, else 0; of the elements i and the 15 after it.
    Vec operator()(int64_t i, Vec x) const {
        if (!mask.drops()) return x;
        // 16 elements take 4 numbers, the lower half of 8
        return _mm512_maskz_mul_ps((__mmask16)mask.row(number + i / 4), x, broadcast(mask.keep));
    }
};

// residual + dropout(x), rounded; dropout(x) alone where there is no residual.
void add_dropped(const uint16_t* x, const uint16_t* residual, uint16_t* sum, int64_t n, Kept kept) {
    each(n, [=](int64_t i, auto lanes) {
        Vec total = kept(i, load(x + i, lanes));
        store(sum + i, residual ? _mm512_add_ps(load(residual + i, lanes), total) : total, lanes);
    });
}

float mean_of(const uint16_t* s, int64_t N) {
    Vec total = _mm512_setzero_ps();
    each(N, [&](int64_t n, auto lanes) { total = _mm512_add_ps(total, load(s + n, lanes)); });
    return _mm512_reduce_add_ps(total) / N;
}

template <typename Lanes>
inline Vec centred(const uint16_t* s, float mean, Lanes lanes) {
    return only(lanes, _mm512_sub_ps(load(s, lanes), broadcast(mean)));
}

float variance_of(const uint16_t* s, int64_t N, float mean) {
    Vec total = _mm512_setzero_ps();
    each(N, [&](int64_t n, auto lanes) {
        Vec c = centred(s + n, mean, lanes);
        total = _mm512_fmadd_ps(c, c, total);
    });
    return _mm512_reduce_add_ps(total) / N;
}

}  // namespace

extern "C" {

// Elements (n,) whose numbers go on from 0, or rows (rows, N) of them; residual may be null.
void fastgpt_dropout(const uint16_t* x, const uint16_t* residual, uint16_t* y, int64_t rows, int64_t N,
                     const Mask* mask, int threads) {
    if (N % 4 == 0) {  // no number is left over at the end of a row
        int64_t n = rows * N;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < n; i += BLOCK)
            add_dropped(x + i, residual ? residual + i : nullptr, y + i, n - i < BLOCK ? n - i : BLOCK, {*mask, i / 4});
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        add_dropped(x + i * N, residual ? residual + i * N : nullptr, y + i * N, N, {*mask, i * words(N)});
}

// s is written where x is given; else the norm is of `residual` itself. mean and rstd (rows,) are for the backward.
void fastgpt_layer_norm(const uint16_t* x, const uint16_t* residual, const uint16_t* weight, const uint16_t* bias,
                        float eps, uint16_t* y, uint16_t* s, float* mean, float* rstd, int64_t rows, int64_t N,
                        const Mask* mask, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t* row = residual + i * N;
        if (x) {
            add_dropped(x + i * N, row, s + i * N, N, {*mask, i * words(N)});
            row = s + i * N;
        }
        float m = mean_of(row, N), r = 1 / sqrtf(variance_of(row, N, m) + eps);
        each(N, [=](int64_t n, auto lanes) {
            Vec c = _mm512_mul_ps(centred(row + n, m, lanes), broadcast(r));
            store(y + i * N + n, _mm512_fmadd_ps(c, load(weight + n, lanes), load(bias + n, lanes)), lanes);
        });
        mean[i] = m;
        rstd[i] = r;
    }
}

// ds may be null; dx is written where it is given, and is else dresidual. dweight and dbias (N,) are bfloat16.
void fastgpt_layer_norm_backward(const uint16_t* s, const uint16_t* weight, const float* mean, const float* rstd,
                                 const uint16_t* dy, const uint16_t* ds, uint16_t* dresidual, uint16_t* dx,
                                 uint16_t* dweight, uint16_t* dbias, int64_t rows, int64_t N, const Mask* mask,
                                 int threads) {
    Chunks chunks(rows);
    int64_t width = rounded_up(N, LANES);
    Memory memory;
    float* parts = memory.take<float>(chunks.count * 2 * width);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            float *dw = parts + chunk * 2 * width, *db = dw + width;
            for (int64_t n = 0; n < 2 * width; n++) dw[n] = 0;
            for (int64_t i = chunks.first(chunk); i < chunks.stop(chunk); i++) {
                const uint16_t *row = s + i * N, *in = dy + i * N;
                Vec sum = _mm512_setzero_ps(), products = _mm512_setzero_ps();
                each(N, [&](int64_t n, auto lanes) {
                    Vec c = _mm512_mul_ps(centred(row + n, mean[i], lanes), broadcast(rstd[i]));
                    Vec incoming = load(in + n, lanes), g = _mm512_mul_ps(incoming, load(weight + n, lanes));
                    sum = _mm512_add_ps(sum, g);
                    products = _mm512_fmadd_ps(g, c, products);
                    _mm512_store_ps(dw + n, _mm512_fmadd_ps(incoming, c, _mm512_load_ps(dw + n)));
                    _mm512_store_ps(db + n, _mm512_add_ps(incoming, _mm512_load_ps(db + n)));
                });
                Vec g_mean = broadcast(_mm512_reduce_add_ps(sum) / N);
                Vec gc_mean = broadcast(_mm512_reduce_add_ps(products) / N);
                Kept kept = {*mask, i * words(N)};
                each(N, [=](int64_t n, auto lanes) {
                    Vec c = _mm512_mul_ps(centred(row + n, mean[i], lanes), broadcast(rstd[i]));
                    Vec g = _mm512_mul_ps(load(in + n, lanes), load(weight + n, lanes));
                    Vec d = _mm512_mul_ps(_mm512_fnmadd_ps(c, gc_mean, _mm512_sub_ps(g, g_mean)), broadcast(rstd[i]));
                    if (ds) d = _mm512_add_ps(d, load(ds + i * N + n, lanes));
                    store(dresidual + i * N + n, d, lanes);
                    if (dx) store(dx + i * N + n, kept(n, d), lanes);
                });
            }
        }
        add_parts(parts, 2 * width, chunks.count, dweight, N);
        add_parts(parts + width, 2 * width, chunks.count, dbias, N);
    }
}
}
