// The stages as a whole: which instruction set, which range for which thread, and what is computed
// once a channel, in double.
#include "stages/batch_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "system/cache.h"
#include "system/parallel.h"

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

// Of a block of channels that one thread takes through all stages, what it reads there: with as
// much of the next block, within a small second-level cache.
constexpr int64_t kBlockBytes = 1 << 18;

// Where all threads work on the same block of channels, shorter stretches of memory than this cost
// more in jumps than the cache saves.
constexpr int64_t kStretchBytes = 1 << 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of [0, n) that belongs to `task` of `tasks`.
struct Part {
  int64_t begin, end;
};
Part part(int64_t n, int task, int tasks) {
  const auto bound = [&](int64_t t) { return n / tasks * t + std::min<int64_t>(t, n % tasks); };
  return {bound(task), bound(task + 1)};
}

int64_t bytes_of(const Problem& problem) { return problem.shape.size() * bytes_of(problem.dtype); }

Range whole(const Problem& problem) {
  const Shape& shape = problem.shape;
  const bool beyond_cache = bytes_of(problem) > last_level_cache_bytes() / 4;
  return {0, shape.outer, 0, shape.channels, 0, shape.inner, beyond_cache, 0, false};
}

int64_t size_of(const Range& range) {
  return (range.outer1 - range.outer0) * (range.channel1 - range.channel0) *
         (range.inner1 - range.inner0);
}

int threads_for(int64_t size) {
  return static_cast<int>(std::clamp<int64_t>(size / kElementsPerThread, 1, num_threads()));
}

