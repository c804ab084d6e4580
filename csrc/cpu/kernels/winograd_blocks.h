// Tiles of images for Winograd's convolution: how they are cut into blocks, where their pixels lie,
// and what a thread keeps of them.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "cpu/kernels/conv2d_gather.h"
#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// Elements by which planes lie further apart than they need to: powers of two would meet in the
// same sets of a cache.
constexpr int64_t kGap = 16;

constexpr int kAllRows = -1;

// A rectangle of the pixels of some images.
struct Window {
  int64_t first_image, images, first_row, rows, first_column, columns;
  int64_t pixels() const { return images * rows * columns; }
};

// A part of a tensor as pixels, the channels of one group side by side. Coordinates are the
// tensor's.
template <class T>
struct Pixels {
  T* data;  // where image, y and x of the part's corner lie
  int64_t image_stride, row_stride, pixel_stride;
  int64_t first_image, first_row, first_column;

  T* at(int64_t image, int64_t y, int64_t x) const {
    return data + (image - first_image) * image_stride + (y - first_row) * row_stride +
           (x - first_column) * pixel_stride;
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
          0,
          0};
}

template <class T>
Pixels<T> pixels_of(const Window& window, T* rows, int64_t ld) {
  const int64_t row = window.columns * ld;
  return {
      rows, window.rows * row, row, ld, window.first_image, window.first_row, window.first_column};
}

// Calls move(tensor, block, pixel) for the runs of pixels of a window that are neighbours in memory
// in either layout: `pixel` is the first one's index in the window. Where they are less than rows,
// the tensor is one of images a pixel wide.
template <class Move>
void for_runs(const ImageTensor& tensor, const Window& w, const Move& move) {
  if (w.columns == tensor.width) {
    move(tensor, Block{w.first_image, w.images, w.first_row, w.rows}, int64_t(0));
    return;
  }
  ImageTensor line = tensor;
  line.height = tensor.height * tensor.width;
  line.width = 1;
  for (int64_t i = 0; i < w.images * w.rows; ++i) {
    const int64_t row = w.first_row + i % w.rows;
    const int64_t first = row * tensor.width + w.first_column;
    move(line, Block{w.first_image + i / w.rows, 1, first, w.columns}, i * w.columns);
  }
}

// Tiles of a tensor of results, and the blocks of them that are worked on at a time, at most `most`
// tiles: some images, or some rows of tiles of one, or a part of such a row.
struct Tiling {
  Tiling(const ImageTensor& results, int64_t size, int64_t most)
      : size(size),
        batch(results.batch),
        height(results.height),
        width(results.width),
        down(ceil_div(results.height, size)),
        across(ceil_div(results.width, size)) {
    const int64_t images =
        std::clamp<int64_t>(most / (down * across), 1, std::max<int64_t>(1, batch));
    block_images = ceil_div(batch, ceil_div(std::max<int64_t>(1, batch), images));
    const int64_t rows = std::clamp<int64_t>(most / across, 1, down);
    block_down = ceil_div(down, ceil_div(down, rows));
    blocks_down = ceil_div(down, block_down);
    block_across = ceil_div(across, ceil_div(across, most));
    blocks_across = ceil_div(across, block_across);
    if (blocks_down > 1 || blocks_across > 1) block_images = 1;
    blocks = block_images ? ceil_div(batch, block_images) * blocks_down * blocks_across : 0;
  }

