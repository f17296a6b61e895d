// The handlers that XLA calls; the JAX door lowers to them.
//
// Every handler takes the attributes features, activation ("" for none) and eps, and the operands
// that Inputs names; its own follow. The statistics of a channel are moments: a pivot (its mean,
// rounded), a unit (a power of two), and the mean and the variance in the coordinate
// (x - pivot) / unit: in float32, too, the mean is then not rounded to a float, and the variance of
// large values stays finite.
//
// A handler may run on a thread of XLA's pool. It never waits for that pool: see system/parallel.h.
#include "faces/xla.h"

#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "faces/operands.h"
#include "stages/batch_norm.h"
#include "stages/layout.h"
#include "xla/ffi/api/ffi.h"

namespace batchnorm {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

Element element_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return element_of(Dtype::float32);
    case ffi::DataType::F64:
      return element_of(Dtype::float64);
    case ffi::DataType::F16:
      return element_of(Dtype::float16);
    case ffi::DataType::BF16:
      return element_of(Dtype::bfloat16);
    default:
      return Element::other;
  }
}

// XLA's buffers are in C order.
Operand operand_of(const char* name, Buffer buffer) {
  Operand operand;
  operand.name = name;
  operand.is_present = true;
  operand.is_known = operand.is_writable = buffer.dimensions().size() <= kMaxRank;
  operand.element = element_of(buffer.element_type());
  operand.data = buffer.untyped_data();
  operand.axes.rank = 0;
  if (!operand.is_known) return operand;
  for (const int64_t size : buffer.dimensions()) operand.axes.sizes[operand.axes.rank++] = size;
  set_dense_strides(&operand.axes);
  return operand;
}

Operand operand_of(const char* name, Result result) { return operand_of(name, *result); }

// What a call does without comes without elements.
template <class Array>
Operand optional(const char* name, Array array) {
  Operand operand = operand_of(name, array);
  operand.is_present = operand.axes.elements() > 0;
  return operand;
}

using FeatureAxes = ffi::Span<const int64_t>;

// False for what is no axis of any array.
bool find_features(FeatureAxes axes, Features* features) {
  *features = 0;
  for (const int64_t axis : axes) {
    if (axis < 0 || axis > 63) return false;
    *features |= Features{1} << axis;
  }
  return true;
}

// The operands that all handlers have in common, as the stages want them.
struct Inputs {
  Operand x, scale, bias, residual, weights, count, pivot, unit, offset, var;
  Reader reader;
  Problem problem = {};

  Inputs(Features features, Activation activation, double eps, Buffer x, Buffer scale, Buffer bias,
         Buffer residual, Buffer weights, Buffer count, Buffer pivot, Buffer unit, Buffer offset,
         Buffer var)
      : x(operand_of("x", x)),
        scale(optional("scale", scale)),
        bias(optional("bias", bias)),
        residual(optional("residual", residual)),
        weights(optional("weights", weights)),
        count(optional("count", count)),
        pivot(operand_of("pivot", pivot)),
        unit(optional("unit", unit)),
        offset(optional("offset", offset)),
        var(operand_of("var", var)),
        reader(this->x, features) {
    problem.shape = reader.shape();
    problem.dtype = reader.dtype();
    problem.x = reader.x();
    problem.eps = eps;
    problem.scale = reader.values(this->scale);
    problem.bias = reader.values(this->bias);
    problem.residual = reader.like_x(this->residual, Access::read);
    problem.weights = reader.weights(this->weights, &problem.weight_channels);
    problem.activation = activation;
  }
};

// What the moments among the inputs say, of which count, unit (1) and offset (0) may be absent.
class Given {
 public:
  explicit Given(Inputs& inputs) {
    Reader& reader = inputs.reader;
    by_.count = reader.values(inputs.count);
    by_.mean = reader.values(inputs.pivot);
    by_.unit = reader.values(inputs.unit);
    const double* offset = reader.values(inputs.offset);
    by_.var = reader.values(inputs.var);
    if (!reader.is_usable() || !offset) return;
    mean_low_.reset(new double[inputs.problem.shape.channels]);
    for (int64_t c = 0; c < inputs.problem.shape.channels; ++c) {
      mean_low_[c] = (by_.unit ? by_.unit[c] : 1) * offset[c];
    }
    by_.mean_low = mean_low_.get();
  }
  operator const Statistics&() const { return by_; }

 private:
  Statistics by_;
  std::unique_ptr<double[]> mean_low_;
};

