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
  return {weight, pivot + offset, second - first * offset};
}

// Where w is 0, t may be anything.
template <class F>
inline void add_weighted(Pack<F> t, Pack<F> w, Pack<F>& first, Pack<F>& second) {
  const Pack<F> inside = select<F>(Bits<F>(w > 0), t, Pack<F>{});
  first += w * inside;
  second += w * inside * inside;
}

// An element that counts is one of those near their mean, so that a pivot may start there.
template <class F, class T>
F first_pivot(const Problem& problem, const Runs<T>& runs) {
  for (int64_t run = 0; run < runs.number; ++run) {
    const T* x = static_cast<const T*>(problem.x) + runs.first + run * runs.stride;
    for (int64_t i = 0; i < runs.length; ++i) {
      if (!runs.weights || runs.weights[run * runs.weights_stride + i] > 0) {
        return load<F>(x + i, 1)[0];
      }
    }
  }
  return 0;
}

template <class F, class T>
void deviations_by_runs(const Problem& problem, const Range& range, Deviations* channels) {
  const bool weighted = problem.weights;
  const int64_t ahead = range.ahead;
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    const Runs<T> all_runs = runs_of<T>(problem, range, c);
    Pack<F> pivot = all(first_pivot<F, T>(problem, all_runs));
    Pack<F> weights = {};
    Chains<F> sums;
    const auto add = [&](int64_t first, int64_t length, const Weight<T>* w) BATCHNORM_INLINE {
      const T* x = static_cast<const T*>(problem.x) + first;
      if (w) {
        add_run<F>(length, sums, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
          const Pack<F> weight = load<F>(w + i, n);
          weights += weight;
          add_weighted<F>(load<F>(x + i, n) - pivot, weight, a, b);
        });
      } else {
        add_run<F>(length, sums, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
          if (ahead) fetch(x + i + ahead);
          const Pack<F> t = load<F>(x + i, n, pivot) - pivot;
          a += t;
          b += t * t;
        });
      }
    };
    const auto finish = [&](int64_t elements) BATCHNORM_INLINE {
      const double weight = weighted ? horizontal_sum<F>(weights) : static_cast<double>(elements);
      const Deviations found = about(pivot[0], weight, sums.sum_of_first(), sums.sum_of_second());
      channels[c].merge(found);
      if (found.count > 0) pivot = all(static_cast<F>(found.mean));
      weights = Pack<F>{};
      sums = Chains<F>();
    };
    for_blocks_of_channel<F>(all_runs, kLanes<F>, weighted ? 4 : 16, add, finish);
  }
}

template <class F, class T>
struct StripSums {
  alignas(64) F pivot[kStripLanes], weight[kStripLanes], first[kStripLanes], second[kStripLanes];
  alignas(64) double count[kStripLanes], mean[kStripLanes], squares[kStripLanes];
  WeightBuffer<Weight<T>> weights;
};

template <class F, class T>
void start_pivots(const Problem& problem, const Strip& strip, StripSums<F, T>& sums) {
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  for_packs<F>(strip.lanes, [&](int64_t i, int n)
                                BATCHNORM_INLINE { store(sums.pivot + i, load<F>(x + i, n)); });
  if (!problem.weights) return;
  bool started[kStripLanes] = {};
  int waiting = strip.lanes;
  for (int64_t row = 0; row < strip.rows && waiting > 0; ++row) {
    const Weights<Weight<T>> w = weights_of_rows(problem, strip, row, row + 1, sums.weights).first;
    for (int lane = 0; lane < strip.lanes; ++lane) {
      if (started[lane] || !(w.first[lane & w.mask] > 0)) continue;
      sums.pivot[lane] = load<F>(x + row * strip.stride + lane, 1)[0];
      started[lane] = true;
      --waiting;
    }
  }
}

template <class F, class W>
void add_weights(int lanes, int64_t rows, const RowsOfWeights<W>& weights, F* sums) {
  Pack<F> sum = {};
  for_packs<F>(lanes, [&](int64_t i, int n) BATCHNORM_INLINE {
    if (i == 0 || weights.first.mask) {
      sum = Pack<F>{};
      for (int64_t row = 0; row < rows; ++row) sum += weights.row(row).template at<F>(i, n);
    }
    store(sums + i, load<F>(sums + i) + sum);
  });
}

