// What every face does with the arrays of a call: one record for each, whatever framework it comes
// from, and one place where it is looked at before a stage sees its memory.
#pragma once

#include <cstdint>
#include <forward_list>
#include <iterator>
#include <memory>
#include <string>

#include "stages/batch_norm.h"
#include "stages/layout.h"

namespace batchnorm {

// The dtypes of the stages, by their codes, and others.
enum class Element : int { int64 = std::size(kDtypes), other };
constexpr Element element_of(Dtype dtype) { return static_cast<Element>(dtype); }

struct Operand {
  const char* name = "";
  bool is_present = false;
  bool is_known = false;     // whether what follows is known, and the memory this process's
  bool is_writable = false;  // all that is known of a DLTensor, say, is writable
  Element element = Element::other;
  void* data = nullptr;  // the first element
  Axes axes;
};

// All elements of a floating-point operand, in the order of its axes; a stride may be 0.
void read(const Operand& operand, float* values);

// in_place: written, and may be x itself; of all others, what is written is apart from all else.
enum class Access { read, write, in_place };

// Looks at the operands of a call one by one, x first, and gives the memory of each as the stages
// take it. After the first operand that will not do, and for one that is absent, that is null;
// before any of the memory is used, is_usable() says whether there was such a one.
//
// The operands must outlive it.
class Reader {
 public:
  Reader(const Operand& x, Features features);

  const Shape& shape() const { return layout_.shape; }
  const void* x() const { return x_.data; }
  Dtype dtype() const { return static_cast<Dtype>(x_.element); }

  // Of the shape, dtype and strides of x.
  void* like_x(const Operand& operand, Access access);

  // One weight a row, or an element: `channels` is 1 or all.
  const void* weights(const Operand& operand, int64_t* channels);

  // One value a channel, of any floating-point dtype and strides.
  const double* values(const Operand& operand);

  // To be written: what `store` then takes to the operand. Memory also for an absent operand.
  double* new_values(const Operand& operand);
  void store();
  // To be changed: `reload` reads them (again), and between it and `store` the GIL is held.
  double* changed_values(const Operand& operand);
  void reload();

  // float64 [number, channels], dense.
  double* rows(const Operand& operand, int64_t number, Access access);

  // One int64.
  int64_t* counter(const Operand& operand);

  // Also that no operand to be written shares memory with another one.
  bool is_usable();

  // The name of the operand that can't be used as it lies in memory; null if it is an error.
  const char* unusable() const { return unusable_; }
  // What is wrong with the shape of an operand.
  const std::string& error() const { return error_; }

 private:
  struct Memory {
    const Operand* operand;
    Access access;
    uintptr_t begin, end;
  };
  struct Pending {
    const Operand* operand;
    double* values;
    bool is_read;
  };

  bool is_done() const { return unusable_ || !error_.empty(); }
  void refuse(const Operand& operand);
  void refuse_shape(const Operand& operand, const std::string& wanted);
  bool is_in_memory(const Operand& operand, Access access);
  bool has_feature_shape(const Operand& operand, int64_t rows);
  void note(const Operand& operand, Access access);
  double* values_to_change(const Operand& operand, bool is_read);
  double* memory_for_values();

  const Operand& x_;
  Features features_;
  Layout layout_ = {{0, 0, 1}, 0, {}};
  const char* unusable_ = nullptr;
  std::string error_;
  static constexpr int kMostOperands = 20, kMostPending = 6;
  Memory memory_[kMostOperands];
  int memories_ = 0;
  // Those of few channels need no memory of their own.
  static constexpr int64_t kFewValues = 192;
  double few_values_[kFewValues];
  int64_t few_used_ = 0;
  std::forward_list<std::unique_ptr<double[]>> values_;
  Pending pending_[kMostPending];
  int number_pending_ = 0;
};

}  // namespace batchnorm
