// Of DLPack, what is needed to ask a tensor where it lies in memory: the C exchange API, which a
// framework's type of tensor offers as the capsule __dlpack_c_exchange_api__. It is a published
// binary interface: https://github.com/dmlc/dlpack/blob/v1.3/include/dlpack/dlpack.h
#pragma once

#include <cstdint>

namespace batchnorm::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

constexpr int32_t kCpu = 1;  // a device_type

enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t device_type, device_id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// Fills in what stays true as long as the object lives and is not changed. Else there is a Python
// error, and the result is not 0.
using TensorOfObject = int (*)(void* object, Tensor* tensor);

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  const ExchangeApi* previous;  // that of an older version, or null
  // From here on, as of major version 1.
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  TensorOfObject tensor_of_object_no_sync;  // may be null
  void* current_work_stream;
};

}  // namespace batchnorm::dlpack
