// Depthwise convolution: a filter sees one channel. Nothing is summed over channels, so vector
// lanes run across them, and a pass moves more memory than it computes. Tensors whose channels lie
// side by side (nhwc) are read and written where they are, each element once; others (16-bit types,
// nchw where conv2d_depthwise_planes.cpp does not do better) go block by block through that form.
// Padding is neither copied nor read: pixels are cut into rectangles that meet the same taps.
//
// With several filters per channel, an image tensor of the filters counts as that many tensors
// ("planes") of one filter per channel.
#include <algorithm>

#include "cpu/kernels/conv2d_depthwise_planes.h"
#include "cpu/kernels/conv2d_driver.h"
#include "cpu/kernels/depthwise_axis.h"

namespace convext::cpu {
namespace {

// How the work is cut. Constants, for the sums of backward_weight depend on them.
constexpr int64_t kBlockBytes = 512 << 10;  // of sources and targets in a block of rows
constexpr int64_t kCopiedChannels = 32;     // of a block that is copied
constexpr int64_t kSummedChannels = 256;    // of one that is summed up in place

// Rows of one image and a range of channels, in place or in scratch: element (plane, row, column,
// channel) lies at data + plane * plane_step + row * row_step + column * column_step + channel,
// counting from the block's first row and channel.
template <class T>
struct View {
  T* data;
  int64_t plane_step, row_step, column_step;
};

// An image tensor of which blocks become views.
template <class T>
class Side {
 public:
  struct Scratch {
    T *planes, *rows, *convert;
  };

  Side(const VectorKernels<T>& isa, const ImageTensor& tensor, int64_t planes, int64_t most_rows,
       int64_t most_channels, bool copies)
      : isa_(isa),
        tensor_(tensor),
        planes_(planes),
        channels_(tensor.channels / planes),
        in_place_(!copies),
        most_pixels_(most_rows * tensor.width),
        plane_ld_(round_up(most_channels, isa.lanes)),
        ld_(round_up(most_channels * planes, isa.lanes)) {}

  int64_t ld() const { return ld_; }

  Scratch scratch(Arena& arena) const {
    if (in_place_) return {};
    return {arena.take<T>(planes_ == 1 ? 0 : planes_ * most_pixels_ * plane_ld_),
            arena.take<T>(most_pixels_ * ld_),
            arena.take<T>(scratch_size<T>(tensor_.dtype, most_pixels_ * ld_))};
  }

  // A view to be written to, in `data` itself where that goes.
  View<T> target(void* data, const Block& b, int64_t channel, const Scratch& s) const {
    if (!in_place_) return copied(s);
    const int64_t row = tensor_.width * channels_;
    const int64_t first = (b.first_image * tensor_.height + b.first_row) * row + channel;
    return {static_cast<T*>(data) + first, 0, row, channels_};
  }

  // A view that holds the tensor's values; in place it is the tensor, and nothing writes to it.
  View<T> read(const Block& b, int64_t channel, int64_t count, const Scratch& s) const {
    if (in_place_) return target(const_cast<void*>(tensor_.data), b, channel, s);
    load_block(isa_, tensor_, b, channel * planes_, count * planes_, s.rows, ld_, s.convert);
    if (planes_ > 1) {
      each_value(b, count, s, [](T& plane, T& row) { plane = row; });
    }
    return copied(s);
  }

  // What was written to a view, as rows[pixel][ld()] of all planes.
  T* rows(const Block& b, int64_t count, const Scratch& s) const {
    if (planes_ > 1) {
      each_value(b, count, s, [](T& plane, T& row) { row = plane; });
    }
    return s.rows;
  }
  void write(void* data, const Block& b, int64_t channel, int64_t count, const Scratch& s) const {
    store_block(isa_, tensor_, b, channel * planes_, count * planes_, s.rows, ld_, s.convert, data);
  }

 private:
  View<T> copied(const Scratch& s) const {
    if (planes_ == 1) return {s.rows, 0, tensor_.width * ld_, ld_};
    return {s.planes, most_pixels_ * plane_ld_, tensor_.width * plane_ld_, plane_ld_};
  }

