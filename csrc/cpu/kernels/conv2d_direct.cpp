// Direct convolution: products are summed where the operands lie, with no matrix laid out. Vector
// lanes run across output channels (input channels in backward_input), never across a sum, so every
// result adds its products in the order channel, kernel row, kernel column (in chains of fused
// multiply-adds, see kSumChain), and has the same bits on every ISA.
#include "cpu/kernels/conv2d_driver.h"

namespace convext::cpu {
namespace {

// Cuts a row of `ld` lanes into tiles of two vectors, and one where one is left.
template <class Body>
void for_lane_tiles(int64_t ld, int lanes, const Body& body) {
  for (int64_t lane = 0; lane < ld;) {
    const int vectors = ld - lane >= 2 * lanes ? 2 : 1;
    body(lane, vectors);
    lane += vectors * lanes;
  }
}

template <class T>
class DirectProduct {
 public:
  static constexpr Taps kTaps = Taps::needed;

  struct Scratch {
    Scratch(const Gather<T>&, int64_t, const VectorKernels<T>&, Arena&) {}
  };

  DirectProduct(const Gather<T>& gather, int64_t ld, int64_t groups, const VectorKernels<T>& isa,
                Arena& arena)
      : gather_(gather), ld_(ld), isa_(isa) {
    starts_ = arena.take<const T*>(groups);
    // All taps and one tile of lanes: the filter matrix is the panel.
    panels_ = nullptr;
    if (!gather.meets_every_tap() || ld > 2 * isa.lanes) {
      panels_ = arena.take<T>(groups * gather.tap_total() * ld);
    }
  }

  // Panels [class][tile of lanes][tap][lanes of the tile], so that a tile reads its weights in
  // order.
  void prepare(int64_t group, const T* filters) {
    starts_[group] = filters;
    if (!panels_) return;
    T* panel = panels_ + group * gather_.tap_total() * ld_;
    starts_[group] = panel;
    for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
      const int64_t* weights = gather_.tap_weights(residue);
      for_lane_tiles(ld_, isa_.lanes, [&](int64_t lane, int vectors) {
        const int64_t width = vectors * isa_.lanes;
        for (int64_t t = 0; t < gather_.tap_count(residue); ++t, panel += width) {
          std::copy_n(filters + weights[t] * ld_ + lane, width, panel);
        }
      });
    }
  }

  void multiply(int64_t group, const Block& block, const T* slab, const T* bias, T* rows,
                const Scratch&) const {
    for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
      const int64_t taps = gather_.tap_count(residue);
      const T* panel = starts_[group] + gather_.tap_start(residue) * ld_;
      const int64_t* sources = gather_.pixel_sources(residue);
      const int64_t* targets = gather_.pixel_targets(residue);
      for_lane_tiles(ld_, isa_.lanes, [&](int64_t lane, int vectors) {
        for_tiles(gather_.pixel_count(block, residue), isa_.gather_rows[vectors - 1],
                  [&](int64_t first, int count) {
                    isa_.gather({slab, sources + first, gather_.taps(residue), taps,
                                 panel + lane * taps, bias ? bias + lane : nullptr, rows + lane,
                                 targets + first, ld_, count, vectors, /*accumulate=*/false});
                  });
      });
    }
  }

  static int64_t most_lanes(const VectorKernels<T>& isa, int64_t) { return 2 * isa.lanes; }

  // The same product with the lists' roles exchanged: a row per tap, a sum over the block's pixels.
  static void accumulate(const Gather<T>& gather, const Block& block, const T* slab, const T* rows,
                         int64_t width, bool add, T* partial, int64_t ld,
                         const VectorKernels<T>& isa, const Scratch&) {
    const int vectors = int(width / isa.lanes);
    for_tiles(gather.tap_total(), isa.gather_rows[vectors - 1], [&](int64_t first, int count) {
      isa.gather({slab, gather.taps(0) + first, gather.pixel_sources(0),
                  gather.pixel_count(block, 0), rows, nullptr, partial + first * ld, nullptr, ld,
                  count, vectors, add});
    });
  }

 private:
  const Gather<T>& gather_;
  int64_t ld_;
  const VectorKernels<T>& isa_;
  const T** starts_;  // of each group's panels
  T* panels_;
};

template <class T>
void run(const Conv2dCall& call, Arena& arena) {
  if (call.pass == Conv2dPass::backward_weight) {
    compute_weights<T, DirectProduct>(call, arena);
  } else {
    compute_pixels<T, DirectProduct>(call, arena);
  }
}

}  // namespace

void conv2d_direct(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, arena) : run<float>(call, arena);
}

}  // namespace convext::cpu
