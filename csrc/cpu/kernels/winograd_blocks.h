// Tiles of images for Winograd's convolution: how they are cut into blocks, where their pixels lie,
// and what a thread keeps of them.
#pragma once

#include <algorithm>

#include "cpu/kernels/arena.h"
#include "cpu/kernels/conv2d_gather.h"
#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// Elements by which planes lie further apart than they need to: powers of two would meet in the
// same sets of a cache.
constexpr int64_t kGap = 16;

// A part of a tensor as pixels, the channels of one group side by side. Coordinates are the
// tensor's.
template <class T>
struct Pixels {
  T* data;  // where image, y and x of the part's corner lie
  int64_t image_stride, row_stride, pixel_stride;
  int64_t first_image, first_row;

  T* at(int64_t image, int64_t y, int64_t x) const {
    return data + (image - first_image) * image_stride + (y - first_row) * row_stride +
           x * pixel_stride;
  }
};

// Whether the tensor itself has that form.
template <class T>
bool in_place(const ImageTensor& tensor) {
  return tensor.layout == Layout::nhwc && size_of(tensor.dtype) == int64_t(sizeof(T));
}

template <class T>
Pixels<T> pixels_of(const ImageTensor& tensor, const void* data, int64_t first_channel) {
  const int64_t row = tensor.width * tensor.channels;
  return {static_cast<T*>(const_cast<void*>(data)) + first_channel,
          tensor.height * row,
          row,
          tensor.channels,
          0,
          0};
}

template <class T>
Pixels<T> pixels_of(const ImageTensor& tensor, const Block& block, T* rows, int64_t ld) {
  const int64_t row = tensor.width * ld;
  return {rows, block.rows * row, row, ld, block.first_image, block.first_row};
}

// Tiles of a tensor of results, and the blocks of them that are worked on at a time: some images,
// or some rows of tiles of one.
struct Tiling {
  Tiling(const ImageTensor& results, int64_t size, int64_t most)
      : size(size),
        batch(results.batch),
        height(results.height),
        down(ceil_div(results.height, size)),
        across(ceil_div(results.width, size)) {
    const int64_t images =
        std::clamp<int64_t>(most / (down * across), 1, std::max<int64_t>(1, batch));
    block_images = ceil_div(batch, ceil_div(std::max<int64_t>(1, batch), images));
    const int64_t rows = std::clamp<int64_t>(most / across, 1, down);
    block_down = ceil_div(down, ceil_div(down, rows));
    blocks_down = ceil_div(down, block_down);
    if (blocks_down > 1) block_images = 1;
    blocks = block_images ? ceil_div(batch, block_images) * blocks_down : 0;
  }

  // Of the tensor of results.
  Block block(int64_t index) const {
    const int64_t image = index / blocks_down * block_images;
    const int64_t row = index % blocks_down * block_down * size;
    return {image, std::min(block_images, batch - image), row,
            std::min(block_down * size, height - row)};
  }
  // Of the tensor that is read, which lies `padding` further down, those rows that are there.
  Block source(const Block& block, int64_t padding, int64_t source_height) const {
    const int64_t first = block.first_row - padding;
    const int64_t end = first + round_up(block.rows, size) + 2;
    const int64_t top = std::clamp<int64_t>(first, 0, source_height);
    return {block.first_image, block.images, top,
            std::clamp<int64_t>(end, top, source_height) - top};
  }
  int64_t tiles(const Block& b) const { return b.images * ceil_div(b.rows, size) * across; }
  int64_t most_tiles() const { return block_images * block_down * across; }
  int64_t most_rows() const { return block_down * size; }

  int64_t size, batch, height, down, across;
  int64_t block_images, block_down, blocks_down, blocks;
};

// Lists the n x n pixels of tiles [first, first + count) of a block, which begin `padding` before
// the tile's place among the results. Pixels outside the tensor are `outside`.
template <class T>
void list_pixels(const Tiling& tiling, const Block& block, int64_t first, int64_t count, int64_t n,
                 int64_t padding_y, int64_t padding_x, const ImageTensor& tensor,
                 const Pixels<T>& pixels, T* outside, T** list) {
  const int64_t down = ceil_div(block.rows, tiling.size);
  int64_t across = first % tiling.across;
  int64_t row = first / tiling.across % down;
  int64_t image = block.first_image + first / tiling.across / down;
  for (; count > 0; --count, list += n * n) {
    const int64_t top = block.first_row + row * tiling.size - padding_y;
    const int64_t left = across * tiling.size - padding_x;
    const int64_t begin = std::clamp<int64_t>(-left, 0, n);  // columns inside
    const int64_t end = std::clamp<int64_t>(tensor.width - left, begin, n);
    for (int64_t y = 0; y < n; ++y) {
      T** line = list + y * n;
      if (top + y < 0 || top + y >= tensor.height) {
        std::fill_n(line, n, outside);
        continue;
      }
      T* const pixel = pixels.at(image, top + y, left);
      for (int64_t x = 0; x < begin; ++x) line[x] = outside;
      for (int64_t x = begin; x < end; ++x) line[x] = pixel + x * pixels.pixel_stride;
      for (int64_t x = end; x < n; ++x) line[x] = outside;
    }
    if (++across == tiling.across) {
      across = 0;
      if (++row == down) row = 0, ++image;
    }
  }
}

// A tensor's side of a run of tiles, and what a slot needs for it.
template <class T>
struct Side {
  Side(const ImageTensor& tensor, int64_t channels, int64_t block_rows, const Tiling& tiling,
       int64_t n, int64_t run, bool copies, const VectorKernels<T>& isa, Arena& arena)
      : copies(copies),
        channels(channels),
        ld(round_up(channels, isa.lanes)),
        plane_stride(run * ld + kGap) {
    const int64_t rows_in_image = std::min(block_rows, tensor.height);
    const int64_t elements = copies ? tiling.block_images * rows_in_image * tensor.width * ld : 0;
    rows = arena.take<T>(elements);
    convert = arena.take<T>(scratch_size<T>(tensor.dtype, elements));
    outside = arena.take<T>(ld);
    list = arena.take<T*>(run * n * n);
    planes = arena.take<T>(n_planes(tiling.size) * plane_stride);
  }

  static int64_t n_planes(int64_t size) { return (size + 2) * (size + 2); }

  // The pixels of a block: the tensor's own, or a copy.
  Pixels<T> read(const VectorKernels<T>& isa, const ImageTensor& tensor, const Block& block,
                 int64_t first_channel) const {
    if (!copies) return pixels_of<T>(tensor, tensor.data, first_channel);
    load_block(isa, tensor, block, first_channel, channels, rows, ld, convert);
    return pixels_of(tensor, block, rows, ld);
  }

  WinogradSide<const T> from_pixels() const { return {list, nullptr, 0, 0}; }
  WinogradSide<T> to_pixels() const { return {list, nullptr, 0, 0}; }
  WinogradSide<const T> from_planes() const { return {nullptr, planes, plane_stride, ld}; }
  WinogradSide<T> to_planes() const { return {nullptr, planes, plane_stride, ld}; }

  bool copies;
  int64_t channels, ld, plane_stride;
  T *rows, *convert;  // the copy: [pixel][ld]
  T* outside;         // what pixels outside the tensor are
  T** list;           // [tile][pixel]
  T* planes;          // [plane][tile][ld]
};

}  // namespace convext::cpu
