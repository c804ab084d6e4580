// The convolution matrix of some pixels is written out, but only as much of it at a time as stays
// in the first-level cache while all channels' sums run over it: [tap][pixel], for a part of the
// sum and a tile of pixels. After Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning"
// (2014), and the packed panels of Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008).
#include "cpu/kernels/conv2d_panels.h"

#include "cpu/kernels/conv2d_driver.h"

namespace convext::cpu {
namespace {

// Channels of results whose sums run over one layout of the matrix.
constexpr int64_t kRangeChannels = 256;
// Of sums that stay in the second-level cache while they are added to part by part.
constexpr int64_t kSumBytes = 128 << 10;

// The filters as tiles read them: [group][residue class][part of the sum][panel][tap][lane], a
// panel being as many of the results' channels as a vector has lanes.
template <class T>
class PanelFilters {
 public:
  PanelFilters(const Conv2dCall& call, const Gather<T>& gather, const VectorKernels<T>& isa,
               Arena& arena)
      : call_(call),
        gather_(gather),
        isa_(isa),
        bank_(filter_bank(call)),
        forward_(call.pass == Conv2dPass::forward),
        panels_(ceil_div(forward_ ? bank_.filters : bank_.channels, isa.lanes)),
        rows_((forward_ ? bank_.channels : bank_.filters) * bank_.taps) {
    filters_ = arena.pack<T>(call.problem.groups * size());
    must_load_ = arena.must_pack();
    converted_ = arena.take<T>(scratch_size<T>(call.dtype, call.problem.groups * bank_.size()));
    matrix_rows_ = arena.keep<int64_t>(gather.tap_total());
    if (!arena.must_fill_kept()) return;
    const int64_t* weights = gather.tap_weights(0);
    for (int64_t t = 0; t < gather.tap_start(gather.classes()); ++t) {
      matrix_rows_[t] = weights[t] * kLoaded * isa.lanes;
    }
  }

  int64_t panels() const { return panels_; }
  // Of the matrix that load() needs for each thread.
  int64_t scratch_elements() const { return rows_ * kLoaded * isa_.lanes; }

  // The taps [first_tap, first_tap + count) of a class.
  const T* part(int64_t group, int64_t residue, int64_t first_tap) const {
    return filters_ + place(group, residue, first_tap);
  }

  // Calls body(first tap, count) for every part of a class' sum.
  template <class Body>
  void for_parts(int64_t residue, const Body& body) const {
    const int64_t taps = gather_.tap_count(residue);
    const int64_t row_bytes = isa_.panel_vectors * isa_.lanes * sizeof(T);
    for_sum_parts(taps, tap_chain(taps), row_bytes, body);
  }

  void load(int64_t slots, T* scratch) {
    if (!must_load_) return;
    const int64_t loads = ceil_div(panels_, kLoaded), items = call_.problem.groups * loads;
    const int64_t lanes = isa_.lanes, ld = kLoaded * lanes;
    const T* filters = as_type(isa_, call_.dtype, call_.weight, 0,
                               call_.problem.groups * bank_.size(), converted_);
    const auto load = forward_ ? load_filters_by_filter<T> : load_filters_by_channel<T>;
    run_slots(std::min(slots, items), items, [&](int64_t slot, int64_t item) {
      const int64_t g = item / loads, first_panel = item % loads * kLoaded;
      const int64_t end_panel = std::min(panels_, first_panel + kLoaded);
      T* matrix = scratch + slot * scratch_elements();
      load(isa_, bank_, filters + g * bank_.size(), first_panel * lanes, ld, matrix, ld);
      for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
        for_parts(residue, [&](int64_t first_tap, int64_t taps) {
          const int64_t* rows = matrix_rows_ + gather_.tap_start(residue) + first_tap;
          T* to = filters_ + place(g, residue, first_tap);
          for (int64_t panel = first_panel; panel < end_panel; ++panel) {
            isa_.panel_copy({matrix + (panel - first_panel) * lanes, rows, taps,
                             to + panel * taps * lanes, lanes, int(lanes), /*whole=*/true});
          }
        });
      }
    });
  }

 private:
  static constexpr int64_t kLoaded = 4;  // panels at a time, so that rows of filters are read long

  int64_t row() const { return panels_ * isa_.lanes; }
  int64_t size() const { return gather_.tap_total() * row(); }
  int64_t place(int64_t group, int64_t residue, int64_t first_tap) const {
    return group * size() + (gather_.tap_start(residue) + first_tap) * row();
  }

