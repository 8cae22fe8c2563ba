// Products of small bfloat16 matrices that lie packed in the cache, with float32 sums.
//
//     C (M x N) = or += A (M x 2K) B (2K x N)
//
// The instruction VDPBF16PS multiplies pairs: c += a_{2k} b_{2k} + a_{2k+1} b_{2k+1} in each of 16 lanes. So A is
// read as words of two numbers that follow each other in k, one word for all lanes, from any place; and B lies as K
// rows of N such words. Six rows by four vectors of C stay in registers.

#pragma once

#include "vectors.h"

namespace fastgpt {

constexpr int ROWS = 6, VECTORS = 4;

// A, as words: word (m, k) is at words[m * row + k * step].
struct Left {
    const uint32_t* words;
    int64_t row, step;
};

// B, as words: word (k, n) is at words[k * row + n].
struct Right {
    const uint32_t* words;
    int64_t row;
};

template <int M, int N, bool ADD>
inline void tile(Left a, Right b, float* c, int64_t c_row, int64_t K) {
    Vec sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = ADD ? _mm512_load_ps(c + m * c_row + n * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k++) {
        Ints right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) right[n] = _mm512_load_si512(b.words + k * b.row + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            Ints left = _mm512_set1_epi32((int)a.words[m * a.row + k * a.step]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)left, (__m512bh)right[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) _mm512_store_ps(c + m * c_row + n * LANES, sums[m][n]);
}

template <int N, bool ADD>
inline void columns(Left a, Right b, float* c, int64_t c_row, int64_t M, int64_t K) {
    int64_t m = 0;
    for (; m + ROWS <= M; m += ROWS)
        tile<ROWS, N, ADD>({a.words + m * a.row, a.row, a.step}, b, c + m * c_row, c_row, K);
    a.words += m * a.row;
    c += m * c_row;
    switch (M - m) {
        case 1:
            return tile<1, N, ADD>(a, b, c, c_row, K);
        case 2:
            return tile<2, N, ADD>(a, b, c, c_row, K);
        case 3:
            return tile<3, N, ADD>(a, b, c, c_row, K);
        case 4:
            return tile<4, N, ADD>(a, b, c, c_row, K);
        case 5:
            return tile<5, N, ADD>(a, b, c, c_row, K);
    }
}

// N a multiple of 16; rows of B and C begin at multiples of 64 bytes.
template <bool ADD>
inline void product(Left a, Right b, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += VECTORS * LANES) {
        Right part = {b.words + n, b.row};
        switch ((N - n) / LANES) {
            case 1:
                columns<1, ADD>(a, part, c + n, c_row, M, K);
                break;
            case 2:
                columns<2, ADD>(a, part, c + n, c_row, M, K);
                break;
            case 3:
                columns<3, ADD>(a, part, c + n, c_row, M, K);
                break;
            default:
                columns<4, ADD>(a, part, c + n, c_row, M, K);
        }
    }
}

}  // namespace fastgpt
