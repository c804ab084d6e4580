// Moves data between PyTorch's tensors, of any dtype and layout, and the matrices that the kernels
// multiply, which are float or double with the lanes of the vectors innermost.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

struct Block;

// A whole tensor of sizes (N, C, H, W).
struct ImageTensor {
  const void* data;
  DType dtype;
  Layout layout;
  int64_t batch, channels, height, width;
};

// Reads channels [first_channel, first_channel + channels) of a block into rows[pixel][ld]; columns
// past `channels` become zero. `scratch` holds channels * (pixels of an image's part) elements and
// is used for nchw tensors of 16-bit types only.
template <class T>
void load_block(const VectorKernels<T>& isa, const ImageTensor& tensor, const Block& block,
                int64_t first_channel, int64_t channels, T* rows, int64_t ld, T* scratch,
                bool clear = true);

// The inverse: writes rows[pixel][ld] to `data`, a tensor of the given description.
template <class T>
void store_block(const VectorKernels<T>& isa, const ImageTensor& tensor, const Block& block,
                 int64_t first_channel, int64_t channels, const T* rows, int64_t ld, T* scratch,
                 void* data);

// The filters of one group: (filters, channels, taps) in nchw, (filters, taps, channels) in nhwc.
struct FilterBank {
  DType dtype;
  Layout layout;
  int64_t filters, channels, taps;
  int64_t size() const { return filters * channels * taps; }
};

// matrix[channel * taps + tap][filter] for the filters [first, first + count), rows ld elements
// apart, columns past the last filter of the group zero. `filters` is the group's.
template <class T>
void load_filters_by_filter(const VectorKernels<T>& isa, const FilterBank& bank, const T* filters,
                            int64_t first, int64_t count, T* matrix, int64_t ld);
// matrix[filter * taps + tap][channel] for the channels [first, first + count), likewise.
template <class T>
void load_filters_by_channel(const VectorKernels<T>& isa, const FilterBank& bank, const T* filters,
                             int64_t first, int64_t count, T* matrix, int64_t ld);
// The inverse of load_filters_by_filter, for all filters.
template <class T>
void store_filters(const VectorKernels<T>& isa, const FilterBank& bank, const T* matrix, int64_t ld,
                   T* scratch, void* data, int64_t offset);

// n elements of a tensor as T: where they are when the type is the same, else converted to scratch.
template <class T>
const T* as_type(const VectorKernels<T>& isa, DType dtype, const void* data, int64_t offset,
                 int64_t n, T* scratch) {
  if (size_of(dtype) == int64_t(sizeof(T))) return static_cast<const T*>(data) + offset;
  isa.load(dtype, data, offset, scratch, n);
  return scratch;
}

// Elements of scratch that the dtype makes necessary.
template <class T>
int64_t scratch_size(DType dtype, int64_t elements) {
  return size_of(dtype) == int64_t(sizeof(T)) ? 0 : elements;
}

}  // namespace convext::cpu
