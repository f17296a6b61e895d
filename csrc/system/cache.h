// How large the caches are, asked of the system once.
#pragma once

#include <cstdint>

namespace batchnorm {

// Bytes of the last-level cache that a core reaches, which it may share with others.
int64_t last_level_cache_bytes();

// For later calls, in all threads: with a small value, small tensors take the way of large ones.
void set_last_level_cache_bytes(int64_t bytes);

}  // namespace batchnorm
