// The Python face: batchnorm._cpu. Addresses come and go as integers, so that any array of any
// framework can be served; only batchnorm/native.py calls this, and it checks what it passes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <forward_list>
#include <vector>

#include "batch_norm.h"
#include "cache.h"
#include "parallel.h"
#ifdef BATCHNORM_XLA
#include "xla.h"
#endif

namespace {

using namespace batchnorm;

// Takes the arguments of a call one after the other. After a wrong one, ok() is false and a Python
// error is set.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), left_(count) {}

  int64_t integer() {
    PyObject* value = take();
    return value ? PyLong_AsLongLong(value) : 0;
  }
  double real() {
    PyObject* value = take();
    return value ? PyFloat_AsDouble(value) : 0;
  }
  template <class T>
  T* address() {
    PyObject* value = take();
    return value ? static_cast<T*>(PyLong_AsVoidPtr(value)) : nullptr;
  }
  Dtype dtype() { return static_cast<Dtype>(integer()); }
  // What is float32 or float64, one value a channel. The result may point into this object.
  const double* doubles(Dtype dtype, int64_t channels) {
    const void* values = address<void>();
    if (!values || dtype == Dtype::float64) return static_cast<const double*>(values);
    const float* floats = static_cast<const float*>(values);
    converted_.emplace_front(floats, floats + channels);
    return converted_.front().data();
  }
  // The result may point into this object.
  Problem problem() {
    Problem problem;
    problem.shape.outer = integer();
    problem.shape.channels = integer();
    problem.shape.inner = integer();
    problem.dtype = dtype();
    problem.activation = static_cast<Activation>(integer());
    problem.eps = real();
    problem.x = address<void>();
    problem.residual = address<void>();
    parameter_dtype = dtype();
    problem.scale = doubles(parameter_dtype, problem.shape.channels);
    problem.bias = doubles(parameter_dtype, problem.shape.channels);
    problem.weights = address<void>();
    problem.weight_channels = integer();
    problem.team = reinterpret_cast<Team>(address<void>());
    return problem;
  }
  Dtype parameter_dtype = Dtype::float64;  // of scale, bias and their gradients; or float32

  bool ok() {
    if (left_ > 0) PyErr_Format(PyExc_TypeError, "%zd arguments too many", left_);
    return !PyErr_Occurred();
  }

 private:
  PyObject* take() {
    if (PyErr_Occurred()) return nullptr;
    if (left_ == 0) {
      PyErr_SetString(PyExc_TypeError, "too few arguments");
      return nullptr;
    }
    --left_;
    return *values_++;
  }

  PyObject* const* values_;
  Py_ssize_t left_;
  std::forward_list<std::vector<double>> converted_;
};

// A parameter's gradient in double, for the kernels, and then in the caller's memory: that may be
// narrower, or null.
class ParameterGradient {
 public:
  ParameterGradient(int64_t channels, Dtype dtype, void* out)
      : dtype_(dtype), out_(out), values_(channels) {}
  double* values() { return values_.data(); }
  void store() const {
    if (!out_) return;
    if (dtype_ == Dtype::float64) {
      std::copy(values_.begin(), values_.end(), static_cast<double*>(out_));
    } else {
      std::copy(values_.begin(), values_.end(), static_cast<float*>(out_));
    }
  }

 private:
  Dtype dtype_;
  void* out_;
  std::vector<double> values_;
};

template <class Work>
PyObject* without_gil(const Work& work) {
  Py_BEGIN_ALLOW_THREADS;
  work();
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* py_batch_norm(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  double* count = arguments.address<double>();
  double* mean = arguments.address<double>();
  double* var = arguments.address<double>();
  void* y = arguments.address<void>();
  if (!arguments.ok()) return nullptr;
  return without_gil([&] { batch_norm(problem, count, mean, var, y); });
}

PyObject* py_statistics(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  double* count = arguments.address<double>();
  double* mean = arguments.address<double>();
  double* var = arguments.address<double>();
  if (!arguments.ok()) return nullptr;
  return without_gil([&] { statistics(problem, count, mean, var); });
}

PyObject* py_normalize(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  const Dtype dtype = arguments.dtype();
  const double* mean = arguments.doubles(dtype, problem.shape.channels);
  const double* var = arguments.doubles(dtype, problem.shape.channels);
  void* y = arguments.address<void>();
  if (!arguments.ok()) return nullptr;
  return without_gil([&] { normalize(problem, mean, var, y); });
}

PyObject* py_batch_norm_gradients(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  const double* count = arguments.address<double>();
  const double* mean = arguments.address<double>();
  const double* var = arguments.address<double>();
  const void* dy = arguments.address<void>();
  void* dbias = arguments.address<void>();
  void* dscale = arguments.address<void>();
  void* dx = arguments.address<void>();
  void* dresidual = arguments.address<void>();
  if (!arguments.ok()) return nullptr;
  ParameterGradient sum_g(problem.shape.channels, arguments.parameter_dtype, dbias);
  ParameterGradient sum_g_xhat(problem.shape.channels, arguments.parameter_dtype, dscale);
  return without_gil([&] {
    batch_norm_gradients(problem, count, mean, var, dy, sum_g.values(), sum_g_xhat.values(), dx,
                         dresidual);
    sum_g.store();
    sum_g_xhat.store();
  });
}

PyObject* py_gradient_sums(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  const double* mean = arguments.address<double>();
  const double* var = arguments.address<double>();
  const void* dy = arguments.address<void>();
  double* sum_g = arguments.address<double>();
  double* sum_g_xhat = arguments.address<double>();
  if (!arguments.ok()) return nullptr;
  return without_gil([&] { gradient_sums(problem, mean, var, dy, sum_g, sum_g_xhat); });
}

PyObject* py_input_gradient(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const Problem problem = arguments.problem();
  const double* count = arguments.address<double>();
  const double* mean = arguments.address<double>();
  const double* var = arguments.address<double>();
  const double* sum_g = arguments.address<double>();
  const double* sum_g_xhat = arguments.address<double>();
  const void* dy = arguments.address<void>();
  void* dx = arguments.address<void>();
  void* dresidual = arguments.address<void>();
  if (!arguments.ok()) return nullptr;
  return without_gil(
      [&] { input_gradient(problem, count, mean, var, sum_g, sum_g_xhat, dy, dx, dresidual); });
}

PyObject* py_update_running(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments arguments(values, n);
  const int64_t channels = arguments.integer();
  const double* count = arguments.address<double>();
  const double* mean = arguments.address<double>();
  const double* var = arguments.address<double>();
  const double rate = arguments.real();
  const double correction = arguments.real();
  const Dtype dtype = arguments.dtype();
  void* running_mean = arguments.address<void>();
  void* running_var = arguments.address<void>();
  int64_t* batches = arguments.address<int64_t>();
  if (!arguments.ok()) return nullptr;
  update_running(channels, count, mean, var, rate, correction, dtype, running_mean, running_var,
                 batches);
  Py_RETURN_NONE;
}

// Of anything with the buffer protocol, whatever its strides.
PyObject* py_address(PyObject*, PyObject* object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object, &view, PyBUF_STRIDES) != 0) return nullptr;
  PyObject* address = PyLong_FromVoidPtr(view.buf);
  PyBuffer_Release(&view);
  return address;
}

