/* Packed layers as an operator of onnxruntime: nmflow::packed_linear.
 *
 * y = epilogue(x W' + bias), x (..., in) and y (..., out) in fp32. Inputs: x; values and codes of W
 * in kernel layout (initializers, checked once when the session is made); bias, optional.
 * Attributes: out_features, in_features, n, m, panel, epilogue, as in nmflow.h. The tasks of a product run on the
 * session's own threads; the session entry `custom_op.packed_linear.threads` says for how many a
 * product is cut, 1 where it is absent. */
#include <mutex>
#include <new>
#include <stdio.h>
#include <stdlib.h>

#include "common.h"
#include "ort_abi.h"

namespace {

const int kMostDims = 16;
const char *const kThreadsKey = "custom_op.packed_linear.threads";

/* The operator as a session registers it: one for each table and number of threads. */
struct Op : OrtCustomOp {
  explicit Op(OrtTable from) : OrtCustomOp(), table(from), ort(from) {}
  OrtTable table;
  OrtCalls ort;
  int threads = 1;
  OrtCustomOpDomain *domain = nullptr;
  Op *next = nullptr;
};

struct Kernel {
  const Op *op;
  nmflow_packed packed; /* addresses are filled in at each call */
  int32_t epilogue;
};

struct Shape {
  int64_t dims[kMostDims];
  size_t rank, count;
  int32_t type;
};

OrtStatus *shape_of(const OrtCalls &ort, const OrtValue *value, Shape *out) {
  OrtShapeInfo *info = nullptr;
  OrtStatus *status = ort.shape_of(value, &info);
  if (status != nullptr) return status;
  status = ort.element_type(info, &out->type);
  if (status == nullptr) status = ort.rank(info, &out->rank);
  if (status == nullptr) status = ort.count(info, &out->count);
  if (status == nullptr && out->rank > kMostDims)
    status = ort.create_status(ORT_INVALID_ARGUMENT, "packed_linear: x has more than 16 axes");
  if (status == nullptr) status = ort.dims(info, out->dims, out->rank);
  ort.release_shape(info);
  return status;
}

OrtStatus *refuse(const OrtCalls &ort, const char *what, int64_t number) {
  char text[160];
  snprintf(text, sizeof(text), "nmflow::packed_linear: %s (%lld)", what,
           static_cast<long long>(number));
  return ort.create_status(ORT_INVALID_ARGUMENT, text);
}

int64_t element_bytes(int32_t type) {
  /* float, uint8, int8, uint16, int16, int32, int64, ... of ONNX */
  static const int64_t bytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8};
  return type >= 0 && type < 14 ? bytes[type] : 0;
}

/* The address of an input in kernel layout, after its size in bytes was compared. */
OrtStatus *buffer(const OrtCalls &ort, const OrtValue *value, int64_t bytes, const char *name,
                  const void **out) {
  Shape shape;
  OrtStatus *status = shape_of(ort, value, &shape);
  if (status != nullptr) return status;
  if (static_cast<int64_t>(shape.count) * element_bytes(shape.type) != bytes)
    return refuse(ort, name, bytes);
  void *at = nullptr;
  status = ort.data(value, &at);
  *out = at;
  if (status == nullptr && reinterpret_cast<uintptr_t>(at) % 4 != 0)
    return refuse(ort, "a buffer is not aligned", 4);
  return status;
}

OrtStatus *constant(const OrtCalls &ort, const OrtKernelInfo *info, size_t at, int64_t bytes,
                    const char *name, const void **out) {
  int is_constant = 0;
  const OrtValue *value = nullptr;
  OrtStatus *status = ort.constant(info, at, &is_constant, &value);
  if (status != nullptr) return status;
  if (!is_constant || value == nullptr)
    return refuse(ort, "values and codes must be initializers of the graph, unlike input", at);
  return buffer(ort, value, bytes, name, out);
}

