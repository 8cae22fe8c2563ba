// Working memory of one thread, in lines of the cache; all of it is given back at once.

#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

namespace fastgpt {

class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() {
        while (taken_ > 0) free(parts_[--taken_]);
    }

    template <typename T>
    T* take(int64_t count) {
        size_t bytes = ((size_t)count * sizeof(T) + 63) / 64 * 64;
        void* part = taken_ < MOST ? aligned_alloc(64, bytes ? bytes : 64) : nullptr;
        if (!part) {
            // a C++ exception may not leave a parallel region
            fprintf(stderr, "fastgpt_kernels.native: no memory for %zu bytes\n", bytes);
            abort();
        }
        parts_[taken_++] = part;
        return (T*)part;
    }

  private:
    static constexpr int MOST = 32;
    void* parts_[MOST];
    int taken_ = 0;
};

}  // namespace fastgpt
