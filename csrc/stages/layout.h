// How a tensor lies in memory, and how the stages see it: as [outer, channels, inner].
#pragma once

#include <cstdint>

namespace batchnorm {

// NHWC is [N*H*W, C, 1], NCHW is [N, C, H*W].
struct Shape {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
};

// Tensors of more axes are not served.
constexpr int kMaxRank = 16;

// Of each axis of a tensor, the size and the stride, in elements.
struct Axes {
  int rank = 0;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];

  int64_t elements() const;
};

// A set of axes, one bit each: those that are not reduced.
using Features = uint64_t;
inline bool has(Features features, int axis) { return features >> axis & 1; }

struct Layout {
  Shape shape;
  int axes;             // how many have more than one element,
  int order[kMaxRank];  // and which, the outermost in memory first
};

// False if x has gaps or overlaps itself, or if its feature axes do not lie side by side, in order.
// Axes of one element lie anywhere, and a tensor without elements in any way.
bool find_layout(const Axes& x, Features features, Layout* layout);

// Whether both, of the same sizes, have their elements at the same offsets.
bool lie_alike(const Axes& a, const Axes& b);

// Whether there are no gaps if those axes that have more than one element come in that order.
bool is_dense(const Axes& tensor, const int* order, int axes);

// Whether two elements may be at the same offset: false only if surely not.
bool overlaps_itself(const Axes& tensor);

// In the order of the axes.
bool is_dense(const Axes& tensor);
void set_dense_strides(Axes* tensor);

}  // namespace batchnorm
