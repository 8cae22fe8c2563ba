// Rows in chunks for sums over them: their number depends on that of the rows alone, and so do the sums.

#pragma once

#include "vectors.h"

namespace fastgpt {

struct Chunks {
    static constexpr int64_t FEWEST_ROWS = 64, MOST = 256;

    explicit Chunks(int64_t rows) : rows(rows) {
        int64_t needed = (rows + MOST - 1) / MOST;
        size = needed > FEWEST_ROWS ? needed : FEWEST_ROWS;
        count = (rows + size - 1) / size;
    }

    int64_t first(int64_t chunk) const { return chunk * size; }
    int64_t stop(int64_t chunk) const { return (chunk + 1) * size < rows ? (chunk + 1) * size : rows; }

    int64_t rows, size, count;
};

// The sum over the chunks of parts (N,) that lie `step` apart; for a team of threads. Parts may be read up to a whole
// vector.
inline void add_parts(const float* parts, int64_t step, int64_t chunks, uint16_t* sums, int64_t N) {
#pragma omp for schedule(static)
    for (int64_t start = 0; start < N; start += LANES) {
        Vec sum = _mm512_setzero_ps();
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            sum = _mm512_add_ps(sum, _mm512_load_ps(parts + chunk * step + start));
        each(N - start < LANES ? N - start : LANES, [=](int64_t, auto lanes) { store(sums + start, sum, lanes); });
    }
}

}  // namespace fastgpt
