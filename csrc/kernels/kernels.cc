// Compiled once for each instruction set; BATCHNORM_LEVEL names the table that this copy defines.
// How memory is gone through is in walks.h.
//
// Sums are exact enough for any input, at the speed of float: they are taken of x - pivot, where
// the pivot of a block of about kBlock elements a lane is the mean of the block before it, and
// blocks are merged in double. Were the pivot p far from the mean m of its block, rounding would
// cost eps * n * (p - m)^2; but p being the mean of a neighbour, of no fewer than n/32 elements,
// the total sum of squares is at least n/33 * (p - m)^2: the relative error stays of the order of
// 33 eps where those elements are far from all others, and of eps where they are not. (Weights may
// leave one element of a block that counts: then of n eps, n the elements of the next.)
#include "kernels/kernels.h"

#include <algorithm>

#include "kernels/simd.h"
#include "kernels/walks.h"

namespace batchnorm {
namespace {

// ---- statistics

// Of a block: its sums of w, w*t and w*t^2, t = x - pivot, as deviations of x.
inline Deviations about(double pivot, double weight, double first, double second) {
  const double offset = weight == 0 ? 0 : first / weight;
  return {weight, pivot, offset, second - first * offset, 0};
}

// Where w is 0, t may be anything.
template <class F>
inline void add_weighted(Pack<F> t, Pack<F> w, Pack<F>& first, Pack<F>& second) {
  const Pack<F> inside = select<F>(Bits<F>(w > 0), t, Pack<F>{});
  first += w * inside;
  second += w * inside * inside;
}

// How x is read for statistics: as it is, or multiplied by kWideScale.
template <class F, class T, bool kWide>
struct Values {
  static constexpr bool kScaled = kWide && std::is_same_v<T, double>;
  static constexpr F kScale = kScaled ? kWideScale : 1;

  static BATCHNORM_INLINE Pack<F> load(const T* from, int count) {
    const Pack<F> values = batchnorm::load<F>(from, count);
    return kScaled ? values * kScale : values;
  }
  // The other lanes as those of `rest`.
  static BATCHNORM_INLINE Pack<F> load(const T* from, int count, Pack<F> rest) {
    if constexpr (kScaled) return batchnorm::load<F>(from, count, rest / kScale) * kScale;
    return batchnorm::load<F>(from, count, rest);
  }
};

// An element that counts is one of those near their mean, so that a pivot may start there.
template <class F, class T, bool kWide>
F first_pivot(const Problem& problem, const Runs<T>& runs) {
  for (int64_t run = 0; run < runs.number; ++run) {
    const T* x = static_cast<const T*>(problem.x) + runs.first + run * runs.stride;
    for (int64_t i = 0; i < runs.length; ++i) {
      if (!runs.weights || runs.weights[run * runs.weights_stride + i] > 0) {
        return Values<F, T, kWide>::load(x + i, 1)[0];
      }
    }
  }
  return 0;
}

template <class F, class T, bool kWide>
void deviations_by_runs(const Problem& problem, const Range& range, const bool* only,
                        Deviations* channels) {
  using X = Values<F, T, kWide>;
  const bool weighted = problem.weights;
  const int64_t ahead = range.ahead;
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    if (only && !range.at(only, c)) continue;
    const Runs<T> all_runs = runs_of<T>(problem, range, c);
    Pack<F> pivot = all(first_pivot<F, T, kWide>(problem, all_runs));
    Pack<F> weights = {};
    Chains<F> sums;
    Deviations own;
    const auto add = [&](int64_t first, int64_t length, const Weight<T>* w) BATCHNORM_INLINE {
      const T* x = static_cast<const T*>(problem.x) + first;
      if (w) {
        add_run<F>(length, sums, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
          const Pack<F> weight = load<F>(w + i, n);
          weights += weight;
          add_weighted<F>(X::load(x + i, n) - pivot, weight, a, b);
        });
      } else {
        add_run<F>(length, sums, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
          if (ahead) fetch(x + i + ahead);
          const Pack<F> t = X::load(x + i, n, pivot) - pivot;
          a += t;
          b += t * t;
        });
      }
    };
    const auto finish = [&](int64_t elements) BATCHNORM_INLINE {
      const double weight = weighted ? horizontal_sum<F>(weights) : static_cast<double>(elements);
      const Deviations found = about(pivot[0], weight, sums.sum_of_first(), sums.sum_of_second());
      own.merge(found);
      pivot = all(static_cast<F>(found.mean + found.mean_low));
      weights = Pack<F>{};
      sums = Chains<F>();
    };
    for_blocks_of_channel<F>(all_runs, kLanes<F>, weighted ? 4 : 16, add, finish);
    range.at(channels, c).merge(own);
  }
}

