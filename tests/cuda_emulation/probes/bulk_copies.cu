// mbarriers and TMA: boxes under every swizzle, and a convolution's pixels.
#include "cuda/kernels/hopper.h"
#include "probe.h"

namespace probes {
namespace {

// Where byte `at` of a box lies: 16-byte pieces of a row of 32, 64 or 128 bytes are exchanged by
// the number of the row, counted in lines of 128 bytes. CUDA programming guide, "TMA swizzle".
[[maybe_unused]] __device__ int place_of(int at, Swizzle swizzle) {
  const int line = at / 128 % 8, piece = at / 16 % 8;
  int exchanged = piece;
  if (swizzle == Swizzle::bytes128) exchanged = piece ^ line;
  if (swizzle == Swizzle::bytes64) exchanged = piece ^ line % 4;
  if (swizzle == Swizzle::bytes32) exchanged = piece ^ line % 2;
  return at / 128 * 128 + exchanged * 16 + at % 16;
}

template <class T>
__global__ void copy_box(const __grid_constant__ TensorMap map, T* out, int x, int y, int z,
                         int count, Swizzle swizzle) {
#ifdef CONVEXT_SM90A
  unsigned char* shared = dynamic_shared<unsigned char>();
  __shared__ uint64_t landed;
  if (threadIdx.x == 0) {
    init_mbarrier(&landed, 1);
    publish_mbarriers();
  }
  __syncthreads();
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) {
      arrive_expecting(&landed, uint32_t(count * sizeof(T)));
      const int at[3] = {x, y, z + turn};
      load_box(shared, map, &landed, at);
    }
    wait_for_phase(&landed, turn);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int place = place_of(i * int(sizeof(T)), swizzle);
      out[turn * count + i] = *reinterpret_cast<const T*>(shared + place);
    }
    __syncthreads();
  }
#endif
}

// A tensor of 3 x 20 x 88, boxes of 5 rows that begin at several places, outside of it too.
template <class T>
void check_boxes(MapElement element, Swizzle swizzle) {
  constexpr int kX = 88, kY = 20, kZ = 3, kRows = 5;
  const int columns = int(row_bytes(swizzle) / sizeof(T)), count = columns * kRows;
  Buffer<T> tensor(kX * kY * kZ), out(size_t(count) * 2);
  for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = to_element<T>(float(i % 509) + 1);
  const MapTensor described{element,  swizzle,      tensor.data(),
                            3,        {kX, kY, kZ}, {0, kX * sizeof(T), kX * kY * sizeof(T)},
                            {1, 1, 1}};
  const TensorMap map = make_tensor_map(described, MapBox{{uint32_t(columns), kRows, 1}});
  for (int x : {0, 8, -3, 70}) {
    for (int y : {0, -2, 17}) {
      launch(copy_box<T>, dim3(1), dim3(64), 1024, nullptr, map, out.data(), x, y, 1, count,
             swizzle);
      finish();
      for (int i = 0; i < 2 * count; ++i) {
        const int z = 1 + i / count, ay = y + i % count / columns, ax = x + i % columns;
        const bool inside = ax >= 0 && ax < kX && ay >= 0 && ay < kY;
        const float right = inside ? to_float(tensor[(z * kY + ay) * kX + ax]) : 0;
        expect(to_float(out[i]) == right, "a box", i);
      }
    }
  }
}

PROBE(tma_boxes) {
  for (Swizzle swizzle : {Swizzle::none, Swizzle::bytes32, Swizzle::bytes64, Swizzle::bytes128}) {
    check_boxes<__half>(MapElement::float16, swizzle);
    check_boxes<__nv_bfloat16>(MapElement::bfloat16, swizzle);
    check_boxes<float>(MapElement::float32, swizzle);
  }
}

