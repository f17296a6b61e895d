#include "faces/mlx_operation.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "faces/operands.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "stages/layout.h"

namespace batchnorm {

Definition definition;
const StageTable* stages = nullptr;

namespace {

using mx::array;
using Arrays = std::vector<array>;

std::atomic<int64_t> number_of_runs{0};

// ---- what goes in and comes out

bool is_like_x(Slot slot) { return slot == kX || slot == kResidual || slot == kDy; }

std::vector<Slot> inputs_of(const Settings& settings) {
  std::vector<Slot> slots;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (settings.has(static_cast<Slot>(slot))) slots.push_back(static_cast<Slot>(slot));
  }
  return slots;
}

// Which input it is.
int index_of(const Settings& settings, Slot slot) {
  int index = 0;
  for (int other = 0; other < slot; ++other) index += settings.has(static_cast<Slot>(other));
  return index;
}

// Each result is like an input, or a statistic.
struct Result {
  Slot like;
  bool is_statistic = false;
};

std::vector<Result> results_of(const Settings& settings) {
  const Result count{kX, true}, mean = count, var = count;
  switch (settings.kind) {
    case Kind::batch_norm:
      return {{kX}, count, mean, var};
    case Kind::statistics:
      return {count, mean, var};
    case Kind::normalize:
      return {{kX}};
    case Kind::update_running:
      return {{kRunningMean}, {kRunningVar}};
    case Kind::gradients:
      break;
  }
  std::vector<Result> gradients;
  for (const Slot slot : {kX, kScale, kBias, kResidual}) {
    if (settings.has(slot)) gradients.push_back({slot});
  }
  if (!settings.has(kCount)) gradients.insert(gradients.end(), {{kMean}, {kVar}});
  return gradients;
}

mx::Shape shape_of(const Settings& settings, Result result, const Arrays& inputs) {
  const mx::Shape& like = inputs[index_of(settings, result.like)].shape();
  if (!result.is_statistic) return like;
  mx::Shape shape;
  for (const int axis : settings.features) shape.push_back(like[axis]);
  return shape;
}

// ---- evaluation

Element element_of(mx::Dtype dtype) {
  switch (dtype) {
    case mx::Dtype::Val::float32:
      return element_of(Dtype::float32);
    case mx::Dtype::Val::float64:
      return element_of(Dtype::float64);
    case mx::Dtype::Val::float16:
      return element_of(Dtype::float16);
    case mx::Dtype::Val::bfloat16:
      return element_of(Dtype::bfloat16);
    default:
      return Element::other;
  }
}

Operand operand_of(const char* name, const array& a) {
  Operand operand;
  operand.name = name;
  operand.is_present = true;
  operand.is_known = operand.is_writable = a.ndim() <= kMaxRank;
  operand.element = element_of(a.dtype());
  operand.data = const_cast<void*>(a.data<void>());
  if (!operand.is_known) return operand;
  operand.axes.rank = static_cast<int>(a.ndim());
  std::copy(a.shape().begin(), a.shape().end(), operand.axes.sizes);
  std::copy(a.strides().begin(), a.strides().end(), operand.axes.strides);
  return operand;
}

// One stage, with its operands; what it reads is there when it runs.
class Task {
 public:
  Task(const Settings& settings, const Arrays& inputs, const Arrays& outputs)
      : settings_(settings) {
    int index = 0;
    for (const Slot slot : inputs_of(settings)) {
      inputs_[slot] = operand_of(kSlotNames[slot], inputs[index++]);
    }
    const std::vector<Result> results = results_of(settings);
    int statistics = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      const Slot slot =
          results[i].is_statistic ? static_cast<Slot>(kCount + statistics++) : results[i].like;
      outputs_[slot] = operand_of(kSlotNames[slot], outputs[i]);
    }
    for (const int axis : settings.features) features_ |= Features{1} << axis;
  }