template <class F, class T>
struct StripSums {
  F *pivot, *weight, *first, *second;
  double *count, *mean, *mean_low, *squares, *squares_low;
  bool* started;
  Weight<T>* weights;

  StripSums(const Problem& problem, Scratch scratch) {
    const int64_t lanes = most_lanes(problem.shape);
    for (F** each : {&pivot, &weight, &first, &second}) *each = scratch.take<F>(lanes);
    for (double** each : {&count, &mean, &mean_low, &squares, &squares_low}) {
      *each = scratch.take<double>(lanes);
    }
    weights = buffer_of_weights<Weight<T>>(problem, scratch);
    started = weights ? scratch.take<bool>(lanes) : nullptr;
  }
};

template <class F, class T, bool kWide>
void start_pivots(const Problem& problem, const Strip& strip, StripSums<F, T>& sums) {
  using X = Values<F, T, kWide>;
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  for_packs<F>(strip.lanes, [&](int64_t i, int n)
                                BATCHNORM_INLINE { store(sums.pivot + i, X::load(x + i, n)); });
  if (!problem.weights) return;
  std::fill_n(sums.started, strip.lanes, false);
  int waiting = strip.lanes;
  for (int64_t row = 0; row < strip.rows && waiting > 0; ++row) {
    const Weights<Weight<T>> w = weights_of_row(problem, strip, row, sums.weights);
    for (int lane = 0; lane < strip.lanes; ++lane) {
      if (sums.started[lane] || !(w.first[lane & w.mask] > 0)) continue;
      sums.pivot[lane] = X::load(x + row * strip.stride + lane, 1)[0];
      sums.started[lane] = true;
      --waiting;
    }
  }
}

template <class F, class W>
void add_weights(int lanes, const Rows& rows, const RowsOfWeights<W>& weights, F* sums) {
  Pack<F> sum = {};
  for_packs<F>(lanes, [&](int64_t i, int n) BATCHNORM_INLINE {
    if (i == 0 || weights.first.mask) {
      sum = Pack<F>{};
      for (int stream = 0; stream < rows.streams; ++stream) {
        for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
          sum += weights.at(row, stream).template at<F>(i, n);
        }
      }
    }
    store(sums + i, load<F>(sums + i) + sum);
  });
}

// Deviations::merge for every lane, without branches, so that the compiler makes vectors of it. Of
// float elements, what rounding leaves out of doubles is nothing.
template <class F, class T>
void merge_blocks(int lanes, StripSums<F, T>& sums) {
  for (int i = 0; i < lanes; ++i) {
    const double weight = sums.weight[i], first = sums.first[i], second = sums.second[i];
    const double offset = first / (weight == 0 ? 1 : weight);
    const double total = sums.count[i] + weight;
    const double fraction = weight / (total == 0 ? 1 : total);
    double shift = sums.pivot[i] - sums.mean[i] + offset;
    if constexpr (std::is_same_v<F, double>) shift -= sums.mean_low[i];
    const double squares = second - first * offset + shift * shift * sums.count[i] * fraction;
    if constexpr (std::is_same_v<F, double>) {
      add(squares, sums.squares[i], sums.squares_low[i]);
      add(shift * fraction, sums.mean[i], sums.mean_low[i]);
    } else {
      sums.squares[i] += squares;
      sums.mean[i] += shift * fraction;
    }
    sums.count[i] = total;
    sums.pivot[i] = static_cast<F>(sums.pivot[i] + offset);
  }
}

