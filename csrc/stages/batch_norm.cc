// The stages as a whole: which instruction set, which range for which thread, and what is computed
// once a channel, in double.
#include "stages/batch_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
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

// Those of this build, the widest first, and whether this processor runs them.
struct Level {
  const Kernels* table;
  bool (*runs)();
};
constexpr Level kLevels[] = {
#ifdef BATCHNORM_X86_LEVELS
    {&kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&kernels_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {&kernels_baseline, [] { return true; }},
};

// Null until the first call. (No static variable of a function: a thread that made it while another
// one forks would hold its guard in the child for ever.)
std::atomic<const Kernels*> chosen_kernels{nullptr};

const Kernels& kernels() {
  const Kernels* chosen = chosen_kernels.load(std::memory_order_relaxed);
  for (const Level* level = kLevels; !chosen; ++level) {
    if (level->runs()) chosen_kernels = chosen = level->table;
  }
  return *chosen;
}

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

// Of a tensor of more channels, so many at a time, which bounds the memory for what is known of a
// channel.
constexpr int64_t kMostChannels = 1 << 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of [0, n) that belongs to `task` of `tasks`.
struct Part {
  int64_t begin, end;
};
Part part(int64_t n, int64_t task, int64_t tasks) {
  const auto bound = [&](int64_t t) { return n / tasks * t + std::min<int64_t>(t, n % tasks); };
  return {bound(task), bound(task + 1)};
}

int64_t bytes_of(const Problem& problem) { return problem.shape.size() * bytes_of(problem.dtype); }

Range whole(const Problem& problem) {
  const Shape& shape = problem.shape;
  Range range = {0, shape.outer, 0, shape.channels, 0, shape.inner, 0, false, 0, false, nullptr};
  range.beyond_cache = bytes_of(problem) > last_level_cache_bytes() / 4;
  return range;
}

int64_t size_of(const Range& range) {
  return (range.outer1 - range.outer0) * (range.channel1 - range.channel0) *
         (range.inner1 - range.inner0);
}

int threads_for(int64_t size, int most) {
  return static_cast<int>(std::clamp<int64_t>(size / kElementsPerThread, 1, most));
}

// How a range is cut into tasks: along the axis that gives each task the longest stretches of
// memory and enough to do. Along others than that of the channels, the tasks find partial sums.
struct Cut {
  int64_t outers = 1, channels = 1, inners = 1;

  int tasks() const { return static_cast<int>(outers * channels * inners); }
  int64_t partial_sums() const { return outers * inners; }
  int64_t partial_sum_of(int64_t task) const { return task / channels; }
};

Cut cut_of(const Problem& problem, const Range& range, int most_threads) {
  Cut cut;
  if (range.on_one_thread) return cut;
  const int64_t size = size_of(range), threads = threads_for(size, most_threads);
  const int64_t tasks =
      threads * std::clamp<int64_t>(size / threads / kElementsPerTask, 1, kTasksPerThread);
  const int64_t outers = range.outer1 - range.outer0, channels = range.channel1 - range.channel0;
  if (outers >= 4 * tasks || (outers >= tasks && channels < tasks)) {
    // Rows of so many lanes are gone through in strips anyway.
    const int64_t strips =
        by_rows(problem.shape) ? channels * problem.shape.inner / kStripLanes : 1;
    for (cut.channels = std::clamp<int64_t>(strips, 1, tasks); tasks % cut.channels != 0;) {
      --cut.channels;
    }
    cut.outers = tasks / cut.channels;
  } else if (channels >= tasks) {
    cut.channels = tasks;
  } else {
    cut.inners = std::min(tasks, range.inner1 - range.inner0);
  }
  return cut;
}

Range part_of(Range range, const Cut& cut, int64_t task) {
  const auto take = [](int64_t& begin, int64_t& end, int64_t which, int64_t parts) {
    const Part piece = part(end - begin, which, parts);
    end = begin + piece.end;
    begin += piece.begin;
  };
  take(range.channel0, range.channel1, task % cut.channels, cut.channels);
  take(range.outer0, range.outer1, task / cut.channels % cut.outers, cut.outers);
  take(range.inner0, range.inner1, task / cut.channels / cut.outers, cut.inners);
  return range;
}

// How many channels a thread takes through all stages at a time, in as many rounds for every
// thread; 0 if it is better that all threads work on the same ones.
int64_t channels_of_own_block(const Problem& problem, int64_t channel_bytes, int threads) {
  const int64_t all = problem.shape.channels;
  const int64_t most = std::clamp<int64_t>(kBlockBytes / channel_bytes, 1, all);
  const int64_t rounds = divide_up(all, most * threads);
  const int64_t channels = divide_up(all, rounds * threads);
  if (by_rows(problem.shape) && channels < all && channels * problem.shape.inner < kStripLanes) {
    return 0;
  }
  // No thread has more than a quarter above its share to do.
  const bool even = threads == 1 || 4 * rounds * channels * threads <= 5 * all;
  const bool fits = 2 * channels * channel_bytes * threads <= last_level_cache_bytes() / 2;
  return even && fits ? channels : 0;
}

// How many of which all threads do one stage before the next.
int64_t channels_of_shared_block(const Problem& problem, int64_t channel_bytes, int tensors) {
  const int64_t all = std::min(problem.shape.channels, kMostChannels);
  if (by_rows(problem.shape)) return all;
  const int64_t channels =
      std::clamp<int64_t>(last_level_cache_bytes() / 4 / channel_bytes, 1, all);
  const int64_t stretch = channels * channel_bytes / tensors / problem.shape.outer;
  return whole(problem).beyond_cache && stretch >= kStretchBytes ? channels : all;
}

// At once, unless there are very many channels.
enum class Way { at_once, by_blocks };

// How a call goes through its channels: in blocks, each of which is taken through all stages.
//
// What one stage has read is in the cache for the next. A thread that has blocks of its own keeps
// them in its core's cache, and fetches the next one while it works on this one: so some read while
// others write.
struct Plan {
  Range all;
  int threads;  // asked once, as another thread may change it
  int64_t step;
  bool own;              // whether each thread takes blocks of its own
  int64_t partial_sums;  // of a block, at most

  // `tensors`: how many like x a stage reads.
  Plan(const Problem& problem, int tensors, Way way) : all(whole(problem)) {
    const int64_t channels = problem.shape.channels;
    threads = threads_for(size_of(all), num_threads(problem.team));
    step = std::min(channels, kMostChannels);
    own = false;
    if (size_of(all) > 0 && (way == Way::by_blocks || channels > kMostChannels)) {
      const int64_t channel_bytes = tensors * bytes_of(problem) / channels;
      const int64_t own_step = channels_of_own_block(problem, channel_bytes, threads);
      own = own_step > 0;
      step = own_step > 0 ? own_step : channels_of_shared_block(problem, channel_bytes, tensors);
    }
    partial_sums = 1;
    // The last block may be cut in another way than the others.
    for (const int64_t in_block : {int64_t{0}, channels - 1}) {
      if (size_of(all) == 0) break;
      const Cut cut = cut_of(problem, block_at(in_block / step * step), threads);
      partial_sums = std::max(partial_sums, cut.partial_sums());
    }
  }

  Range block_at(int64_t channel) const {
    Range block = all;
    block.channel0 = block.first_channel = channel;
    block.channel1 = std::min(all.channel1, channel + step);
    block.on_one_thread = own;
    return block;
  }
};

enum class Order { upwards, downwards };

// Where a stage finds no sums.
struct NoSums {};

// A block of channels, and the memory for what is found of them.
template <class Sums>
class Block {
 public:
  Coefficients* coefficients;
  Sums* sums;   // the partial sums of all channels, one after the other; in the end, the first
  bool* again;  // of which channels sums were taken again
  Range range = {};

  static int64_t bytes(const Problem& problem, const Plan& plan) {
    return padded<Coefficients>(plan.step) + padded<Scales>(plan.step) +
           padded<Sums>(plan.step * plan.partial_sums) + padded<bool>(plan.step) +
           seats(plan) * Scratch::bytes(problem.shape, problem.dtype);
  }

  Block(const Problem& problem, const Plan& plan, char* memory)
      : problem_(problem),
        threads_(plan.threads),
        bytes_of_lanes_(Scratch::bytes(problem.shape, problem.dtype)) {
    coefficients = take<Coefficients>(memory, plan.step);
    scales_ = take<Scales>(memory, plan.step);
    sums = take<Sums>(memory, plan.step * plan.partial_sums);
    again = take<bool>(memory, plan.step);
    lanes_ = memory;
  }

  int64_t channels() const { return range.channel1 - range.channel0; }

  // The scales of a channel: 1 until they are set.
  Scales& scales_of(int64_t channel) {
    if (!range.scales) {
      for (int64_t i = 0; i < channels(); ++i) {
        scales_[i] = Scales();
        scales_[i].dx_slope = coefficients[i].slope;
      }
      range.scales = scales_;
    }
    return range.at(scales_, channel);
  }

  // Of a stage that is not the last: the next block would drive out what the last one reads again.
  template <class Stage>
  void without_fetching(const Stage& stage) {
    const int64_t ahead = range.ahead;
    range.ahead = 0;
    stage();
    range.ahead = ahead;
  }

  // body(part, partial sums, scratch) on several threads, the first part of memory first or last.
  template <class Body>
  void for_parts(Order order, const Body& body) const {
    if (size_of(range) == 0) return;
    const Cut cut = cut_of(problem_, range, threads_);
    const int tasks = cut.tasks();
    const auto run = [&](int task, int seat) {
      const int place = order == Order::upwards ? task : tasks - 1 - task;
      body(part_of(range, cut, place), sums + cut.partial_sum_of(place) * channels(),
           Scratch(lanes_ + seat * bytes_of_lanes_, bytes_of_lanes_));
    };
    parallel_for(tasks, threads_, run, problem_.team);
  }

  // The sums of all channels or, with `again`, of those where that is true: add(part, sums,
  // scratch) adds those of a part.
  template <class Add>
  void add_up(const bool* only, const Add& add) {
    const auto for_channels = [&](int64_t begin, int64_t end, const auto& body) {
      for (int64_t i = begin; i < end; ++i) {
        if (!only || only[i]) body(i);
      }
    };
    if (size_of(range) == 0) std::fill_n(sums, channels(), Sums());
    for_parts(Order::upwards, [&](const Range& part, Sums* own, Scratch scratch) {
      for_channels(part.channel0 - range.channel0, part.channel1 - range.channel0,
                   [&](int64_t i) { own[i] = Sums(); });
      add(part, own, scratch);
    });
    const int64_t partial_sums = cut_of(problem_, range, threads_).partial_sums();
    for (int64_t k = 1; k < partial_sums && size_of(range) > 0; ++k) {
      for_channels(0, channels(), [&](int64_t i) { sums[i].merge(sums[k * channels() + i]); });
    }
  }

  // Marks those channels whose sums are to be taken again, and says whether there are any.
  template <class IsOff>
  bool mark(const IsOff& is_off) {
    bool any = false;
    for (int64_t i = 0; i < channels(); ++i) any |= again[i] = is_off(sums[i]);
    return any;
  }

 private:
  static int64_t seats(const Plan& plan) { return plan.own ? 1 : plan.threads; }

  template <class E>
  static int64_t padded(int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(E));
    return divide_up(bytes, Scratch::kAlignment) * Scratch::kAlignment;
  }
  template <class E>
  static E* take(char*& memory, int64_t elements) {
    E* const taken = reinterpret_cast<E*>(memory);
    memory += padded<E>(elements);
    return taken;
  }

  const Problem& problem_;
  int threads_;
  int64_t bytes_of_lanes_;
  Scales* scales_;
  char* lanes_;
};

