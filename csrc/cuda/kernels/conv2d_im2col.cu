// Convolution as a matrix product: rows of the convolution matrix, one an output pixel, are written
// out, one column a weight of a filter, and multiplied. After Chellapilla, Puri and Simard, "High
// Performance Convolutional Neural Networks for Document Processing" (2006). Pieces of so many
// pixels bound the workspace.
#include <algorithm>

#include "cuda/kernels/conv2d_places.h"

namespace convext::cuda {
namespace {

// What a piece's matrices should take together; one row of pixels is the least, whatever it takes.
constexpr int64_t kPieceBytes = int64_t(64) << 20;

struct Range {
  int64_t first = 0, count = 0;
};

// Some images, all rows of them, or some rows of one. `grad_rows`, of the input, are what the
// gradient of the input is made for: rows are then all those of the output that they meet.
struct Piece {
  Range images, rows, grad_rows;
};

// What makes a piece's gradient of the input of its columns.
template <class Index>
struct ColumnSums {
  Divisor<Index> channels, width, rows;  // of the input
  bool channels_inside;
  FastDivisor group_channels, stride_height, stride_width;
  int32_t kernel_height, kernel_width, dilation_height, dilation_width;
  int32_t top, left;                       // padding, and the input's first row
  int32_t out_first, out_rows, width_out;  // the output's rows that the piece has
  int64_t group, pixel, tap, channel;      // distances in the columns
  int64_t n, c, h, w;                      // and in the gradient
};

// grad_input(n, c, h, w) = sum over taps (kh, kw) of columns(n, y, x)(c, kh, kw), in this order,
// each pixel for itself, where y and x are the output's pixels at which a tap meets (h, w).
template <class T, class Index>
__global__ void __launch_bounds__(256)
    sum_columns_kernel(const ColumnSums<Index> s, const Sum<T>* columns, T* to, Index count) {
  Index i = Index(blockIdx.x) * Index(blockDim.x) + Index(threadIdx.x);
  if (i >= count) return;
  // Threads next to each other are at elements next to each other.
  const auto digit = [&](const Divisor<Index>& size) {
    const auto [quotient, remainder] = size.divide(i);
    i = quotient;
    return int32_t(remainder);
  };
  int32_t channel = 0;
  if (s.channels_inside) channel = digit(s.channels);
  const int32_t w = digit(s.width), h = digit(s.rows);
  if (!s.channels_inside) channel = digit(s.channels);
  const int32_t n = int32_t(i);
  const auto [group, own_channel] = s.group_channels.divide(channel);
  const Sum<T>* const from = columns + group * s.group + own_channel * s.channel;
  Sum<T> sum = 0;
  for (int32_t kh = 0; kh < s.kernel_height; ++kh) {
    const int32_t top = h + s.top - kh * s.dilation_height;
    if (top < 0) break;
    const auto [out_y, past_y] = s.stride_height.divide(top);
    const int32_t y = out_y - s.out_first;
    if (past_y != 0 || y < 0 || y >= s.out_rows) continue;
    for (int32_t kw = 0; kw < s.kernel_width; ++kw) {
      const int32_t left = w + s.left - kw * s.dilation_width;
      if (left < 0) break;
      const auto [x, past_x] = s.stride_width.divide(left);
      if (past_x != 0 || x >= s.width_out) continue;
      sum += from[((int64_t(n) * s.out_rows + y) * s.width_out + x) * s.pixel +
                  (kh * s.kernel_width + kw) * s.tap];
    }
  }
  to[n * s.n + channel * s.c + h * s.h + w * s.w] = narrow<T>(sum);
}

class Im2col {
 public:
  Im2col(const Conv2dCall& call, Arena& arena)
      : call_(call),
        p_(call.problem),
        arena_(arena),
        unit_(gemm_unit(call)),
        size_(size_of(call.dtype)),
        sum_size_(call.dtype == DType::float64 ? 8 : 4),
        wide_(16 / size_),
        inside_(call.layout == Layout::nhwc),
        in_vectors_(unit_ == GemmUnit::tensor_cores || call.dtype == DType::float32),
        taps_(p_.group_in_channels() * p_.kernel_taps()),
        filters_(p_.group_out_channels()),
        row_(in_vectors_ ? round_up(taps_, wide_) : taps_) {}