  template <class Body>
  void each_value(const Block& b, int64_t count, const Scratch& s, const Body& body) const {
    for (int64_t pixel = 0; pixel < b.rows * tensor_.width; ++pixel) {
      T* row = s.rows + pixel * ld_;
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t plane = 0; plane < planes_; ++plane) {
          body(s.planes[(plane * most_pixels_ + pixel) * plane_ld_ + c], *row++);
        }
      }
    }
  }

  const VectorKernels<T>& isa_;
  ImageTensor tensor_;
  int64_t planes_, channels_;
  bool in_place_;
  int64_t most_pixels_, plane_ld_, ld_;
};

// What all passes share: axes, and the cut into blocks of rows and ranges of channels.
template <class T>
class Depthwise {
 public:
  struct Scratch {
    Scratch(const Depthwise& d, Arena& arena)
        : source(d.source_.scratch(arena)), target(d.target_.scratch(arena)) {}
    typename Side<T>::Scratch source, target;
  };

  Depthwise(const Conv2dCall& call, Arena& arena)
      : call_(call),
        p_(call.problem),
        isa_(call.isa->of<T>()),
        backward_(call.pass == Conv2dPass::backward_input),
        planes_(p_.group_out_channels()),
        y_((backward_ ? DepthwiseAxis::backward : DepthwiseAxis::forward)(
            p_.in_height, p_.out_height(), p_.kernel_height, p_.stride_height, p_.padding_height,
            p_.dilation_height, tap_group(p_.kernel_height), arena)),
        x_((backward_ ? DepthwiseAxis::backward : DepthwiseAxis::forward)(
            p_.in_width, p_.out_width(), p_.kernel_width, p_.stride_width, p_.padding_width,
            p_.dilation_width, tap_group(p_.kernel_width), arena)),
        copies_(call.layout == Layout::nchw || size_of(call.dtype) != int64_t(sizeof(T))),
        range_(choose_range()),
        block_rows_(choose_rows()),
        source_(side(backward_, y_.most_sources(block_rows_))),
        target_(side(!backward_, block_rows_)),
        weight_ld_(round_up(p_.in_channels, isa_.lanes)) {}

  void compute_pixels(Arena& arena);
  void compute_weights(Arena& arena);

 private:
  // backward_weight holds the sums of a few taps in registers; the other passes meet all at once.
  int64_t tap_group(int64_t kernel) const {
    return call_.pass == Conv2dPass::backward_weight ? kDepthwiseTaps : kernel;
  }

  int64_t choose_range() const {
    // An epilogue wants whole rows of channels.
    if (call_.epilogue) return p_.in_channels;
    const bool in_place = !copies_ && planes_ == 1;
    if (in_place && call_.pass != Conv2dPass::backward_weight) return p_.in_channels;
    const int64_t most = in_place ? kSummedChannels : kCopiedChannels;
    const int64_t equal = ceil_div(p_.in_channels, ceil_div(p_.in_channels, most));
    return std::min(p_.in_channels, round_up(equal, kCopiedChannels));
  }

  int64_t choose_rows() const {
    const double pixel_bytes = double(range_) * sizeof(T);
    const auto bytes = [&](int64_t rows) {
      const double sources = double(y_.most_sources(rows)) * double(x_.source_size);
      const double targets = double(rows) * double(x_.target_size);
      return pixel_bytes * (backward_ ? sources * planes_ + targets : sources + targets * planes_);
    };
    int64_t rows = round_up(y_.target_size, y_.classes);
    while (rows > y_.classes && bytes(rows) > kBlockBytes) rows = round_up(rows / 2, y_.classes);
    return std::min(rows, y_.target_size);
  }

  Side<T> side(bool of_filters, int64_t most_rows) const {
    const bool result = of_filters == !backward_;
    const bool copies = copies_ || (of_filters && planes_ > 1) || (result && call_.epilogue);
    return Side<T>(isa_, of_filters ? grad_output_tensor(call_) : input_tensor(call_),
                   of_filters ? planes_ : 1, most_rows, range_, copies);
  }

