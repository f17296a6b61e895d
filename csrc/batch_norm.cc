// The stages as a whole: which instruction set, which range for which thread, and what is computed
// once a channel, in double.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace batchnorm {

extern const Kernels kernels_baseline;
#ifdef BATCHNORM_X86_LEVELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose_kernels() {
#ifdef BATCHNORM_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kernels_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Below about 50 microseconds of work, waking a thread costs more than it brings.
constexpr int64_t kElementsPerTask = 1 << 16;

// The part of [0, n) that belongs to `task` of `tasks`.
struct Part {
  int64_t begin, end;
};
Part part(int64_t n, int task, int tasks) {
  const auto bound = [&](int64_t t) { return n / tasks * t + std::min<int64_t>(t, n % tasks); };
  return {bound(task), bound(task + 1)};
}

int tasks_of(const Shape& shape) {
  const int64_t useful = shape.size() / kElementsPerTask;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, num_threads()));
}

// Along the axis that gives each task the longest stretches of memory and enough to do.
Range range_of(const Shape& shape, int task, int tasks) {
  Range range = {0, shape.outer, 0, shape.channels, 0, shape.inner};
  if (shape.outer >= 16 * tasks || (shape.outer >= tasks && shape.channels < tasks)) {
    const Part rows = part(shape.outer, task, tasks);
    range.outer0 = rows.begin;
    range.outer1 = rows.end;
  } else if (shape.channels >= tasks) {
    const Part channels = part(shape.channels, task, tasks);
    range.channel0 = channels.begin;
    range.channel1 = channels.end;
  } else {
    const Part inner = part(shape.inner, task, tasks);
    range.inner0 = inner.begin;
    range.inner1 = inner.end;
  }
  return range;
}

template <class Body>
void for_ranges(const Shape& shape, const Body& body) {
  if (shape.size() == 0) return;
  const int tasks = tasks_of(shape);
  parallel_for(tasks, [&](int task) { body(task, range_of(shape, task, tasks)); });
}

std::vector<Moments> moments_of(const Problem& problem, bool wide) {
  const Shape& shape = problem.shape;
  const int tasks = tasks_of(shape);
  std::vector<Moments> parts(tasks * shape.channels);
  for_ranges(shape, [&](int task, const Range& range) {
    kernels().moments(problem, range, wide, parts.data() + task * shape.channels);
  });
  for (int task = 1; task < tasks; ++task) {
    for (int64_t c = 0; c < shape.channels; ++c) parts[c].merge(parts[task * shape.channels + c]);
  }
  parts.resize(shape.channels);
  return parts;
}

Coefficients coefficients_of(const Problem& problem, int64_t c, double mean, double var) {
  const double rstd = 1 / std::sqrt(var + problem.eps);
  const double center =
      problem.dtype == Dtype::float64 ? mean : static_cast<double>(static_cast<float>(mean));
  const double slope = problem.scale ? rstd * problem.scale[c] : rstd;
  const double bias = problem.bias ? problem.bias[c] : 0;
  return {center, rstd, (mean - center) * rstd, slope, bias - (mean - center) * slope, 0, 0};
}

std::vector<Coefficients> coefficients_of(const Problem& problem, const double* mean,
                                          const double* var) {
  std::vector<Coefficients> channels(problem.shape.channels);
  for (int64_t c = 0; c < problem.shape.channels; ++c) {
    channels[c] = coefficients_of(problem, c, mean[c], var[c]);
  }
  return channels;
}

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

void statistics(const Problem& problem, double* count, double* mean, double* var) {
  std::vector<Moments> channels = moments_of(problem, false);
  // A square can overflow a float where the variance of float data does not overflow a double.
  const bool overflow = problem.dtype != Dtype::float64 &&
                        std::any_of(channels.begin(), channels.end(), [](const Moments& moments) {
                          return !std::isfinite(moments.squares);
                        });
  if (overflow) channels = moments_of(problem, true);
  for (int64_t c = 0; c < problem.shape.channels; ++c) {
    const Moments& moments = channels[c];
    count[c] = moments.count;
    mean[c] = moments.mean;
    var[c] = moments.count > 0 ? std::max(0.0, moments.squares / moments.count) : 0;
    if (moments.squares != moments.squares) var[c] = moments.squares;
  }
}

void normalize(const Problem& problem, const double* mean, const double* var, void* y) {
  const std::vector<Coefficients> channels = coefficients_of(problem, mean, var);
  for_ranges(problem.shape, [&](int, const Range& range) {
    kernels().normalize(problem, range, channels.data(), y);
  });
}

void gradient_sums(const Problem& problem, const double* mean, const double* var, const void* dy,
                   double* sum_g, double* sum_g_xhat) {
  const Shape& shape = problem.shape;
  const std::vector<Coefficients> channels = coefficients_of(problem, mean, var);
  const int tasks = tasks_of(shape);
  std::vector<GradientSums> parts(tasks * shape.channels);
  for_ranges(shape, [&](int task, const Range& range) {
    kernels().gradient_sums(problem, range, channels.data(), dy,
                            parts.data() + task * shape.channels);
  });
  for (int64_t c = 0; c < shape.channels; ++c) {
    sum_g[c] = sum_g_xhat[c] = 0;
    for (int task = 0; task < tasks; ++task) {
      sum_g[c] += parts[task * shape.channels + c].g;
      sum_g_xhat[c] += parts[task * shape.channels + c].g_xhat;
    }
  }
}

void input_gradient(const Problem& problem, const double* count, const double* mean,
                    const double* var, const double* sum_g, const double* sum_g_xhat,
                    const void* dy, void* dx, void* dresidual) {
  std::vector<Coefficients> channels = coefficients_of(problem, mean, var);
  for (int64_t c = 0; c < problem.shape.channels; ++c) {
    if (!count || !(count[c] > 0)) continue;
    channels[c].mean_g = sum_g[c] / count[c];
    channels[c].mean_g_xhat = sum_g_xhat[c] / count[c];
  }
  for_ranges(problem.shape, [&](int, const Range& range) {
    kernels().input_gradient(problem, range, channels.data(), dy, dx, dresidual);
  });
}

namespace {

template <class T>
void move(double rate, double value, T* running) {
  *running = static_cast<T>((1 - rate) * *running + rate * value);
}

}  // namespace

void update_running(int64_t channels, const double* count, const double* mean, const double* var,
                    double rate, double correction, Dtype dtype, void* running_mean,
                    void* running_var) {
  for (int64_t c = 0; c < channels; ++c) {
    if (!(count[c] > correction)) continue;
    const double unbiased = var[c] * (count[c] / (count[c] - correction));
    if (dtype == Dtype::float64) {
      move(rate, mean[c], static_cast<double*>(running_mean) + c);
      move(rate, unbiased, static_cast<double*>(running_var) + c);
    } else {
      move(rate, mean[c], static_cast<float*>(running_mean) + c);
      move(rate, unbiased, static_cast<float*>(running_var) + c);
    }
  }
}

}  // namespace batchnorm
