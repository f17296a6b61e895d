// The Python face: batchnorm.native._cpu, whose functions native/_cpu.pyi states. Arrays come by
// name: NumPy's, which say through the buffer protocol where they lie in memory, and tensors of a
// registered type, which say it through DLPack. That is asked and looked at (operands.h) while the
// GIL is held; what comes back as a string names the operand that can't be used as it lies.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <new>
#include <vector>

#include "faces/dlpack.h"
#include "faces/operands.h"
#include "stages/batch_norm.h"
#include "stages/layout.h"
#include "stages/table.h"
#include "system/cache.h"
#include "system/parallel.h"
#ifdef BATCHNORM_XLA
#include "faces/xla.h"
#endif
#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace {

using namespace batchnorm;

// ---- arrays as operands

struct TensorType {
  PyObject* type;
  dlpack::TensorOfObject tensor_of;
};

// Those that are registered, for good: a framework's tensor, and its parameter.
constexpr int kMostTensorTypes = 8;
TensorType tensor_types[kMostTensorTypes];
int number_of_tensor_types = 0;

Element element_of(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return Element::other;
  switch (dtype.code << 8 | dtype.bits) {
    case dlpack::kFloat << 8 | 32:
      return element_of(Dtype::float32);
    case dlpack::kFloat << 8 | 64:
      return element_of(Dtype::float64);
    case dlpack::kFloat << 8 | 16:
      return element_of(Dtype::float16);
    case dlpack::kBfloat << 8 | 16:
      return element_of(Dtype::bfloat16);
    case dlpack::kInt << 8 | 64:
      return Element::int64;
    default:
      return Element::other;
  }
}

// Of the first element; null where there is no memory. In storage that is freed, an element's
// address is its offset alone, and below all memory up to 1 TiB, on macOS up to 4 GiB.
void* address_of(PyObject* object, const dlpack::Tensor& tensor) {
#ifdef __APPLE__
  constexpr uint64_t kLargestOffset = uint64_t{1} << 32;
#else
  constexpr uint64_t kLargestOffset = uint64_t{1} << 40;
#endif
  if (!tensor.data) return nullptr;
  char* const address = static_cast<char*>(tensor.data) + tensor.byte_offset;
  const uint64_t bytes = reinterpret_cast<uintptr_t>(address);
  if (bytes > kLargestOffset) return address;
  PyObject* offset = PyObject_CallMethod(object, "storage_offset", nullptr);
  const uint64_t elements = offset ? PyLong_AsUnsignedLongLong(offset) : 0;
  Py_XDECREF(offset);
  return offset && bytes != elements * (tensor.dtype.bits / 8) ? address : nullptr;
}

void read_tensor(PyObject* object, dlpack::TensorOfObject tensor_of, Operand* operand) {
  dlpack::Tensor tensor;
  if (tensor_of(object, &tensor) != 0) return;  // it is sparse, say, or without memory
  if (tensor.device.device_type != dlpack::kCpu || tensor.ndim > kMaxRank) return;
  operand->is_known = operand->is_writable = true;
  operand->element = element_of(tensor.dtype);
  operand->data = address_of(object, tensor);
  operand->axes.rank = tensor.ndim;
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    operand->axes.sizes[axis] = tensor.shape[axis];
    if (tensor.strides) operand->axes.strides[axis] = tensor.strides[axis];
  }
  if (!tensor.strides) set_dense_strides(&operand->axes);
}

// False where it is no tensor of a registered type.
bool read_registered(PyObject* object, Operand* operand) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (int i = 0; i < number_of_tensor_types; ++i) {
    if (tensor_types[i].type != type) continue;
    read_tensor(object, tensor_types[i].tensor_of, operand);
    return true;
  }
  return false;
}

