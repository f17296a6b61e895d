// The loops over memory, compiled once for each instruction set.
//
// A loop works on a Range of the tensor and on one thread. What it needs to know of a channel comes
// as doubles, computed by batch_norm.cc.
#pragma once

#include "batch_norm.h"

namespace batchnorm {

// The elements [outer0, outer1) x [channel0, channel1) x [inner0, inner1).
struct Range {
  int64_t outer0, outer1, channel0, channel1, inner0, inner1;
};

// Of a set of elements: sum w, mean, and sum w*(x - mean)^2.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // The union with a disjoint set: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise
  // Algorithm for Computing Sample Variances" (1979).
  void merge(const Moments& other) {
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
};

// Of one channel. xhat = (x - center) * rstd - remainder, where center is the mean rounded to the
// arithmetic type and remainder is what that rounding left out.
struct Coefficients {
  double center, rstd, remainder;
  double slope, shift;         // z = (x - center) * slope + shift, before residual and activation
  double mean_g, mean_g_xhat;  // the sums over the count, for input_gradient
};

struct Kernels {
  const char* instruction_set;

  // Merges the moments of the range into channels[c]. `wide`: in double even where x is narrower.
  void (*moments)(const Problem&, const Range&, bool wide, Moments* channels);

  void (*normalize)(const Problem&, const Range&, const Coefficients* channels, void* y);

  // Adds the sums over the range to sums[c].
  void (*gradient_sums)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                        GradientSums* sums);

  void (*input_gradient)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                         void* dx, void* dresidual);
};

}  // namespace batchnorm
