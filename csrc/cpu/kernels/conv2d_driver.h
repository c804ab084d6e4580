// The loops that direct and im2col share: cut the work into blocks, hand each to a thread with its
// own scratch, bring tensors into matrix form and results back. An algorithm supplies a Product,
// the multiplication of one block.
#pragma once

#include <algorithm>

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv2d_epilogue.h"
#include "cpu/kernels/conv2d_gather.h"
#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/slots.h"

namespace convext::cpu {

// Images of one pixel lie the same way in both layouts, of which nhwc has the longer rows.
inline Layout image_layout(const Conv2dCall& call, int64_t height, int64_t width) {
  return height == 1 && width == 1 ? Layout::nhwc : call.layout;
}

inline ImageTensor input_tensor(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const Layout layout = image_layout(call, p.in_height, p.in_width);
  return {call.input, call.dtype, layout, p.batch, p.in_channels, p.in_height, p.in_width};
}

inline ImageTensor grad_output_tensor(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const int64_t height = p.out_height(), width = p.out_width();
  const Layout layout = image_layout(call, height, width);
  return {call.grad_output, call.dtype, layout, p.batch, p.out_channels, height, width};
}

inline FilterBank filter_bank(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  return {call.dtype, call.layout, p.group_out_channels(), p.group_in_channels(), p.kernel_taps()};
}

// Gathers input pixels for output pixels.
template <class T>
Gather<T> forward_gather(const Conv2dCall& call, Taps taps, Cut cut, Slab slab, Arena& arena) {
  const Conv2dProblem& p = call.problem;
  Gather<T> gather = arena.kept([&] {
    return Gather<T>(
        input_tensor(call), p.group_in_channels(),
        GatherAxis::forward(p.in_height, p.out_height(), p.kernel_height, p.stride_height,
                            p.padding_height, p.dilation_height, taps),
        GatherAxis::forward(p.in_width, p.out_width(), p.kernel_width, p.stride_width,
                            p.padding_width, p.dilation_width, taps),
        cut, slab, arena);
  });
  gather.read_from(call.input);
  return gather;
}

// Gathers output pixels for input pixels.
template <class T>
Gather<T> backward_gather(const Conv2dCall& call, Cut cut, Slab slab, Arena& arena) {
  const Conv2dProblem& p = call.problem;
  Gather<T> gather = arena.kept([&] {
    return Gather<T>(grad_output_tensor(call), p.group_out_channels(),
                     GatherAxis::backward(p.in_height, p.out_height(), p.kernel_height,
                                          p.stride_height, p.padding_height, p.dilation_height),
                     GatherAxis::backward(p.in_width, p.out_width(), p.kernel_width, p.stride_width,
                                          p.padding_width, p.dilation_width),
                     cut, slab, arena);
  });
  gather.read_from(call.grad_output);
  return gather;
}

// Slots are equal shares of a list of items, at most one per thread and none too small to be worth
// a thread's start. An item's result does not depend on the slot that computes it.
inline int64_t slot_count(const Conv2dCall& call, int64_t items) {
  constexpr double kWorthAThread = 64 * 1024;  // multiply-adds
  const GemmShape shape = call.problem.gemm(call.pass);
  const double work = double(shape.m) * double(shape.n) * double(shape.k) * call.problem.groups;
  const int64_t worth = 1 + int64_t(std::min(work / kWorthAThread, 1e6));
  return std::max<int64_t>(1, std::min({items, call.threads, worth}));
}

// Index among the tensor's pixels of a block's first; the others follow.
inline int64_t first_pixel(const ImageTensor& tensor, const Block& block) {
  return (block.first_image * tensor.height + block.first_row) * tensor.width;
}

// Whether a group's pixels lie in the tensor as they do in rows of ld elements, but for the
// distance.
template <class T>
bool lies_in_rows(const ImageTensor& tensor, int64_t channels, int64_t ld) {
  return tensor.layout == Layout::nhwc && ld == channels &&
         size_of(tensor.dtype) == int64_t(sizeof(T));
}

// Cuts `count` into nearly equal tiles of at most `most` and calls body(first, size). In 32 bits,
// where a division takes a third of the time, since a tile may take no longer.
template <class Body>
void for_tiles(int64_t count, int64_t most, const Body& body) {
  if (count <= most) {
    if (count > 0) body(int64_t(0), int(count));
    return;
  }
  for (int64_t start = 0; start < count; start += int64_t(1) << 30) {
    const uint32_t part = uint32_t(std::min(count - start, int64_t(1) << 30));
    const uint32_t tiles = (part + uint32_t(most) - 1) / uint32_t(most);
    const uint32_t size = part / tiles, larger = part % tiles;
    int64_t first = start;
    for (uint32_t i = 0; i < tiles; ++i) {
      const int tile = int(size + (i < larger));
      body(first, tile);
      first += tile;
    }
  }
}

// The same cut, tile by tile.
struct Tiles {
  Tiles(int64_t length, int64_t most)
      : count(ceil_div(length, most)),
        size(count ? length / count : 0),
        larger(count ? length % count : 0) {}
  int64_t first(int64_t i) const { return i * size + std::min(i, larger); }
  int64_t length(int64_t i) const { return size + (i < larger); }
  int64_t count, size, larger;
};

// A panel's part that many tiles read in turn stays in the first-level cache beside what they
// gather.
constexpr int64_t kPanelBytes = 16 << 10;

// Cuts a sum of `terms` at multiples of its chain, so that the rows of a panel that one part needs
// fit kPanelBytes, and calls body(first, count). Once for a sum of nothing.
template <class Body>
void for_sum_parts(int64_t terms, int64_t chain, int64_t row_bytes, const Body& body) {
  const int64_t most =
      std::max<int64_t>(1, kPanelBytes / (row_bytes * std::max<int64_t>(1, chain)));
  const int64_t part = most * chain;
  int64_t first = 0;
  do {
    body(first, std::min(part, terms - first));
    first += part;
  } while (first < terms);
}

// What a slot needs for one block of pixels.
template <class T>
struct BlockScratch {
  BlockScratch(const Conv2dCall& call, const Gather<T>& gather, int64_t row_length, Arena& arena) {
    slab = arena.take<T>(gather.slab_size());
    rows = arena.take<T>(gather.most_pixels() * row_length);
    convert = arena.take<T>(scratch_size<T>(call.dtype, gather.most_pixels() * row_length));
  }
  T* slab;
  T* rows;     // [pixel][row_length]
  T* convert;  // for 16-bit tensors
};

// The filters of every group as matrices with a row per weight, cut into panels of some lanes that
// lie one after another: [group][panel][weight][lanes of the panel].
template <class T>
class FilterPanels {
 public:
  FilterPanels(const Conv2dCall& call, bool by_filter, int64_t most_vectors,
               const VectorKernels<T>& isa, Arena& arena)
      : call_(call),
        bank_(filter_bank(call)),
        by_filter_(by_filter),
        isa_(isa),
        rows_(by_filter ? bank_.channels * bank_.taps : bank_.filters * bank_.taps),
        ld_(round_up(by_filter ? bank_.filters : bank_.channels, isa.lanes)),
        vectors_(ld_ / isa.lanes, most_vectors) {
    const int64_t groups = call.problem.groups;
    panels_ = arena.pack<T>(groups * rows_ * ld_);
    must_load_ = arena.must_pack();
    converted_ = arena.take<T>(scratch_size<T>(call.dtype, groups * bank_.size()));
  }

