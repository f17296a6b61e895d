// The handlers that XLA calls; src/batchnorm/_jax_primitives.py lowers to them.
//
// The first ten operands of every handler are x, weights, residual, scale, bias and the statistics
// count, pivot, unit, offset, var; its own operands follow. What a call does without has no
// elements. The statistics of a channel are a pivot (its mean, rounded), a unit (a power of two),
// and the mean and the variance in the coordinate (x - pivot) / unit: in float32, too, the mean is
// then not rounded to a float, and the variance of large values stays finite.
//
// A handler may run on a thread of XLA's pool. It never waits for that pool: see parallel.h.
#include "faces/xla.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "stages/batch_norm.h"
#include "xla/ffi/api/ffi.h"

namespace batchnorm {

// What every call is given besides its operands; the codes are those of batch_norm.h.
struct Attributes {
  int64_t outer, channels, inner, activation;
  double eps;
};

}  // namespace batchnorm

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(batchnorm::Attributes, StructMember<int64_t>("outer"),
                                      StructMember<int64_t>("channels"),
                                      StructMember<int64_t>("inner"),
                                      StructMember<int64_t>("activation"),
                                      StructMember<double>("eps"));

namespace batchnorm {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

// A value of each channel, float32 or float64, as doubles.
class Values {
 public:
  explicit Values(int64_t channels) : values_(channels) {}
  explicit Values(Buffer buffer) : values_(buffer.element_count()) {
    if (buffer.element_type() == ffi::DataType::F64) {
      std::copy_n(static_cast<const double*>(buffer.untyped_data()), values_.size(), data());
    } else {
      std::copy_n(static_cast<const float*>(buffer.untyped_data()), values_.size(), data());
    }
  }
  void store(Result result) const {
    if (result->element_type() == ffi::DataType::F64) {
      std::copy(values_.begin(), values_.end(), static_cast<double*>(result->untyped_data()));
    } else {
      std::transform(values_.begin(), values_.end(), static_cast<float*>(result->untyped_data()),
                     [](double value) { return static_cast<float>(value); });
    }
  }
  double& operator[](int64_t c) { return values_[c]; }
  double* data() { return values_.empty() ? nullptr : values_.data(); }

 private:
  std::vector<double> values_;
};

void* elements(Buffer buffer) { return buffer.element_count() ? buffer.untyped_data() : nullptr; }

Dtype dtype_of(Buffer x) {
  switch (x.element_type()) {
    case ffi::DataType::F64:
      return Dtype::float64;
    case ffi::DataType::F16:
      return Dtype::float16;
    case ffi::DataType::BF16:
      return Dtype::bfloat16;
    default:
      return Dtype::float32;
  }
}

// The operands that all handlers have in common, as the stages want them.
class Inputs {
 public:
  Inputs(const Attributes& attributes, ffi::RemainingArgs operands)
      : operands_(operands), scale_(channel_values(3)), bias_(channel_values(4)) {
    problem.shape = {attributes.outer, attributes.channels, attributes.inner};
    problem.dtype = dtype_of(operand(0));
    problem.activation = static_cast<Activation>(attributes.activation);
    problem.eps = attributes.eps;
    problem.x = elements(operand(0));
    problem.weights = elements(operand(1));
    problem.weight_channels =
        operand(1).element_count() == operand(0).element_count() ? attributes.channels : 1;
    problem.residual = elements(operand(2));
    problem.scale = scale_.data();
    problem.bias = bias_.data();
  }
  Buffer operand(size_t index) const { return *operands_.get<Buffer>(index); }
  Values channel_values(size_t index) const { return Values(operand(index)); }

  Values mean() const {
    Values mean = channel_values(6), unit = channel_values(7), offset = channel_values(8);
    for (int64_t c = 0; c < problem.shape.channels; ++c) mean[c] += unit[c] * offset[c];
    return mean;
  }
  Values var() const {
    Values unit = channel_values(7), var = channel_values(9);
    for (int64_t c = 0; c < problem.shape.channels; ++c) var[c] *= unit[c] * unit[c];
    return var;
  }

  Problem problem = {};

 private:
  ffi::RemainingArgs operands_;
  Values scale_, bias_;
};

// What the kernels find, and store as results.
struct Statistics {
  explicit Statistics(int64_t channels) : count(channels), mean(channels), var(channels) {}
  Values count, mean, var;

