// C[m, n] = A[m, k] B[k, n] (+ bias) in bfloat16 with float sums, for AVX512-BF16.
//
// Mathematics. The instruction vdpbf16ps adds, in each of 16 float lanes, the products of two
// pairs of bfloat16: acc[j] += a[2p] b[2p, j] + a[2p+1] b[2p+1, j]. So two neighbouring steps of k
// must lie side by side ("k pair", 32 bits), and both operands are repacked to that form:
//
//   packed A: panels of  8 rows,    [row panel][k pair][8][2]
//   packed B: panels of 48 columns, [column panel][k pair][48][2]
//
// Rows, columns and an odd last k that do not exist are zeros, so the inner loop has no tails;
// only loads from the operands and stores to C are masked.
//
// Micro-kernel. A tile of C of 8 rows by 48 columns is 8 x 3 = 24 vectors, held in registers over
// the whole k loop. Each k pair needs 3 loads of B, 8 broadcasts of A and 24 vdpbf16ps; the core
// starts one vdpbf16ps a cycle, and all else fits in beside them. Of the tiles with 24
// accumulators (6 x 64, 8 x 48, 12 x 32) all ran equally fast; 8 x 48 divides the dimensions 768,
// 1024, 2304 and 3072 exactly.
//
// Blocking, for 32 KB of L1 and 1 MB of L2:
//   - k is cut into blocks of at most 1664. A row panel (26 KB or less) is then in L1 while the
//     column panels pass by it, out of L2.
//   - B is packed in groups of 2 to 4 column panels (at most 384 KB), which stay in L2 while all rows
//     pass by them. (A group shared by several threads is larger; each uses so many at a time.)
//   - Each thread packs its own rows of A, at most 1024, a batch at a time, just before they pass
//     the first group; for the other groups they are read packed, from L3 or memory.
//   - Where k is cut, partial sums are kept in float, in
//     a work space, and rounded to bfloat16 once, after the last block.
//
// Prefetching. All this moves few bytes for the time it takes, but memory is slow to answer, and
// what was not used for a millisecond is often no longer in a shared L3. Packing cold operands
// took 7% of the time. So each thread, while it multiplies, asks for two lines every 8 k pairs:
// those of the tile of C it will finish next, the next batch of A, the next group of B.
//
// Threads. They form a grid over the rows and columns of C. Up to 4 threads each pack all that
// they need, some of it twice over, and never wait for each other; this costs about 1% but is
// much faster where other processes take turns on the cores. More threads pack a group of B
// together, wait, and then each computes its tiles. The cuts of k depend on k alone, and a tile
// is always computed in full by one thread in the same order, so the bits do not depend on the
// number of threads.
//
// Measured on one Zen 4 core (3.66 GHz, at most 234 GFLOP/s): the micro-kernel alone 230-235, whole
// products of 1024 x 768 x 768 and up 210-225.

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "vectors.h"

using namespace fastgpt;

namespace {

enum Output {
    kFinal,  // C, in bfloat16, each sum rounded once, to nearest even
    kFirst,  // the first of several partial sums, in float
    kMore,   // another, which is added
};

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileVectors = 3;
constexpr int64_t kTileColumns = 16 * kTileVectors;
constexpr int64_t kStrip = 16;         // rows of A, or columns of B, packed by one transpose
constexpr int64_t kMaxDepth = 1664;    // of a block of k
constexpr int64_t kMaxRows = 1024;     // of packed A, for each thread
constexpr int64_t kMaxColumns = 3328;  // of a block of C
constexpr int64_t kMostPanels = 4;     // of columns that stay in L2 together, and their bytes
constexpr int64_t kGroupBytes = 384 << 10;
constexpr int64_t kBatchBytes = 128 << 10;  // of rows of A packed together
constexpr int64_t kPairsPerPrefetch = 8;    // more often would slow the multiplication
constexpr int64_t kFinishingPairs = 192;    // before the end of a tile, its part of C is fetched
constexpr int64_t kMaxUnshared = 4;         // threads that each pack what they need of B
constexpr double kWorkPerThread = 1e6;      // multiplications worth waking one more thread for

int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t max(int64_t x, int64_t y) { return x > y ? x : y; }
int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The size of the equal blocks, each at most `most` and a multiple of `unit`, that cover `total`.
int64_t block_size(int64_t total, int64_t most, int64_t unit) {
    return rounded_up(ceil_div(total, ceil_div(total, most)), unit);
}

// The mask of the first `count` lanes, for a count of any size.
__mmask32 mask32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// Walks over the cache lines of a rectangle of memory, to prefetch them one by one.
class Walk {
  public:
    Walk() = default;
    Walk(const void* start, int64_t stride, int64_t rows, int64_t bytes)
        : row_((const char*)start), stride_(stride), rows_(rows), bytes_(bytes) {
        if (rows_ > 0) begin_row();
    }

