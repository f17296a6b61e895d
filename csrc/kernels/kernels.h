// The loops over memory, compiled once for each instruction set.
//
// A loop works on a Range of the tensor and on one thread. What it needs to know of a channel comes
// as doubles, computed by stages/batch_norm.cc.
#pragma once

#include "stages/batch_norm.h"

namespace batchnorm {

// Shorter runs of a channel are seen as parts of rows, of all channels, which blocks of channels
// would break up.
inline bool by_rows(const Shape& shape) { return shape.inner < 32; }

// The elements [outer0, outer1) x [channel0, channel1) x [inner0, inner1).
struct Range {
  int64_t outer0, outer1, channel0, channel1, inner0, inner1;
  bool beyond_cache;  // what the call reads and writes is more than the caches hold
  int64_t ahead;      // elements from each to the one to fetch for the next block; 0 for none
  bool on_one_thread;
};

// Of a set of elements: sum w, mean, and sum w*(x - mean)^2.
struct Deviations {
  double count = 0, mean = 0, squares = 0;

  // The union with a disjoint set: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise
  // Algorithm for Computing Sample Variances" (1979).
  void merge(const Deviations& other) {
    if (!(other.count > 0) && other.count == other.count) return;
    const double total = count + other.count;
    const double shift = other.mean - mean;
    const double fraction = other.count / total;
    squares += other.squares + shift * shift * count * fraction;
    mean += shift * fraction;
    count = total;
  }
};

struct GradientSums {
  double g = 0, g_xhat = 0;

  void merge(const GradientSums& other) {
    g += other.g;
    g_xhat += other.g_xhat;
  }
};

// Of one channel. The mean is center + remainder / rstd: rounded to the arithmetic type, and what
// that rounding left out. xhat = (x - center) * rstd - remainder.
struct Coefficients {
  double center, rstd, remainder;
  double slope, shift;       // z = (x - center) * slope + shift, before residual and activation
  double share, share_xhat;  // dx = slope * (g - w * (share + (x - center) * share_xhat))
};

struct Kernels {
  const char* instruction_set;

  // Merges the deviations of the range into channels[c]. `wide`: in double even where x is
  // narrower.
  void (*deviations)(const Problem&, const Range&, bool wide, Deviations* channels);

  void (*normalize)(const Problem&, const Range&, const Coefficients* channels, void* y);

  // Adds the sums over the range to sums[c], as if the remainder were 0.
  void (*gradient_sums)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                        GradientSums* sums);

  void (*input_gradient)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                         void* dx, void* dresidual);
};

}  // namespace batchnorm
