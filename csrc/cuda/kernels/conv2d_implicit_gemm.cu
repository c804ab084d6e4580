// Convolution as a matrix product whose matrix is not written out: the product's loop finds its
// elements where the image has them. After Chetlur et al., "cuDNN: Efficient Primitives for Deep
// Learning" (2014). Tensor cores take channels in vectors; a tensor that has none is copied into
// one that has, channels inside and padded with zeros, which costs less than to gather single
// elements.
#include <algorithm>
#include <numeric>

#include "cuda/kernels/conv2d_places.h"
#include "cuda/kernels/moments.h"

namespace convext::cuda {
namespace {

// To the multiple of vectors, if that is not mostly zeros.
bool worth_padding(int64_t channels, int64_t wide) {
  return 3 * round_up(channels, wide) <= 8 * channels;
}

GemmUnit unit_of(const Conv2dCall& call) {
  const int64_t wide = 16 / size_of(call.dtype);
  const Conv2dProblem& p = call.problem;
  const bool worth =
      worth_padding(p.group_in_channels(), wide) && worth_padding(p.group_out_channels(), wide);
  return worth ? gemm_unit(call) : GemmUnit::simt;
}

class ImplicitGemm {
 public:
  ImplicitGemm(const Conv2dCall& call, Arena& arena)
      : call_(call),
        p_(call.problem),
        arena_(arena),
        unit_(unit_of(call)),
        wide_(16 / size_of(call.dtype)),
        inside_(call.layout == Layout::nhwc || unit_ == GemmUnit::tensor_cores) {}

  // rows: pixels of the output. columns: filters. k: taps.
  void forward() {
    const Planes input = readable(Planes::input(call_, call_.input), p_.batch);
    const Planes weight = readable(Planes::weight(call_, call_.weight), p_.group_out_channels());
    const Planes output = Planes::output(call_, call_.output);
    const bool vectors = both_in_vectors(input, weight);
    Gemm g = product(p_.out_pixels(), p_.group_out_channels(), p_.kernel_taps() * input.channels);
    g.a = operand(input, corners(p_, input), taps(p_, input, inside_), inside_, vectors);
    g.b = operand(weight, Axis::line(p_.group_out_channels(), weight.n), all_taps(weight, inside_),
                  true, vectors);
    g.out = pixels_of(output, all_pixels(output, p_.batch), true);
    const bool moments = call_.epilogue.mean;
    cut(g, call_.dtype, unit_, moments ? 1 : INT_MAX);
    void* const sums = arena_.take<char>(bytes_of_sums(split_sums(g)));
    if (moments) {
      g.moments = arena_.take<char>(bytes_of_sums(int64_t(g.tiles_m) * 2 * p_.out_channels));
    }
    run(g, sums);
    if (moments && !arena_.counting()) {
      call_.dtype == DType::float64 ? merge<double>(g) : merge<float>(g);
    }
  }

  // rows: filters. columns: taps. k: pixels of the output.
  void backward_weight() {
    const Planes input = readable(Planes::input(call_, call_.input), p_.batch);
    const Planes grad_output = readable(Planes::output(call_, call_.grad_output), p_.batch);
    const Planes weight = Planes::weight(call_, call_.output);
    const bool vectors = both_in_vectors(input, grad_output);
    Gemm g = product(p_.group_out_channels(), p_.kernel_taps() * input.channels, p_.out_pixels());
    g.a = operand(grad_output, Axis::line(grad_output.channels, grad_output.c),
                  all_pixels(grad_output, p_.batch), !inside_, vectors);
    g.b = operand(input, taps(p_, input, inside_), corners(p_, input), !inside_, vectors);
    g.out.to = const_cast<void*>(weight.from);
    g.out.group = weight.group;
    g.out.rows = Axis::line(p_.group_out_channels(), weight.n);
    g.out.columns = places(weight, input.channels, weight.c, {0, 1, weight.height},
                           {0, 1, weight.width}, inside_);
    g.out.columns.a_end = int32_t(weight.channels);
    g.out.height = int32_t(weight.height), g.out.width = int32_t(weight.width);
    g.out.vectors_of_columns = weight.vectors(store_wide()) && weight.aligned();
    cut(g, call_.dtype, unit_);
    run(g, arena_.take<char>(bytes_of_sums(split_sums(g))));
  }