  int64_t ranges() const { return ceil_div(p_.in_channels, range_); }
  int64_t range_count(int64_t range) const {
    return std::min(range_, p_.in_channels - range * range_);
  }
  int64_t blocks_down() const { return ceil_div(y_.target_size, block_rows_); }
  int64_t block_count() const { return p_.batch * blocks_down(); }
  Block block(int64_t index) const {
    const int64_t row = index % blocks_down() * block_rows_;
    return {index / blocks_down(), 1, row, std::min(block_rows_, y_.target_size - row)};
  }
  Block sources(const Block& b) const {
    const auto rows = y_.sources(b.first_row, b.first_row + b.rows);
    return {b.first_image, 1, rows.first, rows.end - rows.first};
  }

  // weights[plane][tap][weight_ld], to and from (in_channels, planes, taps), as which a tensor of
  // (O, 1, kH, kW) lies in either layout.
  int64_t weights_size() const { return planes_ * p_.kernel_taps() * weight_ld_; }
  void load_weights(T* weights, T* convert) const;
  void store_weights(const T* weights, int64_t channel, int64_t count, T* convert) const;

  template <class Body>
  void for_rectangles(const Block& target, const Block& source, const View<T>& from,
                      const View<T>& to, const Body& body) const;

  const Conv2dCall& call_;
  const Conv2dProblem& p_;
  const VectorKernels<T>& isa_;
  bool backward_;
  int64_t planes_;
  DepthwiseAxis y_, x_;
  bool copies_;
  int64_t range_;       // channels of a block
  int64_t block_rows_;  // targets
  Side<T> source_, target_;
  int64_t weight_ld_;
};

// Calls body(tile, offset) for the rectangles of a block whose pixels all meet the same taps. The
// tile lacks weights, of which the first tap's begin at `offset`.
template <class T>
template <class Body>
void Depthwise<T>::for_rectangles(const Block& target, const Block& source, const View<T>& from,
                                  const View<T>& to, const Body& body) const {
  DepthwiseTile<T> tile{};
  tile.source_row = y_.source_step * from.row_step;
  tile.source_column = x_.source_step * from.column_step;
  tile.pixel_row = y_.classes * to.row_step;
  tile.pixel_column = x_.classes * to.column_step;
  tile.tap_row = y_.tap_step * from.row_step;
  tile.tap_column = x_.tap_step * from.column_step;
  tile.weight_row = y_.kernel_step * p_.kernel_width * weight_ld_;
  tile.weight_column = x_.kernel_step * weight_ld_;
  for (int64_t i = 0; i < y_.span_count(); ++i) {
    const DepthwiseSpan y = y_.within(y_.span(i), target.first_row, target.first_row + target.rows);
    if (y.count == 0) continue;
    for (int64_t j = 0; j < x_.span_count(); ++j) {
      const DepthwiseSpan& x = x_.span(j);
      const bool met = y.taps > 0 && x.taps > 0;
      const int64_t row = y.residue + y.first * y_.classes - target.first_row;
      const int64_t column = x.residue + x.first * x_.classes;
      tile.tap_rows = met ? y.taps : 0;
      tile.tap_columns = met ? x.taps : 0;
      tile.source = met ? from.data + (y.source - source.first_row) * from.row_step +
                              x.source * from.column_step
                        : from.data;
      tile.pixel = to.data + row * to.row_step + column * to.column_step;
      tile.rows = y.count;
      tile.columns = x.count;
      body(tile, (y.kernel * p_.kernel_width + x.kernel) * weight_ld_);
    }
  }
}

