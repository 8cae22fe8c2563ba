// Sums over the rows of a bfloat16 matrix: the gradient of a bias. Float32 sums over chunks of rows that do not depend
// on the number of threads.

#include "chunks.h"
#include "memory.h"
#include "vectors.h"

using namespace fastgpt;

extern "C" void fastgpt_column_sums(const uint16_t* x, uint16_t* sums, int64_t rows, int64_t N, int threads) {
    Chunks chunks(rows);
    int64_t width = rounded_up(N, LANES);
    Memory memory;
    float* parts = memory.take<float>(chunks.count * width);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            float* part = parts + chunk * width;
            for (int64_t n = 0; n < width; n++) part[n] = 0;
            for (int64_t i = chunks.first(chunk); i < chunks.stop(chunk); i++)
                each(N, [=](int64_t n, auto lanes) {
                    _mm512_store_ps(part + n, _mm512_add_ps(_mm512_load_ps(part + n), load(x + i * N + n, lanes)));
                });
        }
        add_parts(parts, width, chunks.count, sums, N);
    }
}