// Deviations::merge for every lane, without branches, so that the compiler makes vectors of it.
template <class F, class T>
void merge_blocks(int lanes, StripSums<F, T>& sums) {
  for (int i = 0; i < lanes; ++i) {
    const double weight = sums.weight[i], first = sums.first[i], second = sums.second[i];
    const double offset = first / (weight == 0 ? 1 : weight);
    const double mean = sums.pivot[i] + offset;
    const double total = sums.count[i] + weight;
    const double fraction = weight / (total == 0 ? 1 : total);
    const double shift = mean - sums.mean[i];
    sums.squares[i] += second - first * offset + shift * shift * sums.count[i] * fraction;
    sums.mean[i] += shift * fraction;
    sums.count[i] = total;
    sums.pivot[i] = static_cast<F>(mean);
  }
}

template <class F, class T>
void deviations_of_strip(const Problem& problem, const Strip& strip, StripSums<F, T>& sums,
                         Deviations* channels) {
  const T* x = static_cast<const T*>(problem.x) + strip.first;
  const int64_t stride = strip.stride;
  std::fill_n(sums.count, strip.lanes, 0.0);
  std::fill_n(sums.mean, strip.lanes, 0.0);
  std::fill_n(sums.squares, strip.lanes, 0.0);
  start_pivots<F, T>(problem, strip, sums);
  int64_t end, block = kFirstBlock;
  for (int64_t start = 0; start < strip.rows;
       start = end, block = std::min<int64_t>(kBlock, 4 * block)) {
    end = std::min(strip.rows, start + block);
    clear(sums.first, strip.lanes);
    clear(sums.second, strip.lanes);
    if (problem.weights) {
      clear(sums.weight, strip.lanes);
      for (int64_t row0 = start, row1; row0 < end; row0 = row1) {
        row1 = std::min(end, row0 + rows_in_buffer<Weight<T>>(strip));
        const RowsOfWeights<Weight<T>> weights =
            weights_of_rows(problem, strip, row0, row1, sums.weights);
        add_weights<F>(strip.lanes, row1 - row0, weights, sums.weight);
        add_rows<F>(strip.lanes, row0, row1, sums.first, sums.second,
                    [&](int64_t row, int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
                      const Pack<F> t = load<F>(x + row * stride + i, n) - load<F>(sums.pivot + i);
                      add_weighted<F>(t, weights.row(row - row0).template at<F>(i, n), a, b);
                    });
      }
    } else {
      std::fill_n(sums.weight, strip.lanes, static_cast<F>(end - start));
      add_rows<F>(strip.lanes, start, end, sums.first, sums.second,
                  [&](int64_t row, int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
                    const T* from = x + row * stride + i;
                    const Pack<F> t = load<F>(from, n) - load<F>(sums.pivot + i);
                    a += t;
                    b += t * t;
                  });
    }
    merge_blocks(strip.lanes, sums);
  }
  for_lanes(problem.shape, strip, [&](int lane, int64_t channel) {
    channels[channel].merge({sums.count[lane], sums.mean[lane], sums.squares[lane]});
  });
}

template <class F, class T>
void deviations(const Problem& problem, const Range& range, Deviations* channels) {
  if (!by_rows(problem.shape)) return deviations_by_runs<F, T>(problem, range, channels);
  StripSums<F, T> sums;
  for_strips(problem.shape, range, lanes_for_sums(problem), [&](const Strip& strip) {
    deviations_of_strip<F, T>(problem, strip, sums, channels);
  });
}

// ---- normalize

template <class F, Activation A>
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
template <class F, Activation A>
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

template <class F, class T, Activation A>
void normalize(const Problem& problem, const Range& range, const Coefficients* channels,
               void* output) {
  const int64_t ahead = fetched_ahead<T>(range);
  // With weights, what is not finite gives NaN, whatever its own weight; so none is read.
  const bool weighted = problem.weights;
  Problem unweighted = problem;
  unweighted.weights = nullptr;
  for_stretches<F, T>(
      unweighted, range, channels,
      [&](int64_t first, int64_t length, const Weights<Weight<T>>&,
          const auto& of) BATCHNORM_INLINE {
        const T* x = static_cast<const T*>(problem.x) + first;
        const T* residual =
            problem.residual ? static_cast<const T*>(problem.residual) + first : nullptr;
        const Writer<F, T> y(static_cast<T*>(output) + first,
                             range.beyond_cache && is_long<T>(length));
        for_packs<F>(y.before_alignment(length), length, [&](int64_t i, int n) BATCHNORM_INLINE {
          if (ahead) fetch(x + i + ahead);
          const Pack<F> value = load<F>(x + i, n);
          Pack<F> z = (value - of.center.at(i)) * of.slope.at(i) + of.shift.at(i);
          if (weighted) z += value - value;
          if (residual) z += load<F>(residual + i, n);
          y.put(i, activate<F, A>(z), n);
        });
      });
  order_stores();
}

