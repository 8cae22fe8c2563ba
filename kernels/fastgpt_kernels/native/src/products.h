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

// Kept out of line: where it is not, the compiler keeps sums in memory.
template <int M, int N, bool ADD>
__attribute__((noinline)) void tile(Left a, Right b, float* c, int64_t c_row, int64_t K) {
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

// The first and the last word, not included, of a row's sums; and how many vectors of its columns are left out.
struct Part {
    int64_t from, to, skipped;
};

// M rows, at most ROWS, by N columns, a multiple of 16.
template <int M, bool ADD>
inline void rows(Left a, Right b, float* c, int64_t c_row, int64_t N, Part part) {
    a.words += part.from * a.step;
    b.words += part.from * b.row;
    for (int64_t n = part.skipped * LANES; n < N; n += VECTORS * LANES) {
        Right there = {b.words + n, b.row};
        switch ((N - n) / LANES) {
            case 1:
                tile<M, 1, ADD>(a, there, c + n, c_row, part.to - part.from);
                break;
            case 2:
                tile<M, 2, ADD>(a, there, c + n, c_row, part.to - part.from);
                break;
            case 3:
                tile<M, 3, ADD>(a, there, c + n, c_row, part.to - part.from);
                break;
            default:
                tile<M, 4, ADD>(a, there, c + n, c_row, part.to - part.from);
        }
    }
}

// N a multiple of 16; rows of B and C begin at multiples of 64 bytes. `part_of(m)` is the `Part` of rows m to
// m + ROWS - 1: what is left out of sums must be zeros, and what is left out of columns is not written.
template <bool ADD, typename PartOf>
inline void product(Left a, Right b, float* c, int64_t c_row, int64_t M, int64_t N, PartOf part_of) {
    for (int64_t m = 0; m < M; m += ROWS, a.words += ROWS * a.row, c += ROWS * c_row) {
        Part part = part_of(m);
        switch (M - m) {
            case 1:
                return rows<1, ADD>(a, b, c, c_row, N, part);
            case 2:
                return rows<2, ADD>(a, b, c, c_row, N, part);
            case 3:
                return rows<3, ADD>(a, b, c, c_row, N, part);
            case 4:
                return rows<4, ADD>(a, b, c, c_row, N, part);
            case 5:
                return rows<5, ADD>(a, b, c, c_row, N, part);
            default:
                rows<6, ADD>(a, b, c, c_row, N, part);
        }
    }
}

}  // namespace fastgpt
