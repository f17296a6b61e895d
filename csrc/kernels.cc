// Compiled once for each instruction set; BATCHNORM_LEVEL names the table that this copy defines.
//
// Two ways through memory. Where `inner` is long, a channel is a run of consecutive elements
// (runs). Where it is short, an [inner, channels] slice is one row of a matrix whose columns
// (lanes) each belong to one channel, and many rows are added up lane by lane (rows). Rows of few
// lanes are folded: several consecutive ones are seen as one.
//
// Sums are exact enough for any input, at the speed of float: they are taken of x - pivot, where
// the pivot of a block of at most kBlock elements a lane is the mean of the block before it, and
// blocks are merged in double. Were the pivot p far from the mean m of its block, rounding would
// cost eps * n * (p - m)^2; but p being the mean of a neighbour, the total sum of squares is at
// least n/2 * (p - m)^2, so that the relative error stays of the order of eps.
#include "kernels.h"

#include <algorithm>

#include "simd.h"

namespace batchnorm {
namespace {

constexpr int kBlock = 64;         // elements added in float before they go into a double
constexpr int kRowsAtOnce = 8;     // rows read side by side: one load and store of the sums for all
constexpr int kStripLanes = 1024;  // lanes whose sums fit the first-level cache
constexpr int64_t kShortRow = 128;     // rows of fewer lanes are folded,
constexpr int64_t kFoldedLanes = 256;  // to about this many
constexpr int64_t kLongRun = 64;       // from here on, runs are as fast as lanes

// The type of the weights of elements of type T.
template <class T>
using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- the two walks

// Part of a matrix: element (row, lane) is at first + row * stride + lane. In a folded row, lane
// column0 + lane is the element (fold, channel, inner) of column0 + lane in that order.
struct Strip {
  int64_t first, rows, stride, column0;
  int64_t outer0, fold;
  int lanes;
};

template <class Body>
void for_strips_of(const Shape& shape, int64_t outer0, int64_t outer1, int64_t column0,
                   int64_t columns, int64_t fold, const Body& body) {
  const int64_t row = shape.channels * shape.inner;
  const int64_t rows = (outer1 - outer0) / fold;
  if (rows == 0) return;
  for (int64_t column = column0; column < column0 + columns; column += kStripLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kStripLanes, column0 + columns - column));
    body(Strip{outer0 * row + column, rows, fold * row, column, outer0, fold, lanes});
  }
}

// body(strip) for strips that cover the range.
template <class Body>
void for_strips(const Shape& shape, const Range& range, const Body& body) {
  const int64_t row = shape.channels * shape.inner;
  const int64_t column0 = range.channel0 * shape.inner;
  const int64_t columns = (range.channel1 - range.channel0) * shape.inner;
  if (columns < row || row >= kShortRow) {
    return for_strips_of(shape, range.outer0, range.outer1, column0, columns, 1, body);
  }
  const int64_t fold = kFoldedLanes / row;
  const int64_t folded = range.outer0 + (range.outer1 - range.outer0) / fold * fold;
  for_strips_of(shape, range.outer0, folded, 0, fold * row, fold, body);
  for_strips_of(shape, folded, range.outer1, 0, row, 1, body);
}

// body(channel, first element, weights or null, length) for the runs of the range.
template <class T, class Body>
void for_runs(const Problem& problem, const Range& range, const Body& body) {
  const Shape& shape = problem.shape;
  const auto* weights = static_cast<const Weight<T>*>(problem.weights);
  for (int64_t o = range.outer0; o < range.outer1; ++o) {
    for (int64_t c = range.channel0; c < range.channel1; ++c) {
      const int64_t first = (o * shape.channels + c) * shape.inner + range.inner0;
      const int64_t weight_channel = problem.weight_channels == 1 ? 0 : c;
      const int64_t weight =
          (o * problem.weight_channels + weight_channel) * shape.inner + range.inner0;
      body(c, first, weights ? weights + weight : nullptr, range.inner1 - range.inner0);
    }
  }
}