OrtStatus *create(const OrtCustomOp *self, OrtTable, const OrtKernelInfo *info, void **out) {
  const Op *op = static_cast<const Op *>(self);
  const OrtCalls &ort = op->ort;
  static const char *const names[] = {"out_features", "in_features", "n",
                                      "m",            "panel",       "epilogue"};
  int64_t number[6];
  for (int i = 0; i < 6; ++i) {
    OrtStatus *status = ort.attribute(info, names[i], &number[i]);
    if (status != nullptr) return status;
    if (i > 1 && (number[i] < 0 || number[i] > INT32_MAX)) return refuse(ort, names[i], number[i]);
  }
  Kernel made;
  made.op = op;
  made.packed.shape = {number[0], number[1], static_cast<int32_t>(number[2]),
                       static_cast<int32_t>(number[3]), static_cast<int32_t>(number[4]),
                       NMFLOW_F32};
  made.epilogue = static_cast<int32_t>(number[5]);
  if (made.epilogue > NMFLOW_RELU) return refuse(ort, "epilogue is unknown", made.epilogue);
  nmf_geometry g;
  const int status = nmf_geometry_of(&made.packed.shape, &g);
  if (status != NMFLOW_OK) return refuse(ort, "the attributes are no packed weight", status);
  made.packed.values_bytes = g.values_bytes;
  made.packed.codes_bytes = g.codes_bytes;
  OrtStatus *refused = constant(ort, info, 1, g.values_bytes, "values do not have the bytes of the attributes",
                                &made.packed.values);
  if (refused == nullptr)
    refused = constant(ort, info, 2, g.codes_bytes, "codes do not have the bytes of the attributes",
                       &made.packed.codes);
  if (refused != nullptr) return refused;
  const int checked = nmflow_validate(&made.packed);
  if (checked != NMFLOW_OK) return refuse(ort, "values and codes are no packed weight", checked);
  *out = new (std::nothrow) Kernel(made);
  return *out == nullptr ? ort.create_status(ORT_FAIL, "nmflow::packed_linear: no memory") : nullptr;
}

void destroy(void *kernel) { delete static_cast<Kernel *>(kernel); }

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

OrtStatus *compute(void *self, OrtKernelContext *context) {
  const Kernel &kernel = *static_cast<const Kernel *>(self);
  const OrtCalls &ort = kernel.op->ort;
  nmflow_packed packed = kernel.packed;
  const OrtValue *given[4] = {nullptr, nullptr, nullptr, nullptr};
  void *address[4] = {nullptr, nullptr, nullptr, nullptr};
  for (size_t i = 0; i < 4; ++i) {
    OrtStatus *status = ort.input(context, i, &given[i]);
    if (status == nullptr && given[i] != nullptr) status = ort.data(given[i], &address[i]);
    if (status != nullptr) return status;
  }
  Shape x;
  OrtStatus *status = shape_of(ort, given[0], &x);
  if (status != nullptr) return status;
  if (x.rank == 0 || x.dims[x.rank - 1] != packed.shape.in)
    return refuse(ort, "the last axis of x must have the features of the packed weight", packed.shape.in);
  if (given[3] != nullptr) {
    Shape bias;
    status = shape_of(ort, given[3], &bias);
    if (status != nullptr) return status;
    if (static_cast<int64_t>(bias.count) != packed.shape.out)
      return refuse(ort, "bias must have the outputs of the packed weight", packed.shape.out);
  }
  x.dims[x.rank - 1] = packed.shape.out;
  OrtValue *result = nullptr;
  status = ort.output(context, 0, x.dims, x.rank, &result);
  if (status != nullptr) return status;
  void *y = nullptr;
  status = ort.data(result, &y);
  if (status != nullptr) return status;
  packed.values = address[1];
  packed.codes = address[2];
  const int64_t tokens = static_cast<int64_t>(x.count) / packed.shape.in;
  Threads threads = {&ort, context};
  const nmf_pool pool = {on_session, &threads};
  nmf_borrow(&pool);
  const int done = nmflow_matmul(&packed, address[0], packed.shape.in, address[3], y,
                                 packed.shape.out, tokens, kernel.epilogue, kernel.op->threads,
                                 NMFLOW_AUTO);
  nmf_borrow(nullptr);
  return done == NMFLOW_OK ? nullptr : refuse(ort, "the product was refused", done);
}

