// The stages as a whole: which instruction set, which range for which thread, and what is computed
// once a channel, in double.
#include "batch_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "parallel.h"

namespace batchnorm {

extern const Kernels kernels_baseline;
#ifdef BATCHNORM_X86_LEVELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

// The tables that this processor can run, the widest first.
std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> tables;
#ifdef BATCHNORM_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    tables.push_back(&kernels_avx2);
  }
#endif
  tables.push_back(&kernels_baseline);
  return tables;
}

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen{runnable_kernels().front()};
  return chosen;
}

const Kernels& kernels() { return *chosen_kernels().load(std::memory_order_relaxed); }

// Below about 50 microseconds of work, waking a thread costs more than it brings.
constexpr int64_t kElementsPerThread = 1 << 16;

// Large tensors are cut into several tasks a thread, so that one that is held up does not hold up
// the call.
constexpr int64_t kElementsPerTask = 1 << 20;
constexpr int64_t kTasksPerThread = 4;

// Reading shorter stretches than this costs more in jumps than the cache saves.
constexpr int64_t kStretchBytes = 1 << 16;

// The part of [0, n) that belongs to `task` of `tasks`.
struct Part {
  int64_t begin, end;
};
Part part(int64_t n, int task, int tasks) {
  const auto bound = [&](int64_t t) { return n / tasks * t + std::min<int64_t>(t, n % tasks); };
  return {bound(task), bound(task + 1)};
}

int64_t bytes_of(const Problem& problem) {
  const int64_t item = problem.dtype == Dtype::float64   ? 8
                       : problem.dtype == Dtype::float32 ? 4
                                                         : 2;
  return problem.shape.size() * item;
}

Range whole(const Problem& problem) {
  const Shape& shape = problem.shape;
  return {0,
          shape.outer,
          0,
          shape.channels,
          0,
          shape.inner,
          bytes_of(problem) > last_level_cache_bytes() / 4};
}

// What a stage works on at a time: channels whose tensors stay in the cache until the next stage
// comes for them, or all of them.
//
// A block of channels is stretches of memory, each of block * inner elements.
std::vector<Range> blocks_of(const Problem& problem, int tensors) {
  const Shape& shape = problem.shape;
  const Range all = whole(problem);
  if (!all.beyond_cache || shape.channels == 0) return {all};
  const int64_t bytes = bytes_of(problem) / shape.channels;
  const int64_t channels =
      std::clamp<int64_t>(last_level_cache_bytes() / 4 / (tensors * bytes), 1, shape.channels);
  if (channels * bytes / shape.outer < kStretchBytes) return {all};
  std::vector<Range> blocks;
  for (int64_t c = 0; c < shape.channels; c += channels) {
    blocks.push_back(all);
    blocks.back().channel0 = c;
    blocks.back().channel1 = std::min(shape.channels, c + channels);
  }
  return blocks;
}

int64_t size_of(const Range& range) {
  return (range.outer1 - range.outer0) * (range.channel1 - range.channel0) *
         (range.inner1 - range.inner0);
}

int tasks_of(const Range& range) {
  const int64_t size = size_of(range);
  const int64_t threads = std::clamp<int64_t>(size / kElementsPerThread, 1, num_threads());
  return static_cast<int>(
      threads * std::clamp<int64_t>(size / threads / kElementsPerTask, 1, kTasksPerThread));
}

// Cuts along the axis that gives each task the longest stretches of memory and enough to do.
Range part_of(Range range, int task, int tasks) {
  const int64_t outers = range.outer1 - range.outer0, channels = range.channel1 - range.channel0;
  const auto cut = [&](int64_t& begin, int64_t& end) {
    const Part piece = part(end - begin, task, tasks);
    end = begin + piece.end;
    begin += piece.begin;
  };
  if (outers >= 4 * tasks || (outers >= tasks && channels < tasks)) {
    cut(range.outer0, range.outer1);
  } else if (channels >= tasks) {
    cut(range.channel0, range.channel1);
  } else {
    cut(range.inner0, range.inner1);
  }
  return range;
}

// body(task, part of the range) on several threads, the first part of memory first or last.
enum class Order { upwards, downwards };
template <class Body>
void for_parts(const Range& range, Order order, Team team, const Body& body) {
  if (size_of(range) == 0) return;
  const int tasks = tasks_of(range);
  const auto run = [&](int task) {
    const int place = order == Order::upwards ? task : tasks - 1 - task;
    body(task, part_of(range, place, tasks));
  };
  parallel_for(tasks, run, team);
}

// Of the channels of the range; the others stay 0.
std::vector<Moments> moments_of(const Problem& problem, const Range& range, bool wide) {
  const int64_t channels = problem.shape.channels;
  const int tasks = tasks_of(range);
  std::vector<Moments> parts(tasks * channels);
  for_parts(range, Order::upwards, problem.team, [&](int task, const Range& part) {
    kernels().moments(problem, part, wide, parts.data() + task * channels);
  });
  for (int task = 1; task < tasks; ++task) {
    for (int64_t c = range.channel0; c < range.channel1; ++c) {
      parts[c].merge(parts[task * channels + c]);
    }
  }
  parts.resize(channels);
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

std::vector<Coefficients> coefficients_of(const Problem& problem, const Range& range,
                                          const double* mean, const double* var) {
  std::vector<Coefficients> channels(problem.shape.channels);
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    channels[c] = coefficients_of(problem, c, mean[c], var[c]);
  }
  return channels;
}