// Sums lane by lane spare a sum across the lanes for each run, but keep a double triple per lane.
bool sums_by_rows(const Shape& shape) {
  return shape.inner == 1 || (shape.inner < 512 && shape.outer >= 16);
}

// The weights of a strip's row, one a lane: in place where they lie so, else copied to `buffer`.
template <class W>
const W* weights_of_row(const Problem& problem, const Strip& strip, int64_t row, W* buffer) {
  const W* weights = static_cast<const W*>(problem.weights);
  const Shape& shape = problem.shape;
  if (!weights) return nullptr;
  if (problem.weight_channels == shape.channels) return weights + strip.first + row * strip.stride;
  for (int lane = 0; lane < strip.lanes; ++lane) {
    const int64_t column = strip.column0 + lane;
    const int64_t o = strip.outer0 + row * strip.fold + column / (shape.channels * shape.inner);
    buffer[lane] = weights[o * shape.inner + column % shape.inner];
  }
  return buffer;
}

// ---- coefficients of consecutive elements: all of one channel, or one channel to a lane

template <class F>
struct One {
  Pack<F> value;
  Pack<F> at(int64_t) const { return value; }
};
template <class F>
struct PerLane {
  alignas(64) F value[kStripLanes];
  Pack<F> at(int64_t i) const { return load<F>(value + i); }
};

template <template <class> class Spread, class F>
struct Spreads {
  Spread<F> center, rstd, remainder, slope, shift, mean_g, mean_g_xhat;
};

template <class F>
Spreads<One, F> spread(const Coefficients& of) {
  const auto same = [](double value) { return One<F>{all(static_cast<F>(value))}; };
  return {same(of.center), same(of.rstd),   same(of.remainder),  same(of.slope),
          same(of.shift),  same(of.mean_g), same(of.mean_g_xhat)};
}

// body(lane, channel) for the lanes of a strip.
template <class Body>
void for_lanes(const Shape& shape, const Strip& strip, const Body& body) {
  int64_t inner = strip.column0 % shape.inner;
  int64_t channel = strip.column0 / shape.inner % shape.channels;
  for (int lane = 0; lane < strip.lanes; ++lane) {
    body(lane, channel);
    if (++inner == shape.inner) {
      inner = 0;
      if (++channel == shape.channels) channel = 0;
    }
  }
}

template <class F>
void spread(const Shape& shape, const Strip& strip, const Coefficients* channels,
            Spreads<PerLane, F>& lanes) {
  for_lanes(shape, strip, [&](int lane, int64_t channel) {
    const Coefficients& of = channels[channel];
    lanes.center.value[lane] = static_cast<F>(of.center);
    lanes.rstd.value[lane] = static_cast<F>(of.rstd);
    lanes.remainder.value[lane] = static_cast<F>(of.remainder);
    lanes.slope.value[lane] = static_cast<F>(of.slope);
    lanes.shift.value[lane] = static_cast<F>(of.shift);
    lanes.mean_g.value[lane] = static_cast<F>(of.mean_g);
    lanes.mean_g_xhat.value[lane] = static_cast<F>(of.mean_g_xhat);
  });
}

// each(first element, length, weights or null, coefficients) for stretches of consecutive
// elements that cover the range.
template <class F, class T, class Each>
void for_stretches(const Problem& problem, const Range& range, const Coefficients* channels,
                   const Each& each) {
  if (problem.shape.inner >= kLongRun) {
    for_runs<T>(problem, range, [&](int64_t c, int64_t first, const Weight<T>* weights, int64_t n) {
      each(first, n, weights, spread<F>(channels[c]));
    });
    return;
  }
  Spreads<PerLane, F> lanes;
  Weight<T> buffer[kStripLanes];
  for_strips(problem.shape, range, [&](const Strip& strip) {
    spread(problem.shape, strip, channels, lanes);
    for (int64_t row = 0; row < strip.rows; ++row) {
      each(strip.first + row * strip.stride, strip.lanes,
           weights_of_row(problem, strip, row, buffer), lanes);
    }
  });
}

// ---- sums of two quantities; body(i or row, i, count, first, second) adds a pack to both

