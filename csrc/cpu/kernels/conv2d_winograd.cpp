// Winograd's convolution with 3x3 filters and stride 1, after Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks" (2016). F(m x m, 3x3) computes tiles of m x m results from tiles d
// of n x n inputs, n = m + 2, with n^2 multiplications for each pair of channels in place of
// 9 m^2: 36 for 144 with m = 4, 16 for 36 with m = 2. With the matrices of winograd_tiles.h,
//
//   forward          y = A^T [sum over c of (B^T d B) * (G g G^T)] A, and the bias
//   backward_input   the same of grad_output, with filters turned by 180 degrees, whose channels
//                    and filters change places, and a padding of 2 - p
//   backward_weight  grad_g = G^T [sum over tiles of (B^T d B) * (A grad_y A^T)] G, the transpose
//
// where * is by elements, so that the sums are n^2 matrix products. Tiles are transformed some at a
// time, so that what is multiplied stays in cache.
//
// Errors. Of random normal operands in float32, the largest error against float64 over the largest
// result is 0.5e-6 to 2e-6 with m = 4 and 0.1e-6 to 0.5e-6 with m = 2, in each pass; that is up to
// 7.4 and 2.4 times PyTorch's own. It goes with the largest results of a tile, not with each. In
// 16-bit types it is below the rounding of the output. A NaN or an infinity in an operand makes NaN
// of all the results of the tiles that read it.
#include "cpu/kernels/conv2d_driver.h"
#include "cpu/kernels/winograd_blocks.h"
#include "cpu/kernels/winograd_filters.h"

namespace convext::cpu {
namespace {

// Terms of a chain. Longer than elsewhere, for the transforms' errors are larger than the sums'.
constexpr int64_t kChain = 128;

// Tiles of a block: their planes of 64 channels stay in a cache of 1 MiB beside 64 x 64 filters.
// More where filters would be transformed, or products summed, anew in every block. Sums depend on
// these, so they are the same on every ISA.
constexpr int64_t kRun = 28, kLongRun = 128, kLongGradRun = 128;
// Sums of products in all planes above which they are not kept over blocks.
constexpr int64_t kManyProducts = 300000;

// Into how many parts each of `items` is to be cut so that every thread finds one, at most `most`.
int64_t cuts_for_threads(const Conv2dCall& call, int64_t items, int64_t most) {
  return std::clamp<int64_t>(ceil_div(call.threads, std::max<int64_t>(1, items)), 1,
                             std::max<int64_t>(1, most));
}

// The passes whose results are pixels.
template <class T>
void compute_images(const Conv2dCall& call, int size, Arena& arena) {
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const bool forward = call.pass == Conv2dPass::forward;
  const ImageTensor source = forward ? input_tensor(call) : grad_output_tensor(call);
  const ImageTensor target = forward ? grad_output_tensor(call) : input_tensor(call);
  const int64_t padding_y = forward ? p.padding_height : 2 - p.padding_height;
  const int64_t padding_x = forward ? p.padding_width : 2 - p.padding_width;
  const int64_t n = size + 2, channels = target.channels / p.groups;

  const int64_t k = source.channels / p.groups, chain = channel_chain(k, kChain);
  WinogradFilters<T> filters(call, size, chain, arena);
  const int64_t ld = filters.ld;
  const Tiling tiling(target, size, filters.many ? kLongRun : kRun);
  T* bias = arena.take<T>(call.bias ? p.groups * ld : 0);
  BlockEpilogue<T> epilogue(call, channels, ld, tiling.blocks, isa, arena);
  struct Scratch {
    Side<T> from, to;
    typename WinogradFilters<T>::Scratch filters;
    typename BlockEpilogue<T>::Scratch epilogue;
  };
  const auto scratch_in = [&](Arena& part) -> Scratch {
    Side<T> from(source, k, k, chain, tiling, n, false, isa, part);
    Side<T> to(target, channels, filters.range, filters.range, tiling, size, call.epilogue, isa,
               part);
    return {from, to, {filters, part}, {epilogue, part}};
  };
  Arena part(nullptr);
  const bool stores_whole = scratch_in(part).to.stores_whole();
  // Where blocks are few, each is several items, some ranges of lanes of it.
  const int64_t ranges = ceil_div(ld, std::max<int64_t>(1, filters.range));
  const int64_t blocks = p.groups * tiling.blocks;
  const int64_t cuts = stores_whole ? 1 : cuts_for_threads(call, blocks, ranges);
  const int64_t items = blocks * cuts;
  const int64_t slots = slot_count(call, items);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  filters.prepare();
  for (int64_t g = 0; g < p.groups; ++g) {
    if (call.epilogue) epilogue.prepare(g);
    if (!call.bias) continue;
    isa.load(call.dtype, call.bias, g * channels, bias + g * ld, channels);
    std::fill(bias + g * ld + channels, bias + (g + 1) * ld, T(0));
  }
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch s = scratch_in(own);
    const Side<T>&from = s.from, &to = s.to;
    const int64_t cut = item % cuts, index = item / cuts % tiling.blocks;
    const int64_t g = item / cuts / tiling.blocks;
    const Window block = tiling.block(index);
    const Window read = tiling.source(block, padding_y, padding_x, source);
    const int64_t tiles = tiling.tiles(block);
    from.begin(block, read, padding_y, padding_x, source.data, g * k);
    from.read(WinogradMap::input, read, tiles, g * k, 0, k);
    to.begin(block, block, 0, 0, call.output, g * channels);
    for (int64_t r = cut * ranges / cuts; r < (cut + 1) * ranges / cuts; ++r) {
      const int64_t lane = r * filters.range, lanes = std::min(filters.range, ld - lane);
      for_chains(k, chain, [&](int64_t first, int64_t terms) {
        filters.choose(g, lane, first, terms, s.filters);
        for (int row = 0; row < n; ++row) {
          const T* weights = filters.planes(g, lane, terms, row, s.filters);
          for (int64_t i = 0; i < n; ++i) {
            const T* tile = from.plane(row * n + i, first);
            const T* next = from.plane((row * n + i + 1) % (n * n), first);
            T* products = to.plane(row * n + i, 0);
            for_panels(lanes, isa.lanes, [&](int64_t at, int vectors) {
              const int64_t width = vectors * isa.lanes;
              const T* panel =
                  weights + i * filters.plane_stride + filters.panel(at, width, first, terms);
              isa.multiply({tile, from.ld, 1, panel, width, terms, products + at, to.ld, tiles,
                            vectors, first > 0, at == 0 ? next : tile});
            });
          }
        }
      });
      if (k == 0) to.clear();
      to.write(call.bias ? bias + g * ld : nullptr, block, tiles, lane, lanes, g * channels,
               call.output);
    }
    if (call.epilogue) epilogue.apply(g, index, to.rows, block.pixels(), s.epilogue);
    if (to.stores_whole()) to.store(block, 0, channels, g * channels, call.output);
  });
  if (call.epilogue) epilogue.finish();
}