template <class T>
void Depthwise<T>::load_weights(T* weights, T* convert) const {
  const int64_t taps = p_.kernel_taps(), size = p_.out_channels * taps;
  const T* from = static_cast<const T*>(call_.weight);
  if (size_of(call_.dtype) != int64_t(sizeof(T))) {
    isa_.load(call_.dtype, call_.weight, 0, convert, size);
    from = convert;
  }
  for (int64_t plane = 0; plane < planes_; ++plane) {
    isa_.transpose(from + plane * taps, planes_ * taps, weights + plane * taps * weight_ld_,
                   weight_ld_, p_.in_channels, taps);
  }
}

template <class T>
void Depthwise<T>::store_weights(const T* weights, int64_t channel, int64_t count,
                                 T* convert) const {
  const int64_t taps = p_.kernel_taps(), filter = planes_ * taps;
  const bool same_type = size_of(call_.dtype) == int64_t(sizeof(T));
  T* to = same_type ? static_cast<T*>(call_.output) + channel * filter : convert;
  for (int64_t plane = 0; plane < planes_; ++plane) {
    isa_.transpose(weights + plane * taps * weight_ld_ + channel, weight_ld_, to + plane * taps,
                   filter, taps, count);
  }
  if (!same_type) isa_.store(to, call_.dtype, call_.output, channel * filter, count * filter);
}

// Forward, and backward_input as a gather from grad_output.
template <class T>
void Depthwise<T>::compute_pixels(Arena& arena) {
  const int64_t taps = p_.kernel_taps();
  const int64_t items = block_count() * ranges();
  const int64_t slots = slot_count(call_, items);
  T* weights = arena.take<T>(weights_size());
  T* convert = arena.take<T>(scratch_size<T>(call_.dtype, p_.out_channels * taps));
  T* bias = arena.take<T>(call_.bias ? 2 * p_.out_channels : 0);
  Conv2dCall whole = call_;  // all channels as one group
  whole.problem.groups = 1;
  BlockEpilogue<T> epilogue(whole, p_.out_channels, target_.ld(), block_count(), isa_, arena);
  using EpilogueScratch = typename BlockEpilogue<T>::Scratch;
  Arena part(nullptr);
  Scratch(*this, part);
  EpilogueScratch(epilogue, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  load_weights(weights, convert);
  if (call_.bias) {  // [plane][channel]
    T* read = bias + p_.out_channels;
    isa_.load(call_.dtype, call_.bias, 0, read, p_.out_channels);
    for (int64_t plane = 0; plane < planes_; ++plane) {
      T* to = bias + plane * p_.in_channels;
      for (int64_t c = 0; c < p_.in_channels; ++c) to[c] = read[c * planes_ + plane];
    }
  }
  if (call_.epilogue) epilogue.prepare(0);
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch scratch(*this, own);
    const EpilogueScratch epilogue_scratch(epilogue, own);
    const int64_t index = item / ranges(), range = item % ranges();
    const int64_t channel = range * range_, count = range_count(range);
    const Block to = block(index), from = sources(to);
    const View<T> source = source_.read(from, channel, count, scratch.source);
    const View<T> target = target_.target(call_.output, to, channel, scratch.target);
    for_rectangles(to, from, source, target, [&](DepthwiseTile<T> tile, int64_t offset) {
      tile.channels = count;
      tile.chain_rows = std::max<int64_t>(1, kSumChain / p_.kernel_width);
      // Few columns, at an edge, but many rows: rows are columns to the tile.
      if (tile.columns < 4 && tile.rows > tile.columns) {
        std::swap(tile.rows, tile.columns);
        std::swap(tile.source_row, tile.source_column);
        std::swap(tile.pixel_row, tile.pixel_column);
      }
      const DepthwiseTile<T> first = tile;
      for (int64_t plane = 0; plane < planes_; ++plane) {
        tile.source = first.source + (backward_ ? plane * source.plane_step : 0);
        tile.pixel = first.pixel + (backward_ ? 0 : plane * target.plane_step);
        tile.weight = weights + plane * taps * weight_ld_ + offset + channel;
        tile.init = call_.bias ? bias + plane * p_.in_channels + channel : nullptr;
        tile.accumulate = backward_ && plane > 0;
        isa_.depthwise_pixels(tile);
      }
    });
    if (call_.epilogue || copies_ || (!backward_ && planes_ > 1)) {
      T* rows = target_.rows(to, count, scratch.target);
      if (call_.epilogue) {
        epilogue.apply(0, index, rows, to.rows * x_.target_size, epilogue_scratch);
      }
      target_.write(call_.output, to, channel, count, scratch.target);
    }
  });
  if (call_.epilogue) epilogue.finish();
}