  void load(int64_t threads) {
    if (!must_load_) return;
    const int64_t groups = call_.problem.groups;
    const T* filters = static_cast<const T*>(call_.weight);
    if (size_of(call_.dtype) != int64_t(sizeof(T))) {
      filters = converted_;
      run_slots(std::min(threads, groups), groups, [&](int64_t, int64_t g) {
        isa_.load(call_.dtype, call_.weight, g * bank_.size(), converted_ + g * bank_.size(),
                  bank_.size());
      });
    }
    const auto load = by_filter_ ? load_filters_by_filter<T> : load_filters_by_channel<T>;
    const int64_t items = groups * panels();
    run_slots(std::min(threads, items), items, [&](int64_t, int64_t item) {
      const int64_t g = item / panels(), panel = item % panels();
      load(isa_, bank_, filters + g * bank_.size(), first_lane(panel), lanes(panel),
           panels_ + g * rows_ * ld_ + first_lane(panel) * rows_, lanes(panel));
    });
  }

  int64_t panels() const { return vectors_.count; }
  int64_t first_lane(int64_t panel) const { return vectors_.first(panel) * isa_.lanes; }
  int64_t lanes(int64_t panel) const { return vectors_.length(panel) * isa_.lanes; }
  const T* panel(int64_t group, int64_t panel) const {
    return panels_ + group * rows_ * ld_ + first_lane(panel) * rows_;
  }