template <class F, class T, bool kWide>
void deviations_of_strip(const Problem& problem, const Range& range, const Strip& strip,
                         const bool* only, StripSums<F, T>& sums, Deviations* channels) {
  using X = Values<F, T, kWide>;
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  const int64_t stride = strip.stride;
  start_pivots<F, T, kWide>(problem, strip, sums);
  std::copy_n(sums.pivot, strip.lanes, sums.mean);
  for (double* each : {sums.count, sums.mean_low, sums.squares, sums.squares_low}) {
    std::fill_n(each, strip.lanes, 0.0);
  }
  for_blocks_of_rows(strip, kFirstBlock, [&](const Rows& block) BATCHNORM_INLINE {
    const int64_t apart = block.apart * stride;
    clear(sums.first, strip.lanes);
    clear(sums.second, strip.lanes);
    if (problem.weights) {
      clear(sums.weight, strip.lanes);
      const int64_t most = rows_in_buffer<Weight<T>>(problem, strip);
      for (Rows rows = block; rows.begin < block.end; rows.begin = rows.end) {
        rows.end = std::min(block.end, rows.begin + most);
        const RowsOfWeights<Weight<T>> weights =
            weights_of_rows(problem, strip, rows, sums.weights);
        add_weights<F>(strip.lanes, rows, weights, sums.weight);
        add_rows<F>(strip.lanes, rows, sums.first, sums.second,
                    [&](int64_t row, int stream, int64_t i, int n, Pack<F>& a, Pack<F>& b)
                        BATCHNORM_INLINE {
                          const T* from = x + row * stride + stream * apart + i;
                          const Pack<F> t = X::load(from, n) - load<F>(sums.pivot + i);
                          const auto w = weights.at(row - rows.begin, stream);
                          add_weighted<F>(t, w.template at<F>(i, n), a, b);
                        });
      }
    } else {
      std::fill_n(sums.weight, strip.lanes, static_cast<F>(block.number()));
      add_rows<F>(strip.lanes, block, sums.first, sums.second,
                  [&](int64_t row, int stream, int64_t i, int n, Pack<F>& a, Pack<F>& b)
                      BATCHNORM_INLINE {
                        const T* from = x + row * stride + stream * apart + i;
                        const Pack<F> t = X::load(from, n) - load<F>(sums.pivot + i);
                        a += t;
                        b += t * t;
                      });
    }
    merge_blocks(strip.lanes, sums);
  });
  for_lanes(problem.shape, strip, [&](int i, int64_t channel) {
    if (only && !range.at(only, channel)) return;
    range.at(channels, channel)
        .merge(
            {sums.count[i], sums.mean[i], sums.mean_low[i], sums.squares[i], sums.squares_low[i]});
  });
}

template <class F, class T, bool kWide>
void deviations(const Problem& problem, const Range& range, const bool* only, Scratch scratch,
                Deviations* channels) {
  if (!by_rows(problem.shape)) {
    return deviations_by_runs<F, T, kWide>(problem, range, only, channels);
  }
  StripSums<F, T> sums(problem, scratch);
  for_strips(problem.shape, range, lanes_for_sums(problem), [&](const Strip& strip) {
    if (!has_any(only, problem.shape, range, strip)) return;
    deviations_of_strip<F, T, kWide>(problem, range, strip, only, sums, channels);
  });
}

// ---- the activation, and whether there are scales

