#include "stages/layout.h"

#include <algorithm>
#include <cstdlib>

namespace batchnorm {

int64_t Axes::elements() const {
  int64_t product = 1;
  for (int axis = 0; axis < rank; ++axis) {
    if (sizes[axis] == 0) return 0;
    product *= sizes[axis];
  }
  return product;
}

bool find_layout(const Axes& x, Features features, Layout* layout) {
  int64_t reduced = 1, channels = 1;
  layout->axes = 0;
  for (int axis = 0; axis < x.rank; ++axis) {
    if (has(features, axis)) channels *= x.sizes[axis];
    if (!has(features, axis) && x.sizes[axis] == 0) reduced = 0;
    if (x.sizes[axis] == 1) continue;
    int place = layout->axes++;
    for (; place > 0 && x.strides[layout->order[place - 1]] < x.strides[axis]; --place) {
      layout->order[place] = layout->order[place - 1];
    }
    layout->order[place] = axis;
  }
  if (reduced == 0 || channels == 0) {
    layout->shape = {reduced, channels, 1};
    return true;
  }
  if (!is_dense(x, layout->order, layout->axes)) return false;
  layout->shape = {1, 1, 1};
  int64_t* part = &layout->shape.outer;
  int last = -1;
  for (int i = 0; i < layout->axes; ++i) {
    const int axis = layout->order[i];
    if (has(features, axis)) {
      if (part == &layout->shape.inner || axis < last) return false;
      part = &layout->shape.channels;
      last = axis;
    } else if (part == &layout->shape.channels) {
      part = &layout->shape.inner;
    }
    *part *= x.sizes[axis];
  }
  if (last < 0) layout->shape = {1, 1, layout->shape.outer};
  return true;
}

bool lie_alike(const Axes& a, const Axes& b) {
  if (a.elements() == 0) return true;
  for (int axis = 0; axis < a.rank; ++axis) {
    if (a.sizes[axis] > 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return true;
}

bool is_dense(const Axes& tensor, const int* order, int axes) {
  if (tensor.elements() == 0) return true;
  int64_t step = 1;
  for (int i = axes - 1; i >= 0; --i) {
    if (tensor.sizes[order[i]] == 1) continue;
    if (tensor.strides[order[i]] != step) return false;
    step *= tensor.sizes[order[i]];
  }
  return true;
}

bool overlaps_itself(const Axes& tensor) {
  if (tensor.elements() == 0) return false;
  int order[kMaxRank], axes = 0;
  for (int axis = 0; axis < tensor.rank; ++axis) {
    if (tensor.sizes[axis] > 1) order[axes++] = axis;
  }
  const auto stride = [&](int axis) { return std::abs(tensor.strides[axis]); };
  std::sort(order, order + axes, [&](int a, int b) { return stride(a) < stride(b); });
  int64_t reach = 0;
  for (int i = 0; i < axes; ++i) {
    if (stride(order[i]) <= reach) return true;
    reach += stride(order[i]) * (tensor.sizes[order[i]] - 1);
  }
  return false;
}

bool is_dense(const Axes& tensor) {
  int order[kMaxRank];
  for (int axis = 0; axis < tensor.rank; ++axis) order[axis] = axis;
  return is_dense(tensor, order, tensor.rank);
}

void set_dense_strides(Axes* tensor) {
  int64_t step = 1;
  for (int axis = tensor->rank - 1; axis >= 0; --axis) {
    tensor->strides[axis] = step;
    step *= tensor->sizes[axis];
  }
}

}  // namespace batchnorm
