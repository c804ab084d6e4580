#include "cpu/kernels/conv2d_gather.h"

#include <algorithm>
#include <cstring>

namespace convext::cpu {
namespace {

// A block's slab stays in the second-level cache; its pixels make the tiles worth their set-up.
// Both are constants, so that the cut, and with it every bit of a result, depends on the shape
// alone.
constexpr int64_t kSlabBytes = 768 << 10;
constexpr int64_t kBlockPixels = 256, kLargeBlockPixels = 512;

int64_t floor_mod(int64_t a, int64_t b) {
  return (a % b + b) % b;
}

}  // namespace

GatherAxis GatherAxis::forward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                               int64_t padding, int64_t dilation, Taps listed) {
  GatherAxis axis{in,
                  out,
                  kernel,
                  stride,
                  padding,
                  dilation,
                  /*transposed=*/false,
                  listed,
                  /*classes=*/1,
                  /*source_step=*/stride};
  axis.span_taps();
  return axis;
}

GatherAxis GatherAxis::backward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                int64_t padding, int64_t dilation) {
  GatherAxis axis{out,
                  in,
                  kernel,
                  stride,
                  padding,
                  dilation,
                  /*transposed=*/true,
                  Taps::needed,
                  /*classes=*/std::max<int64_t>(1, std::min(stride, in)),
                  /*source_step=*/1};
  axis.span_taps();
  return axis;
}

void GatherAxis::span_taps() {
  int64_t met = 0, low = 0, high = 0;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t residue = transposed ? floor_mod(k * dilation - padding, stride) : 0;
    int64_t position = 0;
    if (residue >= classes || !meets(k, residue, &position)) continue;
    low = met ? std::min(low, position) : position;
    high = met ? std::max(high, position) : position;
    ++met;
  }
  origin = low;
  reach = high - low + 1;
  meets_all = classes == 1 && met == kernel;
}

bool GatherAxis::meets(int64_t k, int64_t residue, int64_t* position) const {
  if (transposed) {
    const int64_t distance = residue + padding - k * dilation;
    if (distance % stride != 0) return false;
    *position = distance / stride;
  } else {
    *position = k * dilation - padding;
  }
  if (listed == Taps::all) return true;
  const int64_t last = *position + (class_count(target_size, residue) - 1) * source_step;
  return last >= 0 && *position < source_size;
}

int64_t GatherAxis::tap(int64_t k, int64_t residue) const {
  int64_t position = 0;
  return meets(k, residue, &position) ? position - origin : -1;
}

template <class T>
Gather<T>::Gather(const ImageTensor& source, int64_t channels, GatherAxis y, GatherAxis x, Cut cut,
                  Slab slab, Arena& arena)
    : source_(source), channels_(channels), y_(y), x_(x) {
  const bool by_phase = slab == Slab::by_phase;
  // Images of one pixel, or of one channel, lie the same way in any layout.
  transposed_ = by_phase && source.layout == Layout::nhwc && source.channels > 1 &&
                (source.height > 1 || source.width > 1);
  if (by_phase && !transposed_) source_.layout = Layout::nchw;
  const int64_t phases_y = by_phase ? y.source_step : 1, phases_x = by_phase ? x.source_step : 1;
  choose_blocks(cut);
  in_place_ = cut != Cut::whole_images && !transposed_ &&
              size_of(source.dtype) == int64_t(sizeof(T)) && y.inside() && x.inside() &&
              (!by_phase || fits_whole_vectors());
  slab_height_ = y_.slab_size(block_rows_);
  slab_width_ = x_.slab_size(x_.target_size);
  const int64_t width = in_place_ ? source.width : round_up(slab_width_, phases_x);
  const int64_t height = in_place_ ? source.height : round_up(slab_height_, phases_y);
  // Pixels a power of two apart would share the sets of the first-level cache.
  const bool rows = source_.layout == Layout::nhwc && !transposed_;
  const bool spread = !in_place_ && rows && channels % 64 == 0;
  const int64_t depth = in_place_ ? source.channels : spread ? channels + 16 : channels;
  if (__builtin_mul_overflow(height, width, &stride_c_) ||
      __builtin_mul_overflow(stride_c_, depth, &stride_n_)) {
    arena.take<T>(-1);  // more than 64 bits can address
    stride_n_ = stride_c_ = 0;
  }
  if (!rows) {
    stride_h_ = width / phases_x;
    stride_w_ = 1;
  } else {
    stride_c_ = 1;
    stride_h_ = width * depth;
    stride_w_ = depth;
  }
  const int64_t phase = height / phases_y * stride_h_;
  row_ = {phases_y, phases_x * phase, stride_h_};
  column_ = {phases_x, phase, stride_w_};
  row_step_ = y.source_step / phases_y * stride_h_;
  column_step_ = x.source_step / phases_x * stride_w_;
  list_taps(arena);
  list_pixels(arena);
}