// What an array says that cannot be asked is no error: it is not known. All else is.
void clear_what_cannot_be_asked() {
  for (PyObject* expected : {PyExc_TypeError, PyExc_BufferError, PyExc_RuntimeError,
                             PyExc_ValueError, PyExc_NotImplementedError}) {
    if (PyErr_Occurred() && PyErr_ExceptionMatches(expected)) PyErr_Clear();
  }
}

// The arrays of ml_dtypes' bfloat16 have no buffer: they come as arrays of two bytes that are no
// number, numpy.dtype("V2").
Element element_of(const Py_buffer& buffer) {
  if (!buffer.format) return Element::other;
  if (std::strcmp(buffer.format, "2x") == 0) return element_of(Dtype::bfloat16);
  if (std::strlen(buffer.format) != 1) return Element::other;
  switch (*buffer.format) {
    case 'f':
      return element_of(Dtype::float32);
    case 'd':
      return element_of(Dtype::float64);
    case 'e':
      return element_of(Dtype::float16);
    case 'l':
    case 'q':
      return buffer.itemsize == 8 ? Element::int64 : Element::other;
    default:
      return Element::other;
  }
}

void read_buffer(const Py_buffer& buffer, Operand* operand) {
  if (buffer.ndim > kMaxRank || buffer.itemsize < 1) return;
  if (buffer.ndim > 0 && (!buffer.shape || !buffer.strides)) return;
  for (int axis = 0; axis < buffer.ndim; ++axis) {
    if (buffer.shape[axis] > 1 && buffer.strides[axis] % buffer.itemsize != 0) return;
    operand->axes.sizes[axis] = buffer.shape[axis];
    operand->axes.strides[axis] = buffer.strides[axis] / buffer.itemsize;
  }
  operand->axes.rank = buffer.ndim;
  operand->is_known = true;
  operand->is_writable = !buffer.readonly;
  operand->element = element_of(buffer);
  operand->data = buffer.buf;
}

// ---- the arguments of a call

// The arrays first.
enum Argument {
  kX,
  kScale,
  kBias,
  kResidual,
  kWeights,
  kStatistics,
  kMean,
  kVar,
  kSums,
  kDy,
  kY,
  kDx,
  kDscale,
  kDbias,
  kDresidual,
  kRunningMean,
  kRunningVar,
  kBatches,
  kArrays,
  kFeatures = kArrays,
  kEps,
  kActivation,
  kRate,
  kCorrection,
  kTeam,
  kArguments
};

constexpr const char* kNames[] = {
    "x",        "scale", "bias",       "residual",     "weights",     "statistics",
    "mean",     "var",   "sums",       "dy",           "y",           "dx",
    "dscale",   "dbias", "dresidual",  "running_mean", "running_var", "batches",
    "features", "eps",   "activation", "rate",         "correction",  "team"};
static_assert(sizeof kNames / sizeof *kNames == kArguments);
static_assert(kArguments <= 32, "a set of arguments has 32 bits");

// The same as Python's strings, interned: a keyword nearly always is the very object.
PyObject* names[kArguments];

template <class... Arguments>
constexpr uint32_t set_of(Arguments... arguments) {
  return ((uint32_t{1} << arguments) | ... | 0);
}

constexpr uint32_t kEither = set_of(kStatistics, kMean, kVar);

constexpr const char* kTeamCapsule = "batchnorm.team";

// False with a Python error.
bool read_features(PyObject* axes, Features* features) {
  const Py_ssize_t number = PyTuple_Check(axes) ? PyTuple_Size(axes) : 0;
  int64_t last = -1;
  *features = 0;
  for (Py_ssize_t i = 0; i < number; ++i) {
    const int64_t axis = PyLong_AsLongLong(PyTuple_GetItem(axes, i));
    if (axis == -1 && PyErr_Occurred()) return false;
    if (axis <= last || axis > 63) {
      PyErr_Format(PyExc_ValueError, "features must ascend within [0, 63], but got %R", axes);
      return false;
    }
    *features |= Features{1} << axis;
    last = axis;
  }
  if (number == 0) PyErr_Format(PyExc_TypeError, "features must be a tuple of axes, not %R", axes);
  return number > 0;
}

