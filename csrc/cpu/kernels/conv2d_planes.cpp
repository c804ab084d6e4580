#include "cpu/kernels/conv2d_planes.h"

#include "cpu/kernels/conv2d_driver.h"

namespace convext::cpu {
namespace {

// Channels whose results are computed at a time, which bounds what waits to be written.
constexpr int64_t kRangeChannels = 64;

// The pixels of one class in one image of a block, row after row with the slab's pitch: some lanes
// at the rows' ends compute nothing of use.
struct Run {
  int64_t rows, columns, pitch;
  int64_t length() const { return rows > 0 && columns > 0 ? (rows - 1) * pitch + columns : 0; }
};

template <class T>
class PlaneProduct {
 public:
  struct Scratch {
    Scratch(const PlaneProduct& product, Arena& arena)
        : results(
              arena.take<T>(std::min(kRangeChannels, product.channels_) * product.most_length_)),
          converted(arena.take<T>(
              scratch_size<T>(product.target_.dtype, product.gather_.most_pixels()))) {}
    T* results;    // [channel][pixel of the run]
    T* converted;  // a class's pixels of one plane
  };

  PlaneProduct(const Conv2dCall& call, const Gather<T>& gather, const VectorKernels<T>& isa,
               Arena& arena)
      : call_(call), gather_(gather), isa_(isa), bank_(filter_bank(call)) {
    const bool forward = call.pass == Conv2dPass::forward;
    target_ = forward ? grad_output_tensor(call) : input_tensor(call);
    channels_ = target_.channels / call.problem.groups;
    const Block whole{0, 1, 0, gather.most_rows()};
    most_length_ = 0;
    for (int64_t residue = 0; residue < gather.classes(); ++residue) {
      most_length_ = std::max(most_length_, run(whole, residue).length());
    }
    most_length_ = round_up(most_length_, isa.lanes);
    channel_weights_ = arena.keep<int64_t>(channels_);
    weights_ = arena.keep<int64_t>(gather.tap_total());
    if (arena.must_fill_kept()) list_weights();
    bias_ = arena.take<T>(call.bias ? target_.channels : 0);
    converted_ = arena.take<T>(scratch_size<T>(call.dtype, call.problem.groups * bank_.size()));
  }

  void prepare() {
    if (call_.bias) isa_.load(call_.dtype, call_.bias, 0, bias_, target_.channels);
    filters_ = as_type(isa_, call_.dtype, call_.weight, 0, call_.problem.groups * bank_.size(),
                       converted_);
  }

  void multiply(int64_t group, const Block& block, const T* slab, const Scratch& scratch) const {
    for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
      for (int64_t n = 0; n < block.images; ++n) {
        const T* image = slab + n * gather_.image_stride();
        for_tiles(channels_, kRangeChannels, [&](int64_t first, int count) {
          const Part part{group, first, count, residue, block.first_image + n};
          write(part, block, compute(part, block, image, scratch.results), scratch);
        });
      }
    }
  }

 private:
  // Where in the filters of a group the weights of a channel and those of a tap are.
  void list_weights() {
    const bool forward = call_.pass == Conv2dPass::forward;
    const int64_t taps = bank_.taps, filter = bank_.channels * taps;
    for (int64_t c = 0; c < channels_; ++c) channel_weights_[c] = c * (forward ? filter : taps);
    const int64_t* weights = gather_.tap_weights(0);
    for (int64_t t = 0; t < gather_.tap_start(gather_.classes()); ++t) {
      const int64_t w = weights[t];
      weights_[t] = forward ? w : w / taps * filter + w % taps;
    }
  }

  Run run(const Block& block, int64_t residue) const {
    return {gather_.pixel_rows(block, residue), gather_.pixel_columns(residue),
            gather_.row_pitch()};
  }

  // Channels [first, first + count) of a group, the pixels of a class, in one image.
  struct Part {
    int64_t group, first, count, residue, image;
  };

