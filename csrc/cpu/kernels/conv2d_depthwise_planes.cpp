// Depthwise convolution, plane by plane: some rows of a plane are copied into a slab that stays in
// the first-level cache, with zeros for padding, the columns of a strided convolution side by side
// by their remainder; from there register tiles compute whole rows (see DepthwisePlanes).
#include "cpu/kernels/conv2d_depthwise_planes.h"

#include <algorithm>
#include <numeric>

#include "cpu/kernels/conv2d_driver.h"

namespace convext::cpu {
namespace {

// How the work is cut. Constants, for the sums of backward_weight depend on the first.
constexpr int64_t kSlabBytes = 16 << 10;
constexpr int64_t kItems = 64;  // of backward_weight at least, if need be by splits of the batch
// Elements from the first tap of a row of targets to its last, with all that lies between them.
constexpr double kMostReach = 1 << 16;

// An axis of the slab, whose places are sources from `low` on, whether or not there are such.
// Targets of a residue class meet their taps at
//   start + i * source_step + t * tap_step, target residue + i * classes meeting its t-th tap
//   there,
// which is position kernel + t * kernel_step of the kernel.
struct PlaneAxis {
  struct Class {
    int64_t kernel, taps, start;
  };
  int64_t source_size, target_size;
  int64_t classes, source_step, kernel_step, tap_step;
  int64_t low, reach;  // places that targets 0 to classes - 1 meet
  Class* list;

  static PlaneAxis forward(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                           int64_t dilation, Arena& arena) {
    // Source 0 at a multiple of the stride.
    const int64_t start = round_up(padding, stride) - padding, reach = (kernel - 1) * dilation + 1;
    PlaneAxis axis{in, out, 1, stride, 1, dilation, -padding - start, start + reach, nullptr};
    axis.list = arena.take<Class>(1);
    if (!arena.counting()) axis.list[0] = {0, kernel, start};
    return axis;
  }

  static PlaneAxis backward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                            int64_t padding, int64_t dilation, Arena& arena) {
    const int64_t common = std::gcd(stride, dilation), tap_step = -(dilation / common);
    const int64_t classes = std::max<int64_t>(1, std::min(stride, in));
    PlaneAxis axis{out, in, classes, 1, stride / common, tap_step, 0, 1, nullptr};
    axis.list = arena.take<Class>(classes);
    int64_t low = 0, high = 0;
    bool any = false;
    for (int pass = 0; pass < 2; ++pass) {  // the second knows `low`
      for (int64_t residue = 0; residue < classes; ++residue) {
        int64_t k = 0;
        while (k < kernel && (residue + padding - k * dilation) % stride != 0) ++k;
        const int64_t taps = k < kernel ? ceil_div(kernel - k, axis.kernel_step) : 0;
        const int64_t start = (residue + padding - k * dilation) / stride;
        if (pass == 1 && !arena.counting()) axis.list[residue] = {k, taps, start - low};
        if (pass == 1 || taps == 0) continue;
        const int64_t last = start + (taps - 1) * tap_step;
        low = any ? std::min(low, last) : last;
        high = any ? std::max(high, start) : start;
        any = true;
      }
    }
    axis.low = low;
    axis.reach = high - low + 1;
    return axis;
  }