// body(block) for blocks of channels that cover the problem. All memory is allocated before, by the
// calling thread, and is not written before the thread does that works with it.
template <class Sums, class Body>
void for_blocks(const Problem& problem, int tensors, Way way, const Body& body) {
  const Plan plan(problem, tensors, way);
  const int64_t channels = problem.shape.channels;
  const int64_t bytes = Block<Sums>::bytes(problem, plan), alignment = Scratch::kAlignment;
  const std::unique_ptr<char[]> owner(new char[(plan.own ? plan.threads : 1) * bytes + alignment]);
  const int64_t offset = -reinterpret_cast<uintptr_t>(owner.get()) % alignment;
  char* const memory = owner.get() + offset;
  if (!plan.own) {
    Block<Sums> block(problem, plan, memory);
    for (int64_t c = 0; c < channels; c += plan.step) {
      block.range = plan.block_at(c);
      body(block);
    }
    return;
  }
  std::atomic<int64_t> free{0};
  const auto take_blocks = [&](int, int seat) {
    Block<Sums> block(problem, plan, memory + seat * bytes);
    for (int64_t c = free.fetch_add(plan.step), next; c < channels; c = next) {
      next = free.fetch_add(plan.step);
      block.range = plan.block_at(c);
      if (next < channels) block.range.ahead = (next - c) * problem.shape.inner;
      body(block);
    }
  };
  parallel_for(plan.threads, plan.threads, take_blocks, problem.team);
}