struct Signature {
  const char* name;
  uint32_t required, optional;
};

class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // False with a Python error.
  bool parse(const Signature& signature, PyObject* const* values, Py_ssize_t positional,
             PyObject* keywords) {
    if (positional > 0) {
      PyErr_Format(PyExc_TypeError, "%s() takes arguments by keyword alone", signature.name);
      return false;
    }
    const Py_ssize_t number = keywords ? PyTuple_Size(keywords) : 0;
    int argument = -1;
    for (Py_ssize_t i = 0; i < number; ++i) {
      PyObject* keyword = PyTuple_GetItem(keywords, i);
      argument = find(keyword, argument + 1);
      if (argument < 0 || !(set_of(argument) & (signature.required | signature.optional))) {
        PyErr_Format(PyExc_TypeError, "%s() has no argument %R", signature.name, keyword);
        return false;
      }
      if (values[i] != Py_None) values_[argument] = values[i];
    }
    for (int each = 0; each < kArguments; ++each) {
      if (values_[each] || !(set_of(each) & signature.required)) continue;
      PyErr_Format(PyExc_TypeError, "%s() needs the argument %s", signature.name, kNames[each]);
      return false;
    }
    if (has(kRunningMean) != has(kRunningVar) || has(kRunningMean) != has(kRate)) {
      PyErr_Format(PyExc_TypeError, "%s() needs running_mean, running_var and rate, or none",
                   signature.name);
      return false;
    }
    const bool takes_either = (signature.optional & kEither) == kEither;
    if (takes_either && (has(kMean) != has(kVar) || has(kMean) == has(kStatistics))) {
      PyErr_Format(PyExc_TypeError, "%s() needs either statistics or mean and var", signature.name);
      return false;
    }
    return parse_features() && parse_activation() && parse_team() && parse_real(kEps, &eps) &&
           parse_real(kRate, &rate) && parse_real(kCorrection, &correction);
  }

  bool has(Argument argument) const { return values_[argument]; }

  // As long as the call lasts.
  const Operand& array(Argument argument) {
    Operand& operand = operands_[argument];
    operand.name = kNames[argument];
    PyObject* value = values_[argument];
    if (!value) return operand;
    operand.is_present = true;
    if (!read_registered(value, &operand) &&
        PyObject_GetBuffer(value, &buffers_[held_], PyBUF_STRIDES | PyBUF_FORMAT) == 0) {
      read_buffer(buffers_[held_++], &operand);
    }
    clear_what_cannot_be_asked();
    return operand;
  }

  // What the stages have in common.
  Problem problem(Reader& reader) {
    Problem problem = {};
    problem.shape = reader.shape();
    problem.dtype = reader.dtype();
    problem.x = reader.x();
    problem.activation = activation;
    problem.eps = eps;
    problem.scale = reader.values(array(kScale));
    problem.bias = reader.values(array(kBias));
    problem.residual = reader.like_x(array(kResidual), Access::read);
    problem.weights = reader.weights(array(kWeights), &problem.weight_channels);
    problem.team = team;
    return problem;
  }

  // Of a reader that is not usable.
  static PyObject* refusal(const Reader& reader) {
    if (PyErr_Occurred()) return nullptr;
    if (reader.unusable()) return PyUnicode_InternFromString(reader.unusable());
    PyErr_SetString(PyExc_ValueError, reader.error().c_str());
    return nullptr;
  }

  // Not in a destructor: the end of the program unwinds the stack of a daemon thread that asks for
  // the GIL, and without it no buffer may be released.
  void release_buffers() {
    while (held_ > 0) PyBuffer_Release(&buffers_[--held_]);
  }

  Features features = 0;
  Activation activation = Activation::none;
  Team team = nullptr;
  double eps = 1, rate = 0, correction = 1;

 private:
  // -1 for an unknown one. Keywords mostly come in our order.
  static int find(PyObject* keyword, int first) {
    for (int i = 0; i < kArguments; ++i) {
      const int argument = (first + i) % kArguments;
      if (names[argument] == keyword) return argument;
    }
    for (int argument = 0; argument < kArguments; ++argument) {
      if (PyUnicode_CompareWithASCIIString(keyword, kNames[argument]) == 0) return argument;
    }
    return -1;
  }

  bool parse_features() {
    PyObject* axes = values_[kFeatures];
    return !axes || read_features(axes, &features);
  }
  bool parse_activation() {
    PyObject* name = values_[kActivation];
    if (!name) return true;
    const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, nullptr) : "";
    if (text && *text && find_activation(text, &activation)) return true;
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "no activation %R", name);
    return false;
  }
  bool parse_team() {
    PyObject* capsule = values_[kTeam];
    if (capsule) team = static_cast<Team>(PyCapsule_GetPointer(capsule, kTeamCapsule));
    return !capsule || team;
  }
  bool parse_real(Argument argument, double* real) {
    PyObject* value = values_[argument];
    if (value) *real = PyFloat_AsDouble(value);
    return !value || *real != -1 || !PyErr_Occurred();
  }

  PyObject* values_[kArguments] = {};  // null where there is none, or None
  Operand operands_[kArrays];
  Py_buffer buffers_[kArrays];
  int held_ = 0;
};

