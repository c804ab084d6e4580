// A typed handle of an op, to call it through the dispatcher. Look it up once: keep it static.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace convext {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace convext