  // rows: pixels. columns: filters. k: taps.
  void forward() {
    const int64_t most = most_pixels(row_ * size_);
    void* const columns = arena_.take<char>(p_.groups * most * row_ * size_);
    const GemmOperand weight = weights(call_.weight, true);
    const Planes output = Planes::output(call_, call_.output);
    const auto product = [&](const Piece& piece) {
      Gemm g = blank(pixels(piece), filters_, row_);
      g.a = matrix(columns, g.m, row_, true);
      g.b = weight;
      g.a.vectors = g.b.vectors = g.a.vectors && g.b.vectors;
      g.out.to = at(output.from, piece.images.first * output.n);
      g.out.group = output.group;
      g.out.rows = output_pixels(output, piece);
      g.out.columns = Axis::line(filters_, output.c);
      g.out.height = int32_t(output.height), g.out.width = int32_t(output.width);
      g.out.vectors_of_columns = output.vectors(store_wide()) && output.aligned();
      g.out.along_rows = !inside_;
      cut(g, call_.dtype, unit_);
      return g;
    };
    void* const sums = take_sums(most, product, false);
    if (arena_.counting()) return;
    each_piece(most, [&](const Piece& piece) {
      write_columns(piece, columns);
      multiply_and_add(product(piece), call_, unit_, sums);
    });
  }

  // rows: filters. columns: taps. k: pixels.
  void backward_weight() {
    const Planes grad_output = Planes::output(call_, call_.grad_output);
    const bool copied = must_copy(grad_output);
    const int64_t channels = copied ? round_up(filters_, wide_) : filters_;
    const int64_t most = most_pixels((row_ + (copied ? channels : 0)) * size_);
    void* const columns = arena_.take<char>(p_.groups * most * row_ * size_);
    void* const copy = arena_.take<char>(copied ? p_.groups * most * channels * size_ : 0);
    const auto product = [&](const Piece& piece) {
      Gemm g = blank(filters_, taps_, pixels(piece));
      g.a = grad_pixels(grad_output, piece, copied ? copy : nullptr, channels, false);
      g.b = matrix(columns, g.k, row_, false);
      g.a.vectors = g.b.vectors = g.a.vectors && g.b.vectors;
      g.out.to = call_.output;
      g.out.group = filters_ * taps_;
      g.out.rows = Axis::line(filters_, taps_);
      g.out.columns = Axis::line(taps_, 1);
      g.out.vectors_of_columns =
          taps_ % store_wide() == 0 && reinterpret_cast<uintptr_t>(call_.output) % 16 == 0;
      cut(g, call_.dtype, unit_);
      return g;
    };
    const bool pieces = piece_count(most) > 1;
    Carried carried;
    if (pieces) carried.sums = arena_.take<char>(p_.groups * filters_ * taps_ * sum_size_);
    void* const sums = take_sums(most, product, pieces);
    if (arena_.counting()) return;
    each_piece(most, [&](const Piece& piece) {
      write_columns(piece, columns);
      write_grad(grad_output, piece, copied ? copy : nullptr, channels);
      Gemm g = product(piece);
      if (!pieces) {
        multiply_and_add(g, call_, unit_, sums);
        return;
      }
      g.sums = sums;
      multiply(g, call_, unit_);
      carried.last = is_last(piece);
      add_splits(g, call_, carried);
      carried.first = false;
    });
  }