// The stages, each on the channels of a range.

void statistics(const Problem& problem, const Range& range, double* count, double* mean,
                double* var) {
  std::vector<Moments> channels = moments_of(problem, range, false);
  // A square can overflow a float where the variance of float data does not overflow a double.
  const bool overflow = problem.dtype != Dtype::float64 &&
                        std::any_of(channels.begin(), channels.end(), [](const Moments& moments) {
                          return !std::isfinite(moments.squares);
                        });
  if (overflow) channels = moments_of(problem, range, true);
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    const Moments& moments = channels[c];
    count[c] = moments.count;
    mean[c] = moments.mean;
    var[c] = moments.count > 0 ? std::max(0.0, moments.squares / moments.count) : 0;
    if (moments.squares != moments.squares) var[c] = moments.squares;
  }
}

void normalize(const Problem& problem, const Range& range, const double* mean, const double* var,
               void* y) {
  const std::vector<Coefficients> channels = coefficients_of(problem, range, mean, var);
  for_parts(range, Order::downwards, problem.team, [&](int, const Range& part) {
    kernels().normalize(problem, part, channels.data(), y);
  });
}

void gradient_sums(const Problem& problem, const Range& range, const double* mean,
                   const double* var, const void* dy, double* sum_g, double* sum_g_xhat) {
  const int64_t count = problem.shape.channels;
  const std::vector<Coefficients> channels = coefficients_of(problem, range, mean, var);
  const int tasks = tasks_of(range);
  std::vector<GradientSums> parts(tasks * count);
  for_parts(range, Order::upwards, problem.team, [&](int task, const Range& part) {
    kernels().gradient_sums(problem, part, channels.data(), dy, parts.data() + task * count);
  });
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    GradientSums sums;
    for (int task = 0; task < tasks; ++task) {
      sums.g += parts[task * count + c].g;
      sums.g_xhat += parts[task * count + c].g_xhat;
    }
    sum_g[c] = sums.g;
    sum_g_xhat[c] = sums.g_xhat - channels[c].remainder * sums.g;
  }
}

void input_gradient(const Problem& problem, const Range& range, const double* count,
                    const double* mean, const double* var, const double* sum_g,
                    const double* sum_g_xhat, const void* dy, void* dx, void* dresidual) {
  std::vector<Coefficients> channels = coefficients_of(problem, range, mean, var);
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    if (!count || !(count[c] > 0)) continue;
    // (sum g + xhat * sum g*xhat) / m as a line in x - center
    channels[c].share = (sum_g[c] - channels[c].remainder * sum_g_xhat[c]) / count[c];
    channels[c].share_xhat = channels[c].rstd * sum_g_xhat[c] / count[c];
  }
  for_parts(range, Order::downwards, problem.team, [&](int, const Range& part) {
    kernels().input_gradient(problem, part, channels.data(), dy, dx, dresidual);
  });
}

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
  for (const Kernels* table : runnable_kernels()) names.push_back(table->instruction_set);
  return names;
}

bool set_instruction_set(const char* name) {
  for (const Kernels* table : runnable_kernels()) {
    if (std::strcmp(table->instruction_set, name) != 0) continue;
    chosen_kernels() = table;
    return true;
  }
  return false;
}

void statistics(const Problem& problem, double* count, double* mean, double* var) {
  statistics(problem, whole(problem), count, mean, var);
}

void normalize(const Problem& problem, const double* mean, const double* var, void* y) {
  normalize(problem, whole(problem), mean, var, y);
}

void batch_norm(const Problem& problem, double* count, double* mean, double* var, void* y) {
  for (const Range& block : blocks_of(problem, 1)) {
    statistics(problem, block, count, mean, var);
    normalize(problem, block, mean, var, y);
  }
}

void gradient_sums(const Problem& problem, const double* mean, const double* var, const void* dy,
                   double* sum_g, double* sum_g_xhat) {
  gradient_sums(problem, whole(problem), mean, var, dy, sum_g, sum_g_xhat);
}

void input_gradient(const Problem& problem, const double* count, const double* mean,
                    const double* var, const double* sum_g, const double* sum_g_xhat,
                    const void* dy, void* dx, void* dresidual) {
  input_gradient(problem, whole(problem), count, mean, var, sum_g, sum_g_xhat, dy, dx, dresidual);
}

void batch_norm_gradients(const Problem& problem, const double* count, const double* mean,
                          const double* var, const void* dy, double* sum_g, double* sum_g_xhat,
                          void* dx, void* dresidual) {
  for (const Range& block : blocks_of(problem, 2)) {
    gradient_sums(problem, block, mean, var, dy, sum_g, sum_g_xhat);
    input_gradient(problem, block, count, mean, var, sum_g, sum_g_xhat, dy, dx, dresidual);
  }
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
