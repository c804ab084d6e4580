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

namespace convext::cpu {
namespace {

// Terms of a chain. Longer than elsewhere, for the transforms' errors are larger than the sums'.
constexpr int64_t kChain = 128;

// Tiles that are transformed and multiplied at a time: their planes of 64 channels stay in a cache
// of 1 MiB beside 64 x 64 filters. More where filters would be read, or products summed, from
// further away at every run. Sums depend on these, so they are the same on every ISA.
constexpr int64_t kRun = 28, kLongRun = 128, kLongGradRun = 64;

// Elements of transformed filters above which they are not kept, and of a row of their planes that
// stay in cache.
constexpr int64_t kManyFilters = int64_t(1) << 20, kFilterRow = 400000;
// Sums of products in all planes above which they are not kept over runs.
constexpr int64_t kManyProducts = 300000;

constexpr int kAllRows = -1;

// Cuts `ld` lanes into panels of two vectors, and one where one is left.
template <class Body>
void for_panels(int64_t ld, int lanes, const Body& body) {
  for (int64_t lane = 0; lane < ld;) {
    const int vectors = ld - lane >= 2 * lanes ? 2 : 1;
    body(lane, vectors);
    lane += vectors * lanes;
  }
}

// products[tile][lane] = sum over k of a[tile][k] * panels[panel][k][lane]
template <class T>
void multiply_plane(const VectorKernels<T>& isa, const T* a, int64_t ld_a, int64_t k,
                    const T* panels, int64_t lanes, T* products, int64_t ld, int64_t tiles) {
  for_panels(lanes, isa.lanes, [&](int64_t lane, int vectors) {
    const int64_t width = vectors * isa.lanes;
    const T* panel = panels + lane * k;
    for_tiles(k, kChain, [&](int64_t first, int terms) {
      isa.multiply({a + first, ld_a, 1, panel + first * width, width, terms, products + lane, ld,
                    tiles, vectors, first > 0});
    });
  });
}

// sums[channel][lane] (+)= sum over tiles of a[tile][channel] * b[tile][lane]
template <class T>
void multiply_tiles(const VectorKernels<T>& isa, const T* a, int64_t ld_a, int64_t channels,
                    const T* b, int64_t ld_b, int64_t lanes, T* sums, int64_t ld, int64_t tiles,
                    bool accumulate) {
  for_panels(lanes, isa.lanes, [&](int64_t lane, int vectors) {
    for_tiles(tiles, kChain, [&](int64_t first, int terms) {
      isa.multiply({a + first * ld_a, 1, ld_a, b + first * ld_b + lane, ld_b, terms, sums + lane,
                    ld, channels, vectors, accumulate || first > 0});
    });
  });
}

// The filters of all groups in the form that products take: planes of panels
// [panel][k][lanes of the panel]. A few are transformed once, before all else, and shared; of many,
// which no cache would hold, each item transforms those that it needs next, a row of planes and a
// range of lanes at a time.
template <class T>
class Filters {
 public:
  Filters(const Conv2dCall& call, int size, Arena& arena)
      : isa_(call.isa->of<T>()),
        forward_(call.pass == Conv2dPass::forward),
        size_(size),
        groups_(call.problem.groups),
        bank_(filter_bank(call)) {
    const int64_t n = size + 2;
    k = forward_ ? bank_.channels : bank_.filters;
    ld = round_up(forward_ ? bank_.filters : bank_.channels, isa_.lanes);
    const int64_t panel = 2 * isa_.lanes;
    many = n * n * bank_.filters * bank_.channels > kManyFilters;
    const int64_t row = n * std::max<int64_t>(1, k) * panel;  // elements, of one panel
    range = many ? std::min(ld, std::max<int64_t>(1, kFilterRow / row) * panel) : ld;
    most_ = std::min<int64_t>(bank_.filters, forward_ ? panel : 16);
    parts_ = ceil_div(bank_.filters, most_);
    slots_ = slot_count(call, groups_ * parts_);
    plane_stride = k * range + kGap;
    planes_ = arena.take<T>(many ? 0 : groups_ * n * n * plane_stride);
    matrix_size_ = bank_.taps * k * ld;
    matrices_ = arena.take<T>(groups_ * matrix_size_);
    convert_size_ = scratch_size<T>(call.dtype, most_ * bank_.channels * bank_.taps);
    convert_ = arena.take<T>(slots_ * convert_size_);
  }