template <class T>
bool Gather<T>::fits_whole_vectors() const {
  constexpr int64_t kMostLanes = 16;
  if (classes() > 1 || y_.source_step > 1 || x_.source_step > 1 || block_rows_ == 0) return false;
  const int64_t last_rows = (y_.target_size - 1) % block_rows_ + 1;
  return ((last_rows - 1) * source_.width + x_.target_size) % kMostLanes == 0;
}

template <class T>
void Gather<T>::choose_blocks(Cut cut) {
  const int64_t height = y_.target_size, width = std::max<int64_t>(1, x_.target_size);
  const auto slab_bytes = [&](int64_t rows) {
    return double(y_.slab_size(rows)) * double(x_.slab_size(width)) * double(channels_) * sizeof(T);
  };
  const int64_t pixels = cut == Cut::large ? kLargeBlockPixels : kBlockPixels;
  block_images_ = 1;
  block_rows_ = height;
  if (cut != Cut::whole_images) {
    const int64_t unit = y_.classes;  // keeps every block's rows in step with the residue classes
    const int64_t enough = round_up(std::max<int64_t>(1, pixels / width), unit);
    block_rows_ = std::min(height, enough);
    while (block_rows_ > unit && slab_bytes(block_rows_) > kSlabBytes) {
      block_rows_ = round_up(block_rows_ / 2, unit);
    }
    if (cut == Cut::large && block_rows_ > 0) {
      block_rows_ = std::min(height, round_up(chain_length(height, block_rows_), unit));
    }
  }
  if (block_rows_ >= height && height > 0) {
    const int64_t by_pixels = pixels / (height * width);
    const double by_bytes = kSlabBytes / std::max(1.0, slab_bytes(height));
    block_images_ = std::min<int64_t>(by_pixels, int64_t(std::min(by_bytes, 1e9)));
    block_images_ = std::clamp<int64_t>(block_images_, 1, std::max<int64_t>(1, source_.batch));
  }
  blocks_across_ = ceil_div(source_.batch, block_images_);
  blocks_down_ = block_rows_ > 0 ? ceil_div(height, block_rows_) : 0;
}

template <class T>
Block Gather<T>::block(int64_t index) const {
  const int64_t image = index / blocks_down_ * block_images_;
  const int64_t row = index % blocks_down_ * block_rows_;
  return {image, std::min(block_images_, source_.batch - image), row,
          std::min(block_rows_, y_.target_size - row)};
}

template <class T>
void Gather<T>::list_taps(Arena& arena) {
  tap_start_ = arena.keep<int64_t>(classes() + 1);
  taps_ = arena.keep<int64_t>(tap_total());
  tap_weights_ = arena.keep<int64_t>(tap_total());
  if (!arena.must_fill_kept()) return;
  int64_t count = 0;
  for (int64_t residue = 0; residue < classes(); ++residue) {
    const int64_t start = tap_start_[residue] = count;
    const int64_t residue_y = residue / x_.classes, residue_x = residue % x_.classes;
    for (int64_t ky = 0; ky < y_.kernel && channels_ > 0; ++ky) {
      const int64_t tap_y = y_.tap(ky, residue_y);
      if (tap_y < 0) continue;
      for (int64_t kx = 0; kx < x_.kernel; ++kx) {
        const int64_t tap_x = x_.tap(kx, residue_x);
        if (tap_x < 0) continue;
        taps_[count] = row_.offset(tap_y) + column_.offset(tap_x);
        tap_weights_[count] = ky * x_.kernel + kx;
        ++count;
      }
    }
    // Every further channel meets the same.
    const int64_t plane = count - start;
    for (; count < start + channels_ * plane; ++count) {
      taps_[count] = taps_[count - plane] + stride_c_;
      tap_weights_[count] = tap_weights_[count - plane] + y_.kernel * x_.kernel;
    }
  }
  tap_start_[classes()] = count;
}

