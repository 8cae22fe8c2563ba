// Causal attention over a packed projection in bfloat16, forward and backward. One thread works on one head at a time.
//
//     s_ij = scale q_i . k_j     p_ij = 2^(s_ij log2(e) - m_i) / l_i     l_i = sum_j 2^(s_ij log2(e) - m_i)
//     o_i  = sum_j z_ij p_ij v_j                                    z_ij = 1 / (1 - r) where kept, else 0
//     ds_ij = p_ij (z_ij do_i . v_j - delta_i)                      delta_i = sum_j p_ij z_ij do_i . v_j
//     dv_j = sum_i z_ij p_ij do_i     dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i
//
// A tile has KEYS keys as rows and QUERIES queries as columns: a vector holds one key and 16 queries, so that maxima
// and sums over keys need nothing across lanes. delta is not do_i . o_i, which would have the rounding of o. Scores,
// weights, and all sums are float32; the weights and ds are rounded to bfloat16 for their products, as q, k, v and do
// are already. Tiles that nobody sees are not visited. Positions beyond T are zeros: such keys lie in every query's
// future, and such queries have a gradient of zeros.
//
// The backward has m, the largest exponent, and l, the sum: their logarithm together would have to hold both, and the
// product s log2(e) enters its difference with m unrounded, so that scores in the thousands lose nothing.
//
// Source: Dao, "FlashAttention-2" (2023), sections 3.1 and 3.2.

#include <math.h>
#include <string.h>

#include "memory.h"
#include "products.h"

using namespace fastgpt;

namespace {

constexpr int64_t QUERIES = 64, KEYS = 96;
constexpr int64_t AHEAD = 16;  // rows

// As attention.py describes it to ctypes; strides in elements.
struct Attention {
    int64_t B, T, H, D, window;  // a window of at least T hides nothing
    int64_t strides[5];          // of qkv (B, T, 3, H, D)
    float scale;
    Mask mask;
    const uint16_t* qkv;
    const int32_t* documents;  // (B, T), the number of each position's document; or null
    const int32_t* firsts;     // (B, T), the first position of that document
};

struct Head {
    int64_t b, h;
};

// Keys `key` to `key` + `count` - 1 by the QUERIES queries from `first` on, and what of their products the diagonal
// leaves.
struct Tile {
    int64_t first, key, count;

    // How many keys the 16 queries from q on may see; even, as `key` is.
    int64_t seen(int64_t q) const { return clamp(first + q + LANES - key, count); }

    // For sums over D: keys by the queries that may see them.
    auto scores(int64_t D) const {
        return [=, *this](int64_t j) { return Part{0, D / 2, clamp((key + j - first) / LANES, QUERIES / LANES)}; };
    }
    // For sums over keys, in pairs: what the ROWS queries from q on may see of them.
    auto over_keys() const {
        return [*this](int64_t q) { return Part{0, clamp((first + q + ROWS - key + 1) / 2, count / 2), 0}; };
    }
    // For sums over queries, in pairs: those that may see the key j.
    auto over_queries() const {
        return [*this](int64_t j) { return Part{clamp((key + j - first) / 2, QUERIES / 2), QUERIES / 2, 0}; };
    }

  private:
    static int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : n > most ? most : n; }
};

// What one thread needs of a head: its operands, packed, and which tiles are seen.
class Operands {
  public:
    Operands(const Attention& a) : a(a), T(rounded_up(a.T, QUERIES)), D(rounded_up(a.D, LANES)) {
        if (a.documents) documents_ = memory_.take<int32_t>(T);
    }

    void start(Head head) {
        this->head = head;
        if (!a.documents) return;
        memcpy(documents_, a.documents + head.b * a.T, a.T * 4);
        for (int64_t t = a.T; t < T; t++) documents_[t] = -1;
    }

    // Part 0 (q), 1 (k) or 2 (v) of the rows from `first` on, as bfloat16 rows of D.
    void rows(int part, int64_t first, int64_t count, uint16_t* packed) const {
        const uint16_t* from = a.qkv + head.b * a.strides[0] + part * a.strides[2] + head.h * a.strides[3];
        copy_rows(from + first * a.strides[1], a.strides[1], a.strides[4], a.T - first, count, packed);
    }

