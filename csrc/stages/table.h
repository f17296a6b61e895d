// The stages as a table, for a module that is not linked with them: so that one pool of threads and
// one setting serve all. batchnorm.native._cpu has it as a capsule.
#pragma once

#include "stages/batch_norm.h"

namespace batchnorm {

struct StageTable {
  decltype(&batchnorm::statistics) statistics = batchnorm::statistics;
  decltype(&batchnorm::normalize) normalize = batchnorm::normalize;
  decltype(&batchnorm::batch_norm) batch_norm = batchnorm::batch_norm;
  decltype(&batchnorm::gradient_sums) gradient_sums = batchnorm::gradient_sums;
  decltype(&batchnorm::input_gradient) input_gradient = batchnorm::input_gradient;
  decltype(&batchnorm::batch_norm_gradients) batch_norm_gradients = batchnorm::batch_norm_gradients;
  decltype(&batchnorm::update_running) update_running = batchnorm::update_running;
};
constexpr const char* kStageTableCapsule = "batchnorm.native._cpu.STAGES";

}  // namespace batchnorm