  // Elements of scratch that row() needs.
  int64_t row_scratch() const { return many ? (size_ + 2) * plane_stride : 0; }

  void prepare(const void* weight) const {
    const int64_t n = size_ + 2;
    run_slots(slots_, groups_ * parts_, [&](int64_t slot, int64_t item) {
      const int64_t group = item / parts_, first = item % parts_ * most_;
      FilterBank part = bank_;
      part.filters = std::min(most_, bank_.filters - first);
      const int64_t offset = (group * bank_.filters + first) * bank_.channels * bank_.taps;
      const T* filters =
          as_type(isa_, bank_.dtype, weight, offset, part.size(), convert_ + slot * convert_size_);
      T* matrix = matrices_ + group * matrix_size_ + first * bank_.taps * (forward_ ? k : ld);
      T* planes = planes_ + group * n * n * plane_stride;
      if (forward_) {
        const int64_t width = round_up(part.filters, isa_.lanes);
        load_filters_by_filter(isa_, part, filters, 0, part.filters, matrix, width);
        if (!many) transform(group, first, width, 0, k, kAllRows, planes);
      } else {
        load_filters_by_channel(isa_, part, filters, 0, part.channels, matrix, ld);
        if (!many) transform(group, 0, ld, first, part.filters, kAllRows, planes);
      }
    });
  }

  // The planes of a row, for lanes from `lane` on, `range` of them or those that are left.
  const T* row(int64_t group, int64_t lane, int row, T* scratch) const {
    const int64_t n = size_ + 2;
    if (!many) return planes_ + (group * n + row) * n * plane_stride;
    transform(group, lane, std::min(range, ld - lane), 0, k, row, scratch);
    return scratch;
  }

  bool many;
  int64_t k, ld, range, plane_stride;

 private:
  void transform(int64_t group, int64_t first_lane, int64_t lanes, int64_t first_k, int64_t count,
                 int row, T* planes) const {
    const int64_t taps = bank_.taps;
    const T* matrix = matrices_ + group * matrix_size_;
    for_panels(lanes, isa_.lanes, [&](int64_t lane, int vectors) {
      const int64_t width = vectors * isa_.lanes, at = first_lane + lane;
      WinogradSide<const T> from{nullptr, matrix + at * taps * k, width, taps * width};
      if (!forward_) {  // turned by 180 degrees
        from = {nullptr, matrix + ((first_k + 1) * taps - 1) * ld + at, -ld, taps * ld};
      }
      T* panel = planes + (many ? lane : at) * k + first_k * width;
      isa_.winograd({WinogradMap::filter,
                     size_,
                     from,
                     {nullptr, panel, plane_stride, width},
                     nullptr,
                     count,
                     width,
                     row});
    });
  }

  const VectorKernels<T>& isa_;
  bool forward_;
  int size_;
  int64_t groups_;
  FilterBank bank_;
  int64_t most_, parts_, slots_, matrix_size_, convert_size_;
  T *planes_, *matrices_, *convert_;  // matrices: [group], and in forward [panel], [k * 9 + tap]
};

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

