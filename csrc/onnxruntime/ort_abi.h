/* The part of onnxruntime's C interface that its custom operators need.
 *
 * onnxruntime hands a library one table of function pointers. Places in it are fixed for good: new
 * functions are only ever appended. So the few that are used here are declared with their places,
 * and no header of onnxruntime is needed, neither to build nor to run. Version 17 (onnxruntime 1.17)
 * is the first that has all of them. */
#ifndef NMFLOW_ORT_ABI_H
#define NMFLOW_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ORT_VERSION_USED 17

struct OrtStatus;
struct OrtValue;
struct OrtShapeInfo;
struct OrtSessionOptions;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOpDomain;
typedef void *const *OrtTable;

struct OrtApiBase {
  OrtTable (*get_api)(uint32_t version);
  const char *(*version_text)(void);
};

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };      /* error codes */
enum { ORT_ANY_TYPE = 0, ORT_FLOAT = 1 };             /* element types */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };          /* inputs */

/* What onnxruntime asks an operator, in its order; null where the default will do. */
struct OrtCustomOp {
  uint32_t version;
  void *(*create_kernel)(const OrtCustomOp *, OrtTable, const OrtKernelInfo *);
  const char *(*name)(const OrtCustomOp *);
  const char *(*provider)(const OrtCustomOp *);
  int32_t (*input_type)(const OrtCustomOp *, size_t);
  size_t (*inputs)(const OrtCustomOp *);
  int32_t (*output_type)(const OrtCustomOp *, size_t);
  size_t (*outputs)(const OrtCustomOp *);
  void (*compute)(void *, OrtKernelContext *);
  void (*destroy)(void *);
  int32_t (*input_kind)(const OrtCustomOp *, size_t);
  int32_t (*output_kind)(const OrtCustomOp *, size_t);
  int32_t (*input_memory)(const OrtCustomOp *, size_t);
  int (*variadic_input_least)(const OrtCustomOp *);
  int (*variadic_input_alike)(const OrtCustomOp *);
  int (*variadic_output_least)(const OrtCustomOp *);
  int (*variadic_output_alike)(const OrtCustomOp *);
  OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, OrtTable, const OrtKernelInfo *, void **);
  OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
  void *infer_shape;
  void *start_version, *end_version;
  void *may_inplace, *release_may_inplace, *alias_map, *release_alias_map; /* version 18 */
};

/* Name, place in the table, and type. Each returns null where all is well, unless it is void. */
#define ORT_FUNCTIONS(F)                                                                           \
  F(create_status, 0, OrtStatus *, (int32_t code, const char *text))                               \
  F(create_domain, 26, OrtStatus *, (const char *name, OrtCustomOpDomain **out))                   \
  F(add_to_domain, 27, OrtStatus *, (OrtCustomOpDomain *, const OrtCustomOp *))                    \
  F(add_domain, 28, OrtStatus *, (OrtSessionOptions *, OrtCustomOpDomain *))                       \
  F(data, 51, OrtStatus *, (const OrtValue *, void **out))                                         \
  F(element_type, 60, OrtStatus *, (const OrtShapeInfo *, int32_t *out))                           \
  F(rank, 61, OrtStatus *, (const OrtShapeInfo *, size_t *out))                                    \
  F(dims, 62, OrtStatus *, (const OrtShapeInfo *, int64_t *out, size_t rank))                      \
  F(count, 64, OrtStatus *, (const OrtShapeInfo *, size_t *out))                                   \
  F(shape_of, 65, OrtStatus *, (const OrtValue *, OrtShapeInfo **out))                             \
  F(attribute, 86, OrtStatus *, (const OrtKernelInfo *, const char *name, int64_t *out))           \
  F(input, 90, OrtStatus *, (const OrtKernelContext *, size_t at, const OrtValue **out))           \
  F(output, 91, OrtStatus *, (OrtKernelContext *, size_t at, const int64_t *dims, size_t rank,     \
                              OrtValue **out))                                                     \
  F(release_status, 93, void, (OrtStatus *))                                                       \
  F(release_shape, 99, void, (OrtShapeInfo *))                                                     \
  F(has_config, 237, OrtStatus *, (const OrtSessionOptions *, const char *key, int *out))          \
  F(config, 238, OrtStatus *, (const OrtSessionOptions *, const char *key, char *text,             \
                               size_t *bytes))                                                     \
  F(constant, 249, OrtStatus *, (const OrtKernelInfo *, size_t at, int *is, const OrtValue **out)) \
  F(parallel, 274, OrtStatus *, (const OrtKernelContext *, void (*run)(void *, size_t),            \
                                 size_t total, size_t batches, void *data))

struct OrtCalls {
#define ORT_DECLARE(name, place, result, parameters) result(*name) parameters;
  ORT_FUNCTIONS(ORT_DECLARE)
#undef ORT_DECLARE

  explicit OrtCalls(OrtTable table) {
#define ORT_READ(name, place, result, parameters) memcpy(&name, &table[place], sizeof(name));
    ORT_FUNCTIONS(ORT_READ)
#undef ORT_READ
  }
};

#endif