  // rows: pixels. columns: taps. k: filters. Sums of the taps follow.
  void backward_input() {
    const Planes grad_output = Planes::output(call_, call_.grad_output);
    const bool copied = must_copy(grad_output);
    const int64_t channels = copied ? round_up(filters_, wide_) : filters_;
    const int64_t bytes = taps_ * sum_size_ + (copied ? channels * size_ : 0);
    const GradPiece size = grad_piece(most_pixels(bytes));
    const int64_t most = size.images * size.out_rows * p_.out_width();
    void* const columns = arena_.take<char>(p_.groups * most * taps_ * sum_size_);
    void* const copy = arena_.take<char>(copied ? p_.groups * most * channels * size_ : 0);
    const GemmOperand weight = weights(call_.weight, false);
    const Planes input = Planes::input(call_, call_.output);
    if (arena_.counting()) return;
    each_grad_piece(size, [&](const Piece& piece) {
      if (pixels(piece) > 0) {
        write_grad(grad_output, piece, copied ? copy : nullptr, channels);
        Gemm g = blank(pixels(piece), taps_, channels);
        g.a = grad_pixels(grad_output, piece, copied ? copy : nullptr, channels, true);
        g.b = weight;
        g.a.vectors = g.b.vectors = g.a.vectors && g.b.vectors;
        g.sums = columns;
        cut(g, call_.dtype, unit_, 1);
        multiply(g, call_, unit_);
      }
      const int64_t count =
          piece.images.count * piece.grad_rows.count * p_.in_width * p_.in_channels;
      if (count <= INT_MAX - 256) {
        sum_columns<int32_t>(input, piece, columns, int32_t(count));
      } else {
        sum_columns<int64_t>(input, piece, columns, count);
      }
    });
  }

 private:
  // ------------------------------------------------------------------------------------------------
  // Pieces

  int64_t plane() const { return p_.out_height() * p_.out_width(); }
  int64_t pixels(const Piece& piece) const {
    return piece.images.count * piece.rows.count * p_.out_width();
  }

  // Of a piece, where a pixel of a group takes so many bytes: whole images or whole rows.
  int64_t most_pixels(int64_t bytes) const {
    const int64_t most = kPieceBytes / std::max<int64_t>(p_.groups * bytes, 1);
    if (most >= plane()) return std::min(most / plane(), std::max<int64_t>(p_.batch, 1)) * plane();
    return std::max<int64_t>(most / p_.out_width(), 1) * p_.out_width();
  }
  Range images_at(int64_t first, int64_t most) const {
    return {first, std::min(std::max<int64_t>(most / plane(), 1), p_.batch - first)};
  }
  int64_t rows_of(int64_t most) const { return std::min(most / p_.out_width(), p_.out_height()); }

  int64_t piece_count(int64_t most) const {
    return ceil_div(p_.batch, std::max<int64_t>(most / plane(), 1)) *
           ceil_div(p_.out_height(), rows_of(most));
  }
  // At least one, be it empty: its product writes zeros.
  template <class F>
  void each_piece(int64_t most, const F& f) const {
    if (p_.batch == 0) f(Piece{{0, 0}, {0, p_.out_height()}, {}});
    for (int64_t n = 0; n < p_.batch;) {
      const Range images = images_at(n, most);
      const int64_t rows = rows_of(most);
      for (int64_t y = 0; y < p_.out_height(); y += rows) {
        f(Piece{images, {y, std::min(rows, p_.out_height() - y)}, {}});
      }
      n += images.count;
    }
  }
  // Room for the sums of any piece's product: those of splits, or always.
  template <class F>
  void* take_sums(int64_t most, const F& product, bool always) {
    int64_t count = 0;
    each_piece(most, [&](const Piece& piece) {
      const Gemm g = product(piece);
      count = std::max(count, always ? g.splits * g.elements() : split_sums(g));
    });
    return arena_.take<char>(count * sum_size_);
  }
  bool is_last(const Piece& piece) const {
    return piece.images.first + piece.images.count == p_.batch &&
           piece.rows.first + piece.rows.count == p_.out_height();
  }

  // Images, or rows of the input, whose gradient a piece of so many pixels can make, and rows of
  // the output that these meet at most.
  struct GradPiece {
    int64_t images, rows, out_rows;
  };
  GradPiece grad_piece(int64_t most) const {
    if (most >= plane()) return {most / plane(), p_.in_height, p_.out_height()};
    const int64_t reach = (p_.kernel_height - 1) * p_.dilation_height;
    const int64_t rows =
        std::clamp<int64_t>((rows_of(most) - 1) * p_.stride_height - reach + 1, 1, p_.in_height);
    return {1, rows, std::min((rows - 1 + reach) / p_.stride_height + 1, p_.out_height())};
  }