  void run() {
    ++number_of_runs;
    if (settings_.kind == Kind::update_running) return update_running();
    Reader reader(inputs_[kX], features_);
    std::vector<float> spread;
    Problem problem{};
    problem.shape = reader.shape();
    problem.dtype = reader.dtype();
    problem.activation = settings_.activation;
    problem.eps = settings_.eps;
    problem.x = reader.x();
    problem.scale = reader.values(inputs_[kScale]);
    problem.bias = reader.values(inputs_[kBias]);
    problem.residual = reader.like_x(inputs_[kResidual], Access::read);
    spread_weights(spread);
    problem.weights = reader.weights(inputs_[kWeights], &problem.weight_channels);
    switch (settings_.kind) {
      case Kind::batch_norm: {
        const NewStatistics found = new_statistics(reader);
        void* const y = reader.like_x(outputs_[kX], Access::in_place);
        check(reader);
        stages->batch_norm(problem, found, y);
        break;
      }
      case Kind::statistics: {
        const NewStatistics found = new_statistics(reader);
        check(reader);
        stages->statistics(problem, found);
        break;
      }
      case Kind::normalize: {
        const Statistics by = given_statistics(reader);
        void* const y = reader.like_x(outputs_[kX], Access::in_place);
        check(reader);
        stages->normalize(problem, by, y);
        break;
      }
      case Kind::gradients:
        gradients(reader, problem);
        break;
      case Kind::update_running:
        break;
    }
    reader.store();
  }

 private:
  static void check(Reader& reader) {
    if (reader.is_usable()) return;
    throw std::invalid_argument("[batchnorm] " +
                                (reader.unusable()
                                     ? reader.unusable() + std::string(" can't be used as it lies "
                                                                       "in memory.")
                                     : reader.error()));
  }

  NewStatistics new_statistics(Reader& reader) {
    NewStatistics found;
    found.count = reader.new_values(outputs_[kCount]);
    found.mean = reader.new_values(outputs_[kMean]);
    found.var = reader.new_values(outputs_[kVar]);
    return found;
  }

  Statistics given_statistics(Reader& reader) {
    Statistics by;
    by.count = reader.values(inputs_[kCount]);
    by.mean = reader.values(inputs_[kMean]);
    by.var = reader.values(inputs_[kVar]);
    return by;
  }

  // Weights that broadcast to x, as the stages take them: one a row, or an element.
  void spread_weights(std::vector<float>& spread) {
    Operand& weights = inputs_[kWeights];
    const Axes& x = inputs_[kX].axes;
    if (!weights.is_present || weights.axes.rank != x.rank) return;  // which the reader refuses
    Axes wanted = x;
    bool one_a_row = true;
    for (int axis = 0; axis < x.rank; ++axis) {
      one_a_row &= !has(features_, axis) || weights.axes.sizes[axis] == 1;
    }
    for (int axis = 0; axis < x.rank; ++axis) {
      if (one_a_row && has(features_, axis)) wanted.sizes[axis] = 1;
      wanted.strides[axis] = weights.axes.sizes[axis] == 1 ? 0 : weights.axes.strides[axis];
      if (weights.axes.sizes[axis] != 1 && weights.axes.sizes[axis] != x.sizes[axis]) return;
    }
    if (wanted.elements() == weights.axes.elements() && is_dense(weights.axes)) return;
    weights.axes = wanted;
    spread.resize(wanted.elements());
    read(weights, spread.data());
    weights.data = spread.data();
    set_dense_strides(&weights.axes);
  }

