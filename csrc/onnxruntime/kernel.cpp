/* A packed layer in a session of onnxruntime: made from attributes and initializers, then run. */
#include <new>
#include <stdio.h>

#include "op.h"

namespace {

const int kMostDims = 16, kMostInputs = 4;

struct Kernel {
  const NmfOrtOp *op;
  nmflow_shape shape;
  int32_t epilogue, activations;
  int64_t bytes[2]; /* of values and codes, or of the stream */

  int validate(const void *const *held) const {
    if (op->int8) {
      const nmflow_int8 weight = {shape, held[0], bytes[0]};
      return nmflow_int8_validate(&weight);
    }
    const nmflow_packed weight = {shape, held[0], bytes[0], held[1], bytes[1]};
    return nmflow_validate(&weight);
  }

  int multiply(const void *const *held, const void *x, const void *bias, void *y,
               int64_t tokens) const {
    if (op->int8) {
      const nmflow_int8 weight = {shape, held[0], bytes[0]};
      return nmflow_int8_matmul(&weight, activations, x, shape.in, bias, y, shape.out, tokens,
                                epilogue, op->threads, NMFLOW_AUTO);
    }
    const nmflow_packed weight = {shape, held[0], bytes[0], held[1], bytes[1]};
    return nmflow_matmul(&weight, x, shape.in, bias, y, shape.out, tokens, epilogue, op->threads,
                         NMFLOW_AUTO);
  }
};

struct Shape {
  int64_t dims[kMostDims];
  size_t rank, count;
  int32_t type;
};

OrtStatus *refuse(const NmfOrtOp *op, const char *what, int64_t number) {
  char text[160];
  snprintf(text, sizeof(text), "nmflow::%s: %s (%lld)", op->title(), what,
           static_cast<long long>(number));
  return op->ort.create_status(ORT_INVALID_ARGUMENT, text);
}

OrtStatus *shape_of(const NmfOrtOp *op, const OrtValue *value, Shape *out) {
  const OrtCalls &ort = op->ort;
  OrtShapeInfo *info = nullptr;
  OrtStatus *status = ort.shape_of(value, &info);
  if (status != nullptr) return status;
  status = ort.element_type(info, &out->type);
  if (status == nullptr) status = ort.rank(info, &out->rank);
  if (status == nullptr) status = ort.count(info, &out->count);
  if (status == nullptr && out->rank > kMostDims)
    status = refuse(op, "x has more axes than 16", static_cast<int64_t>(out->rank));
  if (status == nullptr) status = ort.dims(info, out->dims, out->rank);
  ort.release_shape(info);
  return status;
}

int64_t element_bytes(int32_t type) {
  /* float, uint8, int8, uint16, int16, int32, int64, ... of ONNX */
  static const int64_t bytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8};
  return type >= 0 && type < 14 ? bytes[type] : 0;
}

/* The address of an initializer in kernel layout, after its size in bytes was compared. */
OrtStatus *initializer(const NmfOrtOp *op, const OrtKernelInfo *info, size_t at, int64_t bytes,
                       const void **out) {
  const OrtCalls &ort = op->ort;
  int is_constant = 0;
  const OrtValue *value = nullptr;
  OrtStatus *status = ort.constant(info, at, &is_constant, &value);
  if (status != nullptr) return status;
  if (!is_constant || value == nullptr)
    return refuse(op, "the weight must be initializers of the graph, unlike input",
                  static_cast<int64_t>(at));
  Shape shape;
  status = shape_of(op, value, &shape);
  if (status != nullptr) return status;
  if (static_cast<int64_t>(shape.count) * element_bytes(shape.type) != bytes)
    return refuse(op, "a buffer of the weight does not have the bytes of the attributes", bytes);
  void *address = nullptr;
  status = ort.data(value, &address);
  *out = address;
  if (status == nullptr && reinterpret_cast<uintptr_t>(address) % 4 != 0)
    return refuse(op, "a buffer of the weight is not aligned to bytes", 4);
  return status;
}

/* The session's threads, as nmf_parallel borrows them. */
struct Threads {
  const OrtCalls *ort;
  const OrtKernelContext *context;
};

bool on_session(void *pool, void (*run)(void *, size_t), size_t total, void *data) {
  const Threads *threads = static_cast<const Threads *>(pool);
  OrtStatus *status = threads->ort->parallel(threads->context, run, total, 0, data);
  if (status == nullptr) return true;
  threads->ort->release_status(status);
  return false;
}

}  // namespace