  // Of the tensor of results.
  Window block(int64_t index) const {
    const int64_t column = index % blocks_across * block_across * size;
    const int64_t line = index / blocks_across;
    const int64_t row = line % blocks_down * block_down * size;
    const int64_t image = line / blocks_down * block_images;
    return {image,  std::min(block_images, batch - image),
            row,    std::min(block_down * size, height - row),
            column, std::min(block_across * size, width - column)};
  }
  // Of the tensor that is read, which lies `padding` further, those pixels that are there.
  Window source(const Window& block, int64_t padding_y, int64_t padding_x,
                const ImageTensor& tensor) const {
    const auto clip = [&](int64_t first, int64_t count, int64_t length, int64_t& from,
                          int64_t& size_there) {
      from = std::clamp<int64_t>(first, 0, length);
      size_there = std::clamp<int64_t>(first + round_up(count, size) + 2, from, length) - from;
    };
    Window w = block;
    clip(block.first_row - padding_y, block.rows, tensor.height, w.first_row, w.rows);
    clip(block.first_column - padding_x, block.columns, tensor.width, w.first_column, w.columns);
    return w;
  }
  int64_t tiles(const Window& b) const {
    return b.images * ceil_div(b.rows, size) * ceil_div(b.columns, size);
  }
  int64_t most_tiles() const { return block_images * block_down * block_across; }
  // Of a tensor of which a block's tiles read `halo` rows and columns more than they have.
  int64_t most_pixels(const ImageTensor& tensor, int64_t halo) const {
    return block_images * std::min(block_down * size + halo, tensor.height) *
           std::min(block_across * size + halo, tensor.width);
  }

  int64_t size, batch, height, width, down, across;
  int64_t block_images, block_down, blocks_down, block_across, blocks_across, blocks;
};

// Lists the n x n pixels of a block's tiles, which begin `padding` before the tile's place among
// the results. Pixels outside the tensor are `outside`.
template <class T>
void list_pixels(const Tiling& tiling, const Window& block, int64_t n, int64_t padding_y,
                 int64_t padding_x, const ImageTensor& tensor, const Pixels<T>& pixels, T* outside,
                 T** list) {
  const int64_t bottom = block.first_row + block.rows, right = block.first_column + block.columns;
  for (int64_t image = block.first_image; image < block.first_image + block.images; ++image) {
    for (int64_t row = block.first_row; row < bottom; row += tiling.size) {
      for (int64_t column = block.first_column; column < right; column += tiling.size) {
        const int64_t top = row - padding_y, left = column - padding_x;
        const int64_t begin = std::clamp<int64_t>(-left, 0, n);  // columns inside
        const int64_t end = std::clamp<int64_t>(tensor.width - left, begin, n);
        for (int64_t y = 0; y < n; ++y, list += n) {
          if (top + y < 0 || top + y >= tensor.height) {
            std::fill_n(list, n, outside);
            continue;
          }
          T* const pixel = pixels.at(image, top + y, left);
          for (int64_t x = 0; x < begin; ++x) list[x] = outside;
          for (int64_t x = begin; x < end; ++x) list[x] = pixel + x * pixels.pixel_stride;
          for (int64_t x = end; x < n; ++x) list[x] = outside;
        }
      }
    }
  }
}

// A tensor's side of a block of tiles, and what a slot needs for it. Where the pixels do not lie as
// the transforms want them, a copy of some channels at a time does, which stays in the first-level
// cache or not far from it. Planes are cut into parts of `part` channels, each [tile][part], so
// that what is multiplied at a time is one run of memory.
template <class T>
class Side {
 public:
  // n x n pixels of a tile; planes of `lanes` channels; `whole`: copies, and all channels at a
  // time.
  Side(const ImageTensor& tensor, int64_t channels, int64_t lanes, int64_t part,
       const Tiling& tiling, int64_t n, bool whole, const VectorKernels<T>& isa, Arena& arena)
      : copies(whole || !in_place<T>(tensor)),
        ld(round_up(std::min(part, lanes), isa.lanes)),
        isa_(isa),
        tensor_(tensor),
        tiling_(tiling),
        channels_(channels),
        part_(std::max<int64_t>(1, part)),
        part_stride_(tiling.most_tiles() * ld),
        plane_stride_(ceil_div(lanes, part_) * part_stride_ + kGap),
        n_(n) {
    // Pixels of an nhwc tensor are converted, and those of an nchw tensor are transposed.
    const int64_t all = round_up(channels, isa.lanes);
    const bool some = copies && !whole && tensor.layout == Layout::nchw;
    chunk_ = some ? std::min(all, kChunk) : all;
    const int64_t elements = copies ? tiling.most_pixels(tensor, n - tiling.size) * chunk_ : 0;
    rows = arena.take<T>(elements);
    convert_ = arena.take<T>(scratch_size<T>(tensor.dtype, elements));
    outside_ = arena.take<T>(all);
    list_ = arena.take<T*>(tiling.most_tiles() * n * n);
    planes_ = arena.take<T>((tiling.size + 2) * (tiling.size + 2) * plane_stride_);
  }

