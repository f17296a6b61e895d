#include "faces/operands.h"

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "kernels/simd.h"

namespace batchnorm {
namespace {

bool is_floating(Element element) { return element < Element::int64; }

int64_t bytes_of(Element element) {
  if (is_floating(element)) return bytes_of(static_cast<Dtype>(element));
  return element == Element::int64 ? 8 : 0;
}

template <class T>
double value_of(const T& element) {
  if constexpr (std::is_arithmetic_v<T>) {
    return element;
  } else {
    return load<float>(&element, 1)[0];
  }
}

template <class T>
void set(T& element, double value) {
  if constexpr (std::is_arithmetic_v<T>) {
    element = static_cast<T>(value);
  } else {
    store<float>(&element, Pack<float>{coefficient<float>(value)}, 1);
  }
}

// visit(element, c) for each channel, in the order of the axes.
template <class T, class Visit>
void for_each(const Operand& operand, const Visit& visit) {
  const Axes& axes = operand.axes;
  T* element = static_cast<T*>(operand.data);
  const int64_t elements = axes.elements();
  if (is_dense(axes)) {
    for (int64_t c = 0; c < elements; ++c) visit(element[c], c);
    return;
  }
  int64_t index[kMaxRank] = {};
  for (int64_t c = 0; c < elements; ++c) {
    visit(*element, c);
    for (int axis = axes.rank - 1; axis >= 0; --axis) {
      element += axes.strides[axis];
      if (++index[axis] < axes.sizes[axis]) break;
      element -= axes.strides[axis] * axes.sizes[axis];
      index[axis] = 0;
    }
  }
}

template <class V>
void read_as(const Operand& operand, V* values) {
  with_types(static_cast<Dtype>(operand.element), [&](auto, auto type) {
    using T = decltype(type);
    for_each<T>(operand,
                [&](const T& from, int64_t c) { values[c] = static_cast<V>(value_of(from)); });
  });
}

void write(const Operand& operand, const double* values) {
  with_types(static_cast<Dtype>(operand.element), [&](auto, auto type) {
    using T = decltype(type);
    for_each<T>(operand, [&](T& to, int64_t c) { set(to, values[c]); });
  });
}

std::string text(const int64_t* sizes, int rank) {
  std::string text = "(";
  for (int axis = 0; axis < rank; ++axis) {
    text += (axis ? ", " : "") + std::to_string(sizes[axis]);
  }
  return text + (rank == 1 ? ",)" : ")");
}

bool have_same_shape(const Axes& a, const Axes& b) {
  return a.rank == b.rank && std::equal(a.sizes, a.sizes + a.rank, b.sizes);
}

}  // namespace

void read(const Operand& operand, float* values) { read_as(operand, values); }

Reader::Reader(const Operand& x, Features features) : x_(x), features_(features) {
  if (!is_in_memory(x, Access::read)) return;
  if (features >> x.axes.rank) {
    error_ = "features must be axes of x, whose shape is " + text(x.axes.sizes, x.axes.rank) + ".";
  } else if (!is_floating(x.element) || !find_layout(x.axes, features, &layout_)) {
    refuse(x);
  } else {
    note(x, Access::read);
  }
}

void* Reader::like_x(const Operand& operand, Access access) {
  if (is_done() || !operand.is_present) return nullptr;
  if (operand.is_known && !have_same_shape(operand.axes, x_.axes)) {
    refuse_shape(operand, text(x_.axes.sizes, x_.axes.rank));
  } else if (is_in_memory(operand, access)) {
    if (operand.element == x_.element && lie_alike(operand.axes, x_.axes)) {
      note(operand, access);
      return operand.data;
    }
    refuse(operand);
  }
  return nullptr;
}

const void* Reader::weights(const Operand& operand, int64_t* channels) {
  *channels = 1;
  if (is_done() || !operand.is_present) return nullptr;
  Axes rows = x_.axes;
  for (int axis = 0; axis < rows.rank; ++axis) {
    if (has(features_, axis)) rows.sizes[axis] = 1;
  }
  const bool is_full = operand.is_known && have_same_shape(operand.axes, x_.axes);
  if (operand.is_known && !is_full && !have_same_shape(operand.axes, rows)) {
    refuse_shape(operand, text(x_.axes.sizes, x_.axes.rank) + " or " + text(rows.sizes, rows.rank));
  } else if (is_in_memory(operand, Access::read)) {
    const bool is_wide = dtype() == Dtype::float64;
    const Element wanted = element_of(is_wide ? Dtype::float64 : Dtype::float32);
    if (operand.element == wanted && is_dense(operand.axes, layout_.order, layout_.axes)) {
      if (is_full) *channels = layout_.shape.channels;
      note(operand, Access::read);
      return operand.data;
    }
    refuse(operand);
  }
  return nullptr;
}

const double* Reader::values(const Operand& operand) {
  if (is_done() || !operand.is_present || !has_feature_shape(operand, 0)) return nullptr;
  if (!is_in_memory(operand, Access::read)) return nullptr;
  if (!is_floating(operand.element)) {
    refuse(operand);
    return nullptr;
  }
  note(operand, Access::read);
  if (operand.element == element_of(Dtype::float64) && is_dense(operand.axes)) {
    return static_cast<const double*>(operand.data);
  }
  double* values = memory_for_values();
  read_as(operand, values);
  return values;
}

double* Reader::new_values(const Operand& operand) { return values_to_change(operand, false); }

double* Reader::changed_values(const Operand& operand) {
  return operand.is_present ? values_to_change(operand, true) : nullptr;
}

double* Reader::values_to_change(const Operand& operand, bool is_read) {
  if (is_done()) return nullptr;
  if (!operand.is_present) return memory_for_values();
  if (!has_feature_shape(operand, 0) || !is_in_memory(operand, Access::write)) return nullptr;
  if (!is_floating(operand.element) || overlaps_itself(operand.axes)) {
    refuse(operand);
    return nullptr;
  }
  note(operand, Access::write);
  if (operand.element == element_of(Dtype::float64) && is_dense(operand.axes)) {
    return static_cast<double*>(operand.data);
  }
  double* values = memory_for_values();
  assert(number_pending_ < kMostPending);
  pending_[number_pending_++] = {&operand, values, is_read};
  return values;
}

void Reader::reload() {
  for (int i = 0; i < number_pending_; ++i) {
    if (pending_[i].is_read) read_as(*pending_[i].operand, pending_[i].values);
  }
}

void Reader::store() {
  for (int i = 0; i < number_pending_; ++i) write(*pending_[i].operand, pending_[i].values);
}

double* Reader::rows(const Operand& operand, int64_t number, Access access) {
  if (is_done() || !operand.is_present || !has_feature_shape(operand, number)) return nullptr;
  if (!is_in_memory(operand, access)) return nullptr;
  if (operand.element != element_of(Dtype::float64) || !is_dense(operand.axes)) {
    refuse(operand);
    return nullptr;
  }
  note(operand, access);
  return static_cast<double*>(operand.data);
}

int64_t* Reader::counter(const Operand& operand) {
  if (is_done() || !operand.is_present) return nullptr;
  if (operand.is_known && operand.axes.elements() != 1) {
    refuse_shape(operand, "()");
  } else if (is_in_memory(operand, Access::write)) {
    if (operand.element == Element::int64) {
      note(operand, Access::write);
      return static_cast<int64_t*>(operand.data);
    }
    refuse(operand);
  }
  return nullptr;
}

bool Reader::is_usable() {
  for (int i = 0; i < memories_ && !is_done(); ++i) {
    for (int j = 0; j < i && !is_done(); ++j) {
      const Memory &one = memory_[j], &other = memory_[i];
      if (one.access == Access::read && other.access == Access::read) continue;
      if (one.end <= other.begin || other.end <= one.begin) continue;
      const bool is_x = one.operand == &x_ && other.begin == one.begin;
      if (is_x && other.access == Access::in_place) continue;
      refuse(other.access == Access::read ? *one.operand : *other.operand);
    }
  }
  return !is_done();
}

void Reader::refuse(const Operand& operand) {
  if (!is_done()) unusable_ = operand.name;
}

void Reader::refuse_shape(const Operand& operand, const std::string& wanted) {
  error_ = std::string(operand.name) + " must have the shape " + wanted + " that goes with " +
           x_.name + ", whose shape is " + text(x_.axes.sizes, x_.axes.rank) +
           ", but its shape is " + text(operand.axes.sizes, operand.axes.rank) + ".";
}

bool Reader::is_in_memory(const Operand& operand, Access access) {
  if (is_done()) return false;
  const int64_t bytes = bytes_of(operand.element);
  if (operand.is_known && bytes > 0 && (access == Access::read || operand.is_writable)) {
    if (operand.axes.elements() == 0) return true;
    if (operand.data && reinterpret_cast<uintptr_t>(operand.data) % bytes == 0) return true;
  }
  refuse(operand);
  return false;
}

// With `rows` > 0, so many of them.
bool Reader::has_feature_shape(const Operand& operand, int64_t rows) {
  if (!operand.is_known) return true;
  int64_t sizes[kMaxRank + 1];
  int rank = 0;
  if (rows > 0) sizes[rank++] = rows;
  for (int axis = 0; axis < x_.axes.rank; ++axis) {
    if (has(features_, axis)) sizes[rank++] = x_.axes.sizes[axis];
  }
  if (rank == operand.axes.rank && std::equal(sizes, sizes + rank, operand.axes.sizes)) return true;
  refuse_shape(operand, text(sizes, rank));
  return false;
}

void Reader::note(const Operand& operand, Access access) {
  const Axes& axes = operand.axes;
  if (axes.elements() == 0) return;
  const int64_t bytes = bytes_of(operand.element);
  uintptr_t begin = reinterpret_cast<uintptr_t>(operand.data), end = begin + bytes;
  for (int axis = 0; axis < axes.rank; ++axis) {
    const int64_t reach = (axes.sizes[axis] - 1) * axes.strides[axis] * bytes;
    (reach < 0 ? begin : end) += reach;
  }
  assert(memories_ < kMostOperands);
  memory_[memories_++] = {&operand, access, begin, end};
}

double* Reader::memory_for_values() {
  const int64_t channels = layout_.shape.channels;
  if (channels <= kFewValues - few_used_) {
    few_used_ += channels;
    return few_values_ + few_used_ - channels;
  }
  values_.emplace_front(new double[channels]);
  return values_.front().get();
}

}  // namespace batchnorm
