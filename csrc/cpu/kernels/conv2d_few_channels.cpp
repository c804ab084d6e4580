#include "cpu/kernels/conv2d_few_channels.h"

#include "cpu/kernels/conv2d_driver.h"

namespace convext::cpu {
namespace {

template <class T>
class FewChannelsProduct {
 public:
  static constexpr Taps kTaps = Taps::needed;
  static constexpr Slab kSlab = Slab::by_phase;

  struct Scratch {
    Scratch(const Gather<T>& gather, int64_t ld, const VectorKernels<T>& isa, Arena& arena)
        : results(arena.take<T>(ld * longest_run(gather, isa))) {}
    T* results;  // [channel][pixel of a run]
  };

  FewChannelsProduct(const Gather<T>& gather, int64_t channels, const VectorKernels<T>& isa,
                     Arena& arena)
      : gather_(gather),
        isa_(isa),
        channels_(channels),
        ld_panel_(round_up(channels, isa.lanes)),
        ld_results_(longest_run(gather, isa)) {
    channel_list_ = arena.keep<int64_t>(channels);
    weights_ = arena.keep<int64_t>(gather.tap_total());
    if (!arena.must_fill_kept()) return;
    for (int64_t c = 0; c < channels; ++c) channel_list_[c] = c;
    for (int64_t t = 0; t < gather.tap_start(gather.classes()); ++t) {
      weights_[t] = gather.tap_weights(0)[t] * ld_panel_;
    }
  }

  static int64_t panel_vectors(const VectorKernels<T>& isa, int64_t) { return isa.most_vectors; }
  // Rows without idle lanes can be computed in an nhwc tensor.
  static int64_t row_length(const Conv2dCall& call, int64_t channels, int64_t lanes) {
    return call.epilogue ? round_up(channels, lanes) : channels;
  }

  void multiply(const Block& block, const T* slab, const T* panel, int64_t, const T* bias, T* rows,
                int64_t ld_rows, const Scratch& scratch) const {
    for (int64_t n = 0; n < block.images; ++n) {
      const T* image = slab + n * gather_.image_stride();
      for (int64_t residue = 0; residue < gather_.classes(); ++residue) {
        const int64_t length = run_length(gather_, block, residue);
        if (length == 0) continue;
        compute(residue, length, image, panel, bias, scratch.results);
        const int64_t first = n * gather_.pixel_rows(block, residue);
        write(block, residue, scratch.results, first, rows, ld_rows);
      }
    }
  }

 private:
  // The pixels of a class in one image, row after row with the slab's pitch: some lanes at the
  // rows' ends compute nothing of use.
  static int64_t run_length(const Gather<T>& gather, const Block& block, int64_t residue) {
    const int64_t rows = gather.pixel_rows(block, residue);
    const int64_t columns = gather.pixel_columns(residue);
    return rows > 0 && columns > 0 ? (rows - 1) * gather.row_pitch() + columns : 0;
  }

  // Of all classes, in whole vectors.
  static int64_t longest_run(const Gather<T>& gather, const VectorKernels<T>& isa) {
    const Block whole{0, 1, 0, gather.most_rows()};
    int64_t longest = 0;
    for (int64_t residue = 0; residue < gather.classes(); ++residue) {
      longest = std::max(longest, run_length(gather, whole, residue));
    }
    return round_up(longest, isa.lanes);
  }

  void compute(int64_t residue, int64_t length, const T* image, const T* panel, const T* bias,
               T* results) const {
    const int64_t taps = gather_.tap_count(residue), chain = tap_chain(taps);
    const int64_t* weights = weights_ + gather_.tap_start(residue);
    for_tiles(ceil_div(length, isa_.lanes), isa_.most_vectors, [&](int64_t vector, int vectors) {
      const int64_t pixel = vector * isa_.lanes, row_bytes = vectors * isa_.lanes * sizeof(T);
      for_sum_parts(taps, chain, row_bytes, [&](int64_t first_tap, int64_t tap_count) {
        for_tiles(channels_, isa_.gather_rows[vectors - 1], [&](int64_t first, int count) {
          isa_.gather({panel, channel_list_ + first, weights + first_tap, tap_count, chain,
                       image + pixel, gather_.taps(residue) + first_tap, 1, nullptr,
                       bias && first_tap == 0 ? bias + first : nullptr,
                       results + first * ld_results_ + pixel, nullptr, ld_results_, count, vectors,
                       /*accumulate=*/first_tap > 0});
        });
      });
    });
  }

  // The run's pixels begin with the class's row `first_row` of the block.
  void write(const Block& block, int64_t residue, const T* results, int64_t first_row, T* rows,
             int64_t ld_rows) const {
    const int64_t count = gather_.pixel_rows(block, residue);
    const int64_t columns = gather_.pixel_columns(residue), pitch = gather_.row_pitch();
    const int64_t* targets = gather_.pixel_targets(residue) + first_row * columns;
    if (gather_.classes() == 1 && pitch == columns) {
      isa_.transpose(results, ld_results_, rows + targets[0] * ld_rows, ld_rows, channels_,
                     count * columns);
      return;
    }
    const int64_t ld_to = gather_.column_classes() * ld_rows;
    for (int64_t i = 0; i < count; ++i) {
      isa_.transpose(results + i * pitch, ld_results_, rows + targets[i * columns] * ld_rows, ld_to,
                     channels_, columns);
    }
  }

  const Gather<T>& gather_;
  const VectorKernels<T>& isa_;
  int64_t channels_, ld_panel_, ld_results_;
  int64_t *channel_list_, *weights_;
};

}  // namespace

bool prefers_few_channels(const Conv2dCall& call) {
  if (call.pass == Conv2dPass::backward_weight) return false;
  if (call.layout == Layout::nchw && !call.epilogue) return false;  // see prefers_planes
  const Conv2dProblem& p = call.problem;
  const bool forward = call.pass == Conv2dPass::forward;
  const int64_t lanes = call.dtype == DType::float64 ? call.isa->f64.lanes : call.isa->f32.lanes;
  const int64_t channels = forward ? p.group_out_channels() : p.group_in_channels();
  // Slabs by phase hold planes: what lies in rows is transposed, which phases or a conversion of
  // 16-bit elements would make two steps.
  const bool rows = call.layout == Layout::nhwc && (forward ? p.in_channels : p.out_channels) > 1;
  const bool phases = forward && (p.stride_height > 1 || p.stride_width > 1);
  const bool small = call.dtype == DType::float16 || call.dtype == DType::bfloat16;
  if (rows && (phases || small)) return false;
  const int64_t height = forward ? p.out_height() : ceil_div(p.in_height, p.stride_height);
  const int64_t width = forward ? p.out_width() : ceil_div(p.in_width, p.stride_width);
  const int64_t reach = p.dilation_width * (p.kernel_width - 1) / p.stride_width;
  const int64_t length = (height - 1) * (width + reach) + width;
  const double pixels_busy = double(height * width) / double(round_up(length, lanes));
  return 2 * channels <= lanes && pixels_busy >= 1.5 * double(channels) / double(lanes);
}

template <class T>
void compute_few_channels(const Conv2dCall& call, Arena& arena) {
  compute_pixels<T, FewChannelsProduct>(call, arena);
}

template void compute_few_channels<float>(const Conv2dCall&, Arena&);
template void compute_few_channels<double>(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