  const Filters<T> filters(call, size, arena);
  const int64_t k = filters.k, ld = filters.ld;
  const int64_t run = filters.many ? kLongRun : kRun;
  const Tiling tiling(target, size, run);
  const int64_t items = p.groups * tiling.blocks;
  const int64_t slots = slot_count(call, items);
  T* bias = arena.take<T>(call.bias ? p.groups * ld : 0);
  BlockEpilogue<T> epilogue(call, channels, ld, tiling.blocks, isa, arena);
  using EpilogueScratch = typename BlockEpilogue<T>::Scratch;
  struct Scratch {
    Side<T> from, to;
    T* filters;
    EpilogueScratch epilogue;
  };
  const auto scratch_in = [&](Arena& part) -> Scratch {
    Side<T> from(source, k, tiling.most_rows() + 2, tiling, n, run, !in_place<T>(source), isa,
                 part);
    Side<T> to(target, channels, tiling.most_rows(), tiling, size, run,
               call.epilogue || !in_place<T>(target), isa, part);
    T* row = part.take<T>(filters.row_scratch());
    return {from, to, row, EpilogueScratch(epilogue, part)};
  };
  Arena part(nullptr);
  scratch_in(part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  filters.prepare(call.weight);
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
    const int64_t g = item / tiling.blocks, index = item % tiling.blocks;
    const Block block = tiling.block(index);
    const Block source_block = tiling.source(block, padding_y, source.height);
    const Pixels<T> read = from.read(isa, source, source_block, g * k);
    const Pixels<T> written = to.copies ? pixels_of(target, block, to.rows, ld)
                                        : pixels_of<T>(target, call.output, g * channels);
    std::fill_n(from.outside, from.ld, T(0));
    if (k == 0) std::fill_n(to.planes, n * n * to.plane_stride, T(0));
    for_tiles(tiling.tiles(block), run, [&](int64_t first, int count) {
      list_pixels(tiling, block, first, count, n, padding_y, padding_x, source, read, from.outside,
                  from.list);
      list_pixels(tiling, block, first, count, size, 0, 0, target, written, to.outside, to.list);
      isa.winograd({WinogradMap::input, size, from.from_pixels(), from.to_planes(), nullptr, count,
                    k, kAllRows});
      for (int64_t lane = 0; lane < ld; lane += filters.range) {
        const int64_t lanes = std::min(filters.range, ld - lane);
        for (int row = 0; row < n; ++row) {
          const T* weights = filters.row(g, lane, row, s.filters);
          for (int64_t plane = row * n; plane < (row + 1) * n; ++plane) {
            multiply_plane(isa, from.planes + plane * from.plane_stride, from.ld, k, weights, lanes,
                           to.planes + plane * to.plane_stride + lane, to.ld, count);
            weights += filters.plane_stride;
          }
        }
      }
      isa.winograd({WinogradMap::output, size, to.from_planes(), to.to_pixels(),
                    call.bias ? bias + g * ld : nullptr, count, to.copies ? ld : channels,
                    kAllRows});
    });
    if (call.epilogue) {
      epilogue.apply(g, index, to.rows, block.images * block.rows * target.width, s.epilogue);
    }
    if (to.copies) {
      store_block(isa, target, block, g * channels, channels, to.rows, ld, to.convert, call.output);
    }
  });
  if (call.epilogue) epilogue.finish();
}