// ---- what is computed once a channel

// The statistics of a channel, as in StatisticsOf.
struct ChannelStatistics {
  double count, mean, var, mean_low, unit;
};

template <class Double>
ChannelStatistics channel_of(const StatisticsOf<Double>& of, int64_t c) {
  return {of.count ? of.count[c] : 0, of.mean[c], of.var[c], of.mean_low ? of.mean_low[c] : 0,
          of.unit ? of.unit[c] : 1};
}

void set(const NewStatistics& to, int64_t c, const ChannelStatistics& of) {
  to.count[c] = of.count;
  to.mean[c] = of.mean;
  to.var[c] = to.unit ? of.var : of.var * of.unit * of.unit;
  if (to.mean_low) to.mean_low[c] = of.mean_low;
  if (to.unit) to.unit[c] = of.unit;
}

// `unit`: that the deviations are in.
ChannelStatistics channel_of(const Deviations& of, double unit) {
  double mean = of.mean + of.mean_low, low = (of.mean - mean) + of.mean_low;
  if (!std::isfinite(of.mean)) mean = of.mean, low = 0;
  double var = of.squares;
  if (std::isfinite(var)) {
    var = of.count > 0 ? std::max(0.0, (var + of.squares_low) / of.count) : 0;
  }
  return {of.count, mean * unit, var, low * unit, unit};
}

