// What Conv2dEpilogue asks for, on the blocks that the driver computes.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// Rows of results are `ld` elements long, a multiple of the lanes, of which the first `channels`
// belong to a group. Without a call.epilogue nothing is laid out and nothing may be called.
template <class T>
class BlockEpilogue {
 public:
  // Per slot.
  struct Scratch {
    Scratch(const BlockEpilogue&, Arena&);
    T *shift, *sum, *dot;
    double *total, *total_dot;
  };

  BlockEpilogue(const Conv2dCall&, int64_t channels, int64_t ld, int64_t blocks,
                const VectorKernels<T>&, Arena&);

  // Lays a group's parameters out over the lanes.
  void prepare(int64_t group);
  void apply(int64_t group, int64_t block, T* rows, int64_t count, const Scratch&) const;
  // When all blocks are done: adds their moments up, in order.
  void finish() const;

 private:
  void add_moments(double* mean, double* deviation, const T* rows, int64_t count,
                   const Scratch&) const;

  const Conv2dEpilogue* asked_;
  const VectorKernels<T>& isa_;
  int64_t groups_, channels_, ld_, blocks_;
  T *shift_, *scale_, *offset_;  // [group][ld]
  double* moments_;              // [block][mean, deviation][group][channel]
  int64_t* counts_;              // [block]
};

}  // namespace convext::cpu