OrtStatus *nmf_ort_create(const OrtCustomOp *self, OrtTable, const OrtKernelInfo *info,
                          void **out) {
  const NmfOrtOp *op = static_cast<const NmfOrtOp *>(self);
  static const char *const names[] = {"out_features", "in_features", "n",          "m",
                                      "panel",        "epilogue",    "activations"};
  int64_t number[7] = {0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < (op->int8 ? 7 : 6); ++i) {
    OrtStatus *status = op->ort.attribute(info, names[i], &number[i]);
    if (status != nullptr) return status;
    if (i > 1 && (number[i] < 0 || number[i] > INT32_MAX)) return refuse(op, names[i], number[i]);
  }
  Kernel made;
  made.op = op;
  made.shape = {number[0], number[1], static_cast<int32_t>(number[2]),
                static_cast<int32_t>(number[3]), static_cast<int32_t>(number[4]), NMFLOW_F32};
  made.epilogue = static_cast<int32_t>(number[5]);
  made.activations = static_cast<int32_t>(number[6]);
  if (made.epilogue > NMFLOW_GELU_TANH) return refuse(op, "epilogue is unknown", made.epilogue);
  if (made.activations > NMFLOW_INT8S)
    return refuse(op, "activations is unknown", made.activations);
  int status;
  if (op->int8) {
    status = nmflow_int8_bytes(&made.shape, &made.bytes[0]);
  } else {
    nmf_geometry g;
    status = nmf_geometry_of(&made.shape, &g);
    made.bytes[0] = g.values_bytes;
    made.bytes[1] = g.codes_bytes;
  }
  if (status != NMFLOW_OK) return refuse(op, "the attributes are no packed weight", status);
  const void *held[2] = {nullptr, nullptr};
  for (size_t i = 0; i + 1 < op->bias_at(); ++i) {
    OrtStatus *refused = initializer(op, info, i + 1, made.bytes[i], &held[i]);
    if (refused != nullptr) return refused;
  }
  status = made.validate(held);
  if (status != NMFLOW_OK) return refuse(op, "the buffers are no packed weight", status);
  *out = new (std::nothrow) Kernel(made);
  return *out == nullptr ? refuse(op, "no memory for a kernel", sizeof(Kernel)) : nullptr;
}

void nmf_ort_destroy(void *kernel) { delete static_cast<Kernel *>(kernel); }

OrtStatus *nmf_ort_compute(void *self, OrtKernelContext *context) {
  const Kernel &kernel = *static_cast<const Kernel *>(self);
  const NmfOrtOp *op = kernel.op;
  const OrtCalls &ort = op->ort;
  const size_t bias_at = op->bias_at();
  const OrtValue *given[kMostInputs] = {nullptr, nullptr, nullptr, nullptr};
  void *address[kMostInputs] = {nullptr, nullptr, nullptr, nullptr};
  for (size_t i = 0; i <= bias_at; ++i) {
    OrtStatus *status = ort.input(context, i, &given[i]);
    if (status == nullptr && given[i] != nullptr) status = ort.data(given[i], &address[i]);
    if (status != nullptr) return status;
  }
  Shape x;
  OrtStatus *status = shape_of(op, given[0], &x);
  if (status != nullptr) return status;
  if (x.rank == 0 || x.dims[x.rank - 1] != kernel.shape.in)
    return refuse(op, "the last axis of x must have the features of the packed weight",
                  kernel.shape.in);
  if (given[bias_at] != nullptr) {
    Shape bias;
    status = shape_of(op, given[bias_at], &bias);
    if (status != nullptr) return status;
    if (static_cast<int64_t>(bias.count) != kernel.shape.out)
      return refuse(op, "bias must have the outputs of the packed weight", kernel.shape.out);
  }
  x.dims[x.rank - 1] = kernel.shape.out;
  OrtValue *result = nullptr;
  status = ort.output(context, 0, x.dims, x.rank, &result);
  if (status != nullptr) return status;
  void *y = nullptr;
  status = ort.data(result, &y);
  if (status != nullptr) return status;
  Threads threads = {&ort, context};
  const nmf_pool pool = {on_session, &threads};
  nmf_borrow(&pool);
  const int done = kernel.multiply(address + 1, address[0], address[bias_at], y,
                                   static_cast<int64_t>(x.count) / kernel.shape.in);
  nmf_borrow(nullptr);
  return done == NMFLOW_OK ? nullptr : refuse(op, "the product was refused", done);
}
