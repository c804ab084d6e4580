// Bulk copies of boxes and of a convolution's pixels to shared memory (TMA).
#include <algorithm>
#include <cstring>
#include <string>

#include "hopper.h"
#include "scheduler.h"

namespace emulator {
namespace {

using convext::cuda::MapBox;
using convext::cuda::MapElement;
using convext::cuda::MapPixels;
using convext::cuda::MapTensor;
using convext::cuda::Swizzle;

constexpr uint32_t kMark = 0x7e4507a9;

// What cuTensorMapEncode... asks for; also that a swizzled row is as long as the swizzle, which it
// need not be, but what lies where then is less clear.
const char* wrong_with(const TensorMap& map) {
  const MapTensor& t = map.tensor;
  if (t.rank < 1 || t.rank > 5) return "a tensor has 1 to 5 axes";
  if (reinterpret_cast<uintptr_t>(t.base) % 16)
    return "the tensor's address is not a multiple of 16";
  for (int axis = 0; axis < t.rank; ++axis) {
    if (t.size[axis] < 1 || t.size[axis] > uint64_t{1} << 32) return "a size is not 1 to 2^32";
    if (axis && (t.stride[axis] % 16 || t.stride[axis] >= uint64_t{1} << 40)) {
      return "a stride is not a multiple of 16 below 2^40";
    }
    if (t.step[axis] < 1 || t.step[axis] > 8) return "a step is not 1 to 8";
  }
  if (t.step[0] != 1) return "the step along axis 0 is not 1";
  if (map.of_pixels) {
    if (t.rank != 4) return "pixels are emulated for 4 axes";
    if (map.pixels.channels < 1 || map.pixels.channels > 256) return "not 1 to 256 channels";
    if (map.pixels.pixels < 1 || map.pixels.pixels > 1024) return "not 1 to 1024 pixels";
    for (int axis = 0; axis < 2; ++axis) {
      const int lower = map.pixels.lower[axis], upper = map.pixels.upper[axis];
      if (lower < -128 || lower > 127 || upper < -128 || upper > 127) {
        return "a corner is not -128 to 127";
      }
    }
  } else {
    for (int axis = 0; axis < t.rank; ++axis) {
      if (map.box.size[axis] < 1 || map.box.size[axis] > 256) return "a box's side is not 1 to 256";
      if (t.step[axis] != 1) return "steps are emulated for pixels only";
    }
  }
  if (map.inner_bytes() % 16) return "rows of the box are not multiples of 16 bytes";
  if (t.swizzle != Swizzle::none && map.inner_bytes() != row_bytes(t.swizzle)) {
    return "rows of the box are not as long as the swizzle";
  }
  return nullptr;
}

// Copies elements along axis 0, zeros where they are outside of the tensor.
void copy_row(const TensorCopy& copy, const char* row, bool inside, uint32_t done) {
  const MapTensor& t = copy.map.tensor;
  const uint32_t bytes = uint32_t(copy.map.element_bytes());
  const uint32_t first = kDynamicSharedAddress + uint32_t(copy.to - this_worker().shared);
  unsigned char* const origin = this_worker().shared - kDynamicSharedAddress;
  for (uint32_t i = 0; i < copy.map.inner_bytes(); i += bytes) {
    unsigned char* to = origin + swizzled(first + done + i, t.swizzle);
    const int64_t x = int64_t(copy.at[0]) + i / bytes;
    if (!inside || x < 0 || x >= int64_t(t.size[0])) {
      std::memset(to, 0, bytes);
      continue;
    }
    std::memcpy(to, row + x * bytes, bytes);
    if (t.element == MapElement::tf32) {
      float value;
      std::memcpy(&value, to, 4);
      const uint32_t rounded = round_to_tf32(value);
      std::memcpy(to, &rounded, 4);
    }
  }
}

void land_box(const TensorCopy& copy) {
  const MapTensor& t = copy.map.tensor;
  const uint32_t row_length = copy.map.inner_bytes(), rows = copy.map.bytes() / row_length;
  for (uint32_t row = 0; row < rows; ++row) {
    const char* from = static_cast<const char*>(t.base);
    bool inside = true;
    uint32_t rest = row;
    for (int axis = 1; axis < t.rank; ++axis) {
      const int64_t i = int64_t(copy.at[axis]) + rest % copy.map.box.size[axis];
      rest /= copy.map.box.size[axis];
      inside = inside && i >= 0 && i < int64_t(t.size[axis]);
      from += i * int64_t(t.stride[axis]);
    }
    copy_row(copy, from, inside, row * row_length);
  }
}

// Pixels in the order W, H, N within the bounding box; PTX ISA, "im2col mode".
void land_pixels(const TensorCopy& copy) {
  const MapTensor& t = copy.map.tensor;
  const MapPixels& p = copy.map.pixels;
  int64_t at[3] = {copy.at[1], copy.at[2], copy.at[3]};
  for (uint32_t pixel = 0; pixel < p.pixels; ++pixel) {
    const int64_t w = at[0] + copy.offset[0], h = at[1] + copy.offset[1], n = at[2];
    const bool inside = w >= 0 && w < int64_t(t.size[1]) && h >= 0 && h < int64_t(t.size[2]) &&
                        n >= 0 && n < int64_t(t.size[3]);
    const char* from = static_cast<const char*>(t.base) + w * int64_t(t.stride[1]) +
                       h * int64_t(t.stride[2]) + n * int64_t(t.stride[3]);
    copy_row(copy, from, inside, pixel * copy.map.inner_bytes());
    for (int axis = 0; axis < 2; ++axis) {
      at[axis] += t.step[axis + 1];
      if (at[axis] < int64_t(t.size[axis + 1]) + p.upper[axis]) break;
      at[axis] = p.lower[axis];
      if (axis == 1) ++at[2];
    }
  }
}

void issue(TensorCopy copy) {
  Worker& worker = this_worker();
  const Place place = copy.place;
  this_fiber().place = place;
  const uint32_t first = shared_address(copy.to, place), bytes = copy.map.bytes();
  const Swizzle swizzle = copy.map.tensor.swizzle;
  const uint32_t alignment = std::max(128u, swizzle == Swizzle::none ? 0 : 8 * row_bytes(swizzle));
  if (first % alignment != 0) {
    fail("TMA: the destination is not a multiple of 128, or of the swizzle's period", place);
  }
  if (first - kDynamicSharedAddress + bytes > worker.shared_bytes) {
    fail("TMA: the box does not fit into shared memory", place);
  }
  races::write(copy.to, bytes, place);
  announce_bytes(copy.barrier, place);
  if (settings.early) {
    land(copy);
  } else {
    worker.tensor_copies.push_back(copy);
  }
}

}  // namespace

int TensorMap::element_bytes() const {
  return tensor.element == MapElement::float16 || tensor.element == MapElement::bfloat16 ? 2 : 4;
}

uint32_t TensorMap::inner_bytes() const {
  return (of_pixels ? pixels.channels : box.size[0]) * uint32_t(element_bytes());
}

uint32_t TensorMap::bytes() const {
  uint32_t rows = 1;
  if (of_pixels) rows = pixels.pixels;
  for (int axis = 1; !of_pixels && axis < tensor.rank; ++axis) rows *= box.size[axis];
  return rows * inner_bytes();
}

TensorMap make_tensor_map(const MapTensor& tensor, const MapBox* box, const MapPixels* pixels,
                          Place place) {
  TensorMap map{kMark, tensor, pixels != nullptr, {}, {}};
  if (box) map.box = *box;
  if (pixels) map.pixels = *pixels;
  if (const char* wrong = wrong_with(map)) {
    fail((std::string("tensor map: ") + wrong).c_str(), place);
  }
  return map;
}

void load_box(void* to, const TensorMap& map, uint64_t* barrier, int rank, const int* at,
              Place place) {
  if (map.mark != kMark || map.of_pixels || map.tensor.rank != rank) {
    fail("TMA: the map is not of boxes with as many axes", place);
  }
  TensorCopy copy{map, static_cast<unsigned char*>(to), barrier, {}, {}, current, place};
  std::copy_n(at, rank, copy.at);
  issue(copy);
}

void load_pixels(void* to, const TensorMap& map, uint64_t* barrier, const int* at, int w, int h,
                 Place place) {
  if (map.mark != kMark || !map.of_pixels) fail("TMA: the map is not of pixels", place);
  if (w > 255 || h > 255) fail("TMA: an offset of more than 255", place);
  TensorCopy copy{map, static_cast<unsigned char*>(to), barrier, {}, {w, h}, current, place};
  std::copy_n(at, 4, copy.at);
  issue(copy);
}

void land(const TensorCopy& copy) {
  if (copy.map.of_pixels) {
    land_pixels(copy);
  } else {
    land_box(copy);
  }
  complete_bytes(copy.barrier, copy.map.bytes(), copy.place);
}

uint32_t shared_address(const void* pointer, Place place) {
  const Block& block = *current->block;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (!block.shared || offset < 0 || offset >= ptrdiff_t(block.shared_bytes)) {
    fail("not an address in dynamic shared memory", place);
  }
  return kDynamicSharedAddress + uint32_t(offset);
}

uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t pieces = row_bytes(swizzle) / 16 - 1;  // a mask of the piece in a row
  return address ^ ((address >> 7 & pieces) << 4);
}

}  // namespace emulator
