// oneDNN's batch normalization, float32, for kernels.py to time beside ours: built where oneDNN's
// development package is (Debian: libdnnl-dev).
#include <cstdint>
#include <oneapi/dnnl/dnnl.hpp>

namespace {

using namespace dnnl;
using Forward = batch_normalization_forward;
using Backward = batch_normalization_backward;

const auto kFlags = normalization_flags::use_scale | normalization_flags::use_shift;

struct BatchNorm {
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};
  memory::desc tensor, channels;
  Forward::primitive_desc forward_desc;
  Backward::primitive_desc backward_desc;
  Forward forward;
  Backward backward;

  BatchNorm(memory::dims shape, bool channels_last, float eps)
      : tensor(shape, memory::data_type::f32,
               channels_last ? memory::format_tag::nhwc : memory::format_tag::nchw),
        channels({shape[1]}, memory::data_type::f32, memory::format_tag::a),
#if DNNL_VERSION_MAJOR >= 3
        forward_desc(cpu, prop_kind::forward_training, tensor, tensor, eps, kFlags),
        backward_desc(cpu, prop_kind::backward, tensor, tensor, tensor, eps, kFlags, forward_desc),
#else
        forward_desc({prop_kind::forward_training, tensor, eps, kFlags}, cpu),
        backward_desc({prop_kind::backward, tensor, tensor, eps, kFlags}, cpu, forward_desc),
#endif
        forward(forward_desc),
        backward(backward_desc) {
  }

  memory of(const memory::desc& desc, void* address) { return memory(desc, cpu, address); }
};

}  // namespace

extern "C" {

void* onednn_new(int64_t n, int64_t c, int64_t h, int64_t w, int channels_last, float eps) {
  return new BatchNorm({n, c, h, w}, channels_last, eps);
}

void onednn_forward(void* handle, void* x, void* scale, void* bias, void* mean, void* var,
                    void* y) {
  BatchNorm& norm = *static_cast<BatchNorm*>(handle);
  norm.forward.execute(norm.queue, {{DNNL_ARG_SRC, norm.of(norm.tensor, x)},
                                    {DNNL_ARG_SCALE, norm.of(norm.channels, scale)},
                                    {DNNL_ARG_SHIFT, norm.of(norm.channels, bias)},
                                    {DNNL_ARG_MEAN, norm.of(norm.channels, mean)},
                                    {DNNL_ARG_VARIANCE, norm.of(norm.channels, var)},
                                    {DNNL_ARG_DST, norm.of(norm.tensor, y)}});
  norm.queue.wait();
}

void onednn_backward(void* handle, void* x, void* scale, void* bias, void* mean, void* var,
                     void* dy, void* dx, void* dscale, void* dbias) {
  BatchNorm& norm = *static_cast<BatchNorm*>(handle);
  norm.backward.execute(norm.queue, {{DNNL_ARG_SRC, norm.of(norm.tensor, x)},
                                     {DNNL_ARG_SCALE, norm.of(norm.channels, scale)},
                                     {DNNL_ARG_SHIFT, norm.of(norm.channels, bias)},
                                     {DNNL_ARG_MEAN, norm.of(norm.channels, mean)},
                                     {DNNL_ARG_VARIANCE, norm.of(norm.channels, var)},
                                     {DNNL_ARG_DIFF_DST, norm.of(norm.tensor, dy)},
                                     {DNNL_ARG_DIFF_SRC, norm.of(norm.tensor, dx)},
                                     {DNNL_ARG_DIFF_SCALE, norm.of(norm.channels, dscale)},
                                     {DNNL_ARG_DIFF_SHIFT, norm.of(norm.channels, dbias)}});
  norm.queue.wait();
}

void onednn_delete(void* handle) { delete static_cast<BatchNorm*>(handle); }

}  // extern "C"
