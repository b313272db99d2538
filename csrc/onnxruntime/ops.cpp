/* Packed layers as operators of onnxruntime: nmflow::packed_linear and nmflow::packed_linear_int8.
 *
 * y = epilogue(x W' + bias), x (..., in) and y (..., out) in fp32. Inputs: x; W in kernel layout
 * (values and codes, or one stream of 8-bit values; initializers, checked once when the session is
 * made); bias, optional. Attributes: out_features, in_features, n, m, panel, epilogue, and for 8-bit
 * values activations, as in nmflow.h. The tasks of a product run on the session's own threads; the
 * session entry `custom_op.packed_linear.threads` says for how many a product is cut, 1 where it is
 * absent. */
#include <mutex>
#include <new>
#include <stdlib.h>

#include "op.h"

namespace {

const char *const kThreadsKey = "custom_op.packed_linear.threads";

const NmfOrtOp *as_op(const OrtCustomOp *op) { return static_cast<const NmfOrtOp *>(op); }
const char *name_of(const OrtCustomOp *op) { return as_op(op)->title(); }
size_t inputs_of(const OrtCustomOp *op) { return as_op(op)->bias_at() + 1; }
size_t one(const OrtCustomOp *) { return 1; }
int32_t input_type(const OrtCustomOp *op, size_t at) {
  return at == 0 || at == as_op(op)->bias_at() ? ORT_FLOAT : ORT_ANY_TYPE;
}
int32_t output_type(const OrtCustomOp *, size_t) { return ORT_FLOAT; }
int32_t input_kind(const OrtCustomOp *op, size_t at) {
  return at == as_op(op)->bias_at() ? ORT_OPTIONAL : ORT_REQUIRED;
}
int32_t output_kind(const OrtCustomOp *, size_t) { return ORT_REQUIRED; }
const char *on_cpu(const OrtCustomOp *) { return nullptr; }
int32_t default_memory(const OrtCustomOp *, size_t) { return 0; }

void describe(NmfOrtOp *op, int threads) {
  op->version = ORT_VERSION_USED;
  op->name = name_of;
  op->provider = on_cpu;
  op->input_memory = default_memory;
  op->inputs = inputs_of;
  op->outputs = one;
  op->input_type = input_type;
  op->output_type = output_type;
  op->input_kind = input_kind;
  op->output_kind = output_kind;
  op->create_kernel_v2 = nmf_ort_create;
  op->compute_v2 = nmf_ort_compute;
  op->destroy = nmf_ort_destroy;
  op->threads = threads;
}

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
  if (threads < 1)
    return ort.create_status(ORT_INVALID_ARGUMENT,
                             "custom_op.packed_linear.threads must be a number of 1 or more");
  *out = threads > 256 ? 256 : threads;
  return nullptr;
}

/* Sessions use operators for as long as they live, and nothing tells when the last one ends: so
 * a domain of operators is kept for good, one for each number of threads. */
struct Domain {
  explicit Domain(OrtTable table) : floats(table, false), int8(table, true) {}
  NmfOrtOp floats, int8;
  OrtCustomOpDomain *domain = nullptr;
  Domain *next = nullptr;
};
std::mutex g_mutex;
Domain *g_domains = nullptr;

OrtStatus *domain_for(OrtTable table, const OrtCalls &ort, int threads, OrtCustomOpDomain **out) {
  std::lock_guard<std::mutex> lock(g_mutex);
  for (Domain *known = g_domains; known != nullptr; known = known->next) {
    *out = known->domain;
    if (known->floats.table == table && known->floats.threads == threads) return nullptr;
  }
  Domain *made = new (std::nothrow) Domain(table);
  if (made == nullptr) return ort.create_status(ORT_FAIL, "nmflow: no memory for its operators");
  describe(&made->floats, threads);
  describe(&made->int8, threads);
  OrtStatus *status = ort.create_domain("nmflow", &made->domain);
  if (status == nullptr) status = ort.add_to_domain(made->domain, &made->floats);
  if (status == nullptr) status = ort.add_to_domain(made->domain, &made->int8);
  if (status != nullptr) {
    delete made;
    return status;
  }
  made->next = g_domains;
  g_domains = made;
  *out = made->domain;
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
  const OrtCalls ort(table);
  int threads = 1;
  OrtCustomOpDomain *domain = nullptr;
  OrtStatus *status = threads_of(ort, options, &threads);
  if (status == nullptr) status = domain_for(table, ort, threads, &domain);
  return status != nullptr ? status : ort.add_domain(options, domain);
}