  // From `channel` on, at the block's first tile.
  T* plane(int64_t plane, int64_t channel) const {
    return planes_ + plane * plane_stride_ + channel / part_ * part_stride_ + channel % part_;
  }

  void clear() const {
    std::fill_n(planes_, (tiling_.size + 2) * (tiling_.size + 2) * plane_stride_, T(0));
  }

  // Lists the pixels of a block's tiles, which are in this window of the tensor at `data`.
  void begin(const Window& block, const Window& window, int64_t padding_y, int64_t padding_x,
             const void* data, int64_t first_channel) const {
    const Pixels<T> pixels =
        copies ? pixels_of(window, rows, chunk_) : pixels_of<T>(tensor_, data, first_channel);
    list_pixels(tiling_, block, n_, padding_y, padding_x, tensor_, pixels, outside_, list_);
  }

  // Pixels to planes, of channels [channel, end_channel), the first a multiple of the part.
  void read(WinogradMap map, const Window& window, int64_t tiles, int64_t first_channel,
            int64_t channel, int64_t end_channel) const {
    std::fill_n(outside_, round_up(channels_, isa_.lanes), T(0));
    for (int64_t c = channel; c < end_channel; c += chunk_) {
      const int64_t end = std::min(c + chunk_, end_channel);
      if (copies) {
        for_runs(tensor_, window, [&](const ImageTensor& tensor, const Block& block, int64_t at) {
          load_block(isa_, tensor, block, first_channel + c, end - c, rows + at * chunk_, chunk_,
                     convert_);
        });
      }
      for (int64_t i = c; i < end;) {
        const int64_t count = std::min(end, (i / part_ + 1) * part_) - i;
        isa_.winograd({map,
                       int(tiling_.size),
                       {list_, nullptr, 0, 0},
                       {nullptr, plane(0, i), plane_stride_, ld},
                       nullptr,
                       tiles,
                       count,
                       kAllRows,
                       false,
                       i - c});
        i += count;
      }
    }
  }

  // Planes to pixels, from `lane` on: `lanes` of them, which are all that the planes have. What is
  // copied whole is yet to be stored.
  void write(const T* bias, const Window& window, int64_t tiles, int64_t lane, int64_t lanes,
             int64_t first_channel, void* data) const {
    const int64_t there = std::min(lanes, channels_ - lane);
    for (int64_t c = 0; c < there; c += chunk_) {
      const int64_t count = std::min(chunk_, there - c);
      const bool part_of_rows = !copies || chunk_ >= channels_;
      isa_.winograd({WinogradMap::output,
                     int(tiling_.size),
                     {nullptr, planes_ + c, plane_stride_, ld},
                     {list_, nullptr, 0, 0},
                     bias ? bias + lane + c : nullptr,
                     tiles,
                     copies ? round_up(count, isa_.lanes) : count,
                     kAllRows,
                     false,
                     part_of_rows ? lane + c : 0});
      if (!part_of_rows) store(window, lane + c, count, first_channel, data);
    }
  }
  bool stores_whole() const { return copies && chunk_ >= channels_; }
  void store(const Window& window, int64_t channel, int64_t count, int64_t first_channel,
             void* data) const {
    for_runs(tensor_, window, [&](const ImageTensor& tensor, const Block& block, int64_t at) {
      store_block(isa_, tensor, block, first_channel + channel, count, rows + at * chunk_, chunk_,
                  convert_, data);
    });
  }

  bool copies;
  int64_t ld;  // from tile to tile in a part
  T* rows;     // the copy: [pixel][chunk]

 private:
  static constexpr int64_t kChunk = 32;  // channels

  const VectorKernels<T>& isa_;
  const ImageTensor tensor_;
  const Tiling& tiling_;
  int64_t channels_, part_, part_stride_, plane_stride_, n_, chunk_;
  T* convert_;
  T* outside_;  // what pixels outside the tensor are
  T** list_;    // [tile][pixel]
  T* planes_;   // [plane][part][tile][ld]
};

}  // namespace convext::cpu