template <class T>
void Gather<T>::list_pixels(Arena& arena) {
  pixel_start_ = arena.keep<int64_t>(classes());
  pixel_sources_ = arena.keep<int64_t>(most_pixels());
  pixel_targets_ = arena.keep<int64_t>(most_pixels());
  if (!arena.must_fill_kept()) return;
  const int64_t width = x_.target_size;
  int64_t count = 0;
  for (int64_t residue = 0; residue < classes(); ++residue) {
    pixel_start_[residue] = count;
    const int64_t residue_y = residue / x_.classes, residue_x = residue % x_.classes;
    const int64_t rows = y_.class_count(block_rows_, residue_y);
    const int64_t columns = x_.class_count(width, residue_x);
    for (int64_t n = 0; n < block_images_; ++n) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = residue_y + i * y_.classes;
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t x = residue_x + j * x_.classes;
          pixel_sources_[count] = n * stride_n_ + i * row_step_ + j * column_step_;
          pixel_targets_[count] = (n * block_rows_ + y) * width + x;
          ++count;
        }
      }
    }
  }
}

// Blocks hold either several whole images or rows of one, so a smaller last block is a prefix.
template <class T>
int64_t Gather<T>::pixel_count(const Block& b, int64_t residue) const {
  return b.images * pixel_rows(b, residue) * pixel_columns(residue);
}

template <class T>
const T* Gather<T>::fill(const VectorKernels<T>& isa, const Block& b, int64_t first_channel,
                         T* slab, bool refill) const {
  const int64_t top = y_.slab_start(b.first_row), left = x_.slab_start(0);
  const bool nchw = source_.layout == Layout::nchw;
  if (in_place_) {
    const T* image = static_cast<const T*>(source_.data) + b.first_image * stride_n_;
    return image + first_channel * stride_c_ + top * stride_h_ + left * stride_w_;
  }
  // Positions of the slab that lie in the source.
  const int64_t height = y_.slab_size(b.rows);
  const int64_t first = std::clamp<int64_t>(-left, 0, slab_width_);
  const int64_t columns = std::clamp<int64_t>(source_.width - left, first, slab_width_) - first;
  const int64_t first_row = std::clamp<int64_t>(-top, 0, height);
  const int64_t rows = std::clamp<int64_t>(source_.height - top, first_row, height) - first_row;
  const bool padded = columns < slab_width_ || rows < height;
  if (padded && !(refill && refillable())) std::fill(slab, slab + b.images * stride_n_, T(0));
  const bool same_type = size_of(source_.dtype) == int64_t(sizeof(T));
  // Matrices of the source's elements, the first of them at `offset`, to a part of the slab.
  const auto copy = [&](int64_t offset, const PhasedCopy<T>& c) {
    if (same_type) {
      PhasedCopy<T> all = c;
      all.from = static_cast<const T*>(source_.data) + offset;
      isa.phased_copy(all);
      return;
    }
    constexpr int64_t kPiece = 256;
    T piece[kPiece];
    PhasedCopy<T> part = c;
    part.from = piece;
    part.rows = part.planes = 1;
    for (int64_t plane = 0; plane < c.planes; ++plane) {
      part.to = c.to + plane * c.to_plane;
      for (int64_t r = 0; r < c.rows; ++r) {
        part.first_row = c.first_row + r;
        for (int64_t x = 0; x < c.cols; x += kPiece) {
          part.cols = std::min(kPiece, c.cols - x);
          part.first_col = c.first_col + x;
          const int64_t from = offset + plane * c.from_plane + r * c.ld_from + x;
          isa.load(source_.dtype, source_.data, from, piece, part.cols);
          isa.phased_copy(part);
        }
      }
    }
  };
  const int64_t line = source_.width * (nchw ? 1 : source_.channels);
  const int64_t plane = line * source_.height, image = nchw ? plane * source_.channels : plane;
  const int64_t start = (top + first_row) * line + (left + first) * (nchw ? 1 : source_.channels) +
                        first_channel * (nchw ? plane : 1);
  if (nchw && channels_ == source_.channels) {  // all planes of the block's images are one sequence
    copy(b.first_image * image + start, {nullptr, line, rows, columns, slab, row_, column_,
                                         first_row, first, b.images * channels_, plane, stride_c_});
    return slab;
  }
  const PhasedAxis pixel{1, 0, stride_w_}, row{1, 0, stride_h_}, element{1, 0, 1};
  T* corner = slab + first_row * stride_h_ + first * stride_w_;  // nhwc's first row there
  if (!nchw && !transposed_ && channels_ == source_.channels && channels_ == stride_w_) {
    copy(b.first_image * image + start, {nullptr, line, rows, columns * channels_, corner, row,
                                         element, 0, 0, b.images, image, stride_n_});
    return slab;
  }
  for (int64_t n = 0; n < b.images; ++n) {
    const int64_t offset = (b.first_image + n) * image + start;
    if (transposed_) {
      for (int64_t r = 0; r < rows; ++r) {
        isa.transpose(static_cast<const T*>(source_.data) + offset + r * line, source_.channels,
                      corner + n * stride_n_ + r * stride_h_, stride_c_, columns, channels_);
      }
    } else if (nchw) {
      copy(offset, {nullptr, line, rows, columns, slab + n * stride_n_, row_, column_, first_row,
                    first, channels_, plane, stride_c_});
    } else {
      copy(offset, {nullptr, source_.channels, columns, channels_, corner + n * stride_n_, pixel,
                    element, 0, 0, rows, line, stride_h_});
    }
  }
  return slab;
}