// The pass whose results are weights. The tiles are cut into splits, as many as the shape wants,
// and each split's gradient is summed by itself, then all in order. Within a split the products
// [plane][channel][filter] are summed over runs of tiles; where they are too many for a cache, a
// block is one run, and a range of its filters goes all the way before the next.
template <class T>
void compute_weights(const Conv2dCall& call, int size, Arena& arena) {
  constexpr int64_t kRange = 64, kMostSplits = 4;
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const ImageTensor source = input_tensor(call), target = grad_output_tensor(call);
  const FilterBank bank = filter_bank(call);
  const int64_t n = size + 2, planes = n * n;
  const int64_t channels = bank.channels, filters = bank.filters, taps = bank.taps;
  const int64_t ld = round_up(filters, isa.lanes);
  const bool many = planes * channels * filters > kManyProducts;
  const Tiling tiling(target, size, many ? kLongGradRun : kRun);
  const int64_t run = many ? tiling.most_tiles() : kRun;
  const int64_t range = many ? std::min(ld, kRange) : ld;
  const int64_t splits =
      std::clamp<int64_t>(many ? tiling.blocks : tiling.blocks / 8, 1, kMostSplits);
  const int64_t items = p.groups * splits;
  const int64_t slots = slot_count(call, items);
  const int64_t partial_size = taps * channels * ld;
  const int64_t sum_stride = channels * range + kGap;

  T* partials = arena.take<T>(splits * p.groups * partial_size);  // [split][group][c * 9 + tap][ld]
  const int64_t convert_size = scratch_size<T>(call.dtype, bank.size());
  T* convert = arena.take<T>(slots * convert_size);
  struct Scratch {
    Side<T> input, grad;
    T* sums;     // [plane][channel][range]
    T* weights;  // [c * 9 + tap][range]
  };
  const auto scratch_in = [&](Arena& part) -> Scratch {
    Side<T> input(source, channels, tiling.most_rows() + 2, tiling, n, run, !in_place<T>(source),
                  isa, part);
    Side<T> grad(target, filters, tiling.most_rows(), tiling, size, run, !in_place<T>(target), isa,
                 part);
    T* sums = part.take<T>(planes * sum_stride);
    return {input, grad, sums, part.take<T>(taps * channels * range)};
  };
  Arena part(nullptr);
  scratch_in(part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch s = scratch_in(own);
    const Side<T>&input = s.input, &grad = s.grad;
    const int64_t g = item % p.groups, split = item / p.groups;
    T* partial = partials + item * partial_size;
    std::fill_n(input.outside, input.ld, T(0));
    std::fill_n(grad.outside, grad.ld, T(0));
    if (tiling.blocks == 0) std::fill_n(partial, partial_size, T(0));  // an empty batch
    const int64_t begin = split * tiling.blocks / splits;
    const int64_t end = (split + 1) * tiling.blocks / splits;
    for (int64_t b = begin; b < end; ++b) {
      const Block block = tiling.block(b);
      const Block source_block = tiling.source(block, p.padding_height, source.height);
      const Pixels<T> x = input.read(isa, source, source_block, g * channels);
      const Pixels<T> y = grad.read(isa, target, block, g * filters);
      const int64_t tiles = tiling.tiles(block);
      for_tiles(tiles, run, [&](int64_t first, int count) {
        const bool begins = many || (b == begin && first == 0);
        const bool ends = many || (b + 1 == end && first + count == tiles);
        list_pixels(tiling, block, first, count, n, p.padding_height, p.padding_width, source, x,
                    input.outside, input.list);
        list_pixels(tiling, block, first, count, size, 0, 0, target, y, grad.outside, grad.list);
        isa.winograd({WinogradMap::input, size, input.from_pixels(), input.to_planes(), nullptr,
                      count, channels, kAllRows});
        isa.winograd({WinogradMap::output_grad, size, grad.from_pixels(), grad.to_planes(), nullptr,
                      count, filters, kAllRows});
        for (int64_t lane = 0; lane < ld; lane += range) {
          const int64_t lanes = std::min(range, ld - lane);
          for (int64_t plane = 0; plane < planes; ++plane) {
            multiply_tiles(isa, input.planes + plane * input.plane_stride, input.ld, channels,
                           grad.planes + plane * grad.plane_stride + lane, grad.ld, lanes,
                           s.sums + plane * sum_stride, range, count, !begins);
          }
          if (!ends) continue;
          isa.winograd({WinogradMap::filter_grad,
                        size,
                        {nullptr, s.sums, sum_stride, range},
                        {nullptr, s.weights, range, taps * range},
                        nullptr,
                        channels,
                        lanes,
                        kAllRows});
          for (int64_t row = 0; row < taps * channels; ++row) {
            const T* from = s.weights + row * range;
            T* to = partial + row * ld + lane;
            for (int64_t i = 0; i < lanes; ++i)
              to[i] = many && b > begin ? to[i] + from[i] : from[i];
          }
        }
      });
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
