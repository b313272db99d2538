/* Elements by their bytes: kept, or faded. All static, see common.h. */
#ifndef NMFLOW_PROJECT_WRITE_H
#define NMFLOW_PROJECT_WRITE_H

#include "project_vector.h"

namespace {

/* What is kept as it is, the rest times delta. */
template <int DTYPE>
void write_out(const void *from, const uint8_t *kept, int64_t count, float delta, void *to) {
  typedef nmf_element<DTYPE> E;
  typedef typename E::type T;
  const T *w = static_cast<const T *>(from);
  T *out = static_cast<T *>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    if constexpr (DTYPE == NMFLOW_F32) {
      const vecu value = get<vecu>(w + i);
      const vecu faded = delta != 0.0f ? (vecu)((vecf)value * delta) : vecu{};
      put(out + i, choose(kept + i, value, faded));
    } else {
      const vech value = get<vech>(w + i);
      const vech faded =
          delta != 0.0f ? from_float(to_float(value, DTYPE) * delta, DTYPE) : vech{};
      put(out + i, choose(kept + i, value, faded));
    }
  }
  for (; i < count; ++i) {
    const T value = w[i], faded = delta != 0.0f ? E::store(E::load(value) * delta) : T(0);
    out[i] = kept[i] ? value : faded;
  }
}

/* The same with w * pull added where w is pruned. */
template <int DTYPE>
void write_pulled(const void *from, const void *weights, const uint8_t *kept, int64_t count, float delta,
                  float pull, void *to) {
  typedef nmf_element<DTYPE> E;
  typedef typename E::type T;
  const T *v = static_cast<const T *>(from), *w = static_cast<const T *>(weights);
  T *out = static_cast<T *>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    if constexpr (DTYPE == NMFLOW_F32) {
      const vecf value = get<vecf>(v + i), pulled = value * delta + get<vecf>(w + i) * pull;
      put(out + i, choose(kept + i, (vecu)value, (vecu)pulled));
    } else {
      const vech value = get<vech>(v + i);
      const vecf pulled = to_float(value, DTYPE) * delta + to_float(get<vech>(w + i), DTYPE) * pull;
      put(out + i, choose(kept + i, value, from_float(pulled, DTYPE)));
    }
  }
  for (; i < count; ++i)
    out[i] = kept[i] ? v[i] : E::store(E::load(v[i]) * delta + E::load(w[i]) * pull);
}

}  // namespace
#endif