    bool done() const { return rows_ <= 0; }

    const char* next() {
        const char* line = line_;
        line_ += 64;
        if (line_ >= row_ + bytes_) {
            row_ += stride_;
            if (--rows_ > 0) begin_row();
        }
        return line;
    }

  private:
    void begin_row() { line_ = row_ - (uintptr_t)row_ % 64; }

    const char *row_ = nullptr, *line_ = nullptr;
    int64_t stride_ = 0, rows_ = 0, bytes_ = 0;
};

// What will be needed soon, most urgent first. Memory answers slowly, so these lines are asked
// for one at a time in the course of the multiplication, which has no other use for memory.
struct Prefetch {
    Walk tile;     // of C, or of the partial sums, that the current sums will meet
    Walk partial;  // the same, where both are needed
    Walk a, b;     // the next parts of the operands

    // `finishing`: the current sums will soon be ready.
    inline void step(bool finishing) {
        if (finishing && !tile.done())
            __builtin_prefetch(tile.next(), 1);
        else if (finishing && !partial.done())
            _mm_prefetch(partial.next(), _MM_HINT_T0);
        else if (!a.done())
            _mm_prefetch(a.next(), _MM_HINT_T1);
        else if (!b.done())
            _mm_prefetch(b.next(), _MM_HINT_T1);
    }
};

// An operand seen as vectors along k: rows of A, or columns of B.
struct Operand {
    const uint16_t* data;
    int64_t stride;
    bool k_contiguous;  // a vector's elements are neighbours; otherwise elements of one k are
    int64_t count;      // vectors in all

    const uint16_t* at(int64_t vector, int64_t k) const {
        return k_contiguous ? data + vector * stride + k : data + k * stride + vector;
    }

    Walk walk(int64_t first, int64_t vectors, int64_t k, int64_t depth) const {
        const int64_t rows = vectors <= 0 ? 0 : k_contiguous ? vectors : depth;
        return Walk(at(first, k), stride * 2, rows, (k_contiguous ? depth : vectors) * 2);
    }
};

// Stores one k pair of the 16 vectors of a strip to panels `kWidth` vectors wide. A strip covers
// two panels of A, or a third of a panel of B.
template <int64_t kWidth>
inline void store_pair(uint32_t* packed, int64_t pairs, int64_t strip, int64_t pair, __m512i v) {
    if (kWidth == kTileRows) {
        uint32_t* to = packed + 2 * strip * pairs * kWidth + pair * kWidth;
        _mm256_store_si256((__m256i*)to, _mm512_castsi512_si256(v));
        _mm256_store_si256((__m256i*)(to + pairs * kWidth), _mm512_extracti64x4_epi64(v, 1));
    } else {
        uint32_t* to = packed + (strip / kTileVectors * pairs + pair) * kWidth;
        _mm512_store_si512(to + strip % kTileVectors * kStrip, v);
    }
}

// Transposes a 16 x 16 matrix of 32-bit elements: first inside 4 x 4 blocks, then the blocks.
inline void transpose(__m512i (&v)[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        const __m512i lo01 = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        const __m512i hi01 = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i lo23 = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m512i hi23 = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(lo01, lo23);
        t[i + 1] = _mm512_unpackhi_epi64(lo01, lo23);
        t[i + 2] = _mm512_unpacklo_epi64(hi01, hi23);
        t[i + 3] = _mm512_unpackhi_epi64(hi01, hi23);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i even01 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        const __m512i odd01 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        const __m512i even23 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const __m512i odd23 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
}

// Packs one strip of 16 vectors, `depth` steps of k from k0, where k is contiguous in memory:
// 32 steps (16 pairs) of each vector are one load, and the 16 loads are transposed.
template <int64_t kWidth>
void pack_strip(const Operand& x, int64_t first, int64_t k0, int64_t depth, uint32_t* packed, int64_t strip) {
    const int64_t pairs = (depth + 1) / 2;
    const int64_t vectors = min(kStrip, x.count - first);
    const uint16_t* from = x.at(first, k0);
    for (int64_t k = 0; k < depth; k += 32) {
        const __mmask32 mask = mask32(depth - k);
        __m512i v[16];
        if (mask == ~0u && vectors == kStrip) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                v[i] = _mm512_loadu_si512(from + i * x.stride + k);
                _mm_prefetch((const char*)(from + i * x.stride + k) + 256, _MM_HINT_T0);
            }
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                v[i] = i < vectors ? _mm512_maskz_loadu_epi16(mask, from + i * x.stride + k) : _mm512_setzero_si512();
        }
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (k / 2 + i < pairs) store_pair<kWidth>(packed, pairs, strip, k / 2 + i, v[i]);
    }
}

