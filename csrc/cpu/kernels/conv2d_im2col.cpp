// Convolution as a matrix product: the columns of the convolution matrix are written out (one row
// per output pixel, one column per weight of a filter) and multiplied by our GEMM. After
// Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
// Processing" (2006). Blocks of pixels bound the workspace.
#include "cpu/kernels/conv2d_driver.h"
#include "cpu/kernels/gemm.h"

namespace convext::cpu {
namespace {

// columns[pixel][tap] = slab[pixel + tap]
template <class T>
void im2col(const Gather<T>& gather, int64_t first_pixel, int64_t count, const T* slab,
            T* columns) {
  const int64_t* pixels = gather.pixel_sources(0) + first_pixel;
  const int64_t* taps = gather.taps(0);
  const int64_t tap_count = gather.tap_total();
  for (int64_t p = 0; p < count; ++p, columns += tap_count) {
    const T* corner = slab + pixels[p];
    for (int64_t t = 0; t < tap_count; ++t) columns[t] = corner[taps[t]];
  }
}

// slab[pixel + tap] += columns[pixel][tap]
template <class T>
void col2im(const Gather<T>& gather, int64_t first_pixel, int64_t count, const T* columns,
            T* slab) {
  const int64_t* pixels = gather.pixel_sources(0) + first_pixel;
  const int64_t* taps = gather.taps(0);
  const int64_t tap_count = gather.tap_total();
  for (int64_t p = 0; p < count; ++p, columns += tap_count) {
    T* corner = slab + pixels[p];
    for (int64_t t = 0; t < tap_count; ++t) corner[taps[t]] += columns[t];
  }
}

// forward:          rows[pixel][filter] = columns[pixel][tap] * filters[tap][filter]
// backward_weight:  grad[tap][filter]   = columns[pixel][tap]^T * grad_output[pixel][filter]
template <class T>
class Im2colProduct {
 public:
  static constexpr Taps kTaps = Taps::all;
  static constexpr Slab kSlab = Slab::as_source;

  struct Scratch {
    Scratch(const Gather<T>& gather, int64_t ld, const VectorKernels<T>& isa, Arena& arena)
        : columns(arena.take<T>(gather.most_pixels() * gather.tap_total())),
          forward(isa, gather.most_pixels(), ld, gather.tap_total(), arena),
          backward(isa, gather.tap_total(), ld, gather.most_pixels(), arena) {}
    T* columns;
    GemmWorkspace<T> forward, backward;
  };

  Im2colProduct(const Gather<T>& gather, int64_t, const VectorKernels<T>&, Arena&)
      : gather_(gather) {}

  static int64_t row_length(const Conv2dCall&, int64_t channels, int64_t lanes) {
    return round_up(channels, lanes);
  }

  // All lanes in one, since the columns serve them all.
  static int64_t panel_vectors(const VectorKernels<T>& isa, int64_t channels) {
    return std::max<int64_t>(1, ceil_div(channels, isa.lanes));
  }

  void multiply(const Block& block, const T* slab, const T* filters, int64_t lanes, const T* bias,
                T* rows, int64_t ld_rows, const Scratch& scratch) const {
    const int64_t pixels = gather_.pixels(block), taps = gather_.tap_total();
    im2col(gather_, 0, pixels, slab, scratch.columns);
    if (bias) {
      for (int64_t p = 0; p < pixels; ++p) std::copy_n(bias, lanes, rows + p * ld_rows);
    }
    gemm<T>(pixels, lanes, taps, {scratch.columns, taps, 1}, {filters, lanes, 1}, rows, ld_rows,
            /*accumulate=*/bias != nullptr, scratch.forward);
  }

  static int64_t most_lanes(const VectorKernels<T>&, int64_t range) { return range; }

  static void accumulate(const Gather<T>& gather, const Block& block, const T* slab, const T* rows,
                         int64_t width, int64_t ld_rows, bool add, T* partial, int64_t ld,
                         const VectorKernels<T>&, const Scratch& scratch) {
    const int64_t pixels = gather.pixels(block), taps = gather.tap_total();
    im2col(gather, 0, pixels, slab, scratch.columns);
    gemm<T>(taps, width, pixels, {scratch.columns, 1, taps}, {rows, ld_rows, 1}, partial, ld, add,
            scratch.backward);
  }

 private:
  const Gather<T>& gather_;
};

// backward_input: columns[pixel][tap] = grad_output[pixel][filter] * filters[tap][filter]^T,
// scattered back onto the input by col2im. A block is whole images, so no two blocks add to the
// same element.
template <class T>
void scatter_pixels(const Conv2dCall& call, Arena& arena) {
  constexpr int64_t kChunk = 256;  // pixels whose columns exist at a time
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  Conv2dCall target = call;
  target.input = nullptr;  // only its shape counts here: the gather's source is what is computed
  const Gather<T> gather =
      forward_gather<T>(target, Taps::all, Cut::whole_images, Slab::as_source, arena);
  const ImageTensor grad_output = grad_output_tensor(call);
  const int64_t filters = p.group_out_channels(), taps = gather.tap_total();
  const int64_t ld = round_up(filters, isa.lanes);
  const int64_t chunk = std::min(kChunk, gather.most_pixels());
  const int64_t items = p.groups * gather.block_count();
  const int64_t slots = slot_count(call, items);

  FilterPanels<T> panels(call, /*by_filter=*/true, std::max<int64_t>(1, ld / isa.lanes), isa,
                         arena);
  Arena part(nullptr);
  BlockScratch<T>(call, gather, ld, part);
  part.take<T>(chunk * taps);
  GemmWorkspace<T>(isa, chunk, taps, filters, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  panels.load(slots);
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const BlockScratch<T> scratch(call, gather, ld, own);
    T* columns = own.take<T>(chunk * taps);
    const GemmWorkspace<T> workspace(isa, chunk, taps, filters, own);
    const int64_t g = item / gather.block_count();
    const Block block = gather.block(item % gather.block_count());
    load_block(isa, grad_output, block, g * filters, filters, scratch.rows, ld, scratch.convert);
    std::fill(scratch.slab, scratch.slab + gather.slab_size(), T(0));
    for (int64_t first = 0; first < gather.pixels(block); first += chunk) {
      const int64_t count = std::min(chunk, gather.pixels(block) - first);
      gemm<T>(count, taps, filters, {scratch.rows + first * ld, ld, 1}, {panels.panel(g, 0), 1, ld},
              columns, taps, /*accumulate=*/false, workspace);
      col2im(gather, first, count, columns, scratch.slab);
    }
    gather.unfill(isa, block, g * p.group_in_channels(), scratch.slab, call.output);
  });
}

template <class T>
void run(const Conv2dCall& call, Arena& arena) {
  switch (call.pass) {
    case Conv2dPass::forward:
      return compute_pixels<T, Im2colProduct>(call, arena);
    case Conv2dPass::backward_input:
      return scatter_pixels<T>(call, arena);
    case Conv2dPass::backward_weight:
      return compute_weights<T, Im2colProduct>(call, arena);
  }
}

}  // namespace

void conv2d_im2col(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, arena) : run<float>(call, arena);
}

}  // namespace convext::cpu