// Within these, no product of two coefficients and an element leaves the range of the arithmetic
// type, unless the result does. Beyond, elements are scaled by `step`, a power of two.
struct Limits {
  double low, high, step;
  int exponent;  // that a scale may have
};
Limits limits_of(Dtype dtype) {
  return dtype == Dtype::float64 ? Limits{0x1p-900, 0x1p900, 0x1p500, 1000}
                                 : Limits{0x1p-100, 0x1p100, 0x1p60, 120};
}
bool are_within(const Limits& limits, double value) {
  return value == 0 || (std::fabs(value) > limits.low && std::fabs(value) < limits.high);
}

// What is finite in a double stays so in the arithmetic type.
double narrowed(Dtype dtype, double value) {
  constexpr double kMost = std::numeric_limits<float>::max();
  if (dtype == Dtype::float64 || !std::isfinite(value)) return value;
  return std::clamp(value, -kMost, kMost);
}

// A product of finite numbers stays finite.
double product(double a, double b) {
  constexpr double kMost = std::numeric_limits<double>::max();
  const double ab = a * b;
  return std::isinf(ab) && std::isfinite(a) && std::isfinite(b) ? std::copysign(kMost, ab) : ab;
}

// 1 / sqrt(variance + eps)
double rstd_of(const Problem& problem, const ChannelStatistics& of) {
  if (of.unit == 1) return 1 / std::sqrt(of.var + problem.eps);
  return 1 / (of.unit * std::sqrt(of.var + problem.eps / (of.unit * of.unit)));
}

// Of a sum of weights, whose products with weights are shares of a batch; 0 where there are none.
bool is_far_from_1(double count) { return count > 0 && (count < 0x1p-40 || count > 0x1p40); }

bool are_extreme(const Problem& problem, const Limits& limits, const ChannelStatistics& of,
                 double rstd, double slope) {
  return !are_within(limits, rstd) || !are_within(limits, slope) ||
         std::fabs(of.mean) > limits.high || (problem.weights && is_far_from_1(of.count));
}