  const Conv2dCall& call_;
  const Gather<T>& gather_;
  const VectorKernels<T>& isa_;
  FilterBank bank_;
  bool forward_;
  int64_t panels_, rows_;
  int64_t* matrix_rows_;  // where in a matrix the weights of the taps are
  T *filters_, *converted_;
  bool must_load_;
};

// Targets of one class, some whole rows of them in every image of a block, counted through.
struct Run {
  int64_t images, rows, columns;
  int64_t count() const { return images * rows * columns; }
};

// Calls body(place in the tile, image, row, column, length) for the pieces of lines that `count`
// targets from `first` on are. With `joined` an image's rows are one line.
template <class Body>
void for_pieces(const Run& run, bool joined, int64_t first, int64_t count, const Body& body) {
  const int64_t rows = joined ? 1 : run.rows,
                columns = joined ? run.rows * run.columns : run.columns;
  int64_t column = first % columns, row = first / columns % rows, image = first / columns / rows;
  for (int64_t place = 0; place < count;) {
    const int64_t length = std::min(count - place, columns - column);
    body(place, image, row, column, length);
    place += length;
    column = 0;
    if (++row == rows) row = 0, ++image;
  }
}

template <class T>
class PanelProduct {
 public:
  struct Scratch {
    Scratch(const PanelProduct& product, Arena& arena)
        : pixels(arena.take<T>(product.panel_size())),
          results(arena.take<T>(product.range() * product.ld_)),
          converted(arena.take<T>(scratch_size<T>(product.target_.dtype, product.ld_))) {}
    T* pixels;     // a panel: [tap][pixel of a tile]
    T* results;    // [channel][pixel of the block], of tiles that can't be computed in place
    T* converted;  // a piece of a line
  };

  PanelProduct(const Conv2dCall& call, const Gather<T>& gather, const PanelFilters<T>& filters,
               const VectorKernels<T>& isa, Arena& arena)
      : call_(call), gather_(gather), filters_(filters), isa_(isa) {
    target_ = call.pass == Conv2dPass::forward ? grad_output_tensor(call) : input_tensor(call);
    channels_ = target_.channels / call.problem.groups;
    plane_ = target_.height * target_.width;
    ld_ = round_up(gather.most_pixels(), isa.lanes);
    same_type_ = size_of(target_.dtype) == int64_t(sizeof(T));
    bias_ = arena.take<T>(call.bias ? target_.channels : 0);
  }

  void load_bias() const {
    if (call_.bias) isa_.load(call_.dtype, call_.bias, 0, bias_, target_.channels);
  }

  // The results of some panels of a group's filters for a block.
  void multiply(int64_t group, int64_t first_panel, int64_t end_panel, const Block& block,
                const T* slab, const Scratch& scratch) const {
    const int64_t most = range() / isa_.lanes;
    for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
      const Run run{block.images, gather_.pixel_rows(block, residue),
                    gather_.pixel_columns(residue)};
      if (run.count() == 0) continue;
      for_tiles(end_panel - first_panel, most, [&](int64_t first, int64_t count) {
        const Part part{group, residue, first_panel + first, count};
        const Tiles all = tiles(run);
        const int64_t tile_bytes = count * isa_.lanes * isa_.panel_vectors * isa_.lanes * sizeof(T);
        const int64_t together = std::max<int64_t>(1, kSumBytes / tile_bytes);
        for (int64_t tile = 0; tile < all.count; tile += together) {
          compute(part, block, run, all, tile, std::min(all.count, tile + together), slab, scratch);
        }
      });
    }
  }

 private:
  int64_t range() const { return round_up(std::min(kRangeChannels, channels_), isa_.lanes); }
  int64_t panel_size() const {
    // A part of a sum is one chain at least.
    const int64_t ld = isa_.panel_vectors * isa_.lanes, taps = gather_.tap_total();
    int64_t most = 0;
    for_sum_parts(taps, tap_chain(taps), ld * sizeof(T),
                  [&](int64_t, int64_t count) { most = std::max(most, count); });
    return std::max<int64_t>(most * ld, kPanelBytes / sizeof(T));
  }

  // Panels [first, first + count) of a group, the pixels of a class.
  struct Part {
    int64_t group, residue, first, count;
  };
  int64_t first_channel(const Part& part) const { return part.first * isa_.lanes; }
  int64_t end_channel(const Part& part) const {
    return std::min(channels_, (part.first + part.count) * isa_.lanes);
  }