// Elements [start, end) of a run.
template <class F, class Body>
void add_run(int64_t start, int64_t end, double& first, double& second, const Body& body) {
  constexpr int kChains = 4;  // independent sums, so that no addition waits for the one before
  Pack<F> a[kChains] = {}, b[kChains] = {};
  int64_t i = start;
  for (; i + kChains * kLanes<F> <= end; i += kChains * kLanes<F>) {
    for (int k = 0; k < kChains; ++k) body(i + k * kLanes<F>, kLanes<F>, a[k], b[k]);
  }
  for (; i + kLanes<F> <= end; i += kLanes<F>) body(i, kLanes<F>, a[0], b[0]);
  if (i < end) body(i, static_cast<int>(end - i), a[1], b[1]);
  first = horizontal_sum<F>((a[0] + a[1]) + (a[2] + a[3]));
  second = horizontal_sum<F>((b[0] + b[1]) + (b[2] + b[3]));
}

// Rows [start, end), lane by lane, to first[lane] and second[lane].
template <class F, class Body>
void add_rows(int lanes, int64_t start, int64_t end, F* first, F* second, const Body& body) {
  const auto add = [&](int64_t row, auto rows) {
    for_packs<F>(lanes, [&](int64_t i, int n) {
      Pack<F> a = load<F>(first + i), b = load<F>(second + i);
      for (int k = 0; k < rows; ++k) body(row + k, i, n, a, b);
      store(first + i, a);
      store(second + i, b);
    });
  };
  int64_t row = start;
  for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
    add(row, std::integral_constant<int, kRowsAtOnce>());
  }
  for (; row < end; ++row) add(row, std::integral_constant<int, 1>());
}

// Sets as many packs to 0 as hold the lanes.
template <class F>
void clear(F* lanes, int count) {
  for (int i = 0; i < count; i += kLanes<F>) store(lanes + i, Pack<F>{});
}

// ---- statistics

// Of a block: its sums of w, w*t and w*t^2, t = x - pivot, as moments of x.
inline Moments about(double pivot, double weight, double first, double second) {
  if (weight == 0) return {};
  const double offset = first / weight;
  return {weight, pivot + offset, second - first * offset};
}

// Where w is 0, t may be anything.
template <class F>
inline void add_weighted(Pack<F> t, Pack<F> w, Pack<F>& weight, Pack<F>& first, Pack<F>& second) {
  const Pack<F> inside = select<F>(Bits<F>(w > 0), t, Pack<F>{});
  weight += w;
  first += w * inside;
  second += w * inside * inside;
}

// Where the pivot starts: at an element that counts, since it is one of those near their mean.
template <class F, class T>
F first_inside(const T* x, const Weight<T>* weights, int64_t n) {
  int64_t i = 0;
  while (weights && i + 1 < n && !(weights[i] > 0)) ++i;
  return load<F>(x + i, 1)[0];
}

template <class F, class T>
void moments_of_run(const T* x, const Weight<T>* weights, int64_t n, Moments& moments) {
  constexpr int64_t kBlockElements = 4 * kBlock * kLanes<F>;
  F pivot = moments.count > 0 ? static_cast<F>(moments.mean) : first_inside<F>(x, weights, n);
  for (int64_t start = 0; start < n; start += kBlockElements) {
    const int64_t end = std::min(n, start + kBlockElements);
    const Pack<F> p = all(pivot);
    double weight = static_cast<double>(end - start), first, second;
    if (weights) {
      Pack<F> lane_weights = {};
      add_run<F>(start, end, first, second, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) {
        add_weighted<F>(load<F>(x + i, n) - p, load<F>(weights + i, n), lane_weights, a, b);
      });
      weight = horizontal_sum<F>(lane_weights);
    } else {
      add_run<F>(start, end, first, second, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) {
        Pack<F> t = load<F>(x + i, n) - p;
        if (n < kLanes<F>) t = select<F>(first_lanes<F>(n), t, Pack<F>{});
        a += t;
        b += t * t;
      });
    }
    const Moments block = about(pivot, weight, first, second);
    moments.merge(block);
    if (block.count > 0) pivot = static_cast<F>(block.mean);
  }
}