    // Of a contiguous tensor (B, T, H, D).
    void rows(const uint16_t* x, int64_t first, int64_t count, uint16_t* packed) const {
        copy_rows(x + ((head.b * a.T + first) * a.H + head.h) * a.D, a.H * a.D, 1, a.T - first, count, packed);
    }

    // From rows of D to words of two rows that follow each other.
    void pairs(const uint16_t* rows, int64_t count, uint32_t* words) const {
        for (int64_t t = 0; t < count; t += 2)
            for (int64_t d = 0; d < D; d += LANES) {
                Ints even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + t * D + d)));
                Ints odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + (t + 1) * D + d)));
                _mm512_store_si512(words + t / 2 * D + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }

    // From QUERIES rows of D to the words of two columns, (D / 2, QUERIES).
    void transposed(const uint16_t* rows, uint32_t* words) const {
        Ints places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                         _mm512_set1_epi32((int)(D / 2)));
        for (int64_t q = 0; q < QUERIES; q += LANES)
            for (int64_t d = 0; d < D / 2; d++)
                _mm512_store_si512(words + d * QUERIES + q,
                                   _mm512_i32gather_epi32(places, (const int*)(rows + q * D) + d, 4));
    }

    // The first key that any of the queries from `first` on may see; even, because keys are multiplied in pairs.
    int64_t first_key(int64_t first) const {
        int64_t key = first - a.window + 1;
        if (a.documents) {
            int64_t earliest = first;
            for (int64_t t = first; t < first + QUERIES && t < a.T; t++) {
                int64_t start = a.firsts[head.b * a.T + t];
                earliest = start < earliest ? start : earliest;
            }
            key = key > earliest ? key : earliest;
        }
        return key > 0 ? key & ~(int64_t)1 : 0;
    }

    // Whether some of `count` keys from `key` on are hidden from some of the 16 queries from `query` on.
    bool hides(int64_t key, int64_t count, int64_t query) const {
        return a.documents || key + count - 1 > query || query + LANES - key > a.window;
    }

    // Which of the 16 queries from `query` on see a key.
    __mmask16 seeing(int64_t key, int64_t query) const {
        __mmask16 seen = (__mmask16)~first_lanes(key - query) & first_lanes(key + a.window - query);
        if (a.documents)
            seen &= _mm512_cmpeq_epi32_mask(_mm512_load_si512(documents_ + query), _mm512_set1_epi32(documents_[key]));
        return seen;
    }

    // The 64 random bits of four keys from `key`, a multiple of 4, and of the queries `query` to `query` + 7.
    __m512i bits(int64_t key, int64_t query) const {
        int64_t words = (a.T + 3) / 4;
        return a.mask.bits(((head.b * a.H + head.h) * a.T + query) * words + key / 4, words);
    }

    const Attention& a;
    const int64_t T, D;  // rounded up
    Head head = {};

  private:
    // `there` rows are to be had; those beyond, and columns beyond a.D, are zeros.
    void copy_rows(const uint16_t* from, int64_t row, int64_t column, int64_t there, int64_t count,
                   uint16_t* to) const {
        for (int64_t t = 0; t < count; t++, from += row, to += D) {
            int64_t d = 0;
            if (t < there && column == 1) {
                // a row of one head is too short, and the next too far away, for the processor to foresee it
                for (int64_t n = 0; n < a.D; n += 32) _mm_prefetch((const char*)(from + AHEAD * row + n), _MM_HINT_T0);
                for (; d + 32 <= a.D; d += 32) _mm512_storeu_si512(to + d, _mm512_loadu_si512(from + d));
                for (; d < a.D; d++) to[d] = from[d];
            } else if (t < there) {
                for (; d < a.D; d++) to[d] = from[d * column];
            }
            for (; d < D; d++) to[d] = 0;
        }
    }

    Memory memory_;
    int32_t* documents_ = nullptr;
};

