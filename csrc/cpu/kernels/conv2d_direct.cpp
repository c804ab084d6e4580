// Direct convolution: products are summed with no matrix laid out, or no more of it than a tile of
// results needs at a time. Vector lanes run across output channels (input channels in
// backward_input), or across pixels (see conv2d_planes.h, conv2d_panels.h, conv2d_few_channels.h),
// never across a sum, so every result adds its products in the order channel, kernel row, kernel
// column (in chains of fused multiply-adds, see tap_chain), and has the same bits on every ISA.
#include "cpu/kernels/conv2d_driver.h"
#include "cpu/kernels/conv2d_few_channels.h"
#include "cpu/kernels/conv2d_panels.h"
#include "cpu/kernels/conv2d_planes.h"

namespace convext::cpu {
namespace {

// Of sums that stay in the second-level cache while a block's pixels are added to them.
constexpr int64_t kSumBytes = 512 << 10;

template <class T>
class DirectProduct {
 public:
  static constexpr Taps kTaps = Taps::needed;
  static constexpr Slab kSlab = Slab::as_source;

  struct Scratch {
    Scratch(const Gather<T>&, int64_t, const VectorKernels<T>&, Arena&) {}
  };

  DirectProduct(const Gather<T>& gather, int64_t, const VectorKernels<T>& isa, Arena&)
      : gather_(gather), isa_(isa) {}

  static int64_t row_length(const Conv2dCall&, int64_t channels, int64_t lanes) {
    return round_up(channels, lanes);
  }

  static int64_t panel_vectors(const VectorKernels<T>& isa, int64_t) { return isa.most_vectors; }

  void multiply(const Block& block, const T* slab, const T* panel, int64_t lanes, const T* bias,
                T* rows, int64_t ld_rows, const Scratch&) const {
    const int vectors = int(lanes / isa_.lanes);
    const bool in_order = gather_.meets_every_tap();
    for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
      const int64_t pixels = gather_.pixel_count(block, residue);
      const int64_t taps = gather_.tap_count(residue), chain = tap_chain(taps);
      for_sum_parts(taps, chain, lanes * sizeof(T), [&](int64_t first_tap, int64_t tap_count) {
        for_tiles(pixels, isa_.gather_rows[vectors - 1], [&](int64_t first, int count) {
          isa_.gather({slab, gather_.pixel_sources(residue) + first,
                       gather_.taps(residue) + first_tap, tap_count, chain,
                       in_order ? panel + first_tap * lanes : panel,
                       in_order ? nullptr : gather_.tap_weights(residue) + first_tap, lanes,
                       first_tap == 0 ? bias : nullptr, nullptr, rows,
                       gather_.pixel_targets(residue) + first, ld_rows, count, vectors,
                       /*accumulate=*/first_tap > 0});
        });
      });
    }
  }

  static int64_t most_lanes(const VectorKernels<T>& isa, int64_t range) {
    return std::min<int64_t>(range, isa.most_vectors * isa.lanes);
  }

  // The same product with the lists' roles exchanged: a row per tap, a sum over the block's pixels.
  static void accumulate(const Gather<T>& gather, const Block& block, const T* slab, const T* rows,
                         int64_t width, int64_t ld_rows, bool add, T* partial, int64_t ld,
                         const VectorKernels<T>& isa, const Scratch&) {
    const int vectors = int(width / isa.lanes);
    const int64_t pixels = gather.pixel_count(block, 0), chain = pixel_chain(pixels);
    // Larger ones are visited as seldom as can be: all pixels in one part.
    const bool fit = gather.tap_count(0) * width * int64_t(sizeof(T)) <= kSumBytes;
    const int64_t row_bytes = fit ? width * sizeof(T) : 1;
    for_sum_parts(pixels, chain, row_bytes, [&](int64_t first_pixel, int64_t count) {
      for_tiles(gather.tap_count(0), isa.gather_rows[vectors - 1], [&](int64_t first, int taps) {
        isa.gather({slab, gather.taps(0) + first, gather.pixel_sources(0) + first_pixel, count,
                    chain, rows + first_pixel * ld_rows, nullptr, ld_rows, nullptr, nullptr,
                    partial, gather.tap_weights(0) + first, ld, taps, vectors,
                    add || first_pixel > 0});
      });
    });
  }

 private:
  const Gather<T>& gather_;
  const VectorKernels<T>& isa_;
};

template <class T>
void run(const Conv2dCall& call, Arena& arena) {
  if (call.pass == Conv2dPass::backward_weight) {
    compute_weights<T, DirectProduct>(call, arena);
  } else if (prefers_panels(call)) {
    compute_panels<T>(call, arena);
  } else if (prefers_planes(call)) {
    compute_planes<T>(call, arena);
  } else if (prefers_few_channels(call)) {
    compute_few_channels<T>(call, arena);
  } else {
    compute_pixels<T, DirectProduct>(call, arena);
  }
}

}  // namespace

void conv2d_direct(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, arena) : run<float>(call, arena);
}

}  // namespace convext::cpu