template <Activation A, class F>
inline Pack<F> activate(Pack<F> z) {
  if constexpr (A == Activation::relu) return select<F>(Bits<F>(z <= 0), Pack<F>{}, z);
  if constexpr (A == Activation::silu) {
    // From -87 down, z * sigmoid(z) is its limit 0 for any purpose, also at -infinity.
    z = at_least<F>(-kMostExponent<F>, z);
    return z / (F(1) + exponential(-at_most<F>(kMostExponent<F>, z)));
  }
  return z;
}

// dy * act'(z)
template <Activation A, class F>
inline Pack<F> through_activation(Pack<F> dy, Pack<F> z) {
  if constexpr (A == Activation::relu) return select<F>(Bits<F>(z <= 0), Pack<F>{}, dy);
  if constexpr (A == Activation::silu) {
    // Beyond the limits, the slope is 0 or 1, not infinity * 0.
    z = at_least<F>(-kMostExponent<F>, at_most<F>(kMostExponent<F>, z));
    const Pack<F> e = exponential(-z), sigmoid = F(1) / (F(1) + e);
    return dy * (sigmoid * (F(1) + z * (e * sigmoid)));
  }
  return dy;
}

// body(activation), as a type.
template <class Body>
inline BATCHNORM_INLINE auto with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>());
  }
  return body(std::integral_constant<Activation, Activation::none>());
}

// What is known when a loop is compiled. Where some channel has scales, which is rare, the
// activation is not: one loop for all of them.
template <Activation A>
struct Plain {
  static constexpr bool kScaled = false, kActive = A != Activation::none;
  explicit Plain(Activation) {}
  template <class F>
  Pack<F> activate(Pack<F> z) const {
    return batchnorm::activate<A, F>(z);
  }
  template <class F>
  Pack<F> through(Pack<F> dy, Pack<F> z) const {
    return through_activation<A, F>(dy, z);
  }
};

struct Scaled {
  static constexpr bool kScaled = true, kActive = true;
  Activation activation;
  explicit Scaled(Activation activation) : activation(activation) {}
  template <class F>
  Pack<F> activate(Pack<F> z) const {
    return with_activation(activation, [&](auto a) { return batchnorm::activate<a.value, F>(z); });
  }
  template <class F>
  Pack<F> through(Pack<F> dy, Pack<F> z) const {
    return with_activation(activation,
                           [&](auto a) { return through_activation<a.value, F>(dy, z); });
  }
};

template <class Kind>
struct ForOutput {
  static constexpr Reads kReads = {true, false, false, Kind::kScaled};
};
template <class Kind>
struct ForSums {
  static constexpr Reads kReads = {Kind::kActive, true, false, Kind::kScaled};
};
template <class Kind>
struct ForInputGradient {
  static constexpr Reads kReads = {Kind::kActive, false, true, Kind::kScaled};
};

template <class Kind, class F, class Of>
inline BATCHNORM_INLINE Pack<F> coordinate(Pack<F> x, int64_t i, const Of& of) {
  if constexpr (Kind::kScaled) x *= of.scales.x.at(i);
  return x - of.center.at(i);
}

// ---- normalize

template <class F, class T, class Kind>
void normalize(const Problem& problem, const Range& range, const Coefficients* channels,
               Scratch scratch, void* output) {
  const int64_t ahead = fetched_ahead<T>(range);
  const Kind kind(problem.activation);
  // With weights, what is not finite gives NaN, whatever its own weight; so none is read.
  const bool weighted = problem.weights;
  Problem unweighted = problem;
  unweighted.weights = nullptr;
  OpenPack<F, T> open;
  for_stretches<ForOutput<Kind>, F, T>(
      unweighted, range, channels, scratch,
      [&](int64_t first, int64_t length, const Weights<Weight<T>>&, const auto& of)
          BATCHNORM_INLINE {
            const T* x = static_cast<const T*>(problem.x) + first;
            const T* residual =
                problem.residual ? static_cast<const T*>(problem.residual) + first : nullptr;
            const Writer<F, T> y(static_cast<T*>(output) + first,
                                 range.beyond_cache && is_long<T>(length), open);
            const auto normalized = [&](int64_t i, int n) BATCHNORM_INLINE {
              if (ahead) fetch(x + i + ahead);
              const Pack<F> value = load<F>(x + i, n);
              Pack<F> z = coordinate<Kind, F>(value, i, of) * of.slope.at(i) + of.shift.at(i);
              if (weighted) z += value - value;
              if (residual) z += load<F>(residual + i, n);
              return kind.template activate<F>(z);
            };
            const auto put = [&](int64_t i, Pack<F> v, int n) BATCHNORM_INLINE { y.put(i, v, n); };
            map_packs<F>(y.before_alignment(length), length, normalized, put);
          });
  open.close();
  order_stores();
}

