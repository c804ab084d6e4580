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

inline ImageTensor input_tensor(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  return {call.input, call.dtype, call.layout, p.batch, p.in_channels, p.in_height, p.in_width};
}

inline ImageTensor grad_output_tensor(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  return {call.grad_output, call.dtype,     call.layout,  p.batch,
          p.out_channels,   p.out_height(), p.out_width()};
}

inline FilterBank filter_bank(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  return {call.dtype, call.layout, p.group_out_channels(), p.group_in_channels(), p.kernel_taps()};
}

// Gathers input pixels for output pixels.
template <class T>
Gather<T> forward_gather(const Conv2dCall& call, Taps taps, Cut cut, Arena& arena) {
  const Conv2dProblem& p = call.problem;
  return Gather<T>(input_tensor(call), p.group_in_channels(),
                   GatherAxis::forward(p.in_height, p.out_height(), p.kernel_height,
                                       p.stride_height, p.padding_height, p.dilation_height, taps),
                   GatherAxis::forward(p.in_width, p.out_width(), p.kernel_width, p.stride_width,
                                       p.padding_width, p.dilation_width, taps),
                   cut, arena);
}

// Gathers output pixels for input pixels.
template <class T>
Gather<T> backward_gather(const Conv2dCall& call, Arena& arena) {
  const Conv2dProblem& p = call.problem;
  return Gather<T>(grad_output_tensor(call), p.group_out_channels(),
                   GatherAxis::backward(p.in_height, p.out_height(), p.kernel_height,
                                        p.stride_height, p.padding_height, p.dilation_height),
                   GatherAxis::backward(p.in_width, p.out_width(), p.kernel_width, p.stride_width,
                                        p.padding_width, p.dilation_width),
                   Cut::rows, arena);
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

// Cuts `count` into equal tiles of at most `most` and calls body(first, size).
template <class Body>
void for_tiles(int64_t count, int64_t most, const Body& body) {
  const int64_t tiles = ceil_div(count, most);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * count / tiles, last = (i + 1) * count / tiles;
    body(first, int(last - first));
  }
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

// The pass whose results are pixels: forward, or backward_input as a gather from grad_output.
//
// Product<T>::Scratch(gather, ld, isa, arena)    per slot
// Product<T>(gather, ld, groups, isa, arena)     shared
//   ::kTaps                                      the taps that multiply needs listed
//   .prepare(group, filters)                     filters[tap][ld], kept by the driver
//   .multiply(group, block, slab, bias, rows, scratch)
template <class T, template <class> class Product>
void compute_pixels(const Conv2dCall& call, Arena& arena) {
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const bool forward = call.pass == Conv2dPass::forward;
  const Gather<T> gather = forward ? forward_gather<T>(call, Product<T>::kTaps, Cut::rows, arena)
                                   : backward_gather<T>(call, arena);
  const ImageTensor target = forward ? grad_output_tensor(call) : input_tensor(call);
  const int64_t channels = target.channels / p.groups;
  const int64_t ld = round_up(channels, isa.lanes);
  const int64_t filter_size = gather.tap_total() * ld;
  const FilterBank bank = filter_bank(call);
  const int64_t items = p.groups * gather.block_count();
  const int64_t slots = slot_count(call, items);

  T* filters = arena.take<T>(p.groups * filter_size);
  T* bias = arena.take<T>(call.bias ? p.groups * ld : 0);
  const int64_t bank_scratch = scratch_size<T>(call.dtype, bank.size());
  T* filter_scratch = arena.take<T>(slots * bank_scratch);
  Product<T> product(gather, ld, p.groups, isa, arena);
  BlockEpilogue<T> epilogue(call, channels, ld, gather.block_count(), isa, arena);
  using ProductScratch = typename Product<T>::Scratch;
  using EpilogueScratch = typename BlockEpilogue<T>::Scratch;
  Arena part(nullptr);
  BlockScratch<T>(call, gather, ld, part);
  ProductScratch(gather, ld, isa, part);
  EpilogueScratch(epilogue, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  run_slots(std::min(slots, p.groups), p.groups, [&](int64_t slot, int64_t g) {
    const auto load = forward ? load_filters_by_filter<T> : load_filters_by_channel<T>;
    load(isa, bank, call.weight, g * bank.size(), filters + g * filter_size, ld,
         filter_scratch + slot * bank_scratch);
    product.prepare(g, filters + g * filter_size);
    if (call.epilogue) epilogue.prepare(g);
    if (!call.bias) return;
    isa.load(call.dtype, call.bias, g * channels, bias + g * ld, channels);
    std::fill(bias + g * ld + channels, bias + (g + 1) * ld, T(0));
  });
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const BlockScratch<T> scratch(call, gather, ld, own);
    const ProductScratch product_scratch(gather, ld, isa, own);
    const EpilogueScratch epilogue_scratch(epilogue, own);
    const int64_t g = item / gather.block_count(), index = item % gather.block_count();
    const Block block = gather.block(index);
    const int64_t source_channel = g * (forward ? p.group_in_channels() : p.group_out_channels());
    const T* slab = gather.fill(isa, block, source_channel, scratch.slab);
    product.multiply(g, block, slab, call.bias ? bias + g * ld : nullptr, scratch.rows,
                     product_scratch);
    if (call.epilogue) {
      epilogue.apply(g, index, scratch.rows, gather.pixels(block), epilogue_scratch);
    }
    store_block(isa, target, block, g * channels, channels, scratch.rows, ld, scratch.convert,
                call.output);
  });
  if (call.epilogue) epilogue.finish();
}

// The pass whose results are weights. Blocks of pixels are summed in order within a split, and
// splits in order at the end; the number of splits depends on the shape alone.
//
// Product<T>::Scratch                            as above
//   ::most_lanes(isa, range)                     filters that one accumulate call takes at most
//   ::accumulate(gather, block, slab, rows, width, add, partial, ld, isa, scratch)
template <class T, template <class> class Product>
void compute_weights(const Conv2dCall& call, Arena& arena) {
  constexpr int64_t kRange = 64;  // filters that one item computes
  constexpr int64_t kMostSplits = 16;
  constexpr int64_t kMostPartials = int64_t(1) << 22;  // elements
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const Gather<T> gather = forward_gather<T>(call, Taps::all, Cut::rows, arena);
  const ImageTensor grad_output = grad_output_tensor(call);
  const int64_t filters = p.group_out_channels();
  const int64_t ld = round_up(filters, isa.lanes);
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
    if (blocks == 0 && range == 0) std::fill(partial, partial + taps * ld, T(0));  // an empty batch
    for (int64_t b = first_block; b < (split + 1) * blocks / splits; ++b) {
      const Block block = gather.block(b);
      const T* slab = gather.fill(isa, block, g * p.group_in_channels(), scratch.slab);
      for (int64_t lane = range * kRange; lane < std::min(ld, (range + 1) * kRange);) {
        const int64_t lanes = std::min(width, std::min(ld, (range + 1) * kRange) - lane);
        const int64_t channels = std::min(lanes, filters - lane);
        load_block(isa, grad_output, block, g * filters + lane, channels, scratch.rows, lanes,
                   scratch.convert);
        Product<T>::accumulate(gather, block, slab, scratch.rows, lanes, b > first_block,
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