template <class F, class T>
struct StripSums {
  alignas(64) F pivot[kStripLanes], weight[kStripLanes], first[kStripLanes], second[kStripLanes];
  alignas(64) double count[kStripLanes], mean[kStripLanes], squares[kStripLanes];
  Weight<T> weights[kStripLanes];
};

template <class F, class T>
void start_pivots(const Problem& problem, const Strip& strip, StripSums<F, T>& sums) {
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  for_packs<F>(strip.lanes, [&](int64_t i, int n) { store(sums.pivot + i, load<F>(x + i, n)); });
  if (!problem.weights) return;
  bool started[kStripLanes] = {};
  int waiting = strip.lanes;
  for (int64_t row = 0; row < strip.rows && waiting > 0; ++row) {
    const Weight<T>* w = weights_of_row(problem, strip, row, sums.weights);
    for (int lane = 0; lane < strip.lanes; ++lane) {
      if (started[lane] || !(w[lane] > 0)) continue;
      sums.pivot[lane] = load<F>(x + row * strip.stride + lane, 1)[0];
      started[lane] = true;
      --waiting;
    }
  }
}

template <class F, class T>
void moments_of_strip(const Problem& problem, const Strip& strip, StripSums<F, T>& sums,
                      Moments* channels) {
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  std::fill_n(sums.count, strip.lanes, 0.0);
  std::fill_n(sums.mean, strip.lanes, 0.0);
  std::fill_n(sums.squares, strip.lanes, 0.0);
  start_pivots<F, T>(problem, strip, sums);
  for (int64_t start = 0; start < strip.rows; start += kBlock) {
    const int64_t end = std::min(strip.rows, start + kBlock);
    clear(sums.first, strip.lanes);
    clear(sums.second, strip.lanes);
    if (problem.weights) {
      clear(sums.weight, strip.lanes);
      for (int64_t row = start; row < end; ++row) {
        const Weight<T>* w = weights_of_row(problem, strip, row, sums.weights);
        add_rows<F>(strip.lanes, row, row + 1, sums.first, sums.second,
                    [&](int64_t, int64_t i, int n, Pack<F>& a, Pack<F>& b) {
                      Pack<F> weight = load<F>(sums.weight + i);
                      add_weighted<F>(
                          load<F>(x + row * strip.stride + i, n) - load<F>(sums.pivot + i),
                          load<F>(w + i, n), weight, a, b);
                      store(sums.weight + i, weight);
                    });
      }
    } else {
      std::fill_n(sums.weight, strip.lanes, static_cast<F>(end - start));
      add_rows<F>(strip.lanes, start, end, sums.first, sums.second,
                  [&](int64_t row, int64_t i, int n, Pack<F>& a, Pack<F>& b) {
                    const Pack<F> t =
                        load<F>(x + row * strip.stride + i, n) - load<F>(sums.pivot + i);
                    a += t;
                    b += t * t;
                  });
    }
    for (int lane = 0; lane < strip.lanes; ++lane) {
      Moments moments{sums.count[lane], sums.mean[lane], sums.squares[lane]};
      const Moments block =
          about(sums.pivot[lane], sums.weight[lane], sums.first[lane], sums.second[lane]);
      moments.merge(block);
      sums.count[lane] = moments.count;
      sums.mean[lane] = moments.mean;
      sums.squares[lane] = moments.squares;
      sums.pivot[lane] = block.count > 0 ? static_cast<F>(block.mean) : sums.pivot[lane];
    }
  }
  for_lanes(problem.shape, strip, [&](int lane, int64_t channel) {
    channels[channel].merge({sums.count[lane], sums.mean[lane], sums.squares[lane]});
  });
}

template <class F, class T>
void moments(const Problem& problem, const Range& range, Moments* channels) {
  if (sums_by_rows(problem.shape)) {
    StripSums<F, T> sums;
    for_strips(problem.shape, range,
               [&](const Strip& strip) { moments_of_strip<F, T>(problem, strip, sums, channels); });
  } else {
    for_runs<T>(problem, range, [&](int64_t c, int64_t first, const Weight<T>* weights, int64_t n) {
      moments_of_run<F>(static_cast<const T*>(problem.x) + first, weights, n, channels[c]);
    });
  }
}