  // Tiles of pixels.
  Tiles tiles(const Run& run) const {
    return Tiles(ceil_div(run.count(), isa_.lanes), isa_.panel_vectors);
  }

  // Whether a tile's results lie in the output as they do in a tile.
  bool in_place(const Run& run, int64_t pixel, int vectors) const {
    if (!same_type_ || gather_.classes() > 1) return false;
    const int64_t image = run.rows * run.columns;
    return pixel % image + vectors * isa_.lanes <= image;
  }

  // Where in the output a pixel of the part's first channel is.
  int64_t place(const Part& part, const Block& block, int64_t image, int64_t row,
                int64_t column) const {
    const int64_t channel = part.group * channels_ + first_channel(part);
    const int64_t y =
        block.first_row + part.residue / gather_.column_classes() + row * gather_.row_classes();
    const int64_t x = part.residue % gather_.column_classes() + column * gather_.column_classes();
    return ((block.first_image + image) * target_.channels + channel) * plane_ + y * target_.width +
           x;
  }

  // Tiles [first_tile, end_tile) of `all`.
  void compute(const Part& part, const Block& block, const Run& run, const Tiles& all,
               int64_t first_tile, int64_t end_tile, const T* slab, const Scratch& scratch) const {
    const int64_t chain = tap_chain(gather_.tap_count(part.residue));
    const int64_t image = run.rows * run.columns;
    const int64_t channels = end_channel(part) - first_channel(part);
    const T* bias = call_.bias ? bias_ + part.group * channels_ + first_channel(part) : nullptr;
    filters_.for_parts(part.residue, [&](int64_t first_tap, int64_t taps) {
      const T* filters =
          filters_.part(part.group, part.residue, first_tap) + part.first * taps * isa_.lanes;
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        const int64_t pixel = all.first(tile) * isa_.lanes;
        const int vectors = int(all.length(tile));
        lay_out(part.residue, run, pixel, vectors, slab, first_tap, taps, scratch.pixels);
        T* out = scratch.results + pixel;
        int64_t ld = ld_;
        if (in_place(run, pixel, vectors)) {
          out = static_cast<T*>(call_.output) + place(part, block, pixel / image, 0, pixel % image);
          ld = plane_;
        }
        for (int64_t panel = 0; panel < part.count; ++panel) {
          const int64_t channel = panel * isa_.lanes;
          const T* left = filters + channel * taps;
          const int64_t end = std::min<int64_t>(channel + isa_.lanes, channels);
          for (int64_t c = channel; c < end; c += isa_.panel_rows, left += isa_.panel_rows) {
            isa_.panel_tile({left, isa_.lanes, scratch.pixels, taps, chain,
                             bias && first_tap == 0 ? bias + c : nullptr, out + c * ld, ld,
                             int(std::min<int64_t>(isa_.panel_rows, end - c)), vectors,
                             /*accumulate=*/first_tap > 0});
          }
        }
      }
    });
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const int64_t pixel = all.first(tile) * isa_.lanes;
      const int vectors = int(all.length(tile));
      if (!in_place(run, pixel, vectors)) write(part, block, run, pixel, vectors, scratch);
    }
  }

  // The convolution matrix of a tile and some taps.
  void lay_out(int64_t residue, const Run& run, int64_t pixel, int vectors, const T* slab,
               int64_t first_tap, int64_t taps, T* panel) const {
    const bool joined = gather_.row_pitch() == run.columns;
    const int64_t ld = vectors * isa_.lanes;
    for_pieces(run, joined, pixel, std::min(ld, run.count() - pixel),
               [&](int64_t place, int64_t image, int64_t row, int64_t column, int64_t length) {
                 const T* from =
                     slab + image * gather_.image_stride() + row * gather_.row_pitch() + column;
                 isa_.panel_copy({from, gather_.taps(residue) + first_tap, taps, panel + place, ld,
                                  int(length), place + round_up(length, isa_.lanes) <= ld});
               });
  }

  void write(const Part& part, const Block& block, const Run& run, int64_t pixel, int vectors,
             const Scratch& scratch) const {
    const int64_t step = gather_.column_classes();
    const int64_t channels = end_channel(part) - first_channel(part);
    for_pieces(run, gather_.classes() == 1, pixel,
               std::min(vectors * int64_t(isa_.lanes), run.count() - pixel),
               [&](int64_t first, int64_t image, int64_t row, int64_t column, int64_t length) {
                 const T* results = scratch.results + pixel + first;
                 const int64_t offset = place(part, block, image, row, column);
                 if (same_type_ && step == 1) {
                   isa_.phased_copy({results,
                                     ld_,
                                     channels,
                                     length,
                                     static_cast<T*>(call_.output) + offset,
                                     {1, 0, plane_},
                                     {1, 0, 1},
                                     0,
                                     0});
                   return;
                 }
                 for (int64_t c = 0; c < channels; ++c) {
                   write_piece(results + c * ld_, length, step, offset + c * plane_,
                               scratch.converted);
                 }
               });
  }

  void write_piece(const T* results, int64_t count, int64_t step, int64_t offset,
                   T* scratch) const {
    if (same_type_) {
      T* out = static_cast<T*>(call_.output) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * step] = results[i];
    } else if (step == 1) {
      isa_.store(results, target_.dtype, call_.output, offset, count);
    } else {
      isa_.store(results, target_.dtype, scratch, 0, count);
      const uint16_t* values = reinterpret_cast<const uint16_t*>(scratch);
      uint16_t* out = static_cast<uint16_t*>(call_.output) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * step] = values[i];
    }
  }

  const Conv2dCall& call_;
  const Gather<T>& gather_;
  const PanelFilters<T>& filters_;
  const VectorKernels<T>& isa_;
  ImageTensor target_;
  int64_t channels_;  // of a group
  int64_t plane_;     // elements of one in the output
  int64_t ld_;        // of results
  bool same_type_;
  T* bias_;
};