int tasks_of(const Range& range) {
  if (range.on_one_thread) return 1;
  const int64_t size = size_of(range);
  const int threads = threads_for(size);
  return threads * static_cast<int>(
                       std::clamp<int64_t>(size / threads / kElementsPerTask, 1, kTasksPerThread));
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

// body(task, part of the range) on several threads, the first part of memory first or last. The
// caller has the number of tasks from tasks_of, which may say another one the next time: another
// thread may change num_threads().
enum class Order { upwards, downwards };
template <class Body>
void for_parts(const Range& range, int tasks, Order order, Team team, const Body& body) {
  if (size_of(range) == 0) return;
  const auto run = [&](int task) {
    const int place = order == Order::upwards ? task : tasks - 1 - task;
    body(task, part_of(range, place, tasks));
  };
  parallel_for(tasks, run, team);
}

// How many channels a thread takes through all stages at a time, in as many rounds for every
// thread; 0 if it is better that all threads work on the same ones.
int64_t channels_of_own_block(const Problem& problem, int64_t channel_bytes, int threads) {
  const int64_t all = problem.shape.channels;
  const int64_t most = std::clamp<int64_t>(kBlockBytes / channel_bytes, 1, all);
  const int64_t rounds = divide_up(all, most * threads);
  const int64_t channels = divide_up(all, rounds * threads);
  // No thread has more than a quarter above its share to do.
  const bool even = threads == 1 || 4 * rounds * channels * threads <= 5 * all;
  const bool fits = 2 * channels * channel_bytes * threads <= last_level_cache_bytes() / 2;
  return even && fits ? channels : 0;
}

// How many of which all threads do one stage before the next.
int64_t channels_of_shared_block(const Problem& problem, int64_t channel_bytes, int tensors) {
  const int64_t all = problem.shape.channels;
  const int64_t channels =
      std::clamp<int64_t>(last_level_cache_bytes() / 4 / channel_bytes, 1, all);
  const int64_t stretch = channels * channel_bytes / tensors / problem.shape.outer;
  return whole(problem).beyond_cache && stretch >= kStretchBytes ? channels : all;
}

// body(block) for blocks of channels that cover the problem, each of which the body takes through
// all stages of a call. `tensors`: how many like x these read.
//
// What one stage has read is in the cache for the next. A thread that has blocks of its own keeps
// them in its core's cache, and fetches the next one while it works on this one: so some read while
// others write.
template <class Body>
void for_blocks(const Problem& problem, int tensors, const Body& body) {
  const int64_t channels = problem.shape.channels;
  const Range all = whole(problem);
  if (size_of(all) == 0 || by_rows(problem.shape)) return body(all);
  const int64_t channel_bytes = tensors * bytes_of(problem) / channels;
  const int threads = threads_for(size_of(all));
  const int64_t own = channels_of_own_block(problem, channel_bytes, threads);
  const int64_t step = own ? own : channels_of_shared_block(problem, channel_bytes, tensors);
  const auto block_at = [&](int64_t channel) {
    Range block = all;
    block.channel0 = channel;
    block.channel1 = std::min(channels, channel + step);
    return block;
  };
  if (!own) {
    for (int64_t c = 0; c < channels; c += step) body(block_at(c));
    return;
  }
  std::atomic<int64_t> free{0};
  const auto take_blocks = [&](int) {
    for (int64_t c = free.fetch_add(step), next; c < channels; c = next) {
      next = free.fetch_add(step);
      Range block = block_at(c);
      block.on_one_thread = true;
      if (next < channels) block.ahead = (next - c) * problem.shape.inner;
      body(block);
    }
  };
  parallel_for(threads, take_blocks, problem.team);
}

// For all stages of a block but the last.
Range without_fetching(Range block) {
  block.ahead = 0;
  return block;
}

// Sums (or deviations) of the channels of a block, by all threads: find(part, sums) adds those of a
// part.
template <class Sums, class Find>
void add_up(const Problem& problem, const Range& block, Sums* channels, const Find& find) {
  const int64_t row = problem.shape.channels;
  const int tasks = tasks_of(block);
  std::fill(channels + block.channel0, channels + block.channel1, Sums());
  std::vector<Sums> others((tasks - 1) * row);
  for_parts(block, tasks, Order::upwards, problem.team, [&](int task, const Range& part) {
    find(part, task == 0 ? channels : others.data() + (task - 1) * row);
  });
  for (int task = 1; task < tasks; ++task) {
    const Sums* sums = others.data() + (task - 1) * row;
    for (int64_t c = block.channel0; c < block.channel1; ++c) channels[c].merge(sums[c]);
  }
}

// ---- the stages for the channels of a block

void statistics(const Problem& problem, const Range& block, Deviations* channels, double* count,
                double* mean, double* var) {
  const auto find = [&](bool wide) {
    add_up(problem, block, channels, [&](const Range& part, Deviations* deviations) {
      kernels().deviations(problem, part, wide, deviations);
    });
  };
  find(false);
  // A square can overflow a float where the variance of float data does not overflow a double.
  const bool overflow =
      problem.dtype != Dtype::float64 &&
      std::any_of(channels + block.channel0, channels + block.channel1,
                  [](const Deviations& of) { return !std::isfinite(of.squares); });
  if (overflow) find(true);
  for (int64_t c = block.channel0; c < block.channel1; ++c) {
    const Deviations& deviations = channels[c];
    count[c] = deviations.count;
    mean[c] = deviations.mean;
    var[c] = deviations.count > 0 ? std::max(0.0, deviations.squares / deviations.count) : 0;
    if (deviations.squares != deviations.squares) var[c] = deviations.squares;
  }
}

Coefficients coefficients_of(const Problem& problem, int64_t c, double mean, double var) {
  const double rstd = 1 / std::sqrt(var + problem.eps);
  const double center =
      problem.dtype == Dtype::float64 ? mean : static_cast<double>(static_cast<float>(mean));
  const double slope = problem.scale ? rstd * problem.scale[c] : rstd;
  const double bias = problem.bias ? problem.bias[c] : 0;
  return {center, rstd, (mean - center) * rstd, slope, bias - (mean - center) * slope, 0, 0};
}

void find_coefficients(const Problem& problem, const Range& block, const double* mean,
                       const double* var, Coefficients* channels) {
  for (int64_t c = block.channel0; c < block.channel1; ++c) {
    channels[c] = coefficients_of(problem, c, mean[c], var[c]);
  }
}

void normalize(const Problem& problem, const Range& block, const Coefficients* channels, void* y) {
  for_parts(block, tasks_of(block), Order::downwards, problem.team,
            [&](int, const Range& part) { kernels().normalize(problem, part, channels, y); });
}

void gradient_sums(const Problem& problem, const Range& block, const Coefficients* channels,
                   const void* dy, GradientSums* sums, double* sum_g, double* sum_g_xhat) {
  add_up(problem, block, sums, [&](const Range& part, GradientSums* own) {
    kernels().gradient_sums(problem, part, channels, dy, own);
  });
  for (int64_t c = block.channel0; c < block.channel1; ++c) {
    sum_g[c] = sums[c].g;
    sum_g_xhat[c] = sums[c].g_xhat - channels[c].remainder * sums[c].g;
  }
}

void input_gradient(const Problem& problem, const Range& block, Coefficients* channels,
                    const double* count, const double* sum_g, const double* sum_g_xhat,
                    const void* dy, void* dx, void* dresidual) {
  for (int64_t c = block.channel0; c < block.channel1; ++c) {
    if (!count || !(count[c] > 0)) continue;
    // (sum g + xhat * sum g*xhat) / m as a line in x - center
    channels[c].share = (sum_g[c] - channels[c].remainder * sum_g_xhat[c]) / count[c];
    channels[c].share_xhat = channels[c].rstd * sum_g_xhat[c] / count[c];
  }
  for_parts(block, tasks_of(block), Order::downwards, problem.team, [&](int, const Range& part) {
    kernels().input_gradient(problem, part, channels, dy, dx, dresidual);
  });
}

}  // namespace