  // Where the part's first plane begins in the tensor.
  int64_t plane(const Part& part) const {
    const int64_t channel = part.group * channels_ + part.first;
    return (part.image * target_.channels + channel) * target_.height * target_.width;
  }

  // Puts results into the output at once where a run of pixels is one there too, as far as whole
  // vectors go; returns the first pixel of the run that waits in `results` to be written.
  int64_t compute(const Part& part, const Block& block, const T* image, T* results) const {
    const Run r = run(block, part.residue);
    const int64_t length = r.length(), size = target_.height * target_.width;
    const bool in_place = r.pitch == r.columns && gather_.classes() == 1 &&
                          size_of(target_.dtype) == int64_t(sizeof(T));
    const int64_t direct = in_place ? length / isa_.lanes * isa_.lanes : 0;
    T* out = in_place
                 ? static_cast<T*>(call_.output) + plane(part) + block.first_row * target_.width
                 : nullptr;
    const int64_t taps = gather_.tap_count(part.residue), chain = tap_chain(taps);
    const int64_t* weights = weights_ + gather_.tap_start(part.residue);
    const T* bias = call_.bias ? bias_ + part.group * channels_ + part.first : nullptr;
    const auto tile = [&](int64_t pixel, int vectors, T* to, int64_t ld) {
      const int64_t row_bytes = vectors * isa_.lanes * sizeof(T);
      for_sum_parts(taps, chain, row_bytes, [&](int64_t first_tap, int64_t tap_count) {
        for_tiles(part.count, isa_.gather_rows[vectors - 1], [&](int64_t first, int count) {
          isa_.gather({filters_ + part.group * bank_.size(), channel_weights_ + part.first + first,
                       weights + first_tap, tap_count, chain, image + pixel,
                       gather_.taps(part.residue) + first_tap, 1, nullptr,
                       bias && first_tap == 0 ? bias + first : nullptr, to + first * ld + pixel,
                       nullptr, ld, count, vectors, /*accumulate=*/first_tap > 0});
        });
      });
    };
    for_tiles(direct / isa_.lanes, isa_.most_vectors,
              [&](int64_t vector, int vectors) { tile(vector * isa_.lanes, vectors, out, size); });
    for_tiles(ceil_div(length - direct, isa_.lanes), isa_.most_vectors,
              [&](int64_t vector, int vectors) {
                tile(direct + vector * isa_.lanes, vectors, results, most_length_);
              });
    return direct;
  }

  void write(const Part& part, const Block& block, int64_t first_pixel,
             const Scratch& scratch) const {
    Run r = run(block, part.residue);
    const int64_t step_y = gather_.row_classes(), step_x = gather_.column_classes();
    int64_t y = block.first_row + part.residue / step_x, x = part.residue % step_x;
    if (first_pixel > 0) {  // what is left of a run without gaps is one row, as it were
      y = block.first_row;
      x = first_pixel;
      r = {1, r.length() - first_pixel, r.pitch};
      if (r.columns == 0) return;
    }
    const bool same_type = size_of(target_.dtype) == int64_t(sizeof(T));
    for (int64_t c = 0; c < part.count; ++c) {
      const T* results = scratch.results + c * most_length_ + first_pixel;
      const int64_t offset = plane(part) + (c * target_.height + y) * target_.width + x;
      if (same_type && step_x == 1) {
        const PhasedAxis row{1, 0, step_y * target_.width}, column{1, 0, 1};
        isa_.phased_copy({results, r.pitch, r.rows, r.columns,
                          static_cast<T*>(call_.output) + offset, row, column, 0, 0});
        continue;
      }
      for (int64_t i = 0; i < r.rows; ++i, results += r.pitch) {
        const int64_t start = offset + i * step_y * target_.width;
        if (!same_type) {
          store_row(results, r.columns, step_x, start, scratch.converted);
          continue;
        }
        T* out = static_cast<T*>(call_.output) + start;
        for (int64_t j = 0; j < r.columns; ++j) out[j * step_x] = results[j];
      }
    }
  }