// In the body of a call. No `catch (...)`: what unwinds a daemon thread must go on.
template <class Work>
void without_gil(const Work& work) {
  std::exception_ptr error;
  PyThreadState* state = PyEval_SaveThread();
  try {
    work();
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

template <const Signature& signature, PyObject* (*body)(Call&)>
PyObject* called(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
  // Of 7 kB, which the stack of a small thread should not have to hold.
  const std::unique_ptr<Call> call(new (std::nothrow) Call);
  if (!call) return PyErr_NoMemory();
  PyObject* result = nullptr;
  if (call->parse(signature, values, positional, keywords)) {
    try {
      result = body(*call);
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
  }
  call->release_buffers();
  return result;
}

// ---- the stages

// The rows of statistics: count, mean and var; or these, mean_low and unit.
template <class Double>
StatisticsOf<Double> statistics_of(Call& call, Reader& reader, Access access) {
  const Operand& operand = call.array(kStatistics);
  const bool is_whole = operand.is_known && operand.axes.rank > 0 && operand.axes.sizes[0] == 5;
  Double* rows = reader.rows(operand, is_whole ? 5 : 3, access);
  const int64_t channels = reader.shape().channels;
  StatisticsOf<Double> of;
  if (!rows) return of;
  of.count = rows, of.mean = rows + channels, of.var = rows + 2 * channels;
  if (is_whole) of.mean_low = rows + 3 * channels, of.unit = rows + 4 * channels;
  return of;
}

// Those, or a mean and a variance that do not depend on x.
Statistics given_statistics(Call& call, Reader& reader) {
  if (call.has(kStatistics)) return statistics_of<const double>(call, reader, Access::read);
  Statistics of;
  of.mean = reader.values(call.array(kMean));
  of.var = reader.values(call.array(kVar));
  return of;
}

constexpr uint32_t kInputs = set_of(kActivation, kScale, kBias, kResidual, kTeam);

constexpr Signature kBatchNorm = {
    "batch_norm", set_of(kX, kFeatures, kEps, kStatistics, kY),
    kInputs | set_of(kWeights, kRunningMean, kRunningVar, kBatches, kRate)};
PyObject* py_batch_norm(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const auto found = statistics_of<double>(call, reader, Access::write);
  void* y = reader.like_x(call.array(kY), Access::in_place);
  double* running_mean = reader.changed_values(call.array(kRunningMean));
  double* running_var = reader.changed_values(call.array(kRunningVar));
  int64_t* batches = reader.counter(call.array(kBatches));
  if (!reader.is_usable()) return call.refusal(reader);
  without_gil([&] { batch_norm(problem, found, y); });
  reader.reload();  // another thread may have moved them meanwhile
  const Statistics by = {found.count, found.mean, found.var, found.mean_low, found.unit};
  update_running(problem.shape.channels, by, call.rate, 1, running_mean, running_var, batches);
  reader.store();
  Py_RETURN_NONE;
}

constexpr Signature kStatisticsOf = {"statistics", set_of(kX, kFeatures, kStatistics),
                                     set_of(kWeights, kTeam)};
PyObject* py_statistics(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const auto found = statistics_of<double>(call, reader, Access::write);
  if (!reader.is_usable()) return call.refusal(reader);
  without_gil([&] { statistics(problem, found); });
  Py_RETURN_NONE;
}

constexpr Signature kNormalize = {"normalize", set_of(kX, kFeatures, kEps, kY),
                                  kInputs | kEither | set_of(kWeights)};
PyObject* py_normalize(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const Statistics by = given_statistics(call, reader);
  void* y = reader.like_x(call.array(kY), Access::in_place);
  if (!reader.is_usable()) return call.refusal(reader);
  const auto is_negative = [](double value) { return value < 0; };
  if (call.has(kVar) && std::any_of(by.var, by.var + problem.shape.channels, is_negative)) {
    return PyUnicode_InternFromString(kNames[kVar]);  // NaN to one door, an error to another
  }
  without_gil([&] { normalize(problem, by, y); });
  Py_RETURN_NONE;
}

constexpr Signature kBatchNormGradients = {
    "batch_norm_gradients", set_of(kX, kFeatures, kEps, kDy, kDx),
    kInputs | kEither | set_of(kWeights, kDscale, kDbias, kDresidual)};
PyObject* py_batch_norm_gradients(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const Statistics by = given_statistics(call, reader);
  const void* dy = reader.like_x(call.array(kDy), Access::read);
  void* dx = reader.like_x(call.array(kDx), Access::write);
  double* dscale = reader.new_values(call.array(kDscale));
  double* dbias = reader.new_values(call.array(kDbias));
  void* dresidual = reader.like_x(call.array(kDresidual), Access::write);
  if (!reader.is_usable()) return call.refusal(reader);
  without_gil([&] { batch_norm_gradients(problem, by, dy, dbias, dscale, dx, dresidual); });
  reader.store();
  Py_RETURN_NONE;
}

constexpr Signature kGradientSums = {"gradient_sums", set_of(kX, kFeatures, kEps, kDy, kSums),
                                     kInputs | kEither | set_of(kWeights)};
PyObject* py_gradient_sums(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const Statistics by = given_statistics(call, reader);
  const void* dy = reader.like_x(call.array(kDy), Access::read);
  double* sum_g = reader.rows(call.array(kSums), 2, Access::write);
  if (!reader.is_usable()) return call.refusal(reader);
  double* sum_g_xhat = sum_g + problem.shape.channels;
  without_gil([&] { gradient_sums(problem, by, dy, sum_g, sum_g_xhat); });
  Py_RETURN_NONE;
}

constexpr Signature kInputGradient = {"input_gradient",
                                      set_of(kX, kFeatures, kEps, kSums, kDy, kDx),
                                      kInputs | kEither | set_of(kWeights, kDresidual)};
PyObject* py_input_gradient(Call& call) {
  Reader reader(call.array(kX), call.features);
  const Problem problem = call.problem(reader);
  const Statistics by = given_statistics(call, reader);
  const double* sum_g = reader.rows(call.array(kSums), 2, Access::read);
  const void* dy = reader.like_x(call.array(kDy), Access::read);
  void* dx = reader.like_x(call.array(kDx), Access::write);
  void* dresidual = reader.like_x(call.array(kDresidual), Access::write);
  if (!reader.is_usable()) return call.refusal(reader);
  const double* sum_g_xhat = sum_g + problem.shape.channels;
  without_gil([&] { input_gradient(problem, by, sum_g, sum_g_xhat, dy, dx, dresidual); });
  Py_RETURN_NONE;
}

// There is no x here: the statistics stand for it, as an array of the feature shape.
constexpr Signature kUpdateRunning = {
    "update_running", set_of(kStatistics, kRunningMean, kRunningVar, kRate, kCorrection),
    set_of(kBatches)};
PyObject* py_update_running(Call& call) {
  const Operand& statistics = call.array(kStatistics);
  Operand row = statistics;
  Features features = 0;
  row.is_known = row.is_known && row.axes.rank > 0;
  if (row.is_known) {
    --row.axes.rank;
    std::copy_n(statistics.axes.sizes + 1, row.axes.rank, row.axes.sizes);
    std::copy_n(statistics.axes.strides + 1, row.axes.rank, row.axes.strides);
    features = (Features{1} << row.axes.rank) - 1;
  }
  Reader reader(row, features);
  const auto by = statistics_of<const double>(call, reader, Access::read);
  double* running_mean = reader.changed_values(call.array(kRunningMean));
  double* running_var = reader.changed_values(call.array(kRunningVar));
  int64_t* batches = reader.counter(call.array(kBatches));
  if (!reader.is_usable()) return call.refusal(reader);
  const int64_t channels = reader.shape().channels;
  reader.reload();
  update_running(channels, by, call.rate, call.correction, running_mean, running_var, batches);
  reader.store();
  Py_RETURN_NONE;
}

// ---- layouts, types of tensors, threads

// False with a Python error, or where there are too many.
bool read_integers(PyObject* sequence, int64_t* integers, int* number) {
  PyObject* tuple = PySequence_Tuple(sequence);
  if (!tuple) return false;
  const Py_ssize_t size = PyTuple_Size(tuple);
  for (Py_ssize_t i = 0; i < size && size <= kMaxRank && !PyErr_Occurred(); ++i) {
    integers[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
  }
  Py_DECREF(tuple);
  *number = static_cast<int>(size);
  return size <= kMaxRank && !PyErr_Occurred();
}

PyObject* py_layout(PyObject*, PyObject* arguments, PyObject* keywords) {
  PyObject *shape, *axes, *strides = Py_None;
  static char* parameters[] = {const_cast<char*>("shape"), const_cast<char*>("features"),
                               const_cast<char*>("strides"), nullptr};
  Features features;
  const auto is_negative = [](int64_t size) { return size < 0; };
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO|O:layout", parameters, &shape, &axes,
                                   &strides) ||
      !read_features(axes, &features)) {
    return nullptr;
  }
  Axes x;
  Layout layout;
  int rank;
  if (!read_integers(shape, x.sizes, &x.rank))
    return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
  if (strides == Py_None) {
    set_dense_strides(&x);
  } else if (!read_integers(strides, x.strides, &rank)) {
    return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
  }
  if (features >> x.rank || (strides != Py_None && rank != x.rank) ||
      std::any_of(x.sizes, x.sizes + x.rank, is_negative)) {
    PyErr_SetString(PyExc_ValueError, "shape, strides and features must go with each other");
    return nullptr;
  }
  if (!find_layout(x, features, &layout)) Py_RETURN_NONE;
  const Shape& found = layout.shape;
  return Py_BuildValue("LLL", static_cast<long long>(found.outer),
                       static_cast<long long>(found.channels), static_cast<long long>(found.inner));
}

PyObject* py_register_tensor(PyObject*, PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  void* table = capsule ? PyCapsule_GetPointer(capsule, dlpack::kCapsule) : nullptr;
  Py_XDECREF(capsule);
  const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
  if (!api) PyErr_Clear();
  while (api && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (!api || !api->tensor_of_object_no_sync) Py_RETURN_FALSE;
  int i = 0;
  while (i < number_of_tensor_types && tensor_types[i].type != type) ++i;
  if (i == kMostTensorTypes) Py_RETURN_FALSE;
  if (i == number_of_tensor_types) {
    tensor_types[i] = {Py_NewRef(type), api->tensor_of_object_no_sync};
    ++number_of_tensor_types;
  }
  Py_RETURN_TRUE;
}

// fit(x, *parameters): whether each of these is None or a tensor in memory, as long as axis 1 of x
// and of its dtype, or float32 where that has two bytes; as _check_parameters in torch/_layer.py.
PyObject* py_fit(PyObject*, PyObject* const* values, Py_ssize_t number) {
  if (number < 1) return PyErr_Format(PyExc_TypeError, "fit() needs x");
  const auto is_in_memory = [](const Operand& operand) {
    return operand.is_known && (operand.data || operand.axes.elements() == 0);
  };
  Operand x;
  const auto goes_with_x = [&x](Element element) {
    const bool is_half = x.element == element_of(Dtype::float16);
    const bool is_short = is_half || x.element == element_of(Dtype::bfloat16);
    return element == x.element || (is_short && element == element_of(Dtype::float32));
  };
  bool fit = read_registered(values[0], &x) && is_in_memory(x) && x.element < Element::int64 &&
             x.axes.rank > 1;
  for (Py_ssize_t i = 1; i < number && fit; ++i) {
    if (values[i] == Py_None) continue;
    Operand each;
    fit = read_registered(values[i], &each) && is_in_memory(each) && goes_with_x(each.element) &&
          each.axes.rank == 1 && each.axes.sizes[0] == x.axes.sizes[1];
  }
  clear_what_cannot_be_asked();
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(fit);
}

// Of a library that is loaded already, the way into its OpenMP runtime; of PyTorch's, also
// at::get_num_threads(), by the name that it has there (system/parallel.h).
PyObject* py_team(PyObject*, PyObject* path) {
#ifndef _WIN32
  const char* name = PyUnicode_AsUTF8AndSize(path, nullptr);
  if (!name) return nullptr;
  if (void* library = dlopen(name, RTLD_NOLOAD | RTLD_NOW)) {
    void* start = dlsym(library, "GOMP_parallel");
    void* threads = dlsym(library, "_ZN2at15get_num_threadsEv");
    void* number = dlsym(library, "omp_get_thread_num");
    if (start && number) {
      const auto team = new OpenMp{reinterpret_cast<decltype(OpenMp::start)>(start),
                                   reinterpret_cast<decltype(OpenMp::threads)>(threads),
                                   reinterpret_cast<decltype(OpenMp::number)>(number)};
      return PyCapsule_New(team, kTeamCapsule, nullptr);  // for good
    }
  }
#endif
  Py_RETURN_NONE;
}

PyObject* py_num_threads(PyObject*, PyObject*) { return PyLong_FromLong(num_threads()); }

PyObject* py_set_num_threads(PyObject*, PyObject* value) {
  const long n = PyLong_AsLong(value);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  set_num_threads(static_cast<int>(std::clamp<long>(n, 1, 1024)));
  Py_RETURN_NONE;
}

// A list of strings, or null with a Python error.
PyObject* strings(const std::vector<const char*>& texts) {
  PyObject* list = PyList_New(0);
  for (const char* text : texts) {
    PyObject* string = list ? PyUnicode_FromString(text) : nullptr;
    if (!string || PyList_Append(list, string) != 0) Py_CLEAR(list);
    Py_XDECREF(string);
  }
  return list;
}

PyObject* py_instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(instruction_set());
}

PyObject* py_instruction_sets(PyObject*, PyObject*) { return strings(instruction_sets()); }

// Whether it is one of them; only then is it set.
PyObject* py_set_instruction_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool known = set_instruction_set(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(known);
}

PyObject* py_last_level_cache_bytes(PyObject*, PyObject*) {
  return PyLong_FromLongLong(last_level_cache_bytes());
}

PyObject* py_set_last_level_cache_bytes(PyObject*, PyObject* value) {
  const long long bytes = PyLong_AsLongLong(value);
  if (bytes == -1 && PyErr_Occurred()) return nullptr;
  set_last_level_cache_bytes(bytes);
  Py_RETURN_NONE;
}

// (major, minor) of XLA's foreign function interface that the handlers are built for; None without.
PyObject* py_xla_api_version(PyObject*, PyObject*) {
#ifdef BATCHNORM_XLA
  return Py_BuildValue("(ii)", xla_api_version[0], xla_api_version[1]);
#else
  Py_RETURN_NONE;
#endif
}

// {name: capsule}, as jax.ffi.register_ffi_target wants them; empty without an XLA face.
PyObject* py_xla_handlers(PyObject*, PyObject*) {
  PyObject* handlers = PyDict_New();
#ifdef BATCHNORM_XLA
  for (const XlaHandler* each = xla_handlers; handlers && each->name; ++each) {
    PyObject* capsule = PyCapsule_New(each->function, "xla._CUSTOM_CALL_TARGET", nullptr);
    if (!capsule || PyDict_SetItemString(handlers, each->name, capsule) != 0) Py_CLEAR(handlers);
    Py_XDECREF(capsule);
  }
#endif
  return handlers;
}

template <const Signature& signature, PyObject* (*body)(Call&)>
PyMethodDef stage() {
  const auto function = reinterpret_cast<void (*)()>(called<signature, body>);
  return {signature.name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL | METH_KEYWORDS,
          nullptr};
}

// native/_cpu.pyi states what they take and give.
PyMethodDef methods[] = {
    stage<kBatchNorm, py_batch_norm>(),
    stage<kStatisticsOf, py_statistics>(),
    stage<kNormalize, py_normalize>(),
    stage<kBatchNormGradients, py_batch_norm_gradients>(),
    stage<kGradientSums, py_gradient_sums>(),
    stage<kInputGradient, py_input_gradient>(),
    stage<kUpdateRunning, py_update_running>(),
    {"layout", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_layout)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"register_tensor", py_register_tensor, METH_O, nullptr},
    {"fit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_fit)), METH_FASTCALL,
     nullptr},
    {"team", py_team, METH_O, nullptr},
    {"num_threads", py_num_threads, METH_NOARGS, nullptr},
    {"set_num_threads", py_set_num_threads, METH_O, nullptr},
    {"instruction_set", py_instruction_set, METH_NOARGS, nullptr},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, nullptr},
    {"set_instruction_set", py_set_instruction_set, METH_O, nullptr},
    {"last_level_cache_bytes", py_last_level_cache_bytes, METH_NOARGS, nullptr},
    {"set_last_level_cache_bytes", py_set_last_level_cache_bytes, METH_O, nullptr},
    {"xla_handlers", py_xla_handlers, METH_NOARGS, nullptr},
    {"xla_api_version", py_xla_api_version, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject* module) {
  for (int argument = 0; argument < kArguments; ++argument) {
    if (!names[argument]) names[argument] = PyUnicode_InternFromString(kNames[argument]);
    if (!names[argument]) return -1;
  }
  std::vector<const char*> activations;
  for (const NamedActivation& each : kActivations) activations.push_back(each.name);
  activations.erase(activations.begin());  // none
  static const StageTable stages;
  const struct {
    const char* name;
    PyObject* value;
  } constants[] = {
      {"DTYPES", strings({std::begin(kDtypes), std::end(kDtypes)})},
      {"ACTIVATIONS", strings(activations)},
      {"STAGES", PyCapsule_New(const_cast<StageTable*>(&stages), kStageTableCapsule, nullptr)},
  };
  int result = 0;
  for (const auto& [name, value] : constants) {
    if (result == 0) result = PyModule_AddObjectRef(module, name, value);
    Py_XDECREF(value);
  }
  return result;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_cpu",
    "Native kernels; see csrc/stages/batch_norm.h.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&definition); }
