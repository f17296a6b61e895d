// How the kernels go through memory; compiled, like them, once for each instruction set.
//
// Two ways through memory. Where `inner` is long, a channel is a run of consecutive elements
// (runs). Where it is short, an [inner, channels] slice is one row of a matrix whose columns
// (lanes) each belong to one channel, and many rows are added up lane by lane (rows). Rows of few
// lanes are folded: several consecutive ones are seen as one.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace batchnorm {
namespace {

constexpr int kBlock = 64;                // elements added in float before they go into a double,
constexpr int kFirstBlock = 4;            // fewer at the start, when the pivot may be an outlier
constexpr int64_t kChunkBytes = 2 << 20;  // read upwards by the walk downwards
constexpr int64_t kLongBytes = 1 << 9;    // of a stretch that is written past the cache
constexpr int kStreams = 4;               // of rows, read side by side
static_assert(kFirstBlock % kStreams == 0 && kBlock % kStreams == 0);
constexpr int64_t kFetchedBytes = 1 << 10;  // ahead of a walk that writes

// Rows of few lanes are folded to about kFolded, and to this many for sums.
constexpr int64_t kFoldedForSums = 128;

template <class F>
constexpr int64_t kBlockElements = 4 * kBlock * kLanes<F>;  // of a run, in four sums

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

// body(strip) for strips that cover the range, with rows folded to about `lanes`: first those at
// the end that do not fill a folded one.
template <class Body>
inline BATCHNORM_INLINE void for_strips(const Shape& shape, const Range& range, int64_t lanes,
                                        const Body& body) {
  struct Folded {
    int64_t begin, end, fold;
  };
  const int64_t row = shape.channels * shape.inner;
  const int64_t columns = (range.channel1 - range.channel0) * shape.inner;
  const int64_t fold = columns == row ? std::max<int64_t>(1, lanes / row) : 1;
  const int64_t folded = range.outer0 + (range.outer1 - range.outer0) / fold * fold;
  for (const Folded& rows : {Folded{folded, range.outer1, 1}, Folded{range.outer0, folded, fold}}) {
    if (rows.begin == rows.end) continue;
    const int64_t column0 = range.channel0 * shape.inner;
    const int64_t column1 = column0 + rows.fold * columns;
    for (int64_t column = column0; column < column1; column += kStripLanes) {
      body(Strip{rows.begin * row + column, (rows.end - rows.begin) / rows.fold, rows.fold * row,
                 column, rows.begin, rows.fold,
                 static_cast<int>(std::min<int64_t>(kStripLanes, column1 - column))});
    }
  }
}

// Rows of a strip that are read side by side: [begin, end) of the first stream, and those as many
// times `apart` further on.
struct Rows {
  int64_t begin, end, apart;
  int streams;

  int64_t number() const { return streams * (end - begin); }
};

// body(rows) for blocks of `block` rows, and 4 times as many from block to block up to kBlock, that
// cover a strip; the last of up to 3 rows in one stream.
//
// A processor reads ahead of several streams, each in pages of its own, and so has more of memory
// on its way than one stream lets it ask for; of several in one page, it has less.
template <class Body>
inline BATCHNORM_INLINE void for_blocks_of_rows(const Strip& strip, int64_t block,
                                                const Body& body) {
  const int64_t apart = strip.rows / kStreams;
  for (int64_t begin = 0, end; begin < apart; begin = end) {
    end = std::min(apart, begin + block / kStreams);
    body(Rows{begin, end, apart, kStreams});
    block = std::min<int64_t>(kBlock, 4 * block);
  }
  if (kStreams * apart < strip.rows) body(Rows{kStreams * apart, strip.rows, 0, 1});
}

// Of one channel: `number` runs of `length` elements, `stride` apart, and their weights or null.
template <class T>
struct Runs {
  int64_t first, number, stride, length;
  const Weight<T>* weights;
  int64_t weights_stride;
};

template <class T>
Runs<T> runs_of(const Problem& problem, const Range& range, int64_t channel) {
  const Shape& shape = problem.shape;
  const auto* weights = static_cast<const Weight<T>*>(problem.weights);
  const int64_t row =
      range.outer0 * problem.weight_channels + (problem.weight_channels == 1 ? 0 : channel);
  return {(range.outer0 * shape.channels + channel) * shape.inner + range.inner0,
          range.outer1 - range.outer0,
          shape.channels * shape.inner,
          range.inner1 - range.inner0,
          weights ? weights + row * shape.inner + range.inner0 : nullptr,
          problem.weight_channels * shape.inner};
}

// body(i) for i in [0, n), each of which stands for `bytes` of memory: the last chunk first.
//
// The pass over the tensors that came before this one went upwards, and left their end in the
// cache; a second pass upwards would find the beginning gone, and drive out the end before it gets
// there. Within a chunk the walk is upwards, since processors read ahead only that way.
template <class Body>
inline BATCHNORM_INLINE void for_chunks_downwards(int64_t n, int64_t bytes, const Body& body) {
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, bytes));
  for (int64_t end = n; end > 0; end -= chunk) {
    for (int64_t i = std::max<int64_t>(0, end - chunk); i < end; ++i) body(i);
  }
}