// Which of 16 queries keep key number `lane` of 4, from the bits of 8 queries and of the 8 after them.
inline __mmask16 kept(__m512i low, __m512i high, int lane, int32_t bound) {
    auto part = [lane](__m512i bits) {
        return _mm512_cvtepi64_epi32(_mm512_srai_epi64(_mm512_slli_epi64(bits, (unsigned)(48 - 16 * lane)), 48));
    };
    Ints numbers = _mm512_inserti64x4(_mm512_castsi256_si512(part(low)), part(high), 1);
    return _mm512_cmpge_epi32_mask(numbers, _mm512_set1_epi32(bound));
}

// The masks of one group of 16 queries, key after key in rising order.
class Keeping {
  public:
    Keeping(const Operands& operands, int64_t query)
        : operands_(operands), drops_(operands.a.mask.drops()), query_(query) {}

    __mmask16 next(int64_t key) {
        if (!drops_) return 0xFFFF;
        if (key % 4 == 0 || !drawn_) {
            low_ = operands_.bits(key & ~(int64_t)3, query_);
            high_ = operands_.bits(key & ~(int64_t)3, query_ + 8);
            drawn_ = true;
        }
        return kept(low_, high_, (int)(key & 3), operands_.a.mask.bound);
    }

  private:
    const Operands& operands_;
    const bool drops_;
    bool drawn_ = false;
    const int64_t query_;
    __m512i low_ = {}, high_ = {};
};

inline Ints words_of(Vec even, Vec odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(narrowed(even)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(odd)), 16));
}

void write_rows(const float* x, int64_t x_row, int64_t count, int64_t D, float factor, uint16_t* y, int64_t y_row,
                int64_t y_column) {
    for (int64_t t = 0; t < count; t++, x += x_row, y += y_row)
        each(D, [=](int64_t d, auto lanes) {
            Vec numbers = _mm512_mul_ps(_mm512_load_ps(x + d), broadcast(factor));
            if (y_column == 1) return store(y + d, numbers, lanes);
            uint16_t spare[LANES];
            store(spare, numbers);
            for (int64_t i = 0; i < LANES && d + i < D; i++) y[(d + i) * y_column] = spare[i];
        });
}

class Forward {
  public:
    Forward(const Attention& a) : x(a) {
        rows_ = memory_.take<uint16_t>(x.T * x.D);  // of k or v, and of a block of q
        keys_ = memory_.take<uint16_t>(x.T * x.D);
        values_ = memory_.take<uint32_t>(x.T * x.D / 2);
        queries_ = memory_.take<uint32_t>(QUERIES * x.D / 2);
        scores_ = memory_.take<float>(KEYS * QUERIES);
        weights_ = memory_.take<uint32_t>(KEYS / 2 * QUERIES);
        out_ = memory_.take<float>(QUERIES * x.D);
    }

    void run(Head head, uint16_t* out, float* statistics) {
        x.start(head);
        x.rows(1, 0, x.T, keys_);
        x.rows(2, 0, x.T, rows_);
        x.pairs(rows_, x.T, values_);
        for (int64_t first = 0; first < x.a.T; first += QUERIES) block(first, out, statistics);
    }