Scales scales_of(const Problem& problem, const Limits& limits, const ChannelStatistics& of,
                 double rstd, double scale, double slope) {
  Scales scales;
  scales.dx_slope = slope;
  if (!are_extreme(problem, limits, of, rstd, slope)) return scales;
  const double steepest = std::max(rstd, std::fabs(slope));
  const double flattest = slope == 0 ? rstd : std::min(rstd, std::fabs(slope));
  if (flattest < limits.low) {
    scales.x = 1 / limits.step;
  } else if (steepest > limits.high && std::fabs(of.mean) < limits.step) {
    scales.x = limits.step;
  } else if (std::fabs(of.mean) > std::numeric_limits<float>::max() &&
             problem.dtype != Dtype::float64) {
    scales.x = 1 / limits.step;
  } else if (std::fabs(of.mean) > limits.high) {
    scales.x = 0.25;  // for x - mean
  }
  const auto exponent_of = [&](double value) {
    const bool has_one = value != 0 && std::isfinite(value);
    return has_one ? std::clamp(std::ilogb(value), -limits.exponent, limits.exponent) : 0;
  };
  if (problem.weights && is_far_from_1(of.count)) {
    scales.w = std::ldexp(1, -exponent_of(of.count));
  }
  const int of_rstd = exponent_of(rstd), of_scale = exponent_of(scale);
  const int of_slope = std::clamp(of_rstd + of_scale, -limits.exponent, limits.exponent);
  scales.dx_slope = std::ldexp(rstd, -of_rstd) * std::ldexp(scale, of_rstd - of_slope);
  scales.dx = std::ldexp(1, of_slope);
  return scales;
}

Coefficients coefficients_of(const Problem& problem, int64_t c, const ChannelStatistics& of,
                             double rstd, double slope, double x_scale) {
  const double mean = of.mean * x_scale;
  double center = mean;
  if (problem.dtype != Dtype::float64) center = static_cast<float>(narrowed(problem.dtype, mean));
  const double rest = (mean - center) + of.mean_low * x_scale;
  const double bias = problem.bias ? problem.bias[c] : 0;
  return {center, rstd, rest * rstd, slope, bias - rest * slope, 0, 0};
}

// The coefficients of a channel, and its scales if they are not all 1.
template <class Sums>
void set_coefficients(const Problem& problem, Block<Sums>& block, int64_t c,
                      const ChannelStatistics& of) {
  const Limits limits = limits_of(problem.dtype);
  const double rstd = rstd_of(problem, of);
  const double scale = problem.scale ? problem.scale[c] : 1, slope = product(rstd, scale);
  Coefficients& to = block.range.at(block.coefficients, c);
  if (!block.range.scales && !are_extreme(problem, limits, of, rstd, slope)) {
    to = coefficients_of(problem, c, of, rstd, slope, 1);
    return;
  }
  Scales& scales = block.scales_of(c);
  scales = scales_of(problem, limits, of, rstd, scale, slope);
  to = coefficients_of(problem, c, of, rstd / scales.x, slope / scales.x, scales.x);
  for (double* each : {&to.center, &to.slope, &to.shift}) *each = narrowed(problem.dtype, *each);
}

// ---- the stages for the channels of a block; take(c, statistics) gets those of each channel

template <class Take>
void find_statistics(const Problem& problem, Block<Deviations>& block, const Take& take) {
  const bool is_wide = problem.dtype == Dtype::float64;
  block.add_up(nullptr, [&](const Range& part, Deviations* own, Scratch scratch) {
    kernels().deviations(problem, part, nullptr, scratch, own);
  });
  // A square of float data can be more than a float holds, or so little that it is not precise,
  // which matters where eps is as small; and weights can be as small.
  const double least = limits_of(problem.dtype).low;
  const auto is_off = [&](const Deviations& of) {
    const bool is_little = of.count < least || of.squares + problem.eps * of.count < least;
    return !std::isfinite(of.squares) || (!is_wide && of.count > 0 && is_little);
  };
  if (block.mark(is_off)) {
    block.add_up(block.again, [&](const Range& part, Deviations* own, Scratch scratch) {
      kernels().deviations(problem, part, block.again, scratch, own);
    });
  }
  for (int64_t i = 0; i < block.channels(); ++i) {
    const double unit = is_wide && block.again[i] ? 1 / kWideScale : 1;
    take(block.range.channel0 + i, channel_of(block.sums[i], unit));
  }
}

template <class Sums>
void find_coefficients(const Problem& problem, Block<Sums>& block, const Statistics& by) {
  for (int64_t c = block.range.channel0; c < block.range.channel1; ++c) {
    set_coefficients(problem, block, c, channel_of(by, c));
  }
}

