// Sixteen numbers at a time: loads and stores of bfloat16, 2^x, and the dropout masks of fastgpt_kernels.seeds.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#include <initializer_list>

namespace fastgpt {

using Vec = __m512;    // 16 float32
using Ints = __m512i;  // 16 int32, or 16 pairs of bfloat16
constexpr int64_t LANES = 16;
constexpr float LOG_2 = 0.693147180559945309f, LOG2_E = 1.44269504088896341f;

inline Vec broadcast(float x) { return _mm512_set1_ps(x); }

inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The first n lanes; none below 0, all from 16 on.
inline __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

inline Vec widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

inline __m256i narrowed(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// All 16 lanes, as a type: a mask costs some processors many times the time of a plain store.
struct All {};

inline Vec load(const uint16_t* bf16, All = {}) { return widened(_mm256_loadu_si256((const __m256i*)bf16)); }

// Lanes beyond the mask are 0, and not read.
inline Vec load(const uint16_t* bf16, __mmask16 lanes) { return widened(_mm256_maskz_loadu_epi16(lanes, bf16)); }

inline void store(uint16_t* bf16, Vec x, All = {}) { _mm256_storeu_si256((__m256i*)bf16, narrowed(x)); }
inline void store(uint16_t* bf16, Vec x, __mmask16 lanes) { _mm256_mask_storeu_epi16(bf16, lanes, narrowed(x)); }

// x in the lanes, else 0.
inline Vec only(All, Vec x) { return x; }
inline Vec only(__mmask16 lanes, Vec x) { return _mm512_maskz_mov_ps(lanes, x); }

// work(i, lanes) for every 16 of n elements, and for what is left of them.
template <typename Work>
inline void each(int64_t n, Work work) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) work(i, All());
    if (i < n) work(i, first_lanes(n - i));
}

inline float widened(uint16_t bf16) {
    union {
        uint32_t bits;
        float number;
    } both = {(uint32_t)bf16 << 16};
    return both.number;
}

// Of two numbers, NaN is passed on from the second alone.
inline Vec clamped(Vec x, float bound) {
    return _mm512_min_ps(_mm512_set1_ps(bound), _mm512_max_ps(_mm512_set1_ps(-bound), x));
}

// 2^x to within 2 units in the last place; 0 below -150, infinity above 128, NaN for NaN.
inline Vec exp2(Vec x) {
    x = clamped(x, 150.0f);
    Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec f = _mm512_sub_ps(x, whole);  // in [-1/2, 1/2]
    // 2^f to within 1.7e-7 of itself, and 1 at 0: the polynomial of this degree and constant term that is nearest
    Vec y = broadcast(1.326472731e-3f);
    for (float coefficient : {9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f, 6.931470037e-1f})
        y = _mm512_fmadd_ps(y, f, broadcast(coefficient));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// SplitMix64's function of a counter, eight at a time; the whole rule is in fastgpt_kernels/seeds.py.
struct Mask {
    static constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15, A = 0xBF58476D1CE4E5B9, B = 0x94D049BB133111EB;

    int64_t origin;  // where the counters start, as `seeds.origin` has it
    int32_t bound;   // a lane is kept where it is at least this; -32768 keeps all
    float keep;      // 1 / (1 - rate)

    bool drops() const { return bound > -32768; }

    static __m512i mixed(__m512i z) {
        z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 30));
        z = _mm512_mullo_epi64(z, _mm512_set1_epi64((int64_t)A));
        z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 27));
        z = _mm512_mullo_epi64(z, _mm512_set1_epi64((int64_t)B));
        return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    }

    // The 64 bits of the numbers c, c + step, ... c + 7 step.
    __m512i bits(int64_t c, int64_t step) const {
        __m512i steps = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set1_epi64((int64_t)((uint64_t)step * GAMMA)));
        return mixed(_mm512_add_epi64(_mm512_set1_epi64((int64_t)((uint64_t)origin + (uint64_t)c * GAMMA)), steps));
    }

    // Which of 32 elements are kept that lie one after the other, from lane 0 of number c on.
    __mmask32 row(int64_t c) const { return _mm512_cmpge_epi16_mask(bits(c, 1), _mm512_set1_epi16((int16_t)bound)); }
};

}  // namespace fastgpt
