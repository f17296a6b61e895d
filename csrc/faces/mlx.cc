// The MLX face: a module batchnorm.native._mlx_<version of MLX>, opened for that version alone,
// since MLX promises nothing of its classes from one to the next. batchnorm/mlx/_native.py says how
// it is called.
//
// MLX's Python arrays are nanobind's. An extension made with nanobind would be tied to a version of
// Python, and its casts to a version of nanobind; one that is made without serves every Python, and
// the layout of an instance has been the same in all versions that `kKnownTags` names.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "faces/mlx_operation.h"
#include "mlx/version.h"

namespace {

using namespace batchnorm;
using mx::array;

// What nanobind calls its internals, from the version and build of it on.
constexpr const char* kKnownTags[] = {"_v20_", "_v21_", "_a1_v22_"};

PyObject* array_type = nullptr;
PyObject* definition_in_python = nullptr;

// nanobind's nb_inst: where the C++ object is, or a pointer to it.
struct Instance {
  PyObject object;
  int32_t offset;
  uint8_t flags;
};
constexpr uint8_t kState = 3, kIsReady = 2, kIsDirect = 4;

array* array_of(PyObject* object) {
  auto* instance = reinterpret_cast<Instance*>(object);
  char* at = reinterpret_cast<char*>(object) + instance->offset;
  if (!(instance->flags & kIsDirect)) at = *reinterpret_cast<char**>(at);
  return reinterpret_cast<array*>(at);
}

// One that has been initialized.
bool is_array(PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(array_type)) &&
         (reinterpret_cast<Instance*>(object)->flags & kState) == kIsReady;
}

PyObject* object_of(const array& a) {
  static PyObject* const zero = PyFloat_FromDouble(0);
  PyObject* object = PyObject_CallFunctionObjArgs(array_type, zero, nullptr);
  if (object) *array_of(object) = a;
  return object;
}

PyObject* tuple_of(const std::vector<array>& arrays) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(arrays.size()));
  for (size_t i = 0; tuple && i < arrays.size(); ++i) {
    PyObject* object = object_of(arrays[i]);
    if (!object || PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), object) != 0) {
      Py_CLEAR(tuple);
    }
  }
  return tuple;
}

// A tuple of Nones and arrays; false with a Python error.
bool read_operands(PyObject* tuple, Settings* settings, std::vector<array>* operands) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != kSlots) {
    PyErr_Format(PyExc_TypeError, "operands must be a tuple of %d", static_cast<int>(kSlots));
    return false;
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    PyObject* object = PyTuple_GetItem(tuple, slot);
    if (object == Py_None) continue;
    if (!is_array(object)) {
      PyErr_Format(PyExc_TypeError, "%s must be an mlx.core.array", kSlotNames[slot]);
      return false;
    }
    operands->push_back(*array_of(object));
    settings->present |= 1u << slot;
  }
  return true;
}

// ---- what Python calls

// call(kind, operands, features, eps, activation, rate, correction)
PyObject* py_call(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 7) {
    PyErr_Format(PyExc_TypeError, "call takes 7 arguments, but got %zd", number);
    return nullptr;
  }
  Settings settings;
  settings.eps = PyFloat_AsDouble(arguments[3]);
  settings.rate = PyFloat_AsDouble(arguments[5]);
  settings.correction = PyFloat_AsDouble(arguments[6]);
  for (Py_ssize_t i = 0; i < PyTuple_Size(arguments[2]); ++i) {
    settings.features.push_back(static_cast<int>(PyLong_AsLong(PyTuple_GetItem(arguments[2], i))));
  }
  const char* kind = PyUnicode_AsUTF8AndSize(arguments[0], nullptr);
  const char* activation = PyUnicode_AsUTF8AndSize(arguments[4], nullptr);
  if (PyErr_Occurred()) return nullptr;
  const auto found = std::find(std::begin(kKinds), std::end(kKinds), std::string_view(kind));
  if (found == std::end(kKinds)) {
    PyErr_Format(PyExc_ValueError, "there is no stage %s", kind);
    return nullptr;
  }
  settings.kind = static_cast<Kind>(found - std::begin(kKinds));
  if (!find_activation(activation, &settings.activation)) {
    PyErr_Format(PyExc_ValueError, "there is no activation %s", activation);
    return nullptr;
  }
  std::vector<array> operands;
  if (!read_operands(arguments[1], &settings, &operands)) return nullptr;
  try {
    const mx::Stream stream = mx::default_stream(mx::default_device());
    return tuple_of(call(settings, std::move(operands), stream));
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* py_can_serve(PyObject*, PyObject*) { return PyBool_FromLong(can_serve()); }

// The error of Python as the text of an exception, as which it goes through MLX.
std::string text_of_error() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  PyObject* text = value ? PyObject_Str(value) : nullptr;
  const char* bytes = text ? PyUnicode_AsUTF8AndSize(text, nullptr) : nullptr;
  std::string message = bytes ? bytes : "an error without a text";
  for (PyObject* each : {type, value, traceback, text}) Py_XDECREF(each);
  PyErr_Clear();
  return message;
}