// Packs strips [begin, end) where the vectors of one k are contiguous: two neighbouring rows of
// memory are interleaved. Goes through a few rows at a time, to read each from start to end, and
// prefetches the next few. (A prefetch of an address outside the operand does nothing.)
template <int64_t kWidth>
void pack_rows(const Operand& x, int64_t first, int64_t k0, int64_t depth, uint32_t* packed, int64_t begin,
               int64_t end) {
    constexpr int64_t kRows = 16;
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t k_begin = 0; k_begin < depth; k_begin += kRows) {
        const int64_t k_end = min(k_begin + kRows, depth);
        for (int64_t strip = begin; strip < end; strip++) {
            const int64_t vector = first + strip * kStrip;
            const __mmask16 mask = first_lanes(x.count - vector);
            for (int64_t k = k_begin; k < k_end; k += 2) {
                const uint16_t* from = x.at(vector, k0 + k);
                _mm_prefetch((const char*)(from + kRows * x.stride), _MM_HINT_T0);
                _mm_prefetch((const char*)(from + (kRows + 1) * x.stride), _MM_HINT_T0);
                __m256i even, odd = _mm256_setzero_si256();
                if (mask == 0xffff) {
                    even = _mm256_loadu_si256((const __m256i*)from);
                    if (k + 1 < depth) odd = _mm256_loadu_si256((const __m256i*)(from + x.stride));
                } else {
                    even = _mm256_maskz_loadu_epi16(mask, from);
                    if (k + 1 < depth) odd = _mm256_maskz_loadu_epi16(mask, from + x.stride);
                }
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                store_pair<kWidth>(packed, pairs, strip, k / 2, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
            }
        }
    }
}

// Packs vectors [begin, end) of a part of `count` vectors from `first` on, steps [k0, k0 + depth)
// of k, where `packed` is the place of the part. `begin` is a multiple of kStrip. What is missing
// to whole panels at the end of the part becomes zeros.
template <int64_t kWidth>
void pack(const Operand& x, int64_t first, int64_t count, int64_t k0, int64_t depth, uint32_t* packed, int64_t begin,
          int64_t end) {
    if (begin >= end) return;
    if (end == count) end = rounded_up(count, kWidth);
    begin /= kStrip, end = ceil_div(end, kStrip);
    if (!x.k_contiguous) return pack_rows<kWidth>(x, first, k0, depth, packed, begin, end);
    for (int64_t strip = begin; strip < end; strip++)
        pack_strip<kWidth>(x, first + strip * kStrip, k0, depth, packed, strip);
}

// What becomes of a tile's sums over one block of k.
struct Result {
    void* c;  // the tile in C
    int64_t stride;
    Output output;
    const float* partial;  // sums over earlier blocks to be added, or null
    int64_t partial_stride;
    const uint16_t* bias;  // or null
};

// Finishes one vector of sums: the lanes of `mask`, at row i and column j of the tile.
inline void finish(const Result& r, int64_t i, int64_t j, __mmask16 mask, __m512 sum) {
    const bool full = mask == 0xffff;  // masked stores are slow on some cores
    if (r.partial) {
        const float* partial = r.partial + i * r.partial_stride + j;
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, partial));
    }
    if (r.bias) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(mask, r.bias + j)));
    if (r.output == kFinal) {
        uint16_t* c = (uint16_t*)r.c + i * r.stride + j;
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sum);
        if (full)
            _mm256_storeu_si256((__m256i*)c, rounded);
        else
            _mm256_mask_storeu_epi16(c, mask, rounded);
    } else {
        float* c = (float*)r.c + i * r.stride + j;
        if (r.output == kMore) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c));
        if (full)
            _mm512_storeu_ps(c, sum);
        else
            _mm512_mask_storeu_ps(c, mask, sum);
    }
}