// The weights of consecutive elements, or null.
template <class W>
struct Weights {
  const W* first;
  int64_t mask;  // 0 where all have the same, of which there is a pack; else all bits set

  Weights(const W* weights, bool same = false) : first(weights), mask(same ? 0 : -1) {}
  explicit operator bool() const { return first; }
  Weights further(int64_t distance) const {
    Weights other = *this;
    other.first += distance;
    return other;
  }
  template <class F>
  Pack<F> at(int64_t i, int n) const {
    return load<F>(first + (i & mask), n);
  }
};

// The weights of rows of a strip.
template <class W>
struct RowsOfWeights {
  Weights<W> first;
  int64_t stride, apart;  // from a row, and from a stream, to the next

  Weights<W> at(int64_t row, int64_t stream) const {
    return first.further(row * stride + stream * apart);
  }
};
// Room for a row of each stream of the longest strip; null where there are no weights.
template <class W>
W* buffer_of_weights(const Problem& problem, Scratch& scratch) {
  if (!problem.weights) return nullptr;
  return scratch.take<W>(kStreams * most_lanes(problem.shape));
}
// How many rows of each stream it has room for: one takes as many as its lanes, or a pack.
template <class W>
int64_t rows_in_buffer(const Problem& problem, const Strip& strip) {
  return most_lanes(problem.shape) / std::max(strip.lanes, kLanes<W>);
}

bool has_one_weight_a_row(const Problem& problem) {
  return problem.weights && problem.weight_channels == 1 && problem.shape.inner == 1;
}

// Rows are folded to about as many lanes, for sums. A weight that all of a row has in common need
// not be spread over its lanes, so that rows of several packs are left alone.
int64_t lanes_for_sums(const Problem& problem) {
  const bool alone = has_one_weight_a_row(problem) && problem.shape.channels >= 4 * kLanes<float>;
  return alone ? 1 : kFoldedForSums;
}

// Weights in place where they lie as the elements do, else copied to the buffer: of no more than
// rows_in_buffer(strip) rows of each stream.
template <class W>
RowsOfWeights<W> weights_of_rows(const Problem& problem, const Strip& strip, const Rows& rows,
                                 W* buffer) {
  const Shape& shape = problem.shape;
  const W* weights = static_cast<const W*>(problem.weights);
  if (!weights) return {nullptr, 0, 0};
  if (problem.weight_channels == shape.channels) {
    return {weights + strip.first + rows.begin * strip.stride, strip.stride,
            rows.apart * strip.stride};
  }
  const bool one_a_row = has_one_weight_a_row(problem), folded = strip.fold > 1;
  const bool same = one_a_row && !folded;  // for all lanes of a row
  W* lanes = buffer;
  const auto copy_row = [&](int64_t row) {
    const W* of_fold = weights + (strip.outer0 + row * strip.fold) * shape.inner;
    if (one_a_row) {
      // Writes whole packs, the last of them beyond the lanes that they are for.
      const int64_t width = folded ? shape.channels : kLanes<W>;
      for (int64_t k = 0; k < strip.fold; ++k, lanes += width) {
        const Pack<W> weight = all(of_fold[k]);
        for (int64_t i = 0; i < width; i += kLanes<W>) store(lanes + i, weight);
      }
      return;
    }
    int64_t inner = strip.column0 % shape.inner;
    int64_t channel = strip.column0 / shape.inner % shape.channels;
    for (int lane = 0; lane < strip.lanes; ++lane) {
      *lanes++ = of_fold[inner];
      if (++inner < shape.inner) continue;
      inner = 0;
      if (++channel < shape.channels) continue;
      channel = 0;
      of_fold += shape.inner;
    }
  };
  for (int stream = 0; stream < rows.streams; ++stream) {
    for (int64_t row = rows.begin; row < rows.end; ++row) copy_row(row + stream * rows.apart);
  }
  const int64_t width = same ? kLanes<W> : strip.lanes;
  return {{buffer, same}, width, (rows.end - rows.begin) * width};
}
// Of one row.
template <class W>
Weights<W> weights_of_row(const Problem& problem, const Strip& strip, int64_t row, W* buffer) {
  return weights_of_rows(problem, strip, Rows{row, row + 1, 0, 1}, buffer).first;
}