// ---- normalize

template <class F>
inline Pack<F> activate(Pack<F> z, Activation activation) {
  if (activation == Activation::relu) return select<F>(Bits<F>(z <= 0), Pack<F>{}, z);
  if (activation == Activation::silu) {
    // From -100 down, z * sigmoid(z) is its limit 0 for any purpose, also at -infinity.
    return select<F>(Bits<F>(z < -100), all(F(-100)), z) * sigmoid<F>(z);
  }
  return z;
}

// dy * act'(z)
template <class F>
inline Pack<F> through_activation(Pack<F> dy, Pack<F> z, Activation activation) {
  if (activation == Activation::relu) return select<F>(Bits<F>(z <= 0), Pack<F>{}, dy);
  if (activation == Activation::silu) {
    z = clamp<F>(z, 100);  // beyond, the slope is 0 or 1, not infinity * 0
    const Pack<F> s = sigmoid<F>(z);
    return dy * (s * (F(1) + z * (F(1) - s)));
  }
  return dy;
}

template <class F, class T>
void normalize(const Problem& problem, const Range& range, const Coefficients* channels,
               void* output) {
  const T* x = static_cast<const T*>(problem.x);
  const T* residual = static_cast<const T*>(problem.residual);
  T* y = static_cast<T*>(output);
  for_stretches<F, T>(problem, range, channels,
                      [&](int64_t first, int64_t length, const Weight<T>*, const auto& of) {
                        for_packs<F>(length, [&](int64_t i, int n) {
                          Pack<F> z =
                              (load<F>(x + first + i, n) - of.center.at(i)) * of.slope.at(i) +
                              of.shift.at(i);
                          if (residual) z += load<F>(residual + first + i, n);
                          store<F>(y + first + i, activate<F>(z, problem.activation), n);
                        });
                      });
}

// ---- gradients

// g = dy * act'(z) and xhat of the pack at first + i; both 0 where an element takes no part.
template <class F, class T, class Of>
inline void g_and_xhat(const Problem& problem, const T* dy, int64_t first, int64_t i, int n,
                       const Weight<T>* weights, const Of& of, Pack<F>& g, Pack<F>& xhat) {
  const Pack<F> x = load<F>(static_cast<const T*>(problem.x) + first + i, n);
  const Pack<F> t = x - of.center.at(i);
  g = load<F>(dy + first + i, n);
  xhat = t * of.rstd.at(i) - of.remainder.at(i);
  if (problem.activation != Activation::none) {
    Pack<F> z = t * of.slope.at(i) + of.shift.at(i);
    if (problem.residual) z += load<F>(static_cast<const T*>(problem.residual) + first + i, n);
    g = through_activation<F>(g, z, problem.activation);
  }
  if (weights) {
    const Bits<F> finite = Bits<F>(x - x == 0);
    const Bits<F> valid = Bits<F>(load<F>(weights + i, n) > 0) | finite;
    g = select<F>(valid, g, Pack<F>{});
    xhat = select<F>(valid, xhat, Pack<F>{});
  }
}