  // rows: pixels of the input. columns: channels. k: filters and taps.
  void backward_input() {
    const Planes grad_output = readable(Planes::output(call_, call_.grad_output), p_.batch);
    const Planes weight = readable(Planes::weight(call_, call_.weight), p_.group_out_channels());
    const Planes input = Planes::input(call_, call_.output);
    if (taps_apart()) return scatter(grad_output, weight, input);
    const bool vectors = both_in_vectors(grad_output, weight);
    int64_t most_sums = 0;
    each_class([&](const Class& h, const Class& w) {
      most_sums =
          std::max(most_sums, split_sums(of_class(h, w, grad_output, weight, input, vectors)));
    });
    void* sums = arena_.take<char>(bytes_of_sums(most_sums));
    if (arena_.counting()) return;
    each_class([&](const Class& h, const Class& w) {
      run(of_class(h, w, grad_output, weight, input, vectors), sums);
    });
  }

 private:
  // Along one axis: the input's pixels first, first + stride, ... all meet the same taps tap,
  // tap + tap_step, ..., the first of which at the output's pixels out, out + 1, ..., and the next
  // out_step before. A strided convolution is so many dense ones, of all remainders of the stride.
  struct Class {
    int64_t first, pixels, tap, taps, tap_step, out, out_step;

    static Class of(int64_t first, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
      // first + padding = out * stride + tap * dilation
      const int64_t common = std::gcd(stride, dilation), tap_step = stride / common;
      Class c{first, ceil_div(size - first, stride), 0, 0, tap_step, 0, dilation / common};
      while (c.tap < std::min(kernel, tap_step) &&
             (first + padding - c.tap * dilation) % stride != 0) {
        ++c.tap;
      }
      if (c.tap < std::min(kernel, tap_step)) {
        c.taps = ceil_div(kernel - c.tap, tap_step);
        c.out = (first + padding - c.tap * dilation) / stride;
      }
      return c;
    }
  };

  template <class F>
  void each_class(const F& f) const {
    for (int64_t h = 0; h < std::min(p_.stride_height, p_.in_height); ++h) {
      for (int64_t w = 0; w < std::min(p_.stride_width, p_.in_width); ++w) {
        f(Class::of(h, p_.in_height, p_.kernel_height, p_.stride_height, p_.padding_height,
                    p_.dilation_height),
          Class::of(w, p_.in_width, p_.kernel_width, p_.stride_width, p_.padding_width,
                    p_.dilation_width));
      }
    }
  }

  Gemm of_class(const Class& h, const Class& w, const Planes& grad_output, const Planes& weight,
                const Planes& input, bool vectors) const {
    Gemm g = product(p_.batch * h.pixels * w.pixels, p_.group_in_channels(),
                     h.taps * w.taps * grad_output.channels);
    g.a = operand(grad_output,
                  places(grad_output, p_.batch, grad_output.n, {h.out, 1, h.pixels},
                         {w.out, 1, w.pixels}, false),
                  places(grad_output, grad_output.channels, grad_output.c, {0, -h.out_step, h.taps},
                         {0, -w.out_step, w.taps}, inside_),
                  inside_, vectors);
    g.b = operand(weight, Axis::line(weight.channels, weight.c),
                  places(weight, grad_output.channels, weight.n, {h.tap, h.tap_step, h.taps},
                         {w.tap, w.tap_step, w.taps}, inside_),
                  !inside_, vectors);
    g.b.k.a_end = int32_t(p_.group_out_channels());
    g.out = pixels_of(input,
                      places(input, p_.batch, input.n, {h.first, p_.stride_height, h.pixels},
                             {w.first, p_.stride_width, w.pixels}, false),
                      p_.stride_height == 1 && p_.stride_width == 1);
    cut(g, call_.dtype, unit_);
    return g;
  }

  // Whether no pixel of the input meets two taps.
  bool taps_apart() const {
    return p_.dilation_height * (p_.kernel_height - 1) < p_.stride_height &&
           p_.dilation_width * (p_.kernel_width - 1) < p_.stride_width;
  }

  // Then a pixel is one product's and no sum of several: one product for all of them.
  // rows: pixels of the output. columns: taps. k: filters.
  void scatter(const Planes& grad_output, const Planes& weight, const Planes& input) {
    Gemm g = product(p_.out_pixels(), p_.kernel_taps() * weight.channels, grad_output.channels);
    const bool vectors = both_in_vectors(grad_output, weight);
    g.a = operand(grad_output, all_pixels(grad_output, p_.batch),
                  Axis::line(grad_output.channels, grad_output.c), inside_, vectors);
    g.b = operand(weight, all_taps(weight, inside_), Axis::line(p_.group_out_channels(), weight.n),
                  false, vectors);
    g.out.to = const_cast<void*>(input.from);
    g.out.group = input.group;
    g.out.rows = corners(p_, input);
    g.out.columns =
        places(input, weight.channels, input.c, {0, p_.dilation_height, p_.kernel_height},
               {0, p_.dilation_width, p_.kernel_width}, inside_);
    g.out.columns.a_end = int32_t(input.channels);
    g.out.height = int32_t(input.height), g.out.width = int32_t(input.width);
    g.out.vectors_of_columns = input.vectors(store_wide()) && input.aligned();
    g.out.along_rows = call_.layout == Layout::nchw;
    cut(g, call_.dtype, unit_);
    void* sums = arena_.take<char>(bytes_of_sums(split_sums(g)));
    if (arena_.counting()) return;
    const int64_t covered = p_.out_pixels() * p_.kernel_taps();
    if (covered != p_.batch * p_.in_height * p_.in_width || p_.padding_height || p_.padding_width) {
      write_zeros(call_.output,
                  p_.batch * p_.in_channels * p_.in_height * p_.in_width * size_of(call_.dtype),
                  call_.stream);
    }
    run(g, sums);
  }