  int64_t places(int64_t targets) const {
    return std::max<int64_t>(0, ceil_div(targets, classes) - 1) * source_step + reach;
  }
  // Targets of a class among the first so many of all.
  int64_t members(int64_t residue, int64_t targets) const {
    return targets > residue ? ceil_div(targets - residue, classes) : 0;
  }
};

template <class T>
class PlaneConvolution {
 public:
  PlaneConvolution(const Conv2dCall& call, Arena& arena)
      : call_(call),
        p_(call.problem),
        isa_(call.isa->of<T>()),
        backward_(call.pass == Conv2dPass::backward_input),
        filters_(p_.group_out_channels()),
        y_((backward_ ? PlaneAxis::backward : PlaneAxis::forward)(
            p_.in_height, p_.out_height(), p_.kernel_height, p_.stride_height, p_.padding_height,
            p_.dilation_height, arena)),
        x_((backward_ ? PlaneAxis::backward : PlaneAxis::forward)(
            p_.in_width, p_.out_width(), p_.kernel_width, p_.stride_width, p_.padding_width,
            p_.dilation_width, arena)),
        same_type_(size_of(call.dtype) == int64_t(sizeof(T))),
        block_rows_(choose_rows()),
        blocks_(ceil_div(y_.target_size, block_rows_)) {
    const int64_t phases = x_.source_step, places = x_.places(x_.target_size);
    // Phases are written in whole vectors one after another, and not over one another's beginning.
    const int64_t step = ceil_div(places, phases);
    column_ = {phases, step, 1};
    if (phases > 1) column_.phase_step = round_up(step, 8) + (step > isa_.lanes ? isa_.lanes : 0);
    pitch_ = round_up(phases * column_.phase_step, std::min(8, isa_.lanes));
    // So that sources are aligned.
    margin_ = phases == 1 ? (isa_.lanes + x_.low % isa_.lanes) % isa_.lanes : 0;
    slab_rows_ = y_.places(block_rows_);
    result_step_ = round_up(ceil_div(x_.target_size, x_.classes), isa_.lanes);
    group_ = choose_group();
    groups_ = ceil_div(p_.in_channels, group_);
    tap_columns_ = arena.take<int64_t>(x_.classes * p_.kernel_width);
    if (arena.counting()) return;
    for (int64_t i = 0; i < x_.classes; ++i) {
      for (int64_t t = 0; t < x_.list[i].taps; ++t) {
        tap_columns_[i * p_.kernel_width + t] =
            margin_ + column_.offset(x_.list[i].start + t * x_.tap_step);
      }
    }
  }

  void compute_pixels(Arena& arena);
  void compute_weights(Arena& arena);

 private:
  // Per slot.
  struct Scratch {
    Scratch(const PlaneConvolution& d, Arena& arena)
        : slab(arena.take<T>(d.slab_size())),
          results(arena.take<T>(d.results_size())),
          converted(arena.take<T>(d.same_type_ ? 0 : d.most_pixels())),
          converted_too(arena.take<T>(d.same_type_ ? 0 : d.most_pixels())) {}
    T* slab;                       // [plane][slab_rows_][pitch_]
    T* results;                    // [plane][row][class of columns][result_step_]
    T *converted, *converted_too;  // [plane][row][column], as in the tensors
  };

  // By the shape alone.
  int64_t choose_rows() const {
    const auto bytes = [&](int64_t rows) {
      return double(y_.places(rows)) * double(x_.places(x_.target_size)) * sizeof(T);
    };
    int64_t rows = round_up(y_.target_size, y_.classes);
    while (rows > y_.classes && bytes(rows) > kSlabBytes) rows = round_up(rows / 2, y_.classes);
    return std::max<int64_t>(1, std::min(rows, y_.target_size));
  }
  int64_t choose_group() const {
    if (blocks_ > 1 || filters_ > 1) return 1;
    const int64_t most = kSlabBytes / int64_t(sizeof(T)) / std::max<int64_t>(1, slab_plane());
    return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, p_.in_channels));
  }

  int64_t slab_plane() const { return slab_rows_ * pitch_; }
  // With room for the vectors that begin in the last row.
  int64_t slab_size() const { return group_ * slab_plane() + 5 * isa_.lanes; }
  int64_t results_size() const {
    return x_.classes == 1 ? 0 : group_ * block_rows_ * x_.classes * result_step_ + isa_.lanes;
  }
  int64_t most_pixels() const {
    return group_ * std::max(std::min(slab_rows_, y_.source_size) * x_.source_size,
                             block_rows_ * x_.target_size);
  }
  int64_t rows_of(int64_t block) const {
    return std::min(block_rows_, y_.target_size - block * block_rows_);
  }

  // A number of planes from `plane` on, which is 1 where there are several blocks.
  void fill(int64_t block, int64_t plane, int64_t count, const Scratch&) const;
  void compute(int64_t block, const T* filters, const T* bias, bool accumulate, int64_t plane,
               int64_t count, const Scratch&) const;
  void store_results(int64_t block, int64_t plane, int64_t count, const Scratch&) const;

  const Conv2dCall& call_;
  const Conv2dProblem& p_;
  const VectorKernels<T>& isa_;
  bool backward_;
  int64_t filters_;  // of a channel
  PlaneAxis y_, x_;
  bool same_type_;
  int64_t block_rows_, blocks_;  // targets of a plane
  int64_t group_, groups_;       // channels whose planes are computed at a time
  int64_t margin_, pitch_, slab_rows_, result_step_;
  PhasedAxis column_;
  int64_t* tap_columns_;  // [class of columns][kernel_width]
};

