#include "cpu/kernels/conv2d_pack.h"

#include <algorithm>

#include "cpu/kernels/conv2d_gather.h"

namespace convext::cpu {
namespace {

template <class T>
void clear_columns(T* rows, int64_t count, int64_t ld, int64_t first) {
  if (first == ld) return;
  for (int64_t i = 0; i < count; ++i) std::fill(rows + i * ld + first, rows + (i + 1) * ld, T(0));
}

}  // namespace

template <class T>
void load_block(const VectorKernels<T>& isa, const ImageTensor& tensor, const Block& block,
                int64_t first_channel, int64_t channels, T* rows, int64_t ld, T* scratch,
                bool clear) {
  const int64_t image_pixels = tensor.height * tensor.width;
  const int64_t pixels = block.rows * tensor.width;  // of one image in the block: contiguous
  for (int64_t i = 0; i < block.images; ++i, rows += pixels * ld) {
    const int64_t image = block.first_image + i;
    const int64_t first_pixel = block.first_row * tensor.width;
    if (tensor.layout == Layout::nhwc) {
      const int64_t offset = (image * image_pixels + first_pixel) * tensor.channels + first_channel;
      for (int64_t p = 0; p < pixels; ++p) {
        isa.load(tensor.dtype, tensor.data, offset + p * tensor.channels, rows + p * ld, channels);
      }
    } else {
      const int64_t offset = (image * tensor.channels + first_channel) * image_pixels + first_pixel;
      if (size_of(tensor.dtype) == int64_t(sizeof(T))) {
        isa.transpose(static_cast<const T*>(tensor.data) + offset, image_pixels, rows, ld, channels,
                      pixels);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          isa.load(tensor.dtype, tensor.data, offset + c * image_pixels, scratch + c * pixels,
                   pixels);
        }
        isa.transpose(scratch, pixels, rows, ld, channels, pixels);
      }
    }
    if (clear) clear_columns(rows, pixels, ld, channels);
  }
}

template <class T>
void store_block(const VectorKernels<T>& isa, const ImageTensor& tensor, const Block& block,
                 int64_t first_channel, int64_t channels, const T* rows, int64_t ld, T* scratch,
                 void* data) {
  const int64_t image_pixels = tensor.height * tensor.width;
  const int64_t pixels = block.rows * tensor.width;
  for (int64_t i = 0; i < block.images; ++i, rows += pixels * ld) {
    const int64_t image = block.first_image + i;
    const int64_t first_pixel = block.first_row * tensor.width;
    if (tensor.layout == Layout::nhwc) {
      const int64_t offset = (image * image_pixels + first_pixel) * tensor.channels + first_channel;
      for (int64_t p = 0; p < pixels; ++p) {
        isa.store(rows + p * ld, tensor.dtype, data, offset + p * tensor.channels, channels);
      }
    } else {
      const int64_t offset = (image * tensor.channels + first_channel) * image_pixels + first_pixel;
      if (size_of(tensor.dtype) == int64_t(sizeof(T))) {
        isa.transpose(rows, ld, static_cast<T*>(data) + offset, image_pixels, pixels, channels);
      } else {
        isa.transpose(rows, ld, scratch, pixels, pixels, channels);
        for (int64_t c = 0; c < channels; ++c) {
          isa.store(scratch + c * pixels, tensor.dtype, data, offset + c * image_pixels, pixels);
        }
      }
    }
  }
}

template <class T>
void load_filters_by_filter(const VectorKernels<T>& isa, const FilterBank& bank, const T* filters,
                            int64_t first, int64_t count, T* matrix, int64_t ld) {
  const int64_t size = bank.channels * bank.taps;
  const int64_t there = std::min(count, bank.filters - first);
  filters += first * size;
  if (bank.layout == Layout::nchw) {
    isa.transpose(filters, size, matrix, ld, there, size);
  } else {
    for (int64_t tap = 0; tap < bank.taps; ++tap) {
      isa.transpose(filters + tap * bank.channels, size, matrix + tap * ld, bank.taps * ld, there,
                    bank.channels);
    }
  }
  clear_columns(matrix, size, ld, there);
}

template <class T>
void load_filters_by_channel(const VectorKernels<T>& isa, const FilterBank& bank, const T* filters,
                             int64_t first, int64_t count, T* matrix, int64_t ld) {
  const int64_t rows = bank.filters * bank.taps;
  const int64_t there = std::min(count, bank.channels - first);
  if (bank.layout == Layout::nchw && bank.taps > 1) {
    for (int64_t filter = 0; filter < bank.filters; ++filter) {
      isa.transpose(filters + (filter * bank.channels + first) * bank.taps, bank.taps,
                    matrix + filter * bank.taps * ld, ld, there, bank.taps);
    }
  } else {
    isa.phased_copy(
        {filters + first, bank.channels, rows, there, matrix, {1, 0, ld}, {1, 0, 1}, 0, 0});
  }
  clear_columns(matrix, rows, ld, there);
}

template <class T>
void store_filters(const VectorKernels<T>& isa, const FilterBank& bank, const T* matrix, int64_t ld,
                   T* scratch, void* data, int64_t offset) {
  const bool same_type = size_of(bank.dtype) == int64_t(sizeof(T));
  T* filters = same_type ? static_cast<T*>(data) + offset : scratch;
  const int64_t filter_size = bank.channels * bank.taps;
  if (bank.layout == Layout::nchw) {
    isa.transpose(matrix, ld, filters, filter_size, filter_size, bank.filters);
  } else {
    for (int64_t tap = 0; tap < bank.taps; ++tap) {
      isa.transpose(matrix + tap * ld, bank.taps * ld, filters + tap * bank.channels, filter_size,
                    bank.channels, bank.filters);
    }
  }
  if (!same_type) isa.store(filters, bank.dtype, data, offset, bank.size());
}

#define CONVEXT_INSTANTIATE(T)                                                                   \
  template void load_block(const VectorKernels<T>&, const ImageTensor&, const Block&, int64_t,   \
                           int64_t, T*, int64_t, T*, bool);                                      \
  template void store_block(const VectorKernels<T>&, const ImageTensor&, const Block&, int64_t,  \
                            int64_t, const T*, int64_t, T*, void*);                              \
  template void load_filters_by_filter(const VectorKernels<T>&, const FilterBank&, const T*,     \
                                       int64_t, int64_t, T*, int64_t);                           \
  template void load_filters_by_channel(const VectorKernels<T>&, const FilterBank&, const T*,    \
                                        int64_t, int64_t, T*, int64_t);                          \
  template void store_filters(const VectorKernels<T>&, const FilterBank&, const T*, int64_t, T*, \
                              void*, int64_t);
CONVEXT_INSTANTIATE(float)
CONVEXT_INSTANTIATE(double)

}  // namespace convext::cpu