  Gemm product(int64_t m, int64_t n, int64_t k) const {
    Gemm g{};
    g.m = uint32_t(m), g.n = uint32_t(n), g.k = uint32_t(k), g.groups = uint32_t(p_.groups);
    return g;
  }

  // The planes, or for tensor cores a copy that has channels in vectors.
  Planes readable(const Planes& planes, int64_t images) {
    if (unit_ != GemmUnit::tensor_cores || planes.vectors(wide_)) return planes;
    const int64_t channels = round_up(planes.channels, wide_);
    const int64_t pixels = images * planes.height * planes.width;
    void* to = arena_.take<char>(p_.groups * pixels * channels * size_of(call_.dtype));
    if (!arena_.counting()) {
      write_matrix(operand(planes, all_pixels(planes, images),
                           Axis::line(planes.channels, planes.c), planes.c == 1, false),
                   call_.dtype, uint32_t(pixels), uint32_t(channels), uint32_t(p_.groups), to,
                   call_.stream);
    }
    return {to,          planes.height * planes.width * channels,
            1,           planes.width * channels,
            channels,    pixels * channels,
            channels,    planes.height,
            planes.width};
  }

  bool both_in_vectors(const Planes& a, const Planes& b) const {
    return a.vectors(wide_) && b.vectors(wide_);
  }

  // As wide as any loop stores.
  int64_t store_wide() const { return std::max<int64_t>(wide_, 4); }

  GemmOutput pixels_of(const Planes& planes, const Axis& rows, bool all) const {
    GemmOutput out;
    out.to = const_cast<void*>(planes.from);
    out.group = planes.group;
    out.rows = rows;
    out.columns = Axis::line(planes.channels, planes.c);
    out.height = int32_t(planes.height), out.width = int32_t(planes.width);
    out.vectors_of_columns = planes.vectors(store_wide()) && planes.aligned();
    out.along_rows = call_.layout == Layout::nchw;
    out.vectors_of_rows = out.along_rows && all &&
                          planes.height * planes.width % store_wide() == 0 && planes.aligned();
    return out;
  }

  int64_t bytes_of_sums(int64_t count) const {
    return count * (call_.dtype == DType::float64 ? 8 : 4);
  }

  void run(const Gemm& g, void* sums) {
    if (!arena_.counting()) multiply_and_add(g, call_, unit_, sums);
  }

  template <class S>
  void merge(const Gemm& g) const {
    merge_moments(static_cast<const S*>(g.moments), tile_rows(g, unit_), p_.out_pixels(),
                  p_.out_channels, static_cast<S*>(call_.epilogue.mean),
                  static_cast<S*>(call_.epilogue.deviation), call_.stream);
  }

  const Conv2dCall& call_;
  const Conv2dProblem& p_;
  Arena& arena_;
  GemmUnit unit_;
  int64_t wide_;  // elements of a vector
  bool inside_;   // whether channels are the innermost digit of k's and taps
};

}  // namespace

const char* conv2d_implicit_gemm_declines(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const bool counted =
      fits({p.batch, p.in_height, p.in_width}) && fits({p.batch, p.out_height(), p.out_width()}) &&
      fits_gemm(p, p.batch * std::max(p.in_height * p.in_width, p.out_height() * p.out_width()));
  return counted ? nullptr : "implicit_gemm counts pixels, taps and tiles in 31 bits";
}

void conv2d_implicit_gemm(const Conv2dCall& call, Arena& arena) {
  ImplicitGemm product(call, arena);
  switch (call.pass) {
    case Conv2dPass::forward:
      return product.forward();
    case Conv2dPass::backward_input:
      return product.backward_input();
    case Conv2dPass::backward_weight:
      return product.backward_weight();
  }
}

}  // namespace convext::cuda