  private:
    void block(int64_t first, uint16_t* out, float* statistics) {
        const Attention& a = x.a;
        x.rows(0, first, QUERIES, rows_);
        x.transposed(rows_, queries_);
        for (int64_t q = 0; q < QUERIES; q++) maxima_[q] = -INFINITY, sums_[q] = 0;
        int64_t start = x.first_key(first), stop = first + QUERIES;
        for (int64_t key = start; key < stop; key += KEYS) {
            int64_t count = stop - key < KEYS ? stop - key : KEYS;
            Tile tile = {first, key, count};
            product<false>({(uint32_t*)keys_ + key * x.D / 2, x.D / 2, 1}, {queries_, QUERIES}, scores_, QUERIES, count,
                           QUERIES, tile.scores(x.D));
            for (int64_t q = 0; q < QUERIES; q += LANES) soften(tile, q);
            Left weights = {weights_, 1, QUERIES};
            Right values = {values_ + key / 2 * x.D, x.D};
            if (key == start) {
                product<false>(weights, values, out_, x.D, QUERIES, x.D, tile.over_keys());
            } else {
                for (int64_t q = 0; q < QUERIES; q++)
                    for (int64_t d = 0; d < x.D; d += LANES) {
                        float* at = out_ + q * x.D + d;
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), broadcast(shrinking_[q])));
                    }
                product<true>(weights, values, out_, x.D, QUERIES, x.D, tile.over_keys());
            }
        }
        for (int64_t q = 0; q < QUERIES && first + q < a.T; q++) {
            int64_t t = first + q;
            write_rows(out_ + q * x.D, 0, 1, a.D, a.mask.keep / sums_[q],
                       out + ((x.head.b * a.T + t) * a.H + x.head.h) * a.D, 0, 1);
            statistics[(2 * (x.head.b * a.H + x.head.h)) * a.T + t] = maxima_[q];
            statistics[(2 * (x.head.b * a.H + x.head.h) + 1) * a.T + t] = sums_[q];
        }
    }

    // From the scores of 16 queries to their weights, and on with their maxima and sums.
    void soften(Tile tile, int64_t q) {
        int64_t query = tile.first + q, key = tile.key, count = tile.seen(q);
        float* scores = scores_ + q;
        Vec factor = broadcast(x.a.scale * LOG2_E), before = _mm512_load_ps(maxima_ + q);
        Vec largest = broadcast(-INFINITY);
        bool hides = x.hides(key, count, query);
        for (int64_t j = 0; j < count; j++) {
            Vec s = _mm512_load_ps(scores + j * QUERIES);
            if (hides) {
                s = _mm512_mask_mov_ps(broadcast(-INFINITY), x.seeing(key + j, query), s);
                _mm512_store_ps(scores + j * QUERIES, s);
            }
            largest = _mm512_max_ps(largest, s);
        }
        Vec maximum = _mm512_max_ps(before, _mm512_mul_ps(largest, factor));
        // queries that have seen no key yet: 2^(-inf - 0) is 0
        Vec origin = _mm512_mask_mov_ps(maximum, _mm512_cmp_ps_mask(maximum, broadcast(-INFINITY), _CMP_EQ_OQ),
                                        _mm512_setzero_ps());
        Vec shrinking = exp2(_mm512_sub_ps(before, origin)), sum = _mm512_setzero_ps();
        Keeping keeping(x, query);
        for (int64_t j = 0; j < count; j += 2) {
            Vec even = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + j * QUERIES), factor, origin));
            Vec odd = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + (j + 1) * QUERIES), factor, origin));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            even = _mm512_maskz_mov_ps(keeping.next(key + j), even);
            odd = _mm512_maskz_mov_ps(keeping.next(key + j + 1), odd);
            _mm512_store_si512(weights_ + j / 2 * QUERIES + q, words_of(even, odd));
        }
        for (int64_t j = count; j < tile.count; j += 2)
            _mm512_store_si512(weights_ + j / 2 * QUERIES + q, _mm512_setzero_si512());
        _mm512_store_ps(maxima_ + q, maximum);
        _mm512_store_ps(shrinking_ + q, shrinking);
        _mm512_store_ps(sums_ + q, _mm512_fmadd_ps(_mm512_load_ps(sums_ + q), shrinking, sum));
    }

    Memory memory_;
    Operands x;
    uint16_t *rows_, *keys_;
    uint32_t *values_, *queries_, *weights_;
    float *scores_, *out_;
    alignas(64) float maxima_[QUERIES], sums_[QUERIES], shrinking_[QUERIES];
};

