// The XLA face: the stages as handlers of XLA's foreign function interface on the CPU.
#pragma once

namespace batchnorm {

struct XlaHandler {
  const char* name;
  void* function;  // an XLA_FFI_Handler
};

// Ends with a null name. What each handler takes and gives is said in xla.cc.
extern const XlaHandler xla_handlers[];

// Of the interface that they are built for: major, minor.
extern const int xla_api_version[2];

}  // namespace batchnorm