// Copies the sources of a block. What the slab holds beside them are zeros, once they are there.
template <class T>
void PlaneConvolution<T>::fill(int64_t block, int64_t plane, int64_t count,
                               const Scratch& scratch) const {
  const int64_t low = y_.low + block * block_rows_ / y_.classes * y_.source_step;
  const int64_t places = y_.places(rows_of(block));
  const int64_t first = std::clamp<int64_t>(low, 0, y_.source_size);
  const int64_t end = std::clamp(low + places, first, y_.source_size);
  const int64_t left = std::clamp<int64_t>(x_.low, 0, x_.source_size);
  const int64_t right = std::clamp(x_.low + x_.places(x_.target_size), left, x_.source_size);
  if (blocks_ > 1) {
    T* after = scratch.slab + margin_ + (end - low) * pitch_;
    std::fill_n(scratch.slab + margin_, (first - low) * pitch_, T(0));
    std::fill_n(after, (low + places - end) * pitch_, T(0));
  }
  const void* data = backward_ ? call_.grad_output : call_.input;
  const int64_t plane_size = y_.source_size * x_.source_size;
  const int64_t pixels = blocks_ == 1 ? count * plane_size : (end - first) * x_.source_size;
  const int64_t skipped = blocks_ == 1 ? 0 : first * x_.source_size;
  const T* from =
      as_type(isa_, call_.dtype, data, plane * plane_size + skipped, pixels, scratch.converted) +
      first * x_.source_size - skipped + left;
  if (column_.phases <= 2) {
    PlanesCopy<T> copy;
    copy.planes = count;
    copy.rows = end - first;
    copy.columns = right - left;
    copy.from = from;
    copy.from_plane = plane_size;
    copy.from_row = x_.source_size;
    copy.to = scratch.slab + margin_ + (first - low) * pitch_ + column_.offset(left - x_.low);
    copy.to_plane = slab_plane();
    copy.to_row = pitch_;
    copy.odd = column_.phases == 1 ? 0 : column_.phase_step;
    return isa_.copy_planes(copy);
  }
  for (int64_t i = 0; i < count; ++i) {
    isa_.phased_copy({from + i * plane_size,
                      x_.source_size,
                      end - first,
                      right - left,
                      scratch.slab + margin_ + i * slab_plane(),
                      {1, 0, pitch_},
                      column_,
                      first - low,
                      left - x_.low});
  }
}

template <class T>
void PlaneConvolution<T>::compute(int64_t block, const T* filters, const T* bias, bool accumulate,
                                  int64_t plane, int64_t count, const Scratch& scratch) const {
  const int64_t rows = rows_of(block), plane_size = y_.target_size * x_.target_size;
  DepthwisePlanes<T> tile{};
  tile.planes = count;
  tile.init = bias;
  tile.accumulate = accumulate;
  tile.source_plane = slab_plane();
  tile.source_row = y_.source_step * pitch_;
  tile.tap_row = y_.tap_step * pitch_;
  tile.weight_plane = p_.kernel_taps();
  tile.weight_row = y_.kernel_step * p_.kernel_width;
  tile.weight_column = x_.kernel_step;
  T* results = scratch.results;
  int64_t ld = x_.classes * result_step_;
  tile.pixel_plane = rows * ld;
  if (x_.classes == 1) {
    ld = x_.target_size;
    tile.pixel_plane = plane_size;
    results = same_type_
                  ? static_cast<T*>(call_.output) + plane * plane_size + block * block_rows_ * ld
                  : scratch.converted_too;
  }
  tile.pixel_row = y_.classes * ld;
  for (int64_t i = 0; i < y_.classes; ++i) {
    const PlaneAxis::Class& y = y_.list[i];
    tile.rows = y_.members(i, rows);
    if (tile.rows == 0) continue;
    for (int64_t j = 0; j < x_.classes; ++j) {
      const PlaneAxis::Class& x = x_.list[j];
      tile.columns = x_.members(j, x_.target_size);
      const bool met = y.taps > 0 && x.taps > 0;
      tile.tap_row_count = met ? y.taps : 0;
      tile.tap_column_count = met ? x.taps : 0;
      tile.tap_columns = tap_columns_ + j * p_.kernel_width;
      tile.source = scratch.slab + (met ? y.start * pitch_ : 0);
      tile.weight = filters + y.kernel * p_.kernel_width + x.kernel;
      tile.pixel = results + i * ld + j * result_step_;
      isa_.depthwise_planes(tile);
    }
  }
}