class Backward {
  public:
    Backward(const Attention& a) : x(a) {
        int64_t words = x.T * x.D / 2, block = QUERIES * x.D;
        keys_ = memory_.take<uint16_t>(2 * words);
        values_ = memory_.take<uint16_t>(2 * words);
        key_pairs_ = memory_.take<uint32_t>(words);
        dkeys_ = memory_.take<float>(x.T * x.D);
        dvalues_ = memory_.take<float>(x.T * x.D);
        rows_ = memory_.take<uint16_t>(block);
        queries_ = memory_.take<uint32_t>(block / 2);
        query_pairs_ = memory_.take<uint32_t>(block / 2);
        douts_ = memory_.take<uint32_t>(block / 2);
        dout_pairs_ = memory_.take<uint32_t>(block / 2);
        dqueries_ = memory_.take<float>(block);
        scores_ = memory_.take<float>(x.T * QUERIES);  // of all keys, then their weights
        dweights_ = memory_.take<float>(x.T * QUERIES);
        weights_ = memory_.take<uint16_t>(KEYS * QUERIES);
        slopes_ = memory_.take<uint16_t>(KEYS * QUERIES);
        slope_pairs_ = memory_.take<uint32_t>(KEYS * QUERIES / 2);
    }

    // dqkv has strides of its own.
    void run(Head head, const float* statistics, const uint16_t* dout, uint16_t* dqkv, const int64_t* strides) {
        const Attention& a = x.a;
        x.start(head);
        x.rows(1, 0, x.T, keys_);
        x.rows(2, 0, x.T, values_);
        x.pairs(keys_, x.T, key_pairs_);
        memset(dkeys_, 0, x.T * x.D * 4);
        memset(dvalues_, 0, x.T * x.D * 4);
        uint16_t* at = dqkv + head.b * strides[0] + head.h * strides[3];
        for (int64_t first = 0; first < a.T; first += QUERIES) {
            block(first, statistics, dout);
            int64_t count = a.T - first < QUERIES ? a.T - first : QUERIES;
            write_rows(dqueries_, x.D, count, a.D, a.scale, at + first * strides[1], strides[1], strides[4]);
        }
        write_rows(dkeys_, x.D, a.T, a.D, a.scale, at + strides[2], strides[1], strides[4]);
        write_rows(dvalues_, x.D, a.T, a.D, a.mask.keep, at + 2 * strides[2], strides[1], strides[4]);
    }

  private:
    void block(int64_t first, const float* statistics, const uint16_t* dout) {
        const Attention& a = x.a;
        x.rows(dout, first, QUERIES, rows_);
        for (int64_t q = 0; q < QUERIES; q++) {
            bool there = first + q < a.T;
            const float* of_head = statistics + 2 * (x.head.b * a.H + x.head.h) * a.T;
            delta_[q] = 0;
            maxima_[q] = there ? of_head[first + q] : 0;
            inverses_[q] = there ? 1 / of_head[a.T + first + q] : 0;
        }
        x.pairs(rows_, QUERIES, dout_pairs_);
        x.transposed(rows_, douts_);
        x.rows(0, first, QUERIES, rows_);
        x.pairs(rows_, QUERIES, query_pairs_);
        x.transposed(rows_, queries_);
        memset(dqueries_, 0, QUERIES * x.D * 4);
        // delta needs all keys of a query: the first round is for it, the weights and dv, the second for ds
        int64_t start = x.first_key(first), stop = first + QUERIES, D = x.D;
        for (int64_t key = start; key < stop; key += KEYS) {
            Tile tile = {first, key, stop - key < KEYS ? stop - key : KEYS};
            float *scores = scores_ + (key - start) * QUERIES, *dweights = dweights_ + (key - start) * QUERIES;
            product<false>({(uint32_t*)keys_ + key * D / 2, D / 2, 1}, {queries_, QUERIES}, scores, QUERIES, tile.count,
                           QUERIES, tile.scores(D));
            product<false>({(uint32_t*)values_ + key * D / 2, D / 2, 1}, {douts_, QUERIES}, dweights, QUERIES,
                           tile.count, QUERIES, tile.scores(D));
            for (int64_t q = 0; q < QUERIES; q += LANES) weigh(tile, q, scores + q, dweights + q);
            product<true>({(uint32_t*)weights_, QUERIES / 2, 1}, {dout_pairs_, D}, dvalues_ + key * D, D, tile.count, D,
                          tile.over_queries());
        }
        for (int64_t key = start; key < stop; key += KEYS) {
            Tile tile = {first, key, stop - key < KEYS ? stop - key : KEYS};
            const float *weights = scores_ + (key - start) * QUERIES, *dweights = dweights_ + (key - start) * QUERIES;
            for (int64_t q = 0; q < QUERIES; q += LANES) slopes(tile, q, weights + q, dweights + q);
            product<true>({(uint32_t*)slopes_, QUERIES / 2, 1}, {query_pairs_, D}, dkeys_ + key * D, D, tile.count, D,
                          tile.over_queries());
            product<true>({slope_pairs_, 1, QUERIES}, {key_pairs_ + key / 2 * D, D}, dqueries_, D, QUERIES, D,
                          tile.over_keys());
        }
    }