template <class T>
void Gather<T>::unfill(const VectorKernels<T>& isa, const Block& b, int64_t first_channel,
                       const T* slab, void* data) const {
  const int64_t top = y_.slab_start(b.first_row), left = x_.slab_start(0);
  const bool nchw = source_.layout == Layout::nchw;
  const int64_t bytes = size_of(source_.dtype);
  // Source columns that the slab covers; pixels outside the slab meet no tap, their gradient is
  // zero.
  const int64_t first = std::clamp<int64_t>(left, 0, source_.width);
  const int64_t last = std::clamp<int64_t>(left + slab_width_, first, source_.width);
  const auto store = [&](int64_t offset, const T* from, int64_t n) {
    if (from) {
      isa.store(from, source_.dtype, data, offset, n);
    } else {
      std::memset(static_cast<char*>(data) + offset * bytes, 0, n * bytes);
    }
  };
  for (int64_t n = 0; n < b.images; ++n) {
    const T* image = slab + n * stride_n_;
    for (int64_t c = 0; c < (nchw ? channels_ : 1); ++c) {
      for (int64_t y = 0; y < source_.height; ++y) {
        const bool inside = y >= top && y < top + slab_height_;
        const T* row = image + c * stride_c_ + (y - top) * stride_h_ - left * stride_w_;
        const int64_t columns = inside ? last : 0, begin = inside ? first : 0;
        if (nchw) {
          const int64_t line =
              ((b.first_image + n) * source_.channels + first_channel + c) * source_.height + y;
          const int64_t offset = line * source_.width;
          store(offset, nullptr, begin);
          if (columns > begin) store(offset + begin, row + begin, columns - begin);
          store(offset + columns, nullptr, source_.width - columns);
        } else {
          const int64_t line = (b.first_image + n) * source_.height + y;
          for (int64_t x = 0; x < source_.width; ++x) {
            store((line * source_.width + x) * source_.channels + first_channel,
                  x >= begin && x < columns ? row + x * stride_w_ : nullptr, channels_);
          }
        }
      }
    }
  }
}

template class Gather<float>;
template class Gather<double>;

}  // namespace convext::cpu