 private:
  const Conv2dCall& call_;
  FilterBank bank_;
  bool by_filter_;
  const VectorKernels<T>& isa_;
  int64_t rows_, ld_;
  Tiles vectors_;  // cut into panels
  T *panels_, *converted_;
  bool must_load_;
};

// The pass whose results are pixels: forward, or backward_input as a gather from grad_output.
//
// Product<T>::Scratch(gather, ld, isa, arena)    per slot
// Product<T>(gather, channels, isa, arena)       shared
//   ::kTaps, ::kSlab                             the taps and the slab that multiply needs
//   ::row_length(call, channels, lanes)          of the rows that multiply writes
//   ::panel_vectors(isa, channels)               of the panels that multiply reads
//   .multiply(block, slab, panel, lanes, bias, rows, ld_rows, scratch)
//                                                one panel's part of the rows
template <class T, template <class> class Product>
void compute_pixels(const Conv2dCall& call, Arena& arena) {
  constexpr int64_t kItems = 8;  // wanted at least, so that threads find work
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const bool forward = call.pass == Conv2dPass::forward;
  const Gather<T> gather =
      forward ? forward_gather<T>(call, Product<T>::kTaps, Cut::rows, Product<T>::kSlab, arena)
              : backward_gather<T>(call, Cut::rows, Product<T>::kSlab, arena);
  const ImageTensor target = forward ? grad_output_tensor(call) : input_tensor(call);
  const int64_t channels = target.channels / p.groups;
  const int64_t ld = Product<T>::row_length(call, channels, isa.lanes);
  // Results that lie in the output as they do in rows are computed there.
  const bool in_place = lies_in_rows<T>(target, channels, ld) && !call.epilogue;
  FilterPanels<T> filters(call, forward, Product<T>::panel_vectors(isa, channels), isa, arena);
  // Where blocks are few, each is several items, some panels of it; each item fills a slab.
  const int64_t blocks = p.groups * gather.block_count();
  const int64_t ranges = call.epilogue ? 1
                                       : std::clamp<int64_t>(kItems / std::max<int64_t>(1, blocks),
                                                             1, filters.panels());
  const int64_t items = blocks * ranges;
  const int64_t slots = slot_count(call, items);

  T* bias = arena.take<T>(call.bias ? p.groups * ld : 0);
  const Product<T> product(gather, channels, isa, arena);
  BlockEpilogue<T> epilogue(call, channels, ld, gather.block_count(), isa, arena);
  using ProductScratch = typename Product<T>::Scratch;
  using EpilogueScratch = typename BlockEpilogue<T>::Scratch;
  Arena part(nullptr);
  BlockScratch<T>(call, gather, ld, part);
  ProductScratch(gather, ld, isa, part);
  EpilogueScratch(epilogue, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  filters.load(slots);
  for (int64_t g = 0; g < p.groups; ++g) {
    if (call.epilogue) epilogue.prepare(g);
    if (!call.bias) continue;
    isa.load(call.dtype, call.bias, g * channels, bias + g * ld, channels);
    std::fill(bias + g * ld + channels, bias + (g + 1) * ld, T(0));
  }
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const BlockScratch<T> scratch(call, gather, ld, own);
    const ProductScratch product_scratch(gather, ld, isa, own);
    const EpilogueScratch epilogue_scratch(epilogue, own);
    const int64_t range = item % ranges, index = item / ranges % gather.block_count();
    const int64_t g = item / ranges / gather.block_count();
    const Block block = gather.block(index);
    const int64_t source_channel = g * (forward ? p.group_in_channels() : p.group_out_channels());
    const T* slab = gather.fill(isa, block, source_channel, scratch.slab,
                                item > first_item(slot, slots, items));
    T* rows = scratch.rows;
    int64_t ld_rows = ld;
    if (in_place) {
      ld_rows = target.channels;
      rows = static_cast<T*>(call.output) + first_pixel(target, block) * ld_rows + g * channels;
    }
    if (call.epilogue && item == first_item(slot, slots, items)) {  // for what multiply leaves idle
      std::fill_n(rows, gather.most_pixels() * ld, T(0));
    }
    const int64_t first_panel = range * filters.panels() / ranges;
    const int64_t end_panel = (range + 1) * filters.panels() / ranges;
    for (int64_t i = first_panel; i < end_panel; ++i) {
      const int64_t lane = filters.first_lane(i);
      product.multiply(block, slab, filters.panel(g, i), filters.lanes(i),
                       call.bias ? bias + g * ld + lane : nullptr, rows + lane, ld_rows,
                       product_scratch);
    }
    if (in_place) return;
    if (call.epilogue) {
      epilogue.apply(g, index, rows, gather.pixels(block), epilogue_scratch);
    }
    const int64_t lane = filters.first_lane(first_panel);
    const int64_t end = std::min(channels, filters.first_lane(end_panel));
    store_block(isa, target, block, g * channels + lane, end - lane, rows + lane, ld,
                scratch.convert, call.output);
  });
  if (call.epilogue) epilogue.finish();
}