PyObject* py_num_threads(PyObject*, PyObject*) { return PyLong_FromLong(num_threads()); }

PyObject* py_set_num_threads(PyObject*, PyObject* value) {
  const long n = PyLong_AsLong(value);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  set_num_threads(static_cast<int>(n));
  Py_RETURN_NONE;
}

PyObject* py_instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(instruction_set());
}

PyObject* py_instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const char* name : instruction_sets()) {
    PyObject* string = names ? PyUnicode_FromString(name) : nullptr;
    if (!string || PyList_Append(names, string) != 0) Py_CLEAR(names);
    Py_XDECREF(string);
  }
  return names;
}

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

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"batch_norm", fast(py_batch_norm), METH_FASTCALL, "(*problem, count, mean, var, y)"},
    {"statistics", fast(py_statistics), METH_FASTCALL, "(*problem, count, mean, var)"},
    {"normalize", fast(py_normalize), METH_FASTCALL, "(*problem, dtype, mean, var, y)"},
    {"batch_norm_gradients", fast(py_batch_norm_gradients), METH_FASTCALL,
     "(*problem, count, mean, var, dy, dbias, dscale, dx, dresidual)"},
    {"gradient_sums", fast(py_gradient_sums), METH_FASTCALL,
     "(*problem, mean, var, dy, sum_g, sum_g_xhat)"},
    {"input_gradient", fast(py_input_gradient), METH_FASTCALL,
     "(*problem, count, mean, var, sum_g, sum_g_xhat, dy, dx, dresidual)"},
    {"update_running", fast(py_update_running), METH_FASTCALL,
     "(channels, count, mean, var, rate, correction, dtype, running_mean, running_var, batches)"},
    {"address", py_address, METH_O, "The address of a buffer's first element."},
    {"num_threads", py_num_threads, METH_NOARGS, nullptr},
    {"set_num_threads", py_set_num_threads, METH_O, nullptr},
    {"instruction_set", py_instruction_set, METH_NOARGS, nullptr},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "The widest first."},
    {"set_instruction_set", py_set_instruction_set, METH_O, "Whether it is one of them."},
    {"last_level_cache_bytes", py_last_level_cache_bytes, METH_NOARGS, nullptr},
    {"set_last_level_cache_bytes", py_set_last_level_cache_bytes, METH_O, nullptr},
    {"xla_handlers", py_xla_handlers, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// The codes of the enums in batch_norm.h, by the names that Python uses.
int execute(PyObject* module) {
  const auto code = [](auto value) { return static_cast<int>(value); };
  PyObject* dtypes = Py_BuildValue("{s:i,s:i,s:i,s:i}", "float32", code(Dtype::float32), "float64",
                                   code(Dtype::float64), "float16", code(Dtype::float16),
                                   "bfloat16", code(Dtype::bfloat16));
  PyObject* activations = Py_BuildValue("{O:i,s:i,s:i}", Py_None, code(Activation::none), "relu",
                                        code(Activation::relu), "silu", code(Activation::silu));
  int result = -1;
  if (dtypes && activations) {
    result = PyModule_AddObjectRef(module, "DTYPES", dtypes) |
             PyModule_AddObjectRef(module, "ACTIVATIONS", activations);
  }
  Py_XDECREF(dtypes);
  Py_XDECREF(activations);
  return result;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_cpu",
    "Native kernels; see csrc/batch_norm.h.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&definition); }
