// The loops over memory, compiled once for each instruction set.
//
// A loop works on a Range of the tensor and on one thread. What it needs to know of a channel comes
// as doubles, computed by stages/batch_norm.cc; what it keeps of each lane is in memory that comes
// with the call, as a loop may run on a thread with a small stack, where nothing may throw.
#pragma once

#include <algorithm>
#include <cassert>

#include "stages/batch_norm.h"

namespace batchnorm {

// Shorter runs of a channel are seen as parts of rows, of all channels, which blocks of channels
// would break up.
inline bool by_rows(const Shape& shape) { return shape.inner < 32; }

// Of a row, up to so many lanes are worked on at a time, and of runs, those of so many channels:
// their sums and coefficients stay in the caches. Rows of few lanes are folded to about kFolded.
constexpr int64_t kStripLanes = 2048;
constexpr int64_t kFolded = 256;

inline int64_t most_lanes(const Shape& shape) {
  if (!by_rows(shape)) return std::min(kStripLanes, shape.channels);
  return std::min(kStripLanes, std::max(kFolded, shape.channels * shape.inner));
}

// The memory that a loop keeps its lanes in.
class Scratch {
 public:
  static constexpr int64_t kAlignment = 64;

  // No loop takes more: of doubles, gradient sums with weights and scales take most, 16 a lane; of
  // float elements, deviations in double, 12.
  static int64_t bytes(const Shape& shape, Dtype dtype) {
    constexpr int64_t kMostArrays = 16;
    const int64_t lanes = most_lanes(shape), doubles = dtype == Dtype::float64 ? 17 : 13;
    return lanes == 0 ? 0 : padded(8 * doubles * (lanes + kMoreLanes)) + kMostArrays * kAlignment;
  }

  Scratch(char* memory, int64_t bytes) : next_(memory), end_(memory + bytes) {}

  template <class E>
  E* take(int64_t elements) {
    E* const taken = reinterpret_cast<E*>(next_);
    next_ += padded((elements + kMoreLanes) * static_cast<int64_t>(sizeof(E)));
    assert(next_ <= end_);
    return taken;
  }

 private:
  static int64_t padded(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  static constexpr int64_t kMoreLanes = 32;  // a pack at the end of a strip is written whole
  char *next_, *end_;
};

// Of one channel, in the coordinate t = x * scales.x - center, in which the mean is center, of the
// arithmetic type, and what rounding to that left out.
//
//   z    = t * slope + shift, before residual and activation
//   xhat = t * rstd - remainder
//   dx   = slope * (g - w * (share + t * share_xhat))
struct Coefficients {
  double center, rstd, remainder;
  double slope, shift;
  double share, share_xhat;
};

// Powers of two, 1 unless numbers would leave the range of the arithmetic type, and so exact:
//
//   dx = dx_slope * (g * scales.g - w * scales.w * (share + t * scales.t * share_xhat)) * scales.dx
struct Scales {
  double x = 1, g = 1, w = 1, t = 1, dx = 1;
  double dx_slope = 1;
};

// The elements [outer0, outer1) x [channel0, channel1) x [inner0, inner1).
struct Range {
  int64_t outer0, outer1, channel0, channel1, inner0, inner1;
  int64_t first_channel;  // that arrays of channels begin with
  bool beyond_cache;      // what the call reads and writes is more than the caches hold
  int64_t ahead;          // elements from each to the one to fetch for the next block; 0 for none
  bool on_one_thread;
  const Scales* scales;  // of channels, or null where all are 1

  template <class Of>
  Of& at(Of* channels, int64_t channel) const {
    return channels[channel - first_channel];
  }
};

// A sum of doubles, and what rounding has left out of it: Knuth, "The Art of Computer Programming",
// volume 2, 4.2.2, theorem B.
inline void add(double addend, double& sum, double& error) {
  const double total = sum + addend, added = total - sum;
  error += (sum - (total - added)) + (addend - added);
  sum = total;
}

// Of a set of elements: sum w, mean, and sum w*(x - mean)^2, the last two in two parts.
struct Deviations {
  double count = 0, mean = 0, mean_low = 0, squares = 0, squares_low = 0;

  // The union with a disjoint set: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise
  // Algorithm for Computing Sample Variances" (1979).
  void merge(const Deviations& other) {
    if (other.count <= 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const double shift = (other.mean - mean) + (other.mean_low - mean_low);
    const double fraction = other.count / total;
    squares_low += other.squares_low;
    add(other.squares + shift * shift * count * fraction, squares, squares_low);
    add(shift * fraction, mean, mean_low);
    count = total;
  }
};

struct GradientSums {
  double g = 0, g_low = 0, g_xhat = 0, g_xhat_low = 0;

  void merge(const GradientSums& other) {
    g_low += other.g_low;
    g_xhat_low += other.g_xhat_low;
    add(other.g, g, g_low);
    add(other.g_xhat, g_xhat, g_xhat_low);
  }
};

struct Kernels {
  const char* instruction_set;

  // Merges the deviations of the range into the channels. With `wide`, only for the channels where
  // that is true, in double even where x is narrower, and where it is not, of x * kWideScale.
  void (*deviations)(const Problem&, const Range&, const bool* wide, Scratch, Deviations* channels);

  void (*normalize)(const Problem&, const Range&, const Coefficients* channels, Scratch, void* y);

  // Adds the sums over the range, of g * scales.g and of that times t * min(rstd, 1), which is
  // finite; with `again`, only for the channels where that is true.
  void (*gradient_sums)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                        const bool* again, Scratch, GradientSums* sums);

  // through_statistics: whether these depend on x, so that the shares are not 0.
  void (*input_gradient)(const Problem&, const Range&, const Coefficients* channels, const void* dy,
                         bool through_statistics, Scratch, void* dx, void* dresidual);
};

// The square of any double times this is finite.
constexpr double kWideScale = 0x1p-600;

}  // namespace batchnorm
