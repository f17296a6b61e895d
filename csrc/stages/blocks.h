// How a call is cut into blocks of channels and tasks, and where each of them has its memory: which
// range for which thread. Included by batch_norm.cc alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/kernels.h"
#include "stages/batch_norm.h"
#include "system/cache.h"
#include "system/parallel.h"

namespace batchnorm {
namespace {

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
    // Of one stage alone, what it writes may stay for whoever comes next.
    if (way == Way::at_once) {
      all.beyond_cache = (tensors + 1) * bytes_of(problem) > last_level_cache_bytes();
    }
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
    const auto run = [&](int task, int seat) {
      body(part_of(range, cut, task), sums + cut.partial_sum_of(task) * channels(),
           Scratch(lanes_ + seat * bytes_of_lanes_, bytes_of_lanes_));
    };
    parallel_for(cut.tasks(), threads_, run, problem_.team, order);
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
  const auto take_block = [&](int64_t number, int seat) {
    const int64_t c = number * plan.step;
    Block<Sums> block(problem, plan, memory + seat * bytes);
    block.range = plan.block_at(c);
    if (c + plan.step < channels) block.range.ahead = plan.step * problem.shape.inner;
    body(block);
  };
  const int64_t blocks = divide_up(channels, plan.step);
  parallel_for(static_cast<int>(blocks), plan.threads, take_block, problem.team);
}

}  // namespace
}  // namespace batchnorm