  template <class F>
  void each_grad_piece(const GradPiece& size, const F& f) const {
    for (int64_t n = 0; n < p_.batch; n += size.images) {
      const Range images{n, std::min(size.images, p_.batch - n)};
      for (int64_t h = 0; h < p_.in_height; h += size.rows) {
        const Range grad_rows{h, std::min(size.rows, p_.in_height - h)};
        const int64_t reach = (p_.kernel_height - 1) * p_.dilation_height;
        const int64_t above = std::max<int64_t>(h + p_.padding_height - reach, 0);
        const int64_t first = ceil_div(above, p_.stride_height);
        const int64_t end = std::min(
            (h + grad_rows.count - 1 + p_.padding_height) / p_.stride_height + 1, p_.out_height());
        f(Piece{images, {first, std::max<int64_t>(end - first, 0)}, grad_rows});
      }
    }
  }

  template <class Index>
  void sum_columns(const Planes& input, const Piece& piece, const void* columns,
                   Index count) const {
    ColumnSums<Index> s;
    s.channels = Divisor<Index>(Index(p_.in_channels));
    s.width = Divisor<Index>(Index(p_.in_width));
    s.rows = Divisor<Index>(Index(piece.grad_rows.count));
    s.channels_inside = inside_;
    s.group_channels = FastDivisor(int32_t(input.channels));
    // No coordinate is as large as the largest that is left.
    s.stride_height = FastDivisor(int32_t(std::min<int64_t>(p_.stride_height, INT_MAX / 2)));
    s.stride_width = FastDivisor(int32_t(std::min<int64_t>(p_.stride_width, INT_MAX / 2)));
    s.kernel_height = int32_t(p_.kernel_height), s.kernel_width = int32_t(p_.kernel_width);
    s.dilation_height = int32_t(p_.dilation_height), s.dilation_width = int32_t(p_.dilation_width);
    s.top = int32_t(piece.grad_rows.first + p_.padding_height), s.left = int32_t(p_.padding_width);
    s.out_first = int32_t(piece.rows.first), s.out_rows = int32_t(piece.rows.count);
    s.width_out = int32_t(p_.out_width());
    s.group = pixels(piece) * taps_, s.pixel = taps_;
    s.tap = inside_ ? input.channels : 1, s.channel = inside_ ? 1 : p_.kernel_taps();
    s.n = input.n, s.c = input.c, s.h = input.h, s.w = input.w;
    void* const to = at(input.from, piece.images.first * input.n + piece.grad_rows.first * input.h);
    with_element_of(call_.dtype, [&](auto element) {
      using T = decltype(element);
      launch(sum_columns_kernel<T, Index>, dim3(ceil_div(count, 256)), dim3(256), 0, call_.stream,
             s, static_cast<const Sum<T>*>(columns), static_cast<T*>(to), count);
    });
  }

  // ------------------------------------------------------------------------------------------------
  // Operands

  void* at(const void* from, int64_t elements) const {
    return const_cast<char*>(static_cast<const char*>(from)) + elements * size_;
  }

  Axis output_pixels(const Planes& output, const Piece& piece) const {
    return places(output, piece.images.count, output.n, {piece.rows.first, 1, piece.rows.count},
                  {0, 1, p_.out_width()}, false);
  }

  // A matrix of ours: [group][rows][length].
  GemmOperand matrix(const void* from, int64_t rows, int64_t length, bool rows_are_rows) const {
    GemmOperand m;
    m.from = from;
    m.group = rows * length;
    m.rows = rows_are_rows ? Axis::line(rows, length) : Axis::line(length, 1);
    m.k = rows_are_rows ? Axis::line(length, 1) : Axis::line(rows, length);
    m.along_k = rows_are_rows;
    m.vectors = in_vectors_ && length % wide_ == 0;
    m.aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
    return m;
  }