// ---- gradients

// What both gradients read of a stretch of elements.
template <class F, class T, class Kind>
struct GradientInputs {
  Kind kind;
  const T *x, *residual, *dy;
  Weights<Weight<T>> weights;

  GradientInputs(const Problem& problem, const void* dy, int64_t first,
                 const Weights<Weight<T>>& weights)
      : kind(problem.activation),
        x(static_cast<const T*>(problem.x) + first),
        residual(problem.residual ? static_cast<const T*>(problem.residual) + first : nullptr),
        dy(static_cast<const T*>(dy) + first),
        weights(weights) {}

  // The same of elements further on, whose weights are at another distance.
  BATCHNORM_INLINE GradientInputs row(int64_t distance, int64_t distance_of_weights) const {
    GradientInputs other = *this;
    other.x += distance;
    other.dy += distance;
    if (Kind::kActive && residual) other.residual += distance;
    if (weights) other.weights = weights.further(distance_of_weights);
    return other;
  }

  // t, and g = dy * act'(z) of the pack at i; both 0 where an element takes no part.
  template <class Of>
  BATCHNORM_INLINE void get(int64_t i, int n, const Of& of, Pack<F>& t, Pack<F>& g) const {
    const Pack<F> value = load<F>(x + i, n);
    t = coordinate<Kind, F>(value, i, of);
    g = load<F>(dy + i, n);
    if constexpr (Kind::kActive) {
      Pack<F> z = t * of.slope.at(i) + of.shift.at(i);
      if (residual) z += load<F>(residual + i, n);
      g = kind.template through<F>(g, z);
    }
    if (weights) {
      const Pack<F> looked_at = Kind::kScaled ? t : value;
      const Bits<F> finite = Bits<F>(looked_at - looked_at == 0);
      const Bits<F> valid = Bits<F>(weights.template at<F>(i, n) > 0) | finite;
      t = select<F>(valid, t, Pack<F>{});
      g = select<F>(valid, g, Pack<F>{});
    }
  }
};

template <class F, class T, class Kind>
void gradient_sums_by_runs(const Problem& problem, const Range& range, const Coefficients* channels,
                           const void* dy, const bool* again, GradientSums* sums) {
  const int64_t ahead = range.ahead;
  const double most_rstd = again ? 1 : kAnyRstd;
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    if (again && !range.at(again, c)) continue;
    const Spreads<One, F> of = spread<ForSums<Kind>, F>(range, channels, c, most_rstd);
    Chains<F> chains;
    const auto add = [&](int64_t first, int64_t length, const Weight<T>* weights) BATCHNORM_INLINE {
      const GradientInputs<F, T, Kind> inputs(problem, dy, first, weights);
      add_run<F>(length, chains, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
        if (ahead) fetch(inputs.x + i + ahead);
        if (ahead) fetch(inputs.dy + i + ahead);
        Pack<F> t, g;
        inputs.get(i, n, of, t, g);
        if constexpr (Kind::kScaled) g *= of.scales.g.at(i);
        a += g;
        b += g * (t * of.rstd.at(i));
      });
    };
    const auto finish = [&](int64_t) BATCHNORM_INLINE {
      range.at(sums, c).merge({chains.sum_of_first(), 0, chains.sum_of_second(), 0});
      chains = Chains<F>();
    };
    for_blocks_of_channel<F>(runs_of<T>(problem, range, c), kBlockElements<F>, 1, add, finish);
  }
}