  void store(const Problem& problem, Result counts, Result pivots, Result units, Result offsets,
             Result vars) {
    const int64_t channels = problem.shape.channels;
    Values pivot(channels), unit(channels), offset(channels), scaled_var(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double std = std::sqrt(var[c]);
      unit[c] = std > 1 && std::isfinite(std) ? std::exp2(std::ilogb(std)) : 1;
      pivot[c] = problem.dtype == Dtype::float64 ? mean[c] : static_cast<float>(mean[c]);
      offset[c] = (mean[c] - pivot[c]) / unit[c];
      scaled_var[c] = var[c] / (unit[c] * unit[c]);
    }
    count.store(counts);
    pivot.store(pivots);
    unit.store(units);
    offset.store(offsets);
    scaled_var.store(vars);
  }
};

ffi::Error xla_statistics(Attributes attributes, ffi::RemainingArgs operands, Result count,
                          Result pivot, Result unit, Result offset, Result var) {
  const Inputs inputs(attributes, operands);
  Statistics found(attributes.channels);
  statistics(inputs.problem, found.count.data(), found.mean.data(), found.var.data());
  found.store(inputs.problem, count, pivot, unit, offset, var);
  return ffi::Error::Success();
}

// -> the statistics, y
ffi::Error xla_batch_norm(Attributes attributes, ffi::RemainingArgs operands, Result count,
                          Result pivot, Result unit, Result offset, Result var, Result y) {
  const Inputs inputs(attributes, operands);
  Statistics found(attributes.channels);
  batch_norm(inputs.problem, found.count.data(), found.mean.data(), found.var.data(),
             y->untyped_data());
  found.store(inputs.problem, count, pivot, unit, offset, var);
  return ffi::Error::Success();
}

ffi::Error xla_normalize(Attributes attributes, ffi::RemainingArgs operands, Result y) {
  const Inputs inputs(attributes, operands);
  normalize(inputs.problem, inputs.mean().data(), inputs.var().data(), y->untyped_data());
  return ffi::Error::Success();
}

// dy -> sum g, sum g*xhat
ffi::Error xla_gradient_sums(Attributes attributes, ffi::RemainingArgs operands, Result sum_g,
                             Result sum_g_xhat) {
  const Inputs inputs(attributes, operands);
  Values g(attributes.channels), g_xhat(attributes.channels);
  gradient_sums(inputs.problem, inputs.mean().data(), inputs.var().data(),
                elements(inputs.operand(10)), g.data(), g_xhat.data());
  g.store(sum_g);
  g_xhat.store(sum_g_xhat);
  return ffi::Error::Success();
}

// dy, sum g, sum g*xhat -> dx, g
ffi::Error xla_input_gradient(Attributes attributes, ffi::RemainingArgs operands, Result dx,
                              Result dresidual) {
  const Inputs inputs(attributes, operands);
  input_gradient(inputs.problem, inputs.channel_values(5).data(), inputs.mean().data(),
                 inputs.var().data(), inputs.channel_values(11).data(),
                 inputs.channel_values(12).data(), elements(inputs.operand(10)), dx->untyped_data(),
                 elements(*dresidual));
  return ffi::Error::Success();
}

// dy -> sum g, sum g*xhat, dx, g
ffi::Error xla_gradients(Attributes attributes, ffi::RemainingArgs operands, Result sum_g,
                         Result sum_g_xhat, Result dx, Result dresidual) {
  const Inputs inputs(attributes, operands);
  Values g(attributes.channels), g_xhat(attributes.channels);
  batch_norm_gradients(inputs.problem, inputs.channel_values(5).data(), inputs.mean().data(),
                       inputs.var().data(), elements(inputs.operand(10)), g.data(), g_xhat.data(),
                       dx->untyped_data(), elements(*dresidual));
  g.store(sum_g);
  g_xhat.store(sum_g_xhat);
  return ffi::Error::Success();
}

auto bind() { return ffi::Ffi::Bind().Attrs<Attributes>().RemainingArgs(); }

XLA_FFI_DEFINE_HANDLER(
    statistics_handler, xla_statistics,
    bind().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(
    batch_norm_handler, xla_batch_norm,
    bind().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(normalize_handler, xla_normalize, bind().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(gradient_sums_handler, xla_gradient_sums,
                       bind().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(input_gradient_handler, xla_input_gradient,
                       bind().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER(gradients_handler, xla_gradients,
                       bind().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XlaHandler named(const char* name, XLA_FFI_Handler* handler) {
  return {name, reinterpret_cast<void*>(handler)};
}

}  // namespace

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
