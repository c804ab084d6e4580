#include "running_statistics.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>

#include "autograd/differentiated.h"
#include "tensor_args.h"

namespace convext {
namespace {

using at::Tensor;
using std::optional;

// Whether torch's operations in place would do no more than compute and count a version up: nobody
// (a mode, a tracer, a transform) watches them, and neither do the tensors themselves.
bool nobody_watches(const Tensor& a, const Tensor& b) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::CPU, DispatchKey::ADInplaceOrView,
                                       DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  return c10::default_included_set.has_all(c10::impl::tls_local_dispatch_key_set().included_) &&
         usual.has_all(a.key_set()) && usual.has_all(b.key_set()) && !a.is_inference() &&
         !any_differentiated(a, b);
}

template <class T>
void blend(const Tensor& running, const Tensor& batch, double kept, double momentum) {
  T* const to = running.mutable_data_ptr<T>();
  const T* const from = batch.const_data_ptr<T>();
  for (int64_t c = 0; c < running.numel(); ++c) {
    to[c] = std::fma(T(momentum), from[c], T(kept) * to[c]);
  }
}

void update(const char* name, const Tensor& running, const char* batch_name, const Tensor& batch,
            double kept, double momentum) {
  const at::ScalarType type = running.scalar_type();
  const bool simple = nobody_watches(running, batch) && running.is_contiguous() &&
                      batch.is_contiguous() && running.sizes() == batch.sizes() &&
                      type == batch.scalar_type() && (type == at::kFloat || type == at::kDouble);
  if (!simple) {
    running.mul_(kept).add_(batch, momentum);
    return;
  }
  check_tensor("update_running_statistics", name, running);
  check_tensor("update_running_statistics", batch_name, batch);
  if (type == at::kFloat) {
    blend<float>(running, batch, kept, momentum);
  } else {
    blend<double>(running, batch, kept, momentum);
  }
  running.unsafeGetTensorImpl()->bump_version();
}

// running = (1 - momentum) * running + momentum * batch, where there is one, rounded as torch's
// mul_ and add_ round on a machine that has fused multiply-add.
void update_running_statistics(const optional<Tensor>& running_mean,
                               const optional<Tensor>& running_var, const Tensor& mean,
                               const Tensor& var, const at::Scalar& momentum,
                               const at::Scalar& var_momentum) {
  const double kept = 1 - momentum.toDouble();
  if (running_mean) update("running_mean", *running_mean, "mean", mean, kept, momentum.toDouble());
  if (running_var) update("running_var", *running_var, "var", var, kept, var_momentum.toDouble());
}

}  // namespace

bool count_batch(const Tensor& batches) {
  const bool simple =
      nobody_watches(batches, batches) && batches.scalar_type() == at::kLong &&
      batches.dim() == 0 &&
      batches.storage().nbytes() >= (batches.storage_offset() + 1) * sizeof(int64_t);
  if (!simple) return false;
  ++*batches.mutable_data_ptr<int64_t>();
  batches.unsafeGetTensorImpl()->bump_version();
  return true;
}

// What it does not do itself it does by torch's own operations, which know all that there is to
// know about autograd and tracing.
TORCH_LIBRARY_IMPL(convext, CompositeImplicitAutograd, m) {
  m.impl("update_running_statistics", &update_running_statistics);
}

}  // namespace convext
