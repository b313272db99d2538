/* An operator of onnxruntime, as ops.cpp registers it and kernel.cpp runs it. */
#ifndef NMFLOW_ORT_OP_H
#define NMFLOW_ORT_OP_H

#include "common.h"
#include "ort_abi.h"

/* One for each table of onnxruntime and number of threads. */
struct NmfOrtOp : OrtCustomOp {
  NmfOrtOp(OrtTable from, bool has_int8) : OrtCustomOp(), table(from), ort(from), int8(has_int8) {}
  const char *title() const { return int8 ? "packed_linear_int8" : "packed_linear"; }
  size_t bias_at() const { return int8 ? 2 : 3; }
  OrtTable table;
  OrtCalls ort;
  bool int8;
  int threads = 1;
};

/* What onnxruntime calls of it; kernel is the layer that create makes. */
OrtStatus *nmf_ort_create(const OrtCustomOp *self, OrtTable, const OrtKernelInfo *info,
                          void **kernel);
OrtStatus *nmf_ort_compute(void *kernel, OrtKernelContext *context);
void nmf_ort_destroy(void *kernel);

#endif