template <class F, class T, class Kind>
void gradient_sums(const Problem& problem, const Range& range, const Coefficients* channels,
                   const void* dy, const bool* again, Scratch scratch, GradientSums* sums) {
  if (!by_rows(problem.shape)) {
    return gradient_sums_by_runs<F, T, Kind>(problem, range, channels, dy, again, sums);
  }
  const double most_rstd = again ? 1 : kAnyRstd;
  const int64_t lanes = most_lanes(problem.shape);
  Spreads<PerLane, F> of = lanes_of<ForSums<Kind>, F>(problem, scratch);
  F *first = scratch.take<F>(lanes), *second = scratch.take<F>(lanes);
  double *g = scratch.take<double>(lanes), *g_low = scratch.take<double>(lanes);
  double *g_xhat = scratch.take<double>(lanes), *g_xhat_low = scratch.take<double>(lanes);
  Weight<T>* const buffer = buffer_of_weights<Weight<T>>(problem, scratch);
  for_strips(problem.shape, range, lanes_for_sums(problem), [&](const Strip& strip) {
    if (!has_any(again, problem.shape, range, strip)) return;
    spread<ForSums<Kind>>(problem, range, strip, channels, of, most_rstd);
    for (double* each : {g, g_low, g_xhat, g_xhat_low}) std::fill_n(each, strip.lanes, 0.0);
    const int64_t stride = strip.stride;
    for_blocks_of_rows(strip, kBlock, [&](const Rows& block) BATCHNORM_INLINE {
      const int64_t apart = block.apart * stride;
      clear(first, strip.lanes);
      clear(second, strip.lanes);
      const auto add_part = [&](const Rows& rows,
                                const RowsOfWeights<Weight<T>>& weights) BATCHNORM_INLINE {
        const GradientInputs<F, T, Kind> inputs(problem, dy, strip.first + rows.begin * stride,
                                                weights.first);
        add_rows<F>(strip.lanes, rows, first, second,
                    [&](int64_t row, int stream, int64_t i, int n, Pack<F>& a, Pack<F>& b)
                        BATCHNORM_INLINE {
                          Pack<F> t, gradient;
                          row -= rows.begin;
                          const int64_t distance = row * stride + stream * apart;
                          inputs.row(distance, row * weights.stride + stream * weights.apart)
                              .get(i, n, of, t, gradient);
                          if constexpr (Kind::kScaled) gradient *= of.scales.g.at(i);
                          a += gradient;
                          b += gradient * (t * of.rstd.at(i));
                        });
      };
      if (problem.weights) {
        const int64_t most = rows_in_buffer<Weight<T>>(problem, strip);
        for (Rows rows = block; rows.begin < block.end; rows.begin = rows.end) {
          rows.end = std::min(block.end, rows.begin + most);
          add_part(rows, weights_of_rows(problem, strip, rows, buffer));
        }
      } else {
        add_part(block, RowsOfWeights<Weight<T>>{nullptr, 0, 0});
      }
      for (int i = 0; i < strip.lanes; ++i) {
        if constexpr (std::is_same_v<F, double>) {
          add(first[i], g[i], g_low[i]);
          add(second[i], g_xhat[i], g_xhat_low[i]);
        } else {
          g[i] += first[i];
          g_xhat[i] += second[i];
        }
      }
    });
    for_lanes(problem.shape, strip, [&](int i, int64_t channel) {
      if (again && !range.at(again, channel)) return;
      range.at(sums, channel).merge({g[i], g_low[i], g_xhat[i], g_xhat_low[i]});
    });
  });
}