    // From the scores of 16 queries to their weights, in their place; from do . v to z do . v; and on with delta.
    void weigh(Tile tile, int64_t q, float* scores, float* dweights) {
        int64_t query = tile.first + q, key = tile.key, count = tile.seen(q);
        bool hides = x.hides(key, count, query);
        Vec factor = broadcast(x.a.scale * LOG2_E), keep = broadcast(x.a.mask.keep);
        Vec maximum = _mm512_load_ps(maxima_ + q), inverse = _mm512_load_ps(inverses_ + q);
        Vec delta = _mm512_load_ps(delta_ + q);
        Keeping keeping(x, query);
        for (int64_t j = 0; j < count; j++, scores += QUERIES, dweights += QUERIES) {
            Vec p = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores), factor, maximum));
            p = _mm512_mul_ps(p, inverse);
            if (hides) p = _mm512_maskz_mov_ps(x.seeing(key + j, query), p);
            __mmask16 kept = keeping.next(key + j);
            Vec dp = _mm512_maskz_mul_ps(kept, _mm512_load_ps(dweights), keep);
            delta = _mm512_fmadd_ps(p, dp, delta);
            _mm512_store_ps(scores, p);
            _mm512_store_ps(dweights, dp);
            store(weights_ + j * QUERIES + q, _mm512_maskz_mov_ps(kept, p));
        }
        for (int64_t j = count; j < tile.count; j++) store(weights_ + j * QUERIES + q, _mm512_setzero_ps());
        _mm512_store_ps(delta_ + q, delta);
    }

    // From the weights of 16 queries, and z do . v, to ds.
    void slopes(Tile tile, int64_t q, const float* weights, const float* dweights) {
        int64_t count = tile.seen(q);
        Vec delta = _mm512_load_ps(delta_ + q);
        auto slope = [=](int64_t j) {
            Vec difference = _mm512_sub_ps(_mm512_load_ps(dweights + j * QUERIES), delta);
            return _mm512_mul_ps(_mm512_load_ps(weights + j * QUERIES), difference);
        };
        for (int64_t j = 0; j < tile.count; j += 2) {
            Vec even = j < count ? slope(j) : _mm512_setzero_ps(), odd = j < count ? slope(j + 1) : _mm512_setzero_ps();
            store(slopes_ + j * QUERIES + q, even);
            store(slopes_ + (j + 1) * QUERIES + q, odd);
            _mm512_store_si512(slope_pairs_ + j / 2 * QUERIES + q, words_of(even, odd));
        }
    }

    Memory memory_;
    Operands x;
    uint16_t *keys_, *values_, *rows_, *weights_, *slopes_;
    uint32_t *key_pairs_, *queries_, *query_pairs_, *douts_, *dout_pairs_, *slope_pairs_;
    float *dkeys_, *dvalues_, *dqueries_, *scores_, *dweights_;
    alignas(64) float maxima_[QUERIES], inverses_[QUERIES], delta_[QUERIES];
};

}  // namespace

extern "C" {

void fastgpt_attention(const Attention* a, uint16_t* out, float* statistics, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Forward forward(*a);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a->B * a->H; i++) forward.run({i / a->H, i % a->H}, out, statistics);
    }
}

void fastgpt_attention_backward(const Attention* a, const float* statistics, const uint16_t* dout, uint16_t* dqkv,
                                const int64_t* strides, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Backward backward(*a);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a->B * a->H; i++) backward.run({i / a->H, i % a->H}, statistics, dout, dqkv, strides);
    }
}
}