template <class Sums>
void normalize(const Problem& problem, const Block<Sums>& block, void* y) {
  block.for_parts(Order::downwards, [&](const Range& part, Sums*, Scratch scratch) {
    kernels().normalize(problem, part, block.coefficients, scratch, y);
  });
}

// Of a gradient whose difference from its share may overflow.
constexpr double kShareScale = 0x1p-24;

// (sum g + xhat * sum g*xhat) / m as a line in t; the sums are given as multiplied by scales.g.
template <class Sums>
void set_shares(const Problem& problem, Block<Sums>& block, int64_t c, double count, double sum_g,
                double sum_g_xhat) {
  if (!(count > 0)) {
    if (block.range.scales) block.scales_of(c).g = 1;
    return;
  }
  const Limits limits = limits_of(problem.dtype);
  Coefficients& of = block.range.at(block.coefficients, c);
  if (block.range.scales) count *= block.scales_of(c).w;
  double of_g = sum_g / count, of_g_xhat = sum_g_xhat / count;
  const bool are_large = std::max(std::fabs(of_g), std::fabs(of_g_xhat)) > limits.high;
  if (are_large && (!block.range.scales || block.scales_of(c).g == 1)) {
    block.scales_of(c).g = kShareScale;
    of_g *= kShareScale;
    of_g_xhat *= kShareScale;
  }
  of.share = of_g - of.remainder * of_g_xhat;
  of.share_xhat = of.rstd * of_g_xhat;
  const bool vanishes = of.share_xhat == 0 && of_g_xhat != 0;
  if ((vanishes || !are_within(limits, of.share_xhat)) && of.rstd > 0 && std::isfinite(of.rstd)) {
    const int exponent = std::clamp(std::ilogb(of.rstd), -limits.exponent, limits.exponent);
    block.scales_of(c).t = std::ldexp(1, exponent);
    of.share_xhat = std::ldexp(of.rstd, -exponent) * of_g_xhat;
  }
}

// With a count, also the shares.
void gradient_sums(const Problem& problem, Block<GradientSums>& block, const double* count,
                   const void* dy, double* sum_g, double* sum_g_xhat) {
  const auto add = [&](const bool* again) {
    block.add_up(again, [&](const Range& part, GradientSums* own, Scratch scratch) {
      kernels().gradient_sums(problem, part, block.coefficients, dy, again, scratch, own);
    });
  };
  add(nullptr);
  const auto is_off = [](const GradientSums& of) {
    return !std::isfinite(of.g) || !std::isfinite(of.g_xhat);
  };
  if (block.mark(is_off)) {
    add(block.again);  // with smaller products; if that does not help, with a smaller g
    bool any = false;
    for (int64_t c = block.range.channel0; c < block.range.channel1; ++c) {
      if (!block.range.at(block.again, c) || !is_off(block.range.at(block.sums, c))) continue;
      block.scales_of(c).g = 1 / limits_of(problem.dtype).step;
      any = true;
    }
    if (any) add(block.again);
  }
  for (int64_t c = block.range.channel0; c < block.range.channel1; ++c) {
    // What the loop has left out of rstd.
    const bool is_again = block.range.at(block.again, c);
    const double rstd = is_again ? std::max(1.0, block.range.at(block.coefficients, c).rstd) : 1;
    const double remainder = block.range.at(block.coefficients, c).remainder;
    const GradientSums& sums = block.range.at(block.sums, c);
    double g = sums.g + sums.g_low, g_xhat = sums.g_xhat + sums.g_xhat_low;
    if (std::isinf(g_xhat * rstd) && std::isfinite(g_xhat)) {
      const double scale = 1 / limits_of(problem.dtype).step;
      block.scales_of(c).g *= scale;
      g *= scale;
      g_xhat *= scale;
    }
    g_xhat = g_xhat * rstd - remainder * g;
    double scale = block.range.scales ? block.scales_of(c).g : 1;
    sum_g[c] = g / scale;
    sum_g_xhat[c] = g_xhat / scale;
    if (scale != 1) {  // that of the sums is smaller than a gradient needs
      block.scales_of(c).g = kShareScale;
      scale = kShareScale / scale;
      g *= scale;
      g_xhat *= scale;
    }
    if (count) set_shares(problem, block, c, count[c], g, g_xhat);
  }
}