// Computes one tile over one block of k; `rows` x `columns` of it exist.
void multiply_tile(int64_t pairs, const uint32_t* a, const uint32_t* b, const Result& r, int64_t rows, int64_t columns,
                   Prefetch& prefetch) {
    const int64_t size = r.output == kFinal ? 2 : 4;
    prefetch.tile = Walk(r.c, r.stride * size, rows, columns * size);
    prefetch.partial = Walk(r.partial, r.partial_stride * 4, r.partial ? rows : 0, columns * 4);

    __m512 sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 3
        for (int j = 0; j < kTileVectors; j++) sum[i][j] = _mm512_setzero_ps();

    for (int64_t left = pairs; left > 0; left -= kPairsPerPrefetch) {
        prefetch.step(left <= kFinishingPairs);
        prefetch.step(left <= kFinishingPairs);
        for (int64_t p = min(left, kPairsPerPrefetch); p > 0; p--, a += kTileRows, b += kTileColumns) {
            __m512bh column[kTileVectors];
#pragma GCC unroll 3
            for (int j = 0; j < kTileVectors; j++) column[j] = (__m512bh)_mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; i++) {
                const __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[i]);
#pragma GCC unroll 3
                for (int j = 0; j < kTileVectors; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, column[j]);
            }
        }
    }

    if (rows == kTileRows && columns == kTileColumns) {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 3
            for (int j = 0; j < kTileVectors; j++) finish(r, i, 16 * j, 0xffff, sum[i][j]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 3
            for (int j = 0; j < kTileVectors; j++)
                if (i < rows && 16 * j < columns) finish(r, i, 16 * j, first_lanes(columns - 16 * j), sum[i][j]);
    }
}

// A buffer that grows and is kept, one for each calling thread.
class Workspace {
  public:
    ~Workspace() { free(data_); }