struct Pixels {
  int n, h, w, c, kernel, stride, padding, dilation;
  int out_h() const { return (h + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  int out_w() const { return (w + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
};

constexpr int kPixels = 24, kChannels = 32;

// Block b copies the 24 output pixels from 24 b on, for every tap, in pieces of 32 channels.
__global__ void copy_pixels(const __grid_constant__ TensorMap map, __half* out, Pixels p, int out_h,
                            int out_w) {
#ifdef CONVEXT_SM90A
  __half* shared = dynamic_shared<__half>();
  __shared__ uint64_t landed;
  if (threadIdx.x == 0) {
    init_mbarrier(&landed, 1);
    publish_mbarriers();
  }
  __syncthreads();
  const int first = blockIdx.x * kPixels;
  const int x = first % out_w, y = first / out_w % out_h, n = first / (out_w * out_h);
  int phase = 0;
  for (int tap = 0; tap < p.kernel * p.kernel; ++tap) {
    for (int c = 0; c < p.c; c += kChannels, phase ^= 1) {
      if (threadIdx.x == 0) {
        arrive_expecting(&landed, kPixels * kChannels * 2);
        const int at[4] = {c, x * p.stride - p.padding, y * p.stride - p.padding, n};
        load_pixels(shared, map, &landed, at, uint16_t(tap % p.kernel * p.dilation),
                    uint16_t(tap / p.kernel * p.dilation));
      }
      wait_for_phase(&landed, phase);
      for (int i = threadIdx.x; i < kPixels * kChannels; i += blockDim.x) {
        const int pixel = first + i / kChannels;
        out[(size_t(pixel) * p.kernel * p.kernel + tap) * p.c + c + i % kChannels] =
            shared[place_of(i * 2, Swizzle::bytes64) / 2];
      }
      __syncthreads();
    }
  }
#endif
}

void check_pixels(Pixels p) {
  const int taps = p.kernel * p.kernel, count = p.n * p.out_h() * p.out_w();
  const int blocks = (count + kPixels - 1) / kPixels;
  Buffer<__half> image(size_t(p.n) * p.h * p.w * p.c), out(size_t(blocks) * kPixels * taps * p.c);
  for (size_t i = 0; i < image.size(); ++i) image[i] = to_element<__half>(float(i % 1021) + 1);
  const uint64_t pixel = uint64_t(p.c) * 2;
  const MapTensor described{MapElement::float16,
                            Swizzle::bytes64,
                            image.data(),
                            4,
                            {uint64_t(p.c), uint64_t(p.w), uint64_t(p.h), uint64_t(p.n)},
                            {0, pixel, pixel * p.w, pixel * p.w * p.h},
                            {1, uint32_t(p.stride), uint32_t(p.stride), 1}};
  const int upper = p.padding - p.dilation * (p.kernel - 1);
  const TensorMap map = make_tensor_map(
      described, MapPixels{{-p.padding, -p.padding}, {upper, upper}, kChannels, kPixels});
  launch(copy_pixels, dim3(blocks), dim3(64), 2048, nullptr, map, out.data(), p, p.out_h(),
         p.out_w());
  finish();
  for (int row = 0; row < count; ++row) {
    const int x = row % p.out_w(), y = row / p.out_w() % p.out_h(), n = row / p.out_w() / p.out_h();
    for (int i = 0; i < taps * p.c; ++i) {
      const int tap = i / p.c, c = i % p.c;
      const int h = y * p.stride - p.padding + tap / p.kernel * p.dilation;
      const int w = x * p.stride - p.padding + tap % p.kernel * p.dilation;
      const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
      const float right = inside ? to_float(image[((size_t(n) * p.h + h) * p.w + w) * p.c + c]) : 0;
      expect(to_float(out[size_t(row) * taps * p.c + i]) == right, "a pixel", row);
    }
  }
}

PROBE(tma_pixels) {
  check_pixels({2, 7, 9, 32, 3, 1, 1, 1});
  check_pixels({3, 9, 8, 64, 3, 2, 1, 1});
  check_pixels({1, 12, 11, 32, 3, 2, 2, 2});
  check_pixels({2, 5, 6, 32, 1, 1, 0, 1});
  check_pixels({2, 10, 10, 32, 5, 3, 0, 1});
}

}  // namespace
}  // namespace probes
