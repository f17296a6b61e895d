// The stages as a whole: which instruction set, and what is computed once a channel, in double.
#include "stages/batch_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "stages/blocks.h"

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
    if (of.slope == 0) scales.g = 0;
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
      const double scale = problem.scale ? problem.scale[c] : 1, divisor = scale == 0 ? 1 : scale;
      set_shares(problem, block, c, by.count[c], sum_g[c] / divisor, sum_g_xhat[c] / divisor);
      if (scale == 0) {  // then g has no part in dx, but the sums have
        Scales& scales = block.scales_of(c);
        scales.dx_slope = block.range.at(block.coefficients, c).rstd * scales.x;
      }
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