bool find_activation(std::string_view name, Activation* activation) {
  for (const auto& [each, its_name] : kActivations) {
    if (name == its_name) return *activation = each, true;
  }
  return false;
}

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
  std::vector<Deviations> deviations(problem.shape.channels);
  for_blocks(problem, 1, [&](const Range& block) {
    statistics(problem, block, deviations.data(), count, mean, var);
  });
}

void normalize(const Problem& problem, const double* mean, const double* var, void* y) {
  std::vector<Coefficients> channels(problem.shape.channels);
  find_coefficients(problem, whole(problem), mean, var, channels.data());
  normalize(problem, whole(problem), channels.data(), y);
}

void batch_norm(const Problem& problem, double* count, double* mean, double* var, void* y) {
  std::vector<Deviations> deviations(problem.shape.channels);
  std::vector<Coefficients> channels(problem.shape.channels);
  for_blocks(problem, 1, [&](const Range& block) {
    statistics(problem, without_fetching(block), deviations.data(), count, mean, var);
    find_coefficients(problem, block, mean, var, channels.data());
    normalize(problem, block, channels.data(), y);
  });
}

void gradient_sums(const Problem& problem, const double* mean, const double* var, const void* dy,
                   double* sum_g, double* sum_g_xhat) {
  std::vector<GradientSums> sums(problem.shape.channels);
  std::vector<Coefficients> channels(problem.shape.channels);
  for_blocks(problem, 2, [&](const Range& block) {
    find_coefficients(problem, block, mean, var, channels.data());
    gradient_sums(problem, block, channels.data(), dy, sums.data(), sum_g, sum_g_xhat);
  });
}

void input_gradient(const Problem& problem, const double* count, const double* mean,
                    const double* var, const double* sum_g, const double* sum_g_xhat,
                    const void* dy, void* dx, void* dresidual) {
  std::vector<Coefficients> channels(problem.shape.channels);
  find_coefficients(problem, whole(problem), mean, var, channels.data());
  input_gradient(problem, whole(problem), channels.data(), count, sum_g, sum_g_xhat, dy, dx,
                 dresidual);
}

void batch_norm_gradients(const Problem& problem, const double* count, const double* mean,
                          const double* var, const void* dy, double* sum_g, double* sum_g_xhat,
                          void* dx, void* dresidual) {
  std::vector<GradientSums> sums(problem.shape.channels);
  std::vector<Coefficients> channels(problem.shape.channels);
  for_blocks(problem, 2, [&](const Range& block) {
    find_coefficients(problem, block, mean, var, channels.data());
    gradient_sums(problem, without_fetching(block), channels.data(), dy, sums.data(), sum_g,
                  sum_g_xhat);
    input_gradient(problem, block, channels.data(), count, sum_g, sum_g_xhat, dy, dx, dresidual);
  });
}

void update_running(int64_t channels, const double* count, const double* mean, const double* var,
                    double rate, double correction, double* running_mean, double* running_var,
                    int64_t* batches) {
  if (batches && std::any_of(count, count + channels, [](double each) { return each > 0; })) {
    ++*batches;
  }
  if (!running_mean) return;
  const auto move = [&](double value, double* running) {
    *running = (1 - rate) * *running + rate * value;
  };
  for (int64_t c = 0; c < channels; ++c) {
    if (!(count[c] > correction)) continue;
    move(mean[c], running_mean + c);
    move(var[c] * (count[c] / (count[c] - correction)), running_var + c);
  }
}

}  // namespace batchnorm