template <class Sums>
void input_gradient(const Problem& problem, Block<Sums>& block, bool through_statistics,
                    const void* dy, void* dx, void* dresidual) {
  for (int64_t c = block.range.channel0; block.range.scales && c < block.range.channel1; ++c) {
    Coefficients& of = block.range.at(block.coefficients, c);
    Scales& scales = block.scales_of(c);
    if (!through_statistics) scales.g = 1;  // which is for g - share
    scales.dx /= scales.g;
    for (double* each : {&of.share, &of.share_xhat, &scales.dx}) {
      *each = narrowed(problem.dtype, *each);
    }
  }
  block.for_parts(Order::downwards, [&](const Range& part, Sums*, Scratch scratch) {
    kernels().input_gradient(problem, part, block.coefficients, dy, through_statistics, scratch, dx,
                             dresidual);
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
  for (const Level& level : kLevels) {
    if (level.runs()) names.push_back(level.table->instruction_set);
  }
  return names;
}

bool set_instruction_set(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.table->instruction_set, name) != 0 || !level.runs()) continue;
    chosen_kernels = level.table;
    return true;
  }
  return false;
}

void statistics(const Problem& problem, const NewStatistics& found) {
  for_blocks<Deviations>(problem, 1, Way::by_blocks, [&](Block<Deviations>& block) {
    find_statistics(problem, block,
                    [&](int64_t c, const ChannelStatistics& of) { set(found, c, of); });
  });
}

void normalize(const Problem& problem, const Statistics& by, void* y) {
  for_blocks<NoSums>(problem, 1, Way::at_once, [&](Block<NoSums>& block) {
    find_coefficients(problem, block, by);
    normalize(problem, block, y);
  });
}

void batch_norm(const Problem& problem, const NewStatistics& found, void* y) {
  for_blocks<Deviations>(problem, 1, Way::by_blocks, [&](Block<Deviations>& block) {
    const auto take = [&](int64_t c, const ChannelStatistics& of) {
      set(found, c, of);
      set_coefficients(problem, block, c, of);
    };
    block.without_fetching([&] { find_statistics(problem, block, take); });
    normalize(problem, block, y);
  });
}

void gradient_sums(const Problem& problem, const Statistics& by, const void* dy, double* sum_g,
                   double* sum_g_xhat) {
  for_blocks<GradientSums>(problem, 2, Way::by_blocks, [&](Block<GradientSums>& block) {
    find_coefficients(problem, block, by);
    gradient_sums(problem, block, nullptr, dy, sum_g, sum_g_xhat);
  });
}

void input_gradient(const Problem& problem, const Statistics& by, const double* sum_g,
                    const double* sum_g_xhat, const void* dy, void* dx, void* dresidual) {
  for_blocks<NoSums>(problem, 2, Way::at_once, [&](Block<NoSums>& block) {
    find_coefficients(problem, block, by);
    for (int64_t c = block.range.channel0; by.count && c < block.range.channel1; ++c) {
      set_shares(problem, block, c, by.count[c], sum_g[c], sum_g_xhat[c]);
    }
    input_gradient(problem, block, by.count, dy, dx, dresidual);
  });
}

void batch_norm_gradients(const Problem& problem, const Statistics& by, const void* dy,
                          double* sum_g, double* sum_g_xhat, void* dx, void* dresidual) {
  for_blocks<GradientSums>(problem, 2, Way::by_blocks, [&](Block<GradientSums>& block) {
    find_coefficients(problem, block, by);
    block.without_fetching([&] { gradient_sums(problem, block, by.count, dy, sum_g, sum_g_xhat); });
    input_gradient(problem, block, by.count, dy, dx, dresidual);
  });
}

void update_running(int64_t channels, const Statistics& by, double rate, double correction,
                    double* running_mean, double* running_var, int64_t* batches) {
  const auto is_there = [](double count) { return count > 0; };
  if (batches && std::any_of(by.count, by.count + channels, is_there)) ++*batches;
  if (!running_mean) return;
  const auto move = [&](double value, double* running) {
    *running = (1 - rate) * *running + rate * value;
  };
  for (int64_t c = 0; c < channels; ++c) {
    const auto [count, mean, var, mean_low, unit] = channel_of(by, c);
    if (!(count > correction)) continue;
    move(mean + mean_low, running_mean + c);
    move(var * unit * unit * (count / (count - correction)), running_var + c);
  }
}

}  // namespace batchnorm