// The pass whose results are weights. The tiles are cut into splits, as many as the shape wants,
// and each split's gradient is summed by itself, then all in order. Within a split the products
// [plane][channel][filter] are summed over blocks of tiles; where they are too many for a cache, a
// square of channels and filters goes all the way to a gradient before the next.
template <class T>
void compute_weights(const Conv2dCall& call, int size, Arena& arena) {
  constexpr int64_t kSquare = 64, kMostSplits = 4;
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const ImageTensor source = input_tensor(call), target = grad_output_tensor(call);
  const FilterBank bank = filter_bank(call);
  const int64_t n = size + 2, planes = n * n;
  const int64_t channels = bank.channels, filters = bank.filters, taps = bank.taps;
  const int64_t ld = round_up(filters, isa.lanes);
  const bool many = planes * channels * filters > kManyProducts;
  const Tiling tiling(target, size, many ? kLongGradRun : kRun);
  const int64_t range = many ? std::min(ld, kSquare) : ld;
  const int64_t channel_range = many ? std::min(channels, kSquare) : channels;
  const int64_t splits =
      std::clamp<int64_t>(many ? tiling.blocks : tiling.blocks / 8, 1, kMostSplits);
  // Where splits are few, each is several items, some ranges of channels of it.
  const int64_t ranges = ceil_div(channels, std::max<int64_t>(1, channel_range));
  const int64_t cuts = cuts_for_threads(call, p.groups * splits, ranges);
  const int64_t items = p.groups * splits * cuts;
  const int64_t slots = slot_count(call, items);
  const int64_t partial_size = taps * channels * ld;
  const int64_t sum_stride = channel_range * range + kGap;

  T* partials = arena.take<T>(splits * p.groups * partial_size);  // [split][group][c * 9 + tap][ld]
  const int64_t convert_size = scratch_size<T>(call.dtype, bank.size());
  T* convert = arena.take<T>(slots * convert_size);
  struct Scratch {
    Side<T> input, grad;
    T* sums;  // [plane][channel_range][range]
  };
  const auto scratch_in = [&](Arena& part) -> Scratch {
    Side<T> input(source, channels, channels, channel_range, tiling, n, false, isa, part);
    Side<T> grad(target, filters, filters, range, tiling, size, false, isa, part);
    return {input, grad, part.take<T>(planes * sum_stride)};
  };
  Arena part(nullptr);
  scratch_in(part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch s = scratch_in(own);
    const Side<T>&input = s.input, &grad = s.grad;
    const int64_t cut = item % cuts, g = item / cuts % p.groups, split = item / cuts / p.groups;
    const int64_t first_channel = cut * ranges / cuts * channel_range;
    const int64_t end_channel = std::min(channels, (cut + 1) * ranges / cuts * channel_range);
    T* partial = partials + item / cuts * partial_size;
    if (tiling.blocks == 0) {  // an empty batch
      std::fill(partial + first_channel * taps * ld, partial + end_channel * taps * ld, T(0));
    }
    const int64_t begin = split * tiling.blocks / splits;
    const int64_t end = (split + 1) * tiling.blocks / splits;
    for (int64_t b = begin; b < end; ++b) {
      const Window block = tiling.block(b);
      const Window read = tiling.source(block, p.padding_height, p.padding_width, source);
      const int64_t tiles = tiling.tiles(block);
      input.begin(block, read, p.padding_height, p.padding_width, source.data, g * channels);
      input.read(WinogradMap::input, read, tiles, g * channels, first_channel, end_channel);
      grad.begin(block, block, 0, 0, target.data, g * filters);
      grad.read(WinogradMap::output_grad, block, tiles, g * filters, 0, filters);
      for (int64_t channel = first_channel; channel < end_channel; channel += channel_range) {
        const int64_t rows = std::min(channel_range, end_channel - channel);
        for (int64_t lane = 0; lane < ld; lane += range) {
          const int64_t lanes = std::min(range, ld - lane);
          for (int64_t plane = 0; plane < planes; ++plane) {
            const T* x = input.plane(plane, channel);
            const T* y = grad.plane(plane, lane);
            const int64_t after = (plane + 1) % planes;
            const T *next_x = input.plane(after, channel), *next_y = grad.plane(after, lane);
            for_panels(lanes, isa.lanes, [&](int64_t at, int vectors) {
              for_tiles(tiles, kChain, [&](int64_t first, int terms) {
                isa.multiply({x + first * input.ld, 1, input.ld, y + first * grad.ld + at, grad.ld,
                              terms, s.sums + plane * sum_stride + at, range, rows, vectors,
                              first > 0 || (!many && b > begin), at == 0 ? next_x : next_y});
              });
            });
          }
          if (!many && b + 1 < end) continue;
          isa.winograd({WinogradMap::filter_grad,
                        size,
                        {nullptr, s.sums, sum_stride, range},
                        {nullptr, partial + channel * taps * ld + lane, ld, taps * ld},
                        nullptr,
                        rows,
                        lanes,
                        kAllRows,
                        many && b > begin,
                        0});
        }
      }
    }
  });
  run_slots(std::min(slots, p.groups), p.groups, [&](int64_t slot, int64_t g) {
    T* sum = partials + g * partial_size;
    for (int64_t split = 1; split < splits; ++split) {
      const T* other = sum + split * p.groups * partial_size;
      for (int64_t i = 0; i < partial_size; ++i) sum[i] += other[i];
    }
    store_filters(isa, bank, sum, ld, convert + slot * convert_size, call.output, g * bank.size());
  });
}

template <class T>
void run(const Conv2dCall& call, int size, Arena& arena) {
  if (call.pass == Conv2dPass::backward_weight) {
    compute_weights<T>(call, size, arena);
  } else {
    compute_images<T>(call, size, arena);
  }
}

}  // namespace

const char* winograd_declines(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  if (p.kernel_height != 3 || p.kernel_width != 3) return "Winograd's kernels are 3x3";
  if (p.stride_height != 1 || p.stride_width != 1) return "Winograd's stride is 1";
  if (p.dilation_height != 1 || p.dilation_width != 1) return "Winograd's dilation is 1";
  if (p.padding_height > 2 || p.padding_width > 2) return "Winograd's padding is at most 2";
  return nullptr;
}

void conv2d_winograd(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, 4, arena) : run<float>(call, 4, arena);
}

void conv2d_winograd_2x2(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, 2, arena) : run<float>(call, 2, arena);
}

}  // namespace convext::cpu