// ---- gradients

// What both gradients read of a stretch of elements.
template <class F, class T, Activation A>
struct GradientInputs {
  const T *x, *residual, *dy;
  Weights<Weight<T>> weights;

  GradientInputs(const Problem& problem, const void* dy, int64_t first,
                 const Weights<Weight<T>>& weights)
      : x(static_cast<const T*>(problem.x) + first),
        residual(problem.residual ? static_cast<const T*>(problem.residual) + first : nullptr),
        dy(static_cast<const T*>(dy) + first),
        weights(weights) {}

  // The same of elements further on, whose weights are at another distance.
  BATCHNORM_INLINE GradientInputs row(int64_t distance, int64_t distance_of_weights) const {
    GradientInputs other = *this;
    other.x += distance;
    other.dy += distance;
    if (A != Activation::none && residual) other.residual += distance;
    if (weights) other.weights = weights.further(distance_of_weights);
    return other;
  }

  // t = x - center and g = dy * act'(z) of the pack at i; both 0 where an element takes no part.
  template <class Of>
  BATCHNORM_INLINE void get(int64_t i, int n, const Of& of, Pack<F>& t, Pack<F>& g) const {
    const Pack<F> value = load<F>(x + i, n, of.center.at(i));
    t = value - of.center.at(i);
    g = load<F>(dy + i, n);
    if constexpr (A != Activation::none) {
      Pack<F> z = t * of.slope.at(i) + of.shift.at(i);
      if (residual) z += load<F>(residual + i, n);
      g = through_activation<F, A>(g, z);
    }
    if (weights) {
      const Bits<F> finite = Bits<F>(value - value == 0);
      const Bits<F> valid = Bits<F>(weights.template at<F>(i, n) > 0) | finite;
      t = select<F>(valid, t, Pack<F>{});
      g = select<F>(valid, g, Pack<F>{});
    }
  }
};

// Sums g and g * t * rstd, which is g * xhat but for the remainder of the mean: batch_norm.cc takes
// that into account once a channel.
template <class F, class T, Activation A>
void gradient_sums_by_runs(const Problem& problem, const Range& range, const Coefficients* channels,
                           const void* dy, GradientSums* sums) {
  const int64_t ahead = range.ahead;
  for (int64_t c = range.channel0; c < range.channel1; ++c) {
    const Spreads<One, F> of = spread<F>(channels[c]);
    Chains<F> chains;
    const auto add = [&](int64_t first, int64_t length, const Weight<T>* weights) BATCHNORM_INLINE {
      const GradientInputs<F, T, A> inputs(problem, dy, first, weights);
      add_run<F>(length, chains, [&](int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
        if (ahead) fetch(inputs.x + i + ahead);
        if (ahead) fetch(inputs.dy + i + ahead);
        Pack<F> t, g;
        inputs.get(i, n, of, t, g);
        a += g;
        b += g * (t * of.rstd.at(i));
      });
    };
    const auto finish = [&](int64_t) BATCHNORM_INLINE {
      sums[c].g += chains.sum_of_first();
      sums[c].g_xhat += chains.sum_of_second();
      chains = Chains<F>();
    };
    for_blocks_of_channel<F>(runs_of<T>(problem, range, c), kBlockElements<F>, 1, add, finish);
  }
}