// By how many elements a walk that writes fetches ahead; 0 where it need not.
template <class T>
int64_t fetched_ahead(const Range& range) {
  if (range.ahead) return range.ahead;
  return range.beyond_cache ? kFetchedBytes / static_cast<int64_t>(sizeof(T)) : 0;
}

// Whether a stretch is worth a store past the cache, which the lines at both its ends are not.
template <class T>
bool is_long(int64_t length) {
  return length * static_cast<int64_t>(sizeof(T)) >= kLongBytes;
}

// ---- coefficients of consecutive elements: all of one channel, or one channel to a lane

template <class F>
struct One {
  Pack<F> value;
  Pack<F> at(int64_t) const { return value; }
};
template <class F>
struct PerLane {
  F* value;  // the last pack may begin anywhere
  Pack<F> at(int64_t i) const { return load<F>(value + i); }
};

// Those of Coefficients and Scales, by their names.
template <template <class> class Spread, class F>
struct Spreads {
  Spread<F> center, rstd, slope, shift, share, share_xhat;
  struct {
    Spread<F> x, g, w, t, dx, dx_slope;
  } scales;
};

// Which of them a loop reads.
struct Reads {
  bool z, sums, dx, scales;
};

// put(spread, value) for each that is read, rstd up to `most_rstd`: of those of a channel, or of
// those that are spread in another way.
template <class Loop, class Of, class ItsScales, class Spreads, class Put>
inline BATCHNORM_INLINE void put_coefficients(const Of& of, const ItsScales* scales,
                                              double most_rstd, Spreads& to, const Put& put) {
  constexpr Reads kReads = Loop::kReads;
  put(to.center, of.center);
  if constexpr (kReads.z || (kReads.dx && !kReads.scales)) put(to.slope, of.slope);
  if constexpr (kReads.z) put(to.shift, of.shift);
  if constexpr (kReads.sums) put(to.rstd, std::min(most_rstd, of.rstd));
  if constexpr (kReads.dx) {
    put(to.share, of.share);
    put(to.share_xhat, of.share_xhat);
  }
  if constexpr (kReads.scales) put(to.scales.x, scales->x);
  if constexpr (kReads.scales && (kReads.sums || kReads.dx)) put(to.scales.g, scales->g);
  if constexpr (kReads.scales && kReads.dx) {
    put(to.scales.w, scales->w);
    put(to.scales.t, scales->t);
    put(to.scales.dx_slope, scales->dx_slope);
    put(to.scales.dx, scales->dx);
  }
}

constexpr double kAnyRstd = std::numeric_limits<double>::infinity();