// Brings what is not in the output yet there.
template <class T>
void PlaneConvolution<T>::store_results(int64_t block, int64_t plane, int64_t count,
                                        const Scratch& scratch) const {
  if (same_type_ && x_.classes == 1) return;
  const int64_t rows = count * rows_of(block), width = x_.target_size;
  const int64_t offset = (plane * y_.target_size + block * block_rows_) * width;
  const int64_t ld = x_.classes * result_step_;
  T* dense = same_type_ ? static_cast<T*>(call_.output) + offset : scratch.converted_too;
  if (x_.classes == 2) {
    isa_.interleave_rows(scratch.results, scratch.results + result_step_, ld, dense, width, rows,
                         width);
  } else if (x_.classes > 2) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < x_.classes; ++i) {
        const T* from = scratch.results + row * ld + i * result_step_;
        for (int64_t c = i; c < width; c += x_.classes) dense[row * width + c] = *from++;
      }
    }
  }
  if (!same_type_) isa_.store(dense, call_.dtype, call_.output, offset, rows * width);
}

// Forward, and backward_input as a gather from grad_output, whose planes of a channel's filters are
// then added up.
template <class T>
void PlaneConvolution<T>::compute_pixels(Arena& arena) {
  const int64_t taps = p_.kernel_taps();
  const int64_t items = p_.batch * groups_ * blocks_;
  const int64_t slots = slot_count(call_, items);
  T* converted = arena.take<T>(scratch_size<T>(call_.dtype, p_.out_channels * (taps + 1)));
  Arena part(nullptr);
  Scratch(*this, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  const T* weights = as_type(isa_, call_.dtype, call_.weight, 0, p_.out_channels * taps, converted);
  const T* bias = call_.bias ? as_type(isa_, call_.dtype, call_.bias, 0, p_.out_channels,
                                       converted + p_.out_channels * taps)
                             : nullptr;
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch scratch(*this, own);
    if (item == first_item(slot, slots, items)) std::fill_n(scratch.slab, slab_size(), T(0));
    const int64_t block = item % blocks_, image = item / blocks_ / groups_;
    const int64_t channel = item / blocks_ % groups_ * group_;
    const int64_t count = std::min(group_, p_.in_channels - channel);
    const int64_t plane = image * p_.in_channels + channel;
    if (!backward_) fill(block, plane, count, scratch);
    for (int64_t i = 0; i < filters_; ++i) {
      const int64_t filter = channel * filters_ + i;
      if (backward_) fill(block, plane * filters_ + i, count, scratch);
      const int64_t to = backward_ ? plane : plane * filters_ + i;
      compute(block, weights + filter * taps, bias ? bias + filter : nullptr, backward_ && i > 0,
              to, count, scratch);
      if (!backward_ || i == filters_ - 1) store_results(block, to, count, scratch);
    }
  });
}