  // The weights of a group are a matrix of one row a filter as they lie, but for its length.
  GemmOperand weights(const void* from, bool rows_are_rows) {
    if (row_ == taps_) return matrix(from, filters_, taps_, rows_are_rows);
    void* const to = arena_.take<char>(p_.out_channels * row_ * size_);
    if (!arena_.counting()) {
      write_matrix(matrix(from, filters_, taps_, true), call_.dtype, uint32_t(filters_),
                   uint32_t(row_), uint32_t(p_.groups), to, call_.stream);
    }
    return matrix(to, filters_, row_, rows_are_rows);
  }

  void write_columns(const Piece& piece, void* to) const {
    Planes input = Planes::input(call_, call_.input);
    input.from = at(input.from, piece.images.first * input.n);
    const Axis rows = places(input, piece.images.count, input.n,
                             {piece.rows.first * p_.stride_height - p_.padding_height,
                              p_.stride_height, piece.rows.count},
                             {-p_.padding_width, p_.stride_width, p_.out_width()}, false);
    write_matrix(operand(input, rows, taps(p_, input, inside_), inside_, input.vectors(wide_)),
                 call_.dtype, rows.count, uint32_t(row_), uint32_t(p_.groups), to, call_.stream);
  }

  // Whether a gradient must be copied for its channels to lie in vectors.
  bool must_copy(const Planes& grad_output) const {
    return in_vectors_ && !grad_output.vectors(wide_);
  }
  Planes of_piece(const Planes& grad_output, const Piece& piece) const {
    Planes planes = grad_output;
    planes.from = at(planes.from, piece.images.first * planes.n);
    return planes;
  }
  void write_grad(const Planes& grad_output, const Piece& piece, void* copy,
                  int64_t channels) const {
    if (!copy) return;
    const Planes planes = of_piece(grad_output, piece);
    write_matrix(operand(planes, output_pixels(planes, piece), Axis::line(filters_, planes.c),
                         inside_, false),
                 call_.dtype, uint32_t(pixels(piece)), uint32_t(channels), uint32_t(p_.groups),
                 copy, call_.stream);
  }
  GemmOperand grad_pixels(const Planes& grad_output, const Piece& piece, const void* copy,
                          int64_t channels, bool pixels_are_rows) const {
    if (copy) return matrix(copy, pixels(piece), channels, pixels_are_rows);
    const Planes planes = of_piece(grad_output, piece);
    const Axis pixel = output_pixels(planes, piece), filter = Axis::line(filters_, planes.c);
    return operand(planes, pixels_are_rows ? pixel : filter, pixels_are_rows ? filter : pixel,
                   pixels_are_rows == inside_, in_vectors_ && planes.vectors(wide_));
  }

  Gemm blank(int64_t m, int64_t n, int64_t k) const {
    Gemm g{};
    g.m = uint32_t(m), g.n = uint32_t(n), g.k = uint32_t(k), g.groups = uint32_t(p_.groups);
    return g;
  }
  int64_t store_wide() const { return std::max<int64_t>(wide_, 4); }

  const Conv2dCall& call_;
  const Conv2dProblem& p_;
  Arena& arena_;
  GemmUnit unit_;
  int64_t size_, sum_size_;
  int64_t wide_;     // elements of a vector
  bool inside_;      // whether channels are the innermost digit of taps
  bool in_vectors_;  // whether our matrices have rows in vectors
  int64_t taps_, filters_, row_;
};

}  // namespace

const char* conv2d_im2col_declines(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  // Of the output, those that a row of the input meets: the least that a piece is.
  const int64_t rows = (p.kernel_height - 1) * p.dilation_height / p.stride_height + 1;
  const bool counted = fits({rows, p.out_width()}) && fits_gemm(p, rows * p.out_width());
  return counted ? nullptr : "im2col counts a row's pixels, taps and tiles in 31 bits";
}

void conv2d_im2col(const Conv2dCall& call, Arena& arena) {
  Im2col product(call, arena);
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