// Of channel c.
template <class Loop, class F>
inline BATCHNORM_INLINE Spreads<One, F> spread(const Range& range, const Coefficients* channels,
                                               int64_t c, double most_rstd = kAnyRstd) {
  Spreads<One, F> spreads;
  const Scales* scales = Loop::kReads.scales ? &range.at(range.scales, c) : nullptr;
  put_coefficients<Loop>(range.at(channels, c), scales, most_rstd, spreads,
                         [](One<F>& one, double value) { one.value = all(coefficient<F>(value)); });
  return spreads;
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

// Whether any of the channels of a strip is chosen; all of them are where `chosen` is null.
inline bool has_any(const bool* chosen, const Shape& shape, const Range& range,
                    const Strip& strip) {
  bool any = !chosen;
  if (chosen) for_lanes(shape, strip, [&](int, int64_t c) { any |= range.at(chosen, c); });
  return any;
}

// Of the longest strip of a problem, or of as many channels.
template <class Loop, class F>
Spreads<PerLane, F> lanes_of(const Problem& problem, Scratch& scratch) {
  Spreads<PerLane, F> spreads = {};
  const Scales scales;
  put_coefficients<Loop>(
      Coefficients{}, &scales, kAnyRstd, spreads,
      [&](PerLane<F>& lanes, double) { lanes.value = scratch.take<F>(most_lanes(problem.shape)); });
  return spreads;
}

// Of channel c to a lane.
template <class Loop, class F>
inline void spread_lane(const Range& range, const Coefficients* channels, int64_t c, int64_t lane,
                        Spreads<PerLane, F>& lanes, double most_rstd = kAnyRstd) {
  const Scales* scales = Loop::kReads.scales ? &range.at(range.scales, c) : nullptr;
  put_coefficients<Loop>(
      range.at(channels, c), scales, most_rstd, lanes,
      [&](PerLane<F>& of, double value) { of.value[lane] = coefficient<F>(value); });
}

template <class Loop, class F>
void spread(const Problem& problem, const Range& range, const Strip& strip,
            const Coefficients* channels, Spreads<PerLane, F>& lanes, double most_rstd = kAnyRstd) {
  for_lanes(problem.shape, strip, [&](int lane, int64_t c) {
    spread_lane<Loop>(range, channels, c, lane, lanes, most_rstd);
  });
}

// Of a lane to all of a pack; of a loop that reads no sums.
template <class Loop, class F>
inline BATCHNORM_INLINE Spreads<One, F> spread(const Spreads<PerLane, F>& lanes, int64_t lane) {
  Spreads<One, F> spreads;
  put_coefficients<Loop>(lanes, &lanes.scales, kAnyRstd, spreads,
                         [&](One<F>& one, const PerLane<F>& of)
                             BATCHNORM_INLINE { one.value = all(of.value[lane]); });
  return spreads;
}

// As for_stretches, where that goes by runs; `lanes` is memory for the coefficients.
template <class Loop, class F, class T, class Each>
inline BATCHNORM_INLINE void for_stretches_of_runs(const Problem& problem, const Range& range,
                                                   const Coefficients* channels,
                                                   Spreads<PerLane, F>& lanes, const Each& each) {
  const int64_t inner = problem.shape.inner;  // from a run to that of the next channel
  const int64_t weights_step = problem.weight_channels == 1 ? 0 : inner;
  for (int64_t c1 = range.channel1, c0; c1 > range.channel0; c1 = c0) {
    c0 = std::max(range.channel0, c1 - kStripLanes);
    for (int64_t c = c0; c < c1; ++c) spread_lane<Loop>(range, channels, c, c - c0, lanes);
    const Runs<T> of_first = runs_of<T>(problem, range, c0);
    const int64_t bytes = (c1 - c0) * of_first.length * static_cast<int64_t>(sizeof(T));
    for_chunks_downwards(of_first.number, bytes, [&](int64_t row) BATCHNORM_INLINE {
      int64_t first = of_first.first + row * of_first.stride;
      Weights<Weight<T>> weights(of_first.weights);
      if (weights) weights = weights.further(row * of_first.weights_stride);
      for (int64_t c = c0; c < c1; ++c, first += inner) {
        const Spreads<One, F> of = spread<Loop, F>(lanes, c - c0);
        each(first, of_first.length, weights, of);
        if (weights) weights = weights.further(weights_step);
      }
    });
  }
}

// each(first element, length, weights, coefficients) for stretches of consecutive elements that
// cover the range, its rows downwards.
template <class Loop, class F, class T, class Each>
inline BATCHNORM_INLINE void for_stretches(const Problem& problem, const Range& range,
                                           const Coefficients* channels, Scratch scratch,
                                           const Each& each) {
  Spreads<PerLane, F> lanes = lanes_of<Loop, F>(problem, scratch);
  if (!by_rows(problem.shape)) {
    return for_stretches_of_runs<Loop, F, T>(problem, range, channels, lanes, each);
  }
  Weight<T>* const buffer = buffer_of_weights<Weight<T>>(problem, scratch);
  for_strips(problem.shape, range, kFolded, [&](const Strip& strip) BATCHNORM_INLINE {
    spread<Loop>(problem, range, strip, channels, lanes);
    const int64_t bytes = strip.stride * static_cast<int64_t>(sizeof(T));
    for_chunks_downwards(strip.rows, bytes, [&](int64_t row) BATCHNORM_INLINE {
      Weights<Weight<T>> weights(nullptr);
      if (problem.weights) weights = weights_of_row(problem, strip, row, buffer);
      each(strip.first + row * strip.stride, strip.lanes, weights, lanes);
    });
  });
}

// ---- sums of two quantities

// Independent sums of one channel, so that no addition waits for the one before.
template <class F>
struct Chains {
  static constexpr int kNumber = 4;
  Pack<F> first[kNumber] = {}, second[kNumber] = {};

  double sum_of_first() const { return sum_of(first); }
  double sum_of_second() const { return sum_of(second); }

 private:
  static double sum_of(const Pack<F>* chains) {
    return horizontal_sum<F>((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
};

// A run of `length` elements; body(i, count, first, second) adds the pack at i.
template <class F, class Body>
inline BATCHNORM_INLINE void add_run(int64_t length, Chains<F>& sums, const Body& body) {
  constexpr int kNumber = Chains<F>::kNumber;
  const auto add = [&](int64_t i, int n, int k)
                       BATCHNORM_INLINE { body(i, n, sums.first[k], sums.second[k]); };
  int64_t i = 0;
  for (; i + kNumber * kLanes<F> <= length; i += kNumber * kLanes<F>) {
    for (int k = 0; k < kNumber; ++k) add(i + k * kLanes<F>, kLanes<F>, k);
  }
  if (i + 2 * kLanes<F> <= length) {
    add(i, kLanes<F>, 0);
    add(i + kLanes<F>, kLanes<F>, 1);
    i += 2 * kLanes<F>;
  }
  if (i + kLanes<F> <= length) {
    add(i, kLanes<F>, 2);
    i += kLanes<F>;
  }
  if (i < length) add(i, static_cast<int>(length - i), 3);
}

// The runs of a channel in blocks of `limit` elements, or up to twice as many so that runs remain
// whole, and `growth` times as many from block to block up to kBlockElements: add(first element,
// length, weights) for each stretch of one, and finish(elements) at its end.
template <class F, class T, class Add, class Finish>
inline BATCHNORM_INLINE void for_blocks_of_channel(const Runs<T>& runs, int64_t limit,
                                                   int64_t growth, const Add& add,
                                                   const Finish& finish) {
  int64_t elements = 0, first = runs.first, weight = 0;
  for (int64_t run = 0; run < runs.number;
       ++run, first += runs.stride, weight += runs.weights_stride) {
    for (int64_t start = 0, end; start < runs.length; start = end) {
      end = std::min(runs.length, start + limit);
      add(first + start, end - start, runs.weights ? runs.weights + weight + start : nullptr);
      elements += end - start;
      if (elements < limit) continue;
      finish(elements);
      elements = 0;
      limit = std::min<int64_t>(growth * limit, kBlockElements<F>);
    }
  }
  finish(elements);
}

// The rows, lane by lane, to first[lane] and second[lane]; body(row, stream, i, count, first,
// second) adds the pack at lane i.
template <class F, class Body>
inline BATCHNORM_INLINE void add_rows(int lanes, const Rows& rows, F* first, F* second,
                                      const Body& body) {
  const auto add = [&](auto streams) BATCHNORM_INLINE {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for_packs<F>(lanes, [&](int64_t i, int n) BATCHNORM_INLINE {
        Pack<F> a = load<F>(first + i), b = load<F>(second + i);
        for (int stream = 0; stream < streams; ++stream) body(row, stream, i, n, a, b);
        store(first + i, a);
        store(second + i, b);
      });
    }
  };
  if (rows.streams == kStreams) return add(std::integral_constant<int, kStreams>());
  add(std::integral_constant<int, 1>());
}

// Sets as many packs to 0 as hold the lanes.
template <class F>
void clear(F* lanes, int count) {
  for (int i = 0; i < count; i += kLanes<F>) store(lanes + i, Pack<F>{});
}

}  // namespace
}  // namespace batchnorm
