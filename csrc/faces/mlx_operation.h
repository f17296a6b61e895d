// The stages as an operation of MLX's graphs: lazy, with derivatives and vmap, on CPU streams.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"
#include "stages/batch_norm.h"
#include "stages/table.h"

namespace batchnorm {
namespace mx = mlx::core;

// With a count, `gradients` are those of batch_norm; without, of normalize.
//
//   batch_norm      x [scale bias residual weights]            ->  y, count, mean, var
//   statistics      x [weights]                                ->  count, mean, var
//   normalize       x [scale bias residual weights] mean var   ->  y
//   gradients       ... count mean var dy dmean dvar           ->  dx [dscale dbias dresidual]
//                   ... mean var dy                            ->  the same, dmean, dvar
//   update_running  count mean var running_mean running_var    ->  running_mean, running_var
//
// count, mean and var of a batch are float64, of the feature shape.
enum class Kind : int { batch_norm, statistics, normalize, gradients, update_running };
// Their names in Python, and in MLX's graphs.
constexpr const char* kKinds[] = {"batch_norm", "statistics", "normalize", "gradients",
                                  "update_running"};
constexpr const char* kNodes[] = {"BatchNorm", "BatchNormStatistics", "BatchNormNormalize",
                                  "BatchNormGradients", "BatchNormUpdateRunning"};

// In the order in which those that are present are inputs of the operation. x, residual, dy are
// alike; weights broadcast to x, and are float32; all others are of the feature shape.
enum Slot {
  kX,
  kScale,
  kBias,
  kResidual,
  kWeights,
  kCount,
  kMean,
  kVar,
  kRunningMean,
  kRunningVar,
  kDy,
  kDMean,
  kDVar,
  kSlots
};
constexpr const char* kSlotNames[] = {"x",     "scale", "bias", "residual",     "weights",
                                      "count", "mean",  "var",  "running_mean", "running_var",
                                      "dy",    "dmean", "dvar"};

// What a call does, apart from its arrays.
struct Settings {
  Kind kind;
  std::vector<int> features;  // side by side
  double eps = 1;
  Activation activation = Activation::none;
  double rate = 0, correction = 0;
  uint32_t present = 0;  // a bit for each slot

  bool has(Slot slot) const { return present >> slot & 1; }
  bool operator==(const Settings&) const = default;
};

// The same by MLX's own operations: for derivatives that are no stage. Set once; may run Python.
using Definition =
    std::function<std::vector<mx::array>(const Settings&, const std::vector<mx::array>&)>;
extern Definition definition;
// Of batchnorm.native._cpu; set once.
extern const StageTable* stages;
// How many stages have run.
int64_t runs();

// Whether a call here and now can be this operation: not on a GPU's stream, nor within
// mx.export_function, which knows MLX's own operations alone.
bool can_serve();

// The operation on these inputs, lazily.
std::vector<mx::array> call(const Settings& settings, std::vector<mx::array> inputs,
                            mx::Stream stream);

class Operation : public mx::Primitive {
 public:
  Operation(mx::Stream stream, const Settings& settings)
      : mx::Primitive(stream), settings_(settings) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return kNodes[static_cast<int>(settings_.kind)]; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return settings_ == static_cast<const Operation&>(other).settings_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  Settings settings_;
};

}  // namespace batchnorm