const char *name_of(const OrtCustomOp *) { return "packed_linear"; }
size_t four(const OrtCustomOp *) { return 4; }
size_t one(const OrtCustomOp *) { return 1; }
int32_t input_type(const OrtCustomOp *, size_t at) {
  return at == 0 || at == 3 ? ORT_FLOAT : ORT_ANY_TYPE;
}
int32_t output_type(const OrtCustomOp *, size_t) { return ORT_FLOAT; }
int32_t input_kind(const OrtCustomOp *, size_t at) { return at == 3 ? ORT_OPTIONAL : ORT_REQUIRED; }
int32_t output_kind(const OrtCustomOp *, size_t) { return ORT_REQUIRED; }
const char *on_cpu(const OrtCustomOp *) { return nullptr; }
int32_t default_memory(const OrtCustomOp *, size_t) { return 0; }

OrtStatus *threads_of(const OrtCalls &ort, const OrtSessionOptions *options, int *out) {
  int there = 0;
  *out = 1;
  OrtStatus *status = ort.has_config(options, kThreadsKey, &there);
  if (status != nullptr || !there) return status;
  char text[16];
  size_t bytes = sizeof(text);
  status = ort.config(options, kThreadsKey, text, &bytes);
  if (status != nullptr) return status;
  const int threads = atoi(text);
  if (threads < 1) return refuse(ort, "custom_op.packed_linear.threads must be 1 or more", threads);
  *out = threads > 256 ? 256 : threads;
  return nullptr;
}

/* Sessions use an operator for as long as they live, and nothing tells when the last one ends: so
 * operators are kept for good, one for each number of threads. */
std::mutex g_mutex;
Op *g_ops = nullptr;

OrtStatus *op_for(OrtTable table, int threads, Op **out) {
  std::lock_guard<std::mutex> lock(g_mutex);
  for (Op *op = g_ops; op != nullptr; op = op->next) {
    *out = op;
    if (op->table == table && op->threads == threads) return nullptr;
  }
  Op *op = new (std::nothrow) Op(table);
  if (op == nullptr)
    return OrtCalls(table).create_status(ORT_FAIL, "nmflow::packed_linear: no memory");
  op->version = ORT_VERSION_USED;
  op->name = name_of;
  op->provider = on_cpu;
  op->input_memory = default_memory;
  op->inputs = four;
  op->outputs = one;
  op->input_type = input_type;
  op->output_type = output_type;
  op->input_kind = input_kind;
  op->output_kind = output_kind;
  op->create_kernel_v2 = create;
  op->compute_v2 = compute;
  op->destroy = destroy;
  op->threads = threads;
  OrtStatus *status = op->ort.create_domain("nmflow", &op->domain);
  if (status == nullptr) status = op->ort.add_to_domain(op->domain, op);
  if (status != nullptr) {
    delete op;
    return status;
  }
  op->next = g_ops;
  g_ops = *out = op;
  return nullptr;
}

}  // namespace

/* What onnxruntime looks up in a library of operators. */
extern "C" NMFLOW_API OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                   const OrtApiBase *base) {
  OrtTable table = base->get_api(ORT_VERSION_USED);
  if (table == nullptr) {
    OrtStatus *(*create_status)(int32_t, const char *); /* at the first place in every version */
    memcpy(&create_status, base->get_api(1), sizeof(create_status));
    return create_status(ORT_FAIL, "nmflow needs onnxruntime 1.17 or later");
  }
  int threads = 1;
  Op *op = nullptr;
  OrtStatus *status = threads_of(OrtCalls(table), options, &threads);
  if (status == nullptr) status = op_for(table, threads, &op);
  return status != nullptr ? status : op->ort.add_domain(options, op->domain);
}