// The sum over all pixels: in chains of at most kSumChain, added up in order within a split of the
// batch, then over the lanes, and over the splits in order.
template <class T>
void PlaneConvolution<T>::compute_weights(Arena& arena) {
  const int64_t taps = p_.kernel_taps(), size = p_.out_channels * taps;
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(kItems, p_.in_channels), 1, std::max<int64_t>(1, p_.batch));
  const int64_t items = splits * groups_;
  const int64_t slots = slot_count(call_, items);
  const int64_t columns = x_.target_size, plane_size = y_.target_size * columns;
  const int64_t chain_columns = kSumChain * kPlaneLanes;
  const int64_t chain_rows =
      std::max<int64_t>(1, kSumChain / ceil_div(std::max<int64_t>(1, columns), kPlaneLanes));
  const bool partial = splits > 1 || !same_type_;
  T* partials = arena.take<T>(partial ? splits * size : 0);
  Arena part(nullptr);
  Scratch(*this, part);
  part.take<T>(group_ * filters_ * taps * kPlaneLanes);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  T* sums = partial ? partials : static_cast<T*>(call_.output);
  if (p_.batch == 0) std::fill_n(sums, size, T(0));
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    const Scratch scratch(*this, own);
    T* lane_sums = own.take<T>(group_ * filters_ * taps * kPlaneLanes);
    if (item == first_item(slot, slots, items)) std::fill_n(scratch.slab, slab_size(), T(0));
    const int64_t split = item / groups_;
    const int64_t first_image = split * p_.batch / splits, end = (split + 1) * p_.batch / splits;
    const int64_t channel = item % groups_ * group_;
    const int64_t count = std::min(group_, p_.in_channels - channel);
    DepthwisePlanes<T> tile{};
    tile.planes = count;
    tile.source_plane = slab_plane();
    tile.source_row = y_.source_step * pitch_;
    tile.tap_row = y_.tap_step * pitch_;
    tile.tap_columns = tap_columns_;
    tile.tap_row_count = p_.kernel_height;
    tile.tap_column_count = p_.kernel_width;
    tile.pixel_plane = plane_size;
    tile.pixel_row = columns;
    const T* sources = scratch.slab + y_.list[0].start * pitch_;
    for (int64_t image = first_image; image < end; ++image) {
      const int64_t plane = image * p_.in_channels + channel;
      for (int64_t block = 0; block < blocks_; ++block) {
        fill(block, plane, count, scratch);
        const int64_t rows = rows_of(block);
        for (int64_t i = 0; i < filters_; ++i) {
          const int64_t offset =
              (plane * filters_ + i) * plane_size + block * block_rows_ * columns;
          const T* grad = as_type(isa_, call_.dtype, call_.grad_output, offset,
                                  count * rows * columns, scratch.converted_too);
          tile.lane_sums = lane_sums + i * taps * kPlaneLanes;
          for_tiles(rows, chain_rows, [&](int64_t row, int tile_rows) {
            for_tiles(columns, chain_columns, [&](int64_t column, int tile_columns) {
              const bool first = image == first_image && block == 0 && row == 0 && column == 0;
              const bool last = image == end - 1 && block == blocks_ - 1 &&
                                row + tile_rows == rows && column + tile_columns == columns;
              tile.source = sources + row * tile.source_row + column;
              tile.pixel = const_cast<T*>(grad) + row * columns + column;  // it is only read
              tile.rows = tile_rows;
              tile.columns = tile_columns;
              tile.accumulate = !first;
              tile.totals = last ? sums + split * size + (channel * filters_ + i) * taps : nullptr;
              isa_.depthwise_plane_weights(tile);
            });
          });
        }
      }
    }
  });
  if (!partial) return;
  for (int64_t split = 1; split < splits; ++split) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[split * size + i];
  }
  isa_.store(sums, call_.dtype, call_.output, 0, size);
}

template <class T>
void run(const Conv2dCall& call, Arena& arena) {
  PlaneConvolution<T> planes(call, arena);
  if (call.pass == Conv2dPass::backward_weight) {
    planes.compute_weights(arena);
  } else {
    planes.compute_pixels(arena);
  }
}

}  // namespace

bool depthwise_prefers_planes(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  // Kernels so large that a pixel's sum is cut into chains are left to the other way, as is what
  // wants rows of channels, and taps so far apart that the slab would hold little that they meet,
  // or be larger than memory. Of shorter rows than these most of a vector and of the time is lost.
  const bool backward = call.pass == Conv2dPass::backward_input;
  const double height =
      double(p.kernel_height - 1) * double(p.dilation_height) + double(p.stride_height);
  const double width = double(p.in_width) + 2 * double(p.padding_width) + double(p.stride_width);
  if (height * width > kMostReach) return false;
  return call.layout == Layout::nchw && !call.epilogue && p.kernel_taps() <= kSumChain &&
         (backward ? p.in_width : p.out_width()) >= 10;
}

void conv2d_depthwise_planes(const Conv2dCall& call, Arena& arena) {
  call.dtype == DType::float64 ? run<double>(call, arena) : run<float>(call, arena);
}

}  // namespace convext::cpu