  // dx is linear in the sums of g and of g * xhat, and the derivatives of mean and variance,
  //   rstd * w/m * (dmean / rstd + 2 dvar / rstd^2 * xhat),
  // are such sums as well. They are nearly always 0, which is known only here.
  void gradients(Reader& reader, Problem& problem) {
    const Statistics by = given_statistics(reader);
    const double* dmean = reader.values(inputs_[kDMean]);
    const double* dvar = reader.values(inputs_[kDVar]);
    const void* const dy = reader.like_x(inputs_[kDy], Access::read);
    double* const sum_g = reader.new_values(outputs_[kBias]);
    double* const sum_g_xhat = reader.new_values(outputs_[kScale]);
    double* const mean_gradient = reader.new_values(outputs_[kMean]);
    double* const var_gradient = reader.new_values(outputs_[kVar]);
    void* const dx = reader.like_x(outputs_[kX], Access::write);
    void* const dresidual = reader.like_x(outputs_[kResidual], Access::write);
    check(reader);
    const int64_t channels = problem.shape.channels;
    const auto is_zero = [&](const double* d) {
      return std::all_of(d, d + channels, [](double value) { return value == 0; });
    };
    const auto rstd = [&](int64_t c) { return 1 / std::sqrt(by.var[c] + problem.eps); };
    const auto scale = [&](int64_t c) { return problem.scale ? problem.scale[c] : 1; };
    if (!dmean || (is_zero(dmean) && is_zero(dvar))) {
      stages->batch_norm_gradients(problem, by, dy, sum_g, sum_g_xhat, dx, dresidual);
    } else {
      stages->gradient_sums(problem, by, dy, sum_g, sum_g_xhat);
      std::vector<double> first(channels), second(channels);
      for (int64_t c = 0; c < channels; ++c) {
        first[c] = scale(c) * sum_g[c] - dmean[c] / rstd(c);
        second[c] = scale(c) * sum_g_xhat[c] - 2 * dvar[c] / (rstd(c) * rstd(c));
      }
      stages->input_gradient(problem, by, first.data(), second.data(), dy, dx, dresidual);
    }
    if (settings_.has(kCount)) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double slope = scale(c) * rstd(c);
      mean_gradient[c] = -slope * sum_g[c];
      var_gradient[c] = -slope * rstd(c) * sum_g_xhat[c] / 2;
    }
  }

  void update_running() {
    const Operand& mean = inputs_[kMean];
    Reader reader(mean, (Features{1} << mean.axes.rank) - 1);
    const Statistics by = given_statistics(reader);
    const double* const old_mean = reader.values(inputs_[kRunningMean]);
    const double* const old_var = reader.values(inputs_[kRunningVar]);
    double* const new_mean = reader.new_values(outputs_[kRunningMean]);
    double* const new_var = reader.new_values(outputs_[kRunningVar]);
    check(reader);
    const int64_t channels = reader.shape().channels;
    std::copy_n(old_mean, channels, new_mean);
    std::copy_n(old_var, channels, new_var);
    stages->update_running(channels, by, settings_.rate, settings_.correction, new_mean, new_var,
                           nullptr);
    reader.store();
  }

  Settings settings_;
  Features features_ = 0;
  Operand inputs_[kSlots], outputs_[kSlots];
};

// At a multiple of a cache line: MLX's own blocks begin 8 bytes beyond one of 16, where the widest
// stores of the kernels take 2.5 times as long.
void allocate(array& output) {
  constexpr int64_t kLine = 64;
  const int64_t item = mx::size_of(output.dtype()), size = output.size();
  array block({static_cast<int>(size * item / kLine + 2), static_cast<int>(kLine / item)},
              output.dtype(), nullptr, {});
  block.set_data(mx::allocator::malloc(block.nbytes()));
  const int64_t address = reinterpret_cast<intptr_t>(block.data<void>());
  const mx::Shape& shape = output.shape();
  const bool is_one_axis =
      std::any_of(shape.begin(), shape.end(), [&](int n) { return n == size; });
  array::Flags flags;
  flags.contiguous = flags.row_contiguous = true;
  flags.col_contiguous = size <= 1 || is_one_axis;
  output.copy_shared_buffer(block, output.strides(), flags, size,
                            (kLine - address % kLine) % kLine / item);
}

// Whether x can become y: nobody else has it, and it is no small part of what would be kept.
bool can_become_output(const array& x) {
  constexpr size_t kMostMore = 16384;
  return x.is_donatable() && x.buffer_size() <= x.nbytes() + kMostMore;
}

}  // namespace

int64_t runs() { return number_of_runs; }

void Operation::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (array& output : outputs) {
    // Of an operation with several results, each holds the inputs: they are never donated.
    if (settings_.kind == Kind::normalize && can_become_output(inputs[0])) {
      output.copy_shared_buffer(inputs[0]);
    } else {
      allocate(output);
    }
  }
  // MLX copies what it is given to run.
  auto task = std::make_shared<Task>(settings_, inputs, outputs);
  mx::cpu::get_command_encoder(stream()).dispatch([task] { task->run(); });
}

void Operation::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[batchnorm] the native operation has no GPU kernel.");
}

// ---- the graph

namespace {

// The answer is no part of MLX's interface. But where there is no Metal, a Metal kernel can be
// called while a function is exported, and only then.
bool is_exporting() {
  try {
    static const auto kernel = mx::fast::metal_kernel("batchnorm_is_exporting", {}, {"y"}, "");
    kernel({}, {mx::Shape{1}}, {mx::float32}, {1, 1, 1}, {1, 1, 1}, {}, std::nullopt, false, {});
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// As the stages read x and what is like it.
array in_order(const array& a, mx::Stream stream) {
  const bool is_known = a.status() != array::Status::unscheduled;
  return is_known && a.flags().row_contiguous ? a : mx::contiguous(a, false, stream);
}

}  // namespace

bool can_serve() { return mx::default_device() == mx::Device::cpu && !is_exporting(); }

Arrays call(const Settings& settings, Arrays inputs, mx::Stream stream) {
  const std::vector<Slot> slots = inputs_of(settings);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (is_like_x(slots[i])) inputs[i] = in_order(inputs[i], stream);
  }
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const Result& result : results_of(settings)) {
    shapes.push_back(shape_of(settings, result, inputs));
    dtypes.push_back(result.is_statistic ? mx::float64
                                         : inputs[index_of(settings, result.like)].dtype());
  }
  return array::make_arrays(std::move(shapes), dtypes,
                            std::make_shared<Operation>(stream, settings), inputs);
}

