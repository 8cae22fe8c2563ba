// As many multiplications as the processor can do: the instruction that all products here are made of, on registers
// alone.

#include "vectors.h"

using namespace fastgpt;

namespace {

constexpr int CHAINS = 16;  // additions that do not wait for each other

}  // namespace

// `rounds` times CHAINS instructions of 64 operations in each thread; `sums` (threads, 16) keeps the compiler from
// leaving them out.
extern "C" void fastgpt_multiplications(float* sums, int64_t rounds, int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        Vec chains[CHAINS];
        // from different numbers: equal chains the compiler would compute once
        for (int i = 0; i < CHAINS; i++) chains[i] = broadcast((float)i);
        Ints ones = _mm512_set1_epi32(0x3f803f80);
        for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; i++) chains[i] = _mm512_dpbf16_ps(chains[i], (__m512bh)ones, (__m512bh)ones);
            asm volatile("" : "+v"(ones));  // it may have changed, for all the compiler knows
        }
        Vec sum = chains[0];
        for (int i = 1; i < CHAINS; i++) sum = _mm512_add_ps(sum, chains[i]);
        _mm512_storeu_ps(sums + thread * LANES, sum);
    }
}