  // Of a 16-bit type.
  void store_row(const T* results, int64_t count, int64_t step, int64_t offset, T* scratch) const {
    if (step == 1) {
      isa_.store(results, target_.dtype, call_.output, offset, count);
      return;
    }
    isa_.store(results, target_.dtype, scratch, 0, count);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(scratch);
    uint16_t* out = static_cast<uint16_t*>(call_.output) + offset;
    for (int64_t j = 0; j < count; ++j) out[j * step] = values[j];
  }

  const Conv2dCall& call_;
  const Gather<T>& gather_;
  const VectorKernels<T>& isa_;
  FilterBank bank_;
  ImageTensor target_;
  int64_t channels_;     // of a group
  int64_t most_length_;  // of a run, in whole vectors
  int64_t *channel_weights_, *weights_;
  T *bias_, *converted_;
  const T* filters_;
};

template <class T>
Gather<T> gather_of(const Conv2dCall& call, Arena& arena) {
  return call.pass == Conv2dPass::forward
             ? forward_gather<T>(call, Taps::needed, Cut::rows, Slab::by_phase, arena)
             : backward_gather<T>(call, Cut::rows, Slab::by_phase, arena);
}

}  // namespace

bool prefers_planes(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  if (call.layout != Layout::nchw || call.epilogue || call.pass == Conv2dPass::backward_weight) {
    return false;
  }
  const bool forward = call.pass == Conv2dPass::forward;
  const int64_t lanes = call.dtype == DType::float64 ? call.isa->f64.lanes : call.isa->f32.lanes;
  const int64_t channels = forward ? p.group_out_channels() : p.group_in_channels();
  // Of the first residue class, the pitch of whose rows is about what the taps of a row span.
  const int64_t height = forward ? p.out_height() : ceil_div(p.in_height, p.stride_height);
  const int64_t width = forward ? p.out_width() : ceil_div(p.in_width, p.stride_width);
  const int64_t reach = p.dilation_width * (p.kernel_width - 1) / p.stride_width;
  const int64_t length = (height - 1) * (width + reach) + width;
  const double pixels_busy = double(height * width) / double(round_up(length, lanes));
  const double channels_busy = double(channels) / double(round_up(channels, lanes));
  const bool long_runs = length >= 256;  // measured: shorter ones want many more busy lanes
  return pixels_busy >= (long_runs ? 0.95 : 1.3) * channels_busy;
}

template <class T>
void compute_planes(const Conv2dCall& call, Arena& arena) {
  const VectorKernels<T>& isa = call.isa->of<T>();
  const Conv2dProblem& p = call.problem;
  const Gather<T> gather = gather_of<T>(call, arena);
  const int64_t items = p.groups * gather.block_count();
  const int64_t slots = slot_count(call, items);
  const int64_t source_channels =
      call.pass == Conv2dPass::forward ? p.group_in_channels() : p.group_out_channels();
  PlaneProduct<T> product(call, gather, isa, arena);
  Arena part(nullptr);
  using Scratch = typename PlaneProduct<T>::Scratch;
  part.take<T>(gather.slab_size());
  Scratch(product, part);
  char* parts = arena.take_parts(slots, part);
  if (arena.counting()) return;

  product.prepare();
  run_slots(slots, items, [&](int64_t slot, int64_t item) {
    Arena own(parts + slot * part.used());
    T* slab = own.take<T>(gather.slab_size());
    const Scratch scratch(product, own);
    const int64_t g = item / gather.block_count();
    const Block block = gather.block(item % gather.block_count());
    const bool refill = item > first_item(slot, slots, items);
    product.multiply(g, block, gather.fill(isa, block, g * source_channels, slab, refill), scratch);
  });
}

template void compute_planes<float>(const Conv2dCall&, Arena&);
template void compute_planes<double>(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