std::vector<mx::Shape> Operation::output_shapes(const Arrays& inputs) {
  std::vector<mx::Shape> shapes;
  for (const Result& result : results_of(settings_)) {
    shapes.push_back(shape_of(settings_, result, inputs));
  }
  return shapes;
}

Arrays Operation::jvp(const Arrays& primals, const Arrays& tangents,
                      const std::vector<int>& argnums) {
  Arrays all;
  for (const array& primal : primals) all.push_back(mx::zeros_like(primal, stream()));
  for (size_t i = 0; i < argnums.size(); ++i) all[argnums[i]] = tangents[i];
  const auto function = [&](const Arrays& inputs) { return definition(settings_, inputs); };
  return mx::jvp(function, primals, all).second;
}

Arrays Operation::vjp(const Arrays& primals, const Arrays& cotangents,
                      const std::vector<int>& argnums, const Arrays& outputs) {
  const std::vector<Slot> slots = inputs_of(settings_);
  const bool has_y = settings_.kind == Kind::batch_norm || settings_.kind == Kind::normalize;
  const auto is_of_weights = [&](int argnum) { return slots[argnum] == kWeights; };
  if (!has_y || std::any_of(argnums.begin(), argnums.end(), is_of_weights)) {
    const auto function = [&](const Arrays& inputs) { return definition(settings_, inputs); };
    const Arrays all = mx::vjp(function, primals, cotangents).second;
    Arrays wanted;
    for (const int argnum : argnums) wanted.push_back(all[argnum]);
    return wanted;
  }
  Settings settings = settings_;
  settings.kind = Kind::gradients;
  Arrays inputs = primals;
  if (settings_.kind == Kind::batch_norm) {
    // They spare a pass: being functions of x and the weights, they are no variables of the
    // gradients.
    for (int i = 1; i < 4; ++i) inputs.push_back(mx::stop_gradient(outputs[i], stream()));
    inputs.insert(inputs.end(), {cotangents[0], cotangents[2], cotangents[3]});
    settings.present |= 1u << kCount | 1u << kMean | 1u << kVar | 1u << kDMean | 1u << kDVar;
  } else {
    inputs.push_back(cotangents[0]);
  }
  settings.present |= 1u << kDy;
  const Arrays gradients = call(settings, std::move(inputs), stream());
  const std::vector<Result> results = results_of(settings);
  Arrays wanted;
  for (const int argnum : argnums) {
    const auto is_its_own = [&](const Result& result) { return result.like == slots[argnum]; };
    const auto found = std::find_if(results.begin(), results.end(), is_its_own);
    wanted.push_back(gradients[found - results.begin()]);
  }
  return wanted;
}

// What is mapped is one more feature axis, before the others.
std::pair<Arrays, std::vector<int>> Operation::vmap(const Arrays& inputs,
                                                    const std::vector<int>& axes) {
  int size = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) size = inputs[i].shape(axes[i]);
  }
  Settings settings = settings_;
  const int first = settings_.features.empty() ? 0 : settings_.features.front();
  settings.features = {first};
  for (const int axis : settings_.features) settings.features.push_back(axis + 1);
  const std::vector<Slot> slots = inputs_of(settings_);
  Arrays mapped;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int axis = is_like_x(slots[i]) || slots[i] == kWeights ? first : 0;
    if (axes[i] >= 0) {
      mapped.push_back(mx::moveaxis(inputs[i], axes[i], axis, stream()));
    } else {
      array wide = mx::expand_dims(inputs[i], axis, stream());
      if (slots[i] != kWeights) {
        mx::Shape shape = wide.shape();
        shape[axis] = size;
        wide = mx::broadcast_to(wide, shape, stream());
      }
      mapped.push_back(wide);
    }
  }
  std::vector<int> axes_of_results;
  for (const Result& result : results_of(settings_)) {
    axes_of_results.push_back(!result.is_statistic && is_like_x(result.like) ? first : 0);
  }
  return {call(settings, std::move(mapped), stream()), axes_of_results};
}

}  // namespace batchnorm