    char* reserve(size_t size) {
        constexpr size_t kHugePage = 2 << 20;
        if (size > size_) {
            free(data_);
            size_ = (size + kHugePage - 1) / kHugePage * kHugePage;
            data_ = (char*)aligned_alloc(kHugePage, size_);
            if (!data_) {
                fprintf(stderr, "fastgpt_kernels.native: no memory for %zu bytes\n", size_);
                abort();
            }
            madvise(data_, size_, MADV_HUGEPAGE);
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

// Part `index` of `parts` of `total` things.
struct Range {
    int64_t begin, end;
    Range(int64_t total, int64_t index, int64_t parts)
        : begin(total * index / parts), end(total * (index + 1) / parts) {}
};

struct Gemm {
    Operand a, b;
    uint16_t* c;
    int64_t c_stride;
    const uint16_t* bias;
    int64_t m, n, k;

    int64_t threads, down, across;      // a grid of down x across threads
    int64_t block_m, block_n, block_k;  // what is multiplied between two changes of packed A
    int64_t panels;                     // of columns that stay in L2 together
    int64_t group_n;                    // columns of B packed at a time
    bool share_b;                       // whether the threads pack it together, or each its part
    int64_t batch_rows;                 // rows of A packed at a time
    int64_t a_share;                    // elements of packed A of one thread
    uint32_t *packed_a, *packed_b;
    float* partial;  // block_m x block_n sums; only with k cut

    Gemm(const Operand& a, const Operand& b, uint16_t* c, int64_t c_stride, const uint16_t* bias, int64_t k)
        : a(a), b(b), c(c), c_stride(c_stride), bias(bias), m(a.count), n(b.count), k(k) {}

    void plan(int64_t team, Workspace& workspace) {
        threads = team;
        choose_grid();
        block_m = block_size(m, kMaxRows * down, kTileRows);
        block_n = block_size(n, kMaxColumns, kTileColumns);
        block_k = block_size(k, kMaxDepth, 32);
        // Where threads share packed B, they had better not wait for each other too often.
        share_b = threads > kMaxUnshared;
        panels = max(2, min(kMostPanels, kGroupBytes / (kTileColumns * block_k * 2)));
        group_n = block_size(block_n, (share_b ? 4 : 1) * panels * across * kTileColumns, kTileColumns);
        batch_rows = rounded_up(kBatchBytes / (block_k * 2), kStrip);
        a_share = rounded_up(ceil_div(block_m / kTileRows, down) * kTileRows, kStrip) * block_k;

        const size_t a_size = a_share * down * across * 2;
        const size_t b_size = group_n * block_k * 2 * (share_b ? 1 : threads);
        const bool cut = block_k < k;
        char* data = workspace.reserve(a_size + b_size + (cut ? block_m * block_n * 4 : 0));
        packed_a = (uint32_t*)data;
        packed_b = (uint32_t*)(data + a_size);
        partial = (float*)(data + a_size + b_size);
    }

    // The grid whose largest share of tiles is smallest, then the one with least to be packed for
    // it. Some threads may be left over.
    void choose_grid() {
        const int64_t row_panels = ceil_div(m, kTileRows), column_panels = ceil_div(n, kTileColumns);
        int64_t least_tiles = row_panels * column_panels + 1, least_packed = 0;
        for (int64_t d = threads; d >= 1; d--) {
            const int64_t y = ceil_div(row_panels, d), x = ceil_div(column_panels, threads / d);
            const int64_t packed = y * kTileRows + x * kTileColumns;
            if (y * x > least_tiles || (y * x == least_tiles && packed >= least_packed)) continue;
            least_tiles = y * x, least_packed = packed, down = d, across = threads / d;
        }
    }

    // What to do with the tile at (i, j) of C after the block of k that starts at k0; i0 and j0 are
    // where its block of C starts.
    Result result(int64_t i0, int64_t j0, int64_t i, int64_t j, int64_t k0) const {
        const bool first = k0 == 0, last = k0 + block_k >= k;
        const uint16_t* tile_bias = last && bias ? bias + j : nullptr;
        float* sums = partial + (i - i0) * block_n + (j - j0);
        if (!last) return {sums, block_n, first ? kFirst : kMore, nullptr, 0, nullptr};
        return {c + i * c_stride + j, c_stride, kFinal, first ? nullptr : sums, block_n, tile_bias};
    }
};

// One of the threads at work.
class Worker {
  public:
    Worker(const Gemm& g, int64_t thread)
        : g_(g),
          thread_(thread),
          y_(thread / g.across),
          x_(thread % g.across),
          packed_a_(g.packed_a + min(thread, g.down * g.across - 1) * g.a_share / 2),
          packed_b_(g.packed_b + (g.share_b ? 0 : thread * g.group_n * g.block_k / 2)) {}

    void run() {
        for (int64_t i0 = 0; i0 < g_.m; i0 += g_.block_m)
            for (int64_t j0 = 0; j0 < g_.n; j0 += g_.block_n)
                for (int64_t k0 = 0; k0 < g_.k; k0 += g_.block_k) {
                    const int64_t j_end = min(j0 + g_.block_n, g_.n);
                    for (int64_t j = j0; j < j_end; j += g_.group_n) {
                        const int64_t columns = min(g_.group_n, j_end - j);
                        pack_b(j, columns, k0);
                        if (g_.share_b) barrier();
                        // Threads beyond the grid only pack.
                        if (y_ < g_.down) multiply_group(i0, j0, j, columns, k0);
                        if (g_.share_b) barrier();
                    }
                }
    }

  private:
    static void barrier() {
#pragma omp barrier
    }

    // The columns, of a group of so many, that this thread packs, from a multiple of kStrip on.
    Range columns_to_pack(int64_t columns) const {
        const int64_t unit = g_.share_b ? kStrip : kTileColumns;
        Range r = g_.share_b ? Range(ceil_div(columns, unit), thread_, g_.threads)
                             : Range(ceil_div(columns, unit), x_, g_.across);
        r.begin = min(r.begin * unit, columns);
        r.end = min(r.end * unit, columns);
        return r;
    }

    void pack_b(int64_t j, int64_t columns, int64_t k0) {
        const Range r = columns_to_pack(columns);
        pack<kTileColumns>(g_.b, j, columns, k0, depth(k0), packed_b_, r.begin, r.end);
    }

    int64_t depth(int64_t k0) const { return min(g_.block_k, g_.k - k0); }

    // Multiplies this thread's rows by its part of a packed group of columns, `panels` panels
    // at a time. Packs A as it first goes through the rows, unless these were the last it packed.
    void multiply_group(int64_t i0, int64_t j0, int64_t j, int64_t columns, int64_t k0) {
        const int64_t rows = min(g_.block_m, g_.m - i0);
        const Range y(ceil_div(rows, kTileRows), y_, g_.down);
        const Range x(ceil_div(columns, kTileColumns), x_, g_.across);
        const int64_t pairs = (depth(k0) + 1) / 2;
        const int64_t first_row = y.begin * kTileRows, end_row = min(y.end * kTileRows, rows);
        const int64_t middle = (first_row + end_row) / 2;
        for (int64_t x_begin = x.begin; x_begin < x.end; x_begin += g_.panels) {
            const bool fresh = i0 != packed_i_ || k0 != packed_k_;
            const int64_t x_end = min(x_begin + g_.panels, x.end);
            for (int64_t row = first_row; row < end_row; row += g_.batch_rows) {
                const int64_t count = min(g_.batch_rows, end_row - row);
                uint32_t* a = packed_a_ + (row - first_row) * pairs;
                if (fresh) pack<kTileRows>(g_.a, i0 + row, count, k0, depth(k0), a, 0, count);
                prefetch_a(i0, row + count, end_row, a + count * pairs, k0, fresh);
                if (x_end == x.end && row <= middle && middle < row + count) prefetch_b(j0, j, columns, k0);
                for (int64_t i = row; i < row + count; i += kTileRows, a += kTileRows * pairs)
                    for (int64_t p = x_begin; p < x_end; p++) {
                        const int64_t column = p * kTileColumns;
                        multiply_tile(pairs, a, packed_b_ + column * pairs, g_.result(i0, j0, i0 + i, j + column, k0),
                                      min(kTileRows, rows - i), min(kTileColumns, columns - column), prefetch_);
                    }
            }
            packed_i_ = i0, packed_k_ = k0;
        }
    }

    // The next batch of A: to be packed if `fresh`, packed already if not.
    void prefetch_a(int64_t i0, int64_t row, int64_t end_row, const uint32_t* packed, int64_t k0, bool fresh) {
        const int64_t count = min(g_.batch_rows, end_row - row);
        const int64_t panel_bytes = (depth(k0) + 1) / 2 * kTileRows * 4;
        if (count <= 0)
            prefetch_.a = Walk(packed_a_, 0, 1, panel_bytes);  // starts over with the first
        else if (fresh)
            prefetch_.a = g_.a.walk(i0 + row, count, k0, depth(k0));
        else
            prefetch_.a = Walk(packed, 0, 1, ceil_div(count, kTileRows) * panel_bytes);
    }

    // What this thread will pack of the group of B that follows columns [j, j + columns).
    void prefetch_b(int64_t j0, int64_t j, int64_t columns, int64_t k0) {
        const int64_t j_end = min(j0 + g_.block_n, g_.n);
        j += columns;
        if (j >= j_end) j = j0, k0 += g_.block_k;
        if (k0 >= g_.k) k0 = 0, j = j_end < g_.n ? j_end : 0;
        const Range r = columns_to_pack(min(g_.group_n, g_.n - j));
        prefetch_.b = g_.b.walk(j + r.begin, r.end - r.begin, k0, depth(k0));
    }

    const Gemm& g_;
    const int64_t thread_, y_, x_;           // its number and place in the grid
    uint32_t* const packed_a_;               // its own
    uint32_t* const packed_b_;               // its own, or that of all
    int64_t packed_i_ = -1, packed_k_ = -1;  // what of A packed_a_ holds
    Prefetch prefetch_;
};

}  // namespace

// Element (i, p) of A is a[i * a_stride + p], or a[p * a_stride + i] if a_transposed; element (p, j) of B is
// b[p * b_stride + j], or b[j * b_stride + p] if b_transposed. Element (i, j) of C is c[i * c_stride + j]. Nothing need
// be aligned beyond its own element size; m, n and k are at least 1. C must not overlap the operands. `bias` (n,) may
// be null. The result has the same bits whatever the number of threads. Callers in several threads each have a work
// space of their own, kept for the next call and freed when the thread ends.
extern "C" void fastgpt_product(const uint16_t* a, int64_t a_stride, int64_t a_transposed, const uint16_t* b,
                                int64_t b_stride, int64_t b_transposed, uint16_t* c, int64_t c_stride,
                                const uint16_t* bias, int64_t m, int64_t n, int64_t k, int threads) {
    static thread_local Workspace callers_workspace;
    Workspace& workspace = callers_workspace;  // named inside the team, it would be each thread's own
    Gemm gemm({a, a_stride, !a_transposed, m}, {b, b_stride, b_transposed != 0, n}, c, c_stride, bias, k);
    const double work = (double)m * n * k;
    const int64_t team = min(threads, max(1, (int64_t)(work / kWorkPerThread)));
    gemm.plan(team, workspace);
#pragma omp parallel num_threads((int)team)
    {
        if (omp_get_num_threads() != team) {  // fewer than asked for
#pragma omp single
            gemm.plan(omp_get_num_threads(), workspace);
        }
        Worker(gemm, omp_get_thread_num()).run();
    }
}