// The pass whose results are weights. Blocks of pixels are summed in order within a split, and
// splits in order at the end; the number of splits depends on the shape alone.
//
// Product<T>::Scratch                            as above
//   ::most_lanes(isa, range)                     filters that one accumulate call takes at most
//   ::accumulate(gather, block, slab, rows, width, ld_rows, add, partial, ld, isa, scratch)
//                                                adds up, or sets, the rows of partial that belong
//                                                to the gather's taps
template <class T, template <class> class Product>
void compute_weights(const Conv2dCall& call, Arena& arena) {
  constexpr int64_t kRange = 64;  // filters that one item computes
  constexpr int64_t kMostSplits = 16;
  constexpr int64_t kMostPartials = int64_t(1) << 22;  // elements
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const Gather<T> gather =
      forward_gather<T>(call, Product<T>::kTaps, Cut::rows, Slab::as_source, arena);
  const ImageTensor grad_output = grad_output_tensor(call);
  const int64_t filters = p.group_out_channels();
  const int64_t ld = round_up(filters, isa.lanes);
  // Long rows would share the sets of the first-level cache. Idle lanes may meet what comes next.
  const bool in_place = lies_in_rows<T>(grad_output, ld, ld) && grad_output.channels <= 128;
  const int64_t elements =
      grad_output.batch * grad_output.channels * grad_output.height * grad_output.width;
  const int64_t taps = gather.tap_total();
  const int64_t blocks = gather.block_count();
  const int64_t affordable = kMostPartials / std::max<int64_t>(1, p.groups * taps * ld);
  const int64_t splits =
      std::clamp<int64_t>(std::min(affordable, ceil_div(blocks, 2)), 1, kMostSplits);
  const int64_t ranges = ceil_div(ld, kRange);
  const int64_t items = splits * p.groups * ranges;
  const int64_t slots = slot_count(call, items);
  const int64_t width = std::min(ld, Product<T>::most_lanes(isa, kRange));
  const FilterBank bank = filter_bank(call);

  T* partials = arena.take<T>(splits * p.groups * taps * ld);  // [split][group][tap][ld]
  const int64_t bank_scratch = scratch_size<T>(call.dtype, bank.size());
  T* filter_scratch = arena.take<T>(slots * bank_scratch);
  using ProductScratch = typename Product<T>::Scratch;
  Arena part(nullptr);
  BlockScratch<T>(call, gather, width, part);
  ProductScratch(gather, width, isa, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const BlockScratch<T> scratch(call, gather, width, own);
    const ProductScratch product_scratch(gather, width, isa, own);
    const int64_t range = item % ranges, g = item / ranges % p.groups;
    const int64_t split = item / ranges / p.groups;
    const int64_t first_block = split * blocks / splits;
    T* partial = partials + (split * p.groups + g) * taps * ld;
    const int64_t first_lane = range * kRange, end_lane = std::min(ld, first_lane + kRange);
    // Taps that meet only padding, or all of them in an empty batch.
    if (blocks == 0 || gather.tap_count(0) < taps) {
      for (int64_t t = 0; t < taps; ++t) {
        std::fill(partial + t * ld + first_lane, partial + t * ld + end_lane, T(0));
      }
    }
    if (item == first_item(slot, slots, items)) {  // idle lanes, too, shall meet numbers
      std::fill_n(scratch.rows, gather.most_pixels() * width, T(0));
    }
    for (int64_t b = first_block; b < (split + 1) * blocks / splits; ++b) {
      const Block block = gather.block(b);
      const T* slab = gather.fill(isa, block, g * p.group_in_channels(), scratch.slab,
                                  b > first_block || item > first_item(slot, slots, items));
      for (int64_t lane = first_lane; lane < end_lane;) {
        const int64_t lanes = std::min(width, end_lane - lane);
        const int64_t channels = std::min(lanes, filters - lane);
        const T* rows = scratch.rows;
        int64_t ld_rows = lanes;
        const int64_t place = first_pixel(grad_output, block) * grad_output.channels + g * filters;
        const int64_t end = place + (gather.pixels(block) - 1) * grad_output.channels + ld;
        if (in_place && end <= elements) {
          ld_rows = grad_output.channels;
          rows = static_cast<const T*>(call.grad_output) + place + lane;
        } else {
          load_block(isa, grad_output, block, g * filters + lane, channels, scratch.rows, lanes,
                     scratch.convert, /*clear=*/false);
        }
        Product<T>::accumulate(gather, block, slab, rows, lanes, ld_rows, b > first_block,
                               partial + lane, ld, isa, product_scratch);
        lane += lanes;
      }
    }
  });
  run_slots(std::min(slots, p.groups), p.groups, [&](int64_t slot, int64_t g) {
    T* sum = partials + g * taps * ld;
    for (int64_t split = 1; split < splits; ++split) {
      const T* other = sum + split * p.groups * taps * ld;
      for (int64_t i = 0; i < taps * ld; ++i) sum[i] += other[i];
    }
    store_filters(isa, bank, sum, ld, filter_scratch + slot * bank_scratch, call.output,
                  g * bank.size());
  });
}

}  // namespace convext::cpu
