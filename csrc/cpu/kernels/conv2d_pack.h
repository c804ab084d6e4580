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
                int64_t first_channel, int64_t channels, T* rows, int64_t ld, T* scratch);

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

// matrix[channel * taps + tap][filter], rows ld elements apart, columns past `filters` zero.
// `scratch` holds bank.size() elements, for 16-bit types only.
template <class T>
void load_filters_by_filter(const VectorKernels<T>& isa, const FilterBank& bank, const void* data,
                            int64_t offset, T* matrix, int64_t ld, T* scratch);
// matrix[filter * taps + tap][channel], likewise.
template <class T>
void load_filters_by_channel(const VectorKernels<T>& isa, const FilterBank& bank, const void* data,
                             int64_t offset, T* matrix, int64_t ld, T* scratch);
// The inverse of load_filters_by_filter.
template <class T>
void store_filters(const VectorKernels<T>& isa, const FilterBank& bank, const T* matrix, int64_t ld,
                   T* scratch, void* data, int64_t offset);

// Elements of scratch that the dtype makes necessary.
template <class T>
int64_t scratch_size(DType dtype, int64_t elements) {
  return size_of(dtype) == int64_t(sizeof(T)) ? 0 : elements;
}

}  // namespace convext::cpu