template <class F, class T, class Kind>
void input_gradient(const Problem& problem, const Range& range, const Coefficients* channels,
                    const void* dy, bool through_statistics, Scratch scratch, void* output,
                    void* residual_output) {
  const int64_t ahead = fetched_ahead<T>(range);
  OpenPack<F, T> open_dx, open_dresidual;
  for_stretches<ForInputGradient<Kind>, F, T>(
      problem, range, channels, scratch,
      [&](int64_t first, int64_t length, const Weights<Weight<T>>& weights,
          const auto& of) BATCHNORM_INLINE {
        const GradientInputs<F, T, Kind> inputs(problem, dy, first, weights);
        const Writer<F, T> dx(static_cast<T*>(output) + first,
                              range.beyond_cache && is_long<T>(length), open_dx);
        const Writer<F, T> dresidual(
            residual_output ? static_cast<T*>(residual_output) + first : nullptr, dx,
            open_dresidual);
        for_packs<F>(dx.before_alignment(length), length, [&](int64_t i, int n) BATCHNORM_INLINE {
          if (ahead) fetch(inputs.x + i + ahead);
          if (ahead) fetch(inputs.dy + i + ahead);
          Pack<F> t, g;
          inputs.get(i, n, of, t, g);
          Pack<F> own = g;
          if constexpr (Kind::kScaled) {
            own *= of.scales.g.at(i);
            t *= of.scales.t.at(i);
          }
          if (through_statistics) {
            Pack<F> share = of.share.at(i) + t * of.share_xhat.at(i);
            if (weights) {
              Pack<F> w = weights.template at<F>(i, n);
              if constexpr (Kind::kScaled) w *= of.scales.w.at(i);
              share = select<F>(Bits<F>(w > 0), share * w, Pack<F>{});
            }
            own -= share;
          }
          if constexpr (Kind::kScaled) {
            own = own * of.scales.dx_slope.at(i) * of.scales.dx.at(i);
          } else {
            own *= of.slope.at(i);
          }
          dx.put(i, own, n);
          if (residual_output) dresidual.put(i, g, n);
        });
      });
  open_dx.close();
  open_dresidual.close();
  order_stores();
}

// ---- the table of this instruction set

// body(arithmetic type, element type, kind), all as values.
template <class Body>
void with_kind(const Problem& problem, const Range& range, const Body& body) {
  with_types(problem.dtype, [&](auto f, auto t) {
    if (range.scales) return body(f, t, Scaled(problem.activation));
    with_activation(problem.activation,
                    [&](auto a) { body(f, t, Plain<a.value>(problem.activation)); });
  });
}

}  // namespace

#define BATCHNORM_CONCATENATE(a, b) a##b
#define BATCHNORM_TABLE(level) BATCHNORM_CONCATENATE(kernels_, level)

extern const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL);
const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL) = {
    BATCHNORM_INSTRUCTION_SET,
    [](const Problem& problem, const Range& range, const bool* wide, Scratch scratch,
       Deviations* channels) {
      with_types(problem.dtype, [&](auto f, auto t) {
        using F = decltype(f);
        using T = decltype(t);
        if (wide) return deviations<double, T, true>(problem, range, wide, scratch, channels);
        deviations<F, T, false>(problem, range, nullptr, scratch, channels);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, Scratch scratch,
       void* y) {
      with_kind(problem, range, [&](auto f, auto t, auto kind) {
        normalize<decltype(f), decltype(t), decltype(kind)>(problem, range, channels, scratch, y);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       const bool* again, Scratch scratch, GradientSums* sums) {
      with_kind(problem, range, [&](auto f, auto t, auto kind) {
        gradient_sums<decltype(f), decltype(t), decltype(kind)>(problem, range, channels, dy, again,
                                                                scratch, sums);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       bool through_statistics, Scratch scratch, void* dx, void* dresidual) {
      with_kind(problem, range, [&](auto f, auto t, auto kind) {
        input_gradient<decltype(f), decltype(t), decltype(kind)>(
            problem, range, channels, dy, through_statistics, scratch, dx, dresidual);
      });
    },
};

}  // namespace batchnorm
