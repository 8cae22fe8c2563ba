// GELU in its tanh form over bfloat16, forward and backward.
//
//     y = x s     s = 1 / (1 + e^{-2u})     u = sqrt(2 / pi) (x + 0.044715 x^3)     (as (1 + tanh u) / 2 = s)
//     dx = dy (s + 2 x s (1 - s) du/dx)     du/dx = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2.

#include "vectors.h"

using namespace fastgpt;

namespace {

constexpr float TWICE_ROOT = 1.59576912160573f, CUBIC = 0.044715f;  // 2 sqrt(2 / pi)
constexpr float SATURATED = 30.0f;                                  // beyond it s is 0 or 1, and a cube could overflow
constexpr int64_t BLOCK = 4096;                                     // elements that a thread takes at a time

struct Sigmoid {
    Vec x, s;
};

inline Sigmoid sigmoid(Vec number) {
    Vec x = clamped(number, SATURATED), square = _mm512_mul_ps(x, x);
    Vec twice_u =
        _mm512_mul_ps(_mm512_mul_ps(x, broadcast(TWICE_ROOT)), _mm512_fmadd_ps(square, broadcast(CUBIC), broadcast(1)));
    Vec power = exp2(_mm512_mul_ps(twice_u, broadcast(-LOG2_E)));
    return {x, _mm512_div_ps(broadcast(1), _mm512_add_ps(broadcast(1), power))};
}

inline Vec slope(Vec number) {
    auto [x, s] = sigmoid(number);
    Vec twice_du =
        _mm512_mul_ps(broadcast(TWICE_ROOT), _mm512_fmadd_ps(_mm512_mul_ps(x, x), broadcast(3 * CUBIC), broadcast(1)));
    Vec rest = _mm512_mul_ps(_mm512_mul_ps(x, s), _mm512_sub_ps(broadcast(1), s));
    return _mm512_fmadd_ps(rest, twice_du, s);
}

template <typename Work>
void in_blocks(int64_t n, int threads, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        each(stop - start, [=](int64_t i, auto lanes) { work(start + i, lanes); });
    }
}

}  // namespace

extern "C" {

void fastgpt_gelu(const uint16_t* x, uint16_t* y, int64_t n, int threads) {
    in_blocks(n, threads, [=](int64_t i, auto lanes) {
        Vec number = load(x + i, lanes);
        store(y + i, _mm512_mul_ps(number, sigmoid(number).s), lanes);
    });
}

void fastgpt_gelu_backward(const uint16_t* x, const uint16_t* dy, uint16_t* dx, int64_t n, int threads) {
    in_blocks(n, threads, [=](int64_t i, auto lanes) {
        store(dx + i, _mm512_mul_ps(load(dy + i, lanes), slope(load(x + i, lanes))), lanes);
    });
}
}