std::vector<array> call_definition(const Settings& settings, const std::vector<array>& inputs) {
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* operands = PyTuple_New(kSlots);
  size_t input = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    const bool is_present = settings.has(static_cast<Slot>(slot));
    PyObject* object = is_present ? object_of(inputs[input++]) : Py_NewRef(Py_None);
    PyTuple_SetItem(operands, slot, object);
  }
  PyObject* features = PyTuple_New(static_cast<Py_ssize_t>(settings.features.size()));
  for (size_t i = 0; i < settings.features.size(); ++i) {
    PyTuple_SetItem(features, static_cast<Py_ssize_t>(i), PyLong_FromLong(settings.features[i]));
  }
  PyObject* found = PyObject_CallFunction(
      definition_in_python, "sNNdsdd", kKinds[static_cast<int>(settings.kind)], operands, features,
      settings.eps, kActivations[static_cast<int>(settings.activation)].name, settings.rate,
      settings.correction);
  std::vector<array> results;
  for (Py_ssize_t i = 0; found && i < PyTuple_Size(found); ++i) {
    results.push_back(*array_of(PyTuple_GetItem(found, i)));
  }
  const std::string error = found ? "" : text_of_error();
  const bool is_found = found;
  Py_XDECREF(found);
  PyGILState_Release(state);
  if (!is_found) throw std::runtime_error(error);
  return results;
}

PyObject* py_set_definition(PyObject*, PyObject* function) {
  Py_XDECREF(definition_in_python);
  definition_in_python = Py_NewRef(function);
  definition = call_definition;
  Py_RETURN_NONE;
}

PyObject* py_runs(PyObject*, PyObject*) { return PyLong_FromLongLong(runs()); }

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_call)), METH_FASTCALL,
     nullptr},
    {"can_serve", py_can_serve, METH_NOARGS, nullptr},
    {"set_definition", py_set_definition, METH_O, nullptr},
    {"runs", py_runs, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- the module

bool is_known_nanobind() {
  PyObject* internals = PyInterpreterState_GetDict(PyInterpreterState_Get());
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(internals, &position, &key, &value);) {
    const char* text = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, nullptr) : nullptr;
    const std::string name = text ? text : "";
    if (name.find("__nb_internals_") != 0 || name.find("_mlx__") == std::string::npos) continue;
    for (const char* tag : kKnownTags) {
      if (name.find(tag) != std::string::npos) return true;
    }
    PyErr_Format(PyExc_ImportError, "MLX's arrays are those of an unknown nanobind, %s", text);
    return false;
  }
  PyErr_SetString(PyExc_ImportError, "MLX's arrays are not nanobind's");
  return false;
}

int execute(PyObject*) {
  PyObject* core = PyImport_ImportModule("mlx.core");
  array_type = core ? PyObject_GetAttrString(core, "array") : nullptr;
  Py_XDECREF(core);
  if (!array_type || !is_known_nanobind()) return -1;
  stages = static_cast<const StageTable*>(PyCapsule_Import(kStageTableCapsule, 0));
  if (!stages) return -1;
  return 0;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    "_mlx",
    "The stages in MLX's graphs; see csrc/faces/mlx_operation.h.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

#define BATCHNORM_JOINED(a, b, c, d) a##b##_##c##_##d
#define BATCHNORM_INIT(major, minor, patch) BATCHNORM_JOINED(PyInit__mlx_, major, minor, patch)

}  // namespace

PyMODINIT_FUNC BATCHNORM_INIT(MLX_VERSION_MAJOR, MLX_VERSION_MINOR, MLX_VERSION_PATCH)() {
  return PyModuleDef_Init(&module_definition);
}