template <class F, class T, Activation A>
void gradient_sums(const Problem& problem, const Range& range, const Coefficients* channels,
                   const void* dy, GradientSums* sums) {
  if (!by_rows(problem.shape)) {
    return gradient_sums_by_runs<F, T, A>(problem, range, channels, dy, sums);
  }
  // Computing more with each element, a processor asks for memory less far ahead.
  const bool fetching = range.beyond_cache && (A != Activation::none || problem.weights);
  const int64_t ahead = 4 * kFetchedBytes / sizeof(T);
  Spreads<PerLane, F> of;
  WeightBuffer<Weight<T>> buffer;
  alignas(64) F first[kStripLanes], second[kStripLanes];
  alignas(64) double g[kStripLanes], g_xhat[kStripLanes];
  for_strips(problem.shape, range, lanes_for_sums(problem), [&](const Strip& strip) {
    spread(problem.shape, strip, channels, of);
    std::fill_n(g, strip.lanes, 0.0);
    std::fill_n(g_xhat, strip.lanes, 0.0);
    const int64_t stride = strip.stride;
    for (int64_t start = 0; start < strip.rows; start += kBlock) {
      const int64_t end = std::min(strip.rows, start + kBlock);
      clear(first, strip.lanes);
      clear(second, strip.lanes);
      const auto add = [&](int64_t row0, int64_t row1,
                           const RowsOfWeights<Weight<T>>& weights) BATCHNORM_INLINE {
        const GradientInputs<F, T, A> inputs(problem, dy, strip.first + row0 * stride,
                                             weights.first);
        add_rows<F>(strip.lanes, 0, row1 - row0, first, second,
                    [&](int64_t row, int64_t i, int n, Pack<F>& a, Pack<F>& b) BATCHNORM_INLINE {
                      Pack<F> t, gradient;
                      if (fetching) fetch(inputs.x + row * stride + i + ahead);
                      if (fetching) fetch(inputs.dy + row * stride + i + ahead);
                      inputs.row(row * stride, row * weights.stride).get(i, n, of, t, gradient);
                      a += gradient;
                      b += gradient * (t * of.rstd.at(i));
                    });
      };
      if (problem.weights) {
        for (int64_t row0 = start, row1; row0 < end; row0 = row1) {
          row1 = std::min(end, row0 + rows_in_buffer<Weight<T>>(strip));
          add(row0, row1, weights_of_rows(problem, strip, row0, row1, buffer));
        }
      } else {
        add(start, end, RowsOfWeights<Weight<T>>{nullptr, 0});
      }
      for (int i = 0; i < strip.lanes; ++i) {
        g[i] += first[i];
        g_xhat[i] += second[i];
      }
    }
    for_lanes(problem.shape, strip,
              [&](int lane, int64_t channel) { sums[channel].merge({g[lane], g_xhat[lane]}); });
  });
}

template <class F, class T, Activation A>
void input_gradient(const Problem& problem, const Range& range, const Coefficients* channels,
                    const void* dy, void* output, void* residual_output) {
  const int64_t ahead = fetched_ahead<T>(range);
  for_stretches<F, T>(
      problem, range, channels,
      [&](int64_t first, int64_t length, const Weights<Weight<T>>& weights,
          const auto& of) BATCHNORM_INLINE {
        const GradientInputs<F, T, A> inputs(problem, dy, first, weights);
        const Writer<F, T> dx(static_cast<T*>(output) + first,
                              range.beyond_cache && is_long<T>(length));
        const Writer<F, T> dresidual(
            residual_output ? static_cast<T*>(residual_output) + first : nullptr, dx);
        for_packs<F>(dx.before_alignment(length), length, [&](int64_t i, int n) BATCHNORM_INLINE {
          if (ahead) fetch(inputs.x + i + ahead);
          if (ahead) fetch(inputs.dy + i + ahead);
          Pack<F> t, g;
          inputs.get(i, n, of, t, g);
          Pack<F> share = of.share.at(i) + t * of.share_xhat.at(i);
          if (weights) share *= weights.template at<F>(i, n);
          dx.put(i, of.slope.at(i) * (g - share), n);
          if (residual_output) dresidual.put(i, g, n);
        });
      });
  order_stores();
}

// ---- the table of this instruction set

// body(activation), as a type.
template <class Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(std::integral_constant<Activation, Activation::none>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>());
  }
}

}  // namespace

#define BATCHNORM_CONCATENATE(a, b) a##b
#define BATCHNORM_TABLE(level) BATCHNORM_CONCATENATE(kernels_, level)

extern const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL);
const Kernels BATCHNORM_TABLE(BATCHNORM_LEVEL) = {
    BATCHNORM_INSTRUCTION_SET,
    [](const Problem& problem, const Range& range, bool wide, Deviations* channels) {
      with_types(problem.dtype, [&](auto f, auto t) {
        using F = decltype(f);
        using T = decltype(t);
        if (wide) return deviations<double, T>(problem, range, channels);
        deviations<F, T>(problem, range, channels);
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, void* y) {
      with_types(problem.dtype, [&](auto f, auto t) {
        with_activation(problem.activation, [&](auto activation) {
          normalize<decltype(f), decltype(t), activation.value>(problem, range, channels, y);
        });
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       GradientSums* sums) {
      with_types(problem.dtype, [&](auto f, auto t) {
        with_activation(problem.activation, [&](auto activation) {
          gradient_sums<decltype(f), decltype(t), activation.value>(problem, range, channels, dy,
                                                                    sums);
        });
      });
    },
    [](const Problem& problem, const Range& range, const Coefficients* channels, const void* dy,
       void* dx, void* dresidual) {
      with_types(problem.dtype, [&](auto f, auto t) {
        with_activation(problem.activation, [&](auto activation) {
          input_gradient<decltype(f), decltype(t), activation.value>(problem, range, channels, dy,
                                                                     dx, dresidual);
        });
      });
    },
};

}  // namespace batchnorm
