// The four stages of batch normalization on raw memory.
//
//   statistics      m = sum w;  mean = sum w*x / m;  var = sum w*(x - mean)^2 / m
//   normalize       y = act((x - mean) * rstd * scale + bias + residual)
//   gradient_sums   sum g  and  sum g*xhat
//   input_gradient  dx = scale * rstd * (g - w/m * (sum g + xhat * sum g*xhat))
//                      = rstd * (scale * g - w/m * (sum scale*g + xhat * sum scale*g*xhat))
//
// where rstd = 1 / sqrt(var + eps), g = dy * act' and xhat = (x - mean) * rstd.
//
// (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.) Every tensor like x is contiguous and
// seen as [outer, channels, inner] (layout.h). Per-channel values are doubles, so that a mean need
// not be rounded to a float before it is subtracted.
//
// An element whose weight is 0 is left out of the statistics and normalized all the same; where it
// is not finite, it takes no part in any gradient.
//
// Each allocates all its memory before it starts, or throws std::bad_alloc and has changed nothing.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "stages/layout.h"
#include "system/parallel.h"

namespace batchnorm {

enum class Dtype : int { float32, float64, float16, bfloat16 };

inline int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::float16:
    case Dtype::bfloat16:
      return 2;
  }
  return 0;
}

// Their names in NumPy, JAX and PyTorch, in the order of the enum.
constexpr const char* kDtypes[] = {"float32", "float64", "float16", "bfloat16"};

enum class Activation : int { none, relu, silu };

// Their names in Python.
struct NamedActivation {
  Activation activation;
  const char* name;
};
constexpr NamedActivation kActivations[] = {
    {Activation::none, ""}, {Activation::relu, "relu"}, {Activation::silu, "silu"}};

// False for an unknown name.
inline bool find_activation(std::string_view name, Activation* activation) {
  for (const auto& [each, its_name] : kActivations) {
    if (name == its_name) return *activation = each, true;
  }
  return false;
}

// What the stages have in common. Null pointers stand for what is absent.
struct Problem {
  Shape shape;
  Dtype dtype;  // of x, y, residual, dy, dx and dresidual
  Activation activation;
  double eps;
  const void* x;            // [outer, channels, inner]
  const void* residual;     // [outer, channels, inner] or null
  const double* scale;      // [channels] or null (1)
  const double* bias;       // [channels] or null (0)
  const void* weights;      // [outer, weight_channels, inner] or null (1); float64 if x is, else
                            // float32
  int64_t weight_channels;  // 1 or channels
  Team team;                // whose threads do the work, or null (the pool's)
};

// The statistics of every channel, [channels] each; all 0 for a channel without elements.
//
// The mean is mean + mean_low, and the variance var * unit^2, where both can be more than a double
// holds: without mean_low, null, the mean is rounded; without unit, the variance may be infinite.
template <class Double>
struct StatisticsOf {
  Double *count = nullptr, *mean = nullptr, *var = nullptr;
  Double *mean_low = nullptr, *unit = nullptr;
};
using NewStatistics = StatisticsOf<double>;
// Without a count, mean and variance do not depend on x: running statistics.
using Statistics = StatisticsOf<const double>;

void statistics(const Problem& problem, const NewStatistics& found);

// y: out, like x, and may be x itself.
void normalize(const Problem& problem, const Statistics& by, void* y);

// Both in one call: what the first read is in the cache for the second where that is possible.
void batch_norm(const Problem& problem, const NewStatistics& found, void* y);

// dy: in, like x.  sum_g, sum_g_xhat: out, [channels]: the gradients of bias and of scale.
void gradient_sums(const Problem& problem, const Statistics& by, const void* dy, double* sum_g,
                   double* sum_g_xhat);

// sum_g, sum_g_xhat: in, [channels]: of scale*g, which over several devices is not that of one of
// them.  dy: in, like x.
// dx: out, like x.  dresidual: out, like x, receives g; or null.
void input_gradient(const Problem& problem, const Statistics& by, const double* sum_g,
                    const double* sum_g_xhat, const void* dy, void* dx, void* dresidual);

// Both in one call.
void batch_norm_gradients(const Problem& problem, const Statistics& by, const void* dy,
                          double* sum_g, double* sum_g_xhat, void* dx, void* dresidual);

// The step that follows, of a running mean and variance, or null: running = (1 - rate) * running +
// rate * new, the new variance multiplied by count / (count - correction). A channel of no more
// than `correction` elements stays as it was. batches, or null, is one more after a batch with any
// element.
void update_running(int64_t channels, const Statistics& by, double rate, double correction,
                    double* running_mean, double* running_var, int64_t* batches);

// The instruction set in use: the widest of instruction_sets() until another is set.
const char* instruction_set();

// Those that both this build and this processor have, the widest first.
std::vector<const char*> instruction_sets();

// For later calls, in all threads. False, and nothing changes, where it is not one of the above.
bool set_instruction_set(const char* name);

}  // namespace batchnorm