template <class T>
Gather<T> gather_of(const Conv2dCall& call, Arena& arena) {
  // Neighbouring targets of a stride meet neighbours in a slab that is cut into its phases.
  const bool forward = call.pass == Conv2dPass::forward;
  const Slab slab = forward && call.problem.stride_width > 1 ? Slab::by_phase : Slab::as_source;
  return forward ? forward_gather<T>(call, Taps::needed, Cut::large, slab, arena)
                 : backward_gather<T>(call, Cut::large, slab, arena);
}

}  // namespace

bool prefers_panels(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  if (call.layout != Layout::nchw || call.epilogue || call.pass == Conv2dPass::backward_weight) {
    return false;
  }
  const bool forward = call.pass == Conv2dPass::forward;
  const int64_t channels = forward ? p.group_out_channels() : p.group_in_channels();
  const int64_t in = p.in_height * p.in_width, out = p.out_height() * p.out_width();
  // Measured. A small plane's rows are short pieces, which larger kernels copy more often.
  const int64_t plane = p.kernel_taps() == 1 ? 192 : 768;
  return channels >= 16 && (forward ? out : in) >= plane && std::min(in, out) > 1;
}

template <class T>
void compute_panels(const Conv2dCall& call, Arena& arena) {
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const Gather<T> gather = gather_of<T>(call, arena);
  PanelFilters<T> filters(call, gather, isa, arena);
  // Where blocks are few, each is several items, some panels of it.
  const int64_t blocks = p.groups * gather.block_count();
  const int64_t wanted = call.threads == 1 ? 1 : 4 * call.threads;
  const int64_t ranges = std::clamp<int64_t>(wanted / std::max<int64_t>(1, blocks), 1,
                                             std::max<int64_t>(1, filters.panels()));
  const int64_t items = blocks * ranges;
  const int64_t slots = slot_count(call, items);
  const int64_t source_channels =
      call.pass == Conv2dPass::forward ? p.group_in_channels() : p.group_out_channels();
  const PanelProduct<T> product(call, gather, filters, isa, arena);
  T* filter_scratch = arena.take<T>(slots * filters.scratch_elements());
  using Scratch = typename PanelProduct<T>::Scratch;
  Arena part(nullptr);
  part.take<T>(gather.slab_size());
  Scratch(product, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  filters.load(slots, filter_scratch);
  product.load_bias();
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    T* slab = own.take<T>(gather.slab_size());
    const Scratch scratch(product, own);
    const int64_t range = item % ranges, index = item / ranges;
    const int64_t g = index / gather.block_count();
    const Block block = gather.block(index % gather.block_count());
    const bool refill = item > first_item(slot, slots, items);
    product.multiply(g, range * filters.panels() / ranges, (range + 1) * filters.panels() / ranges,
                     block, gather.fill(isa, block, g * source_channels, slab, refill), scratch);
  });
}

template void compute_panels<float>(const Conv2dCall&, Arena&);
template void compute_panels<double>(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