template <class F, class T>
void gradient_sums(const Problem& problem, const Range& range, const Coefficients* channels,
                   const void* gradient, GradientSums* sums) {
  const T* dy = static_cast<const T*>(gradient);
  if (!sums_by_rows(problem.shape)) {
    for_runs<T>(problem, range,
                [&](int64_t c, int64_t first, const Weight<T>* weights, int64_t length) {
                  const Spreads<One, F> of = spread<F>(channels[c]);
                  constexpr int64_t kBlockElements = 4 * kBlock * kLanes<F>;
                  for (int64_t start = 0; start < length; start += kBlockElements) {
                    double sum_g, sum_g_xhat;
                    add_run<F>(start, std::min(length, start + kBlockElements), sum_g, sum_g_xhat,
                               [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) {
                                 Pack<F> g, xhat;
                                 g_and_xhat<F>(problem, dy, first, i, n, weights, of, g, xhat);
                                 a += g;
                                 b += g * xhat;
                               });
                    sums[c].g += sum_g;
                    sums[c].g_xhat += sum_g_xhat;
                  }
                });
    return;
  }
  Spreads<PerLane, F> of;
  Weight<T> buffer[kStripLanes];
  alignas(64) F first[kStripLanes], second[kStripLanes];
  for_strips(problem.shape, range, [&](const Strip& strip) {
    spread(problem.shape, strip, channels, of);
    for (int64_t start = 0; start < strip.rows; start += kBlock) {
      const int64_t end = std::min(strip.rows, start + kBlock);
      clear(first, strip.lanes);
      clear(second, strip.lanes);
      const auto add = [&](int64_t from, int64_t to, const Weight<T>* weights) {
        add_rows<F>(strip.lanes, from, to, first, second,
                    [&](int64_t row, int64_t i, int n, Pack<F>& a, Pack<F>& b) {
                      Pack<F> g, xhat;
                      g_and_xhat<F>(problem, dy, strip.first + row * strip.stride, i, n, weights,
                                    of, g, xhat);
                      a += g;
                      b += g * xhat;
                    });
      };
      if (problem.weights) {
        for (int64_t row = start; row < end; ++row) {
          add(row, row + 1, weights_of_row(problem, strip, row, buffer));
        }
      } else {
        add(start, end, nullptr);
      }
      for_lanes(problem.shape, strip, [&](int lane, int64_t channel) {
        sums[channel].g += first[lane];
        sums[channel].g_xhat += second[lane];
      });
    }
  });
}

template <class F, class T>
void input_gradient(const Problem& problem, const Range& range, const Coefficients* channels,
                    const void* gradient, void* output, void* residual_output) {
  const T* dy = static_cast<const T*>(gradient);
  T* dx = static_cast<T*>(output);
  T* dresidual = static_cast<T*>(residual_output);
  for_stretches<F, T>(problem, range, channels,
                      [&](int64_t first, int64_t length, const Weight<T>* weights, const auto& of) {
                        for_packs<F>(length, [&](int64_t i, int n) {
                          Pack<F> g, xhat;
                          g_and_xhat<F>(problem, dy, first, i, n, weights, of, g, xhat);
                          Pack<F> share = of.mean_g.at(i) + xhat * of.mean_g_xhat.at(i);
                          if (weights) share *= load<F>(weights + i, n);
                          store<F>(dx + first + i, of.slope.at(i) * (g - share), n);
                          if (dresidual) store<F>(dresidual + first + i, g, n);
                        });
                      });
}

// ---- the table of this instruction set

// body(arithmetic type, element type), both as values.
template <class Body>
void with_types(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float(), float());
    case Dtype::float64:
      return body(double(), double());
    case Dtype::float16:
      return body(float(), Half());
    case Dtype::bfloat16:
      return body(float(), Bfloat());
  }
}

}  // namespace

#define BATCHNORM_CONCATENATE(a, b) a##b
#define BATCHNORM_TABLE(level) BATCHNORM_CONCATENATE(kernels_, level)

extern const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL);
const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL) = {
    BATCHNORM_INSTRUCTION_SET,
    [](const Problem& problem, const Range& range, bool wide, Moments* channels) {
      with_types(problem.dtype, [&](auto f, auto t) {
        using F = decltype(f);
        using T = decltype(t);
        if (wide) return moments<double, T>(problem, range, channels);
        moments<F, T>(problem, range, channels);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, void* y) {
      with_types(problem.dtype, [&](auto f, auto t) {
        normalize<decltype(f), decltype(t)>(problem, range, channels, y);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       GradientSums* sums) {
      with_types(problem.dtype, [&](auto f, auto t) {
        gradient_sums<decltype(f), decltype(t)>(problem, range, channels, dy, sums);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       void* dx, void* dresidual) {
      with_types(problem.dtype, [&](auto f, auto t) {
        input_gradient<decltype(f), decltype(t)>(problem, range, channels, dy, dx, dresidual);
      });
    },
};

}  // namespace batchnorm