// The sum over all pixels: in chains of at most kSumChain, added up in order within a split of the
// blocks, and over the splits in order.
template <class T>
void Depthwise<T>::compute_weights(Arena& arena) {
  constexpr int64_t kMostSplits = 16;
  const int64_t blocks = block_count();
  const int64_t splits = std::clamp<int64_t>(ceil_div(blocks, 2), 1, kMostSplits);
  const int64_t items = splits * ranges();
  const int64_t slots = slot_count(call_, items);
  const int64_t taps = planes_ * p_.kernel_taps();
  T* partials = arena.take<T>(splits * weights_size());
  const int64_t convert_size = scratch_size<T>(call_.dtype, range_ * taps);
  T* convert = arena.take<T>(slots * convert_size);
  Arena part(nullptr);
  Scratch(*this, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch scratch(*this, own);
    const int64_t split = item / ranges(), range = item % ranges();
    const int64_t channel = range * range_, count = range_count(range);
    T* sums = partials + split * weights_size() + channel;
    for (int64_t tap = 0; tap < taps; ++tap) std::fill_n(sums + tap * weight_ld_, count, T(0));
    for (int64_t b = split * blocks / splits; b < (split + 1) * blocks / splits; ++b) {
      const Block to = block(b), from = sources(to);
      const View<T> source = source_.read(from, channel, count, scratch.source);
      const View<T> grad = target_.read(to, channel, count, scratch.target);
      for_rectangles(to, from, source, grad, [&](DepthwiseTile<T> tile, int64_t offset) {
        if (tile.tap_rows == 0) return;
        tile.channels = count;
        const DepthwiseTile<T> all = tile;
        const int64_t most_rows = std::max<int64_t>(1, kSumChain / all.columns);
        for_tiles(all.rows, most_rows, [&](int64_t first_row, int rows) {
          for_tiles(all.columns, kSumChain, [&](int64_t first, int columns) {
            tile.rows = rows;
            tile.columns = columns;
            tile.source = all.source + first_row * all.source_row + first * all.source_column;
            for (int64_t plane = 0; plane < planes_; ++plane) {
              tile.pixel = all.pixel + first_row * all.pixel_row + first * all.pixel_column +
                           plane * grad.plane_step;
              tile.weight = sums + plane * p_.kernel_taps() * weight_ld_ + offset;
              isa_.depthwise_weights(tile);
            }
          });
        });
      });
    }
  });
  run_slots(std::min(slots, ranges()), ranges(), [&](int64_t slot, int64_t range) {
    const int64_t channel = range * range_, count = range_count(range);
    for (int64_t split = 1; split < splits; ++split) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        T* sum = partials + tap * weight_ld_ + channel;
        const T* other = sum + split * weights_size();
        for (int64_t c = 0; c < count; ++c) sum[c] += other[c];
      }
    }
    store_weights(partials, channel, count, convert + slot * convert_size);
  });
}

template <class T>
void run(const Conv2dCall& call, Arena& arena) {
  Depthwise<T> depthwise(call, arena);
  if (call.pass == Conv2dPass::backward_weight) {
    depthwise.compute_weights(arena);
  } else {
    depthwise.compute_pixels(arena);
  }
}

}  // namespace

void conv2d_depthwise(const Conv2dCall& call, Arena& arena) {
  if (depthwise_prefers_planes(call)) return conv2d_depthwise_planes(call, arena);
  call.dtype == DType::float64 ? run<double>(call, arena) : run<float>(call, arena);
}

}  // namespace convext::cpu