// Moments that a handler finds, as its results: first the statistics, in the same memory.
class Found {
 public:
  Found(Inputs& inputs, Result count, Result pivot, Result unit, Result offset, Result var)
      : count_(operand_of("the result count", count)),
        pivot_(operand_of("the result pivot", pivot)),
        unit_(operand_of("the result unit", unit)),
        offset_(operand_of("the result offset", offset)),
        var_(operand_of("the result var", var)) {
    found_.count = inputs.reader.new_values(count_);
    found_.mean = inputs.reader.new_values(pivot_);
    found_.unit = inputs.reader.new_values(unit_);
    found_.mean_low = inputs.reader.new_values(offset_);
    found_.var = inputs.reader.new_values(var_);
  }
  operator const NewStatistics&() const { return found_; }

  void store(Inputs& inputs) {
    const Problem& problem = inputs.problem;
    for (int64_t c = 0; c < problem.shape.channels; ++c) {
      double &mean = found_.mean[c], &var = found_.var[c];
      double &unit = found_.unit[c], &low = found_.mean_low[c];
      const double pivot = problem.dtype == Dtype::float64 ? mean : static_cast<float>(mean);
      const double std = unit * std::sqrt(var);
      const double new_unit = std > 1 && std::isfinite(std) ? std::exp2(std::ilogb(std)) : 1;
      low = ((mean - pivot) + low) / new_unit;
      mean = pivot;
      var *= unit / new_unit * (unit / new_unit);
      unit = new_unit;
    }
    inputs.reader.store();
  }

 private:
  Operand count_, pivot_, unit_, offset_, var_;
  NewStatistics found_;
};

ffi::Error refusal(const Reader& reader) {
  if (!reader.unusable()) return ffi::Error::InvalidArgument(reader.error());
  return ffi::Error::InvalidArgument(
      std::string(reader.unusable()) +
      " has a dtype or a layout that batchnorm's kernels do not take");
}

// ---- the handlers: the operands of their own, and their results

// -> the moments
ffi::Error xla_statistics(Inputs& inputs, Result count, Result pivot, Result unit, Result offset,
                          Result var) {
  Found found(inputs, count, pivot, unit, offset, var);
  if (!inputs.reader.is_usable()) return refusal(inputs.reader);
  statistics(inputs.problem, found);
  found.store(inputs);
  return ffi::Error::Success();
}

// -> the moments, y
ffi::Error xla_batch_norm(Inputs& inputs, Result count, Result pivot, Result unit, Result offset,
                          Result var, Result y) {
  Found found(inputs, count, pivot, unit, offset, var);
  const Operand output = operand_of("y", y);
  void* to = inputs.reader.like_x(output, Access::in_place);
  if (!inputs.reader.is_usable()) return refusal(inputs.reader);
  batch_norm(inputs.problem, found, to);
  found.store(inputs);
  return ffi::Error::Success();
}

// -> y
ffi::Error xla_normalize(Inputs& inputs, Result y) {
  const Given given(inputs);
  const Operand output = operand_of("y", y);
  void* to = inputs.reader.like_x(output, Access::in_place);
  if (!inputs.reader.is_usable()) return refusal(inputs.reader);
  normalize(inputs.problem, given, to);
  return ffi::Error::Success();
}

// dy -> sum g, sum g*xhat
ffi::Error xla_gradient_sums(Inputs& inputs, Buffer dy, Result sum_g, Result sum_g_xhat) {
  Reader& reader = inputs.reader;
  const Given given(inputs);
  const Operand cotangent = operand_of("dy", dy), first = operand_of("sum_g", sum_g),
                second = operand_of("sum_g_xhat", sum_g_xhat);
  const void* from = reader.like_x(cotangent, Access::read);
  double *g = reader.new_values(first), *g_xhat = reader.new_values(second);
  if (!reader.is_usable()) return refusal(reader);
  gradient_sums(inputs.problem, given, from, g, g_xhat);
  reader.store();
  return ffi::Error::Success();
}

// dy, sum g, sum g*xhat -> dx, g
ffi::Error xla_input_gradient(Inputs& inputs, Buffer dy, Buffer sum_g, Buffer sum_g_xhat, Result dx,
                              Result dresidual) {
  Reader& reader = inputs.reader;
  const Given given(inputs);
  const Operand cotangent = operand_of("dy", dy), first = operand_of("sum_g", sum_g),
                second = operand_of("sum_g_xhat", sum_g_xhat), output = operand_of("dx", dx),
                other = optional("dresidual", dresidual);
  const void* from = reader.like_x(cotangent, Access::read);
  const double *g = reader.values(first), *g_xhat = reader.values(second);
  void* to = reader.like_x(output, Access::write);
  void* to_other = reader.like_x(other, Access::write);
  if (!reader.is_usable()) return refusal(reader);
  input_gradient(inputs.problem, given, g, g_xhat, from, to, to_other);
  return ffi::Error::Success();
}

// dy -> sum g, sum g*xhat, dx, g
ffi::Error xla_gradients(Inputs& inputs, Buffer dy, Result sum_g, Result sum_g_xhat, Result dx,
                         Result dresidual) {
  Reader& reader = inputs.reader;
  const Given given(inputs);
  const Operand cotangent = operand_of("dy", dy), first = operand_of("sum_g", sum_g),
                second = operand_of("sum_g_xhat", sum_g_xhat), output = operand_of("dx", dx),
                other = optional("dresidual", dresidual);
  const void* from = reader.like_x(cotangent, Access::read);
  double *g = reader.new_values(first), *g_xhat = reader.new_values(second);
  void* to = reader.like_x(output, Access::write);
  void* to_other = reader.like_x(other, Access::write);
  if (!reader.is_usable()) return refusal(reader);
  batch_norm_gradients(inputs.problem, given, from, g, g_xhat, to, to_other);
  reader.store();
  return ffi::Error::Success();
}

template <auto stage>
struct Handler;
template <class... Own, ffi::Error (*stage)(Inputs&, Own...)>
struct Handler<stage> {
  static ffi::Error run(FeatureAxes axes, std::string_view name, double eps, Buffer x, Buffer scale,
                        Buffer bias, Buffer residual, Buffer weights, Buffer count, Buffer pivot,
                        Buffer unit, Buffer offset, Buffer var, Own... own) {
    Features features;
    Activation activation;
    if (!find_features(axes, &features)) {
      return ffi::Error::InvalidArgument("features must be axes of x");
    }
    if (!find_activation(name, &activation)) {
      return ffi::Error::InvalidArgument("no activation " + std::string(name));
    }
    try {
      Inputs inputs(features, activation, eps, x, scale, bias, residual, weights, count, pivot,
                    unit, offset, var);
      return stage(inputs, own...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "batchnorm: out of memory");
    } catch (const std::exception& error) {
      return ffi::Error::Internal(error.what());
    }
  }
};

auto with_inputs() {
  return ffi::Ffi::Bind()
      .Attr<FeatureAxes>("features")
      .Attr<std::string_view>("activation")
      .Attr<double>("eps")
      .Arg<Buffer>()   // x
      .Arg<Buffer>()   // scale
      .Arg<Buffer>()   // bias
      .Arg<Buffer>()   // residual
      .Arg<Buffer>()   // weights
      .Arg<Buffer>()   // count
      .Arg<Buffer>()   // pivot
      .Arg<Buffer>()   // unit
      .Arg<Buffer>()   // offset
      .Arg<Buffer>();  // var
}

template <class Binding>
auto with_moments(Binding binding) {
  return std::move(binding)
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>();
}

XLA_FFI_DEFINE_HANDLER(statistics_handler, Handler<xla_statistics>::run,
                       with_moments(with_inputs()));
XLA_FFI_DEFINE_HANDLER(batch_norm_handler, Handler<xla_batch_norm>::run,
                       with_moments(with_inputs()).Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(normalize_handler, Handler<xla_normalize>::run, with_inputs().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(gradient_sums_handler, Handler<xla_gradient_sums>::run,
                       with_inputs().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(
    input_gradient_handler, Handler<xla_input_gradient>::run,
    with_inputs().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(
    gradients_handler, Handler<xla_gradients>::run,
    with_inputs().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XlaHandler named(const char* name, XLA_FFI_Handler* handler) {
  return {name, reinterpret_cast<void*>(handler)};
}

}  // namespace

const int xla_api_version[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

const XlaHandler xla_handlers[] = {
    named("statistics", statistics_handler),
    named("normalize", normalize_handler),
    named("batch_norm", batch_norm_handler),
    named("gradient_sums", gradient_sums_handler),
    named("input_gradient", input_gradient_handler),
    named("gradients", gradients_handler),
    {nullptr, nullptr},
};

}  // namespace batchnorm
