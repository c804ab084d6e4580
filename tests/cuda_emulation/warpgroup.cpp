// Products of a warpgroup (wgmma): operands in shared memory, results in the registers of 128
// threads.
#include <cstring>

#include "factors.h"
#include "hopper.h"
#include "scheduler.h"

namespace emulator {
namespace {

using convext::cuda::Swizzle;

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kMostColumns = 256;
constexpr int kMostDepth = 16;

Warpgroup& this_warpgroup(Place place) {
  const int first = current->number / kThreads * kThreads;
  if (first + kThreads > current->block->threads) {
    fail("wgmma: the block has no 128 threads for this warpgroup", place);
  }
  return this_worker().warpgroup_of(this_fiber());
}

// Returns when all threads of the warpgroup have come; to the last, true.
bool meet(Warpgroup& group, Place place) {
  Worker& worker = this_worker();
  Fiber& fiber = this_fiber();
  fiber.place = place;
  if (group.arrived == 0) group.place = place;
  if (!same(group.place, place)) {
    fail("wgmma: threads of one warpgroup are at different operations", place);
  }
  if (++group.arrived < kThreads) {
    worker.wait(State::in_warpgroup);
    return false;
  }
  group.arrived = 0;
  const int first = fiber.number / kThreads * kThreads;
  for (int i = first; i < first + kThreads; ++i) {
    if (i != fiber.number) worker.wake(worker.fiber(i));
  }
  return true;
}

// How an operand lies in shared memory: see matrix_in_shared in hopper.h.
class Matrix {
 public:
  Matrix(uint64_t descriptor, bool transposed, int element_bytes)
      : first_(uint32_t(descriptor & 0x3fff) << 4),
        piece_bytes_(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        group_bytes_(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        swizzle_(Swizzle(descriptor >> 62)),
        transposed_(transposed),
        element_bytes_(uint32_t(element_bytes)) {}

  // `across`: a's row or b's column.
  const unsigned char* element(int across_, int k_) const {
    const auto across = uint32_t(across_), k = uint32_t(k_);
    const uint32_t row = row_bytes(swizzle_);
    uint32_t offset;
    if (!transposed_) {
      const uint32_t piece = 16 / element_bytes_;
      const uint32_t next = swizzle_ == Swizzle::none ? piece_bytes_ : 16;
      offset = across % 8 * row + across / 8 * group_bytes_ + k / piece * next +
               k % piece * element_bytes_;
    } else {
      const uint32_t in_row = row / element_bytes_;
      const bool plain = swizzle_ == Swizzle::none;
      offset = across % in_row * element_bytes_ +
               across / in_row * (plain ? group_bytes_ : piece_bytes_) + k % 8 * row +
               k / 8 * (plain ? piece_bytes_ : group_bytes_);
    }
    const Block& block = *current->block;
    const uint32_t address = swizzled(first_ + offset, swizzle_) - kDynamicSharedAddress;
    if (address + element_bytes_ > block.shared_bytes) {
      fail("wgmma: an operand is not within dynamic shared memory");
    }
    return block.shared + address;
  }

 private:
  uint32_t first_, piece_bytes_, group_bytes_;
  Swizzle swizzle_;
  bool transposed_;
  uint32_t element_bytes_;
};

// Line k of b, or row k of a, as floats; `count` is a multiple of 8.
void gather(Factor factor, float* to, int count, const auto& element) {
  uint16_t halves[kMostColumns];
  for (int i = 0; i < count; ++i) {
    if (factor == Factor::tf32) {
      uint32_t bits;
      std::memcpy(&bits, element(i), 4);
      to[i] = cut_to_tf32(bits);
    } else {
      std::memcpy(&halves[i], element(i), 2);
    }
  }
  if (factor != Factor::tf32) widen(factor, halves, to, count);
}

// Rounding as in warp.cpp, where it is explained.
void carry_out(const IssuedProduct& issued) {
  const Product& p = issued.product;
  const int bytes = p.factor == Factor::tf32 ? 4 : 2, depth = 32 / bytes;
  const Matrix a_matrix(p.a, p.transposed_a, bytes), b_matrix(p.b, p.transposed_b, bytes);
  float b[kMostDepth][kMostColumns];
  for (int k = 0; k < depth; ++k) {
    gather(p.factor, b[k], p.columns, [&](int column) { return b_matrix.element(column, k); });
  }
  for (int row = 0; row < kRows; ++row) {
    float a[kMostDepth], sums[kMostColumns] = {};
    gather(p.factor, a, depth, [&](int k) { return a_matrix.element(row, k); });
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < p.columns; ++column) sums[column] += a[k] * b[k][column];
    }
    const int thread = row / 16 * 32 + row % 8 * 4;
    for (int column = 0; column < p.columns; ++column) {
      float& d = issued.d[thread + column % 8 / 2][column / 8 * 4 + row / 8 % 2 * 2 + column % 2];
      d = p.add ? d + sums[column] : sums[column];
    }
  }
}

}  // namespace

void fence_products() {
  this_fiber().products_fenced = true;
}

void issue_product(const Product& product, float* d, Place place) {
  Warpgroup& group = this_warpgroup(place);
  Fiber& fiber = this_fiber();
  if (!fiber.products_fenced) {
    fail("wgmma: no fence between what touched the registers and the product", place);
  }
  if (group.arrived == 0) {
    group.issued.push_back({product, fiber.open_products, {}});
  } else if (std::memcmp(&group.issued.back().product.a, &product.a, 2 * sizeof product.a) != 0) {
    fail("wgmma: threads of one warpgroup give different operands", place);
  }
  group.issued.back().d[fiber.number % kThreads] = d;
  if (meet(group, place) && settings.early) carry_out(group.issued.back());
}

void commit_products() {
  ++this_fiber().open_products;
}

void wait_for_products(int latest, Place place) {
  Warpgroup& group = this_warpgroup(place);
  Fiber& fiber = this_fiber();
  if (latest == 0) fiber.products_fenced = false;
  if (!meet(group, place)) return;
  size_t done = 0;
  for (; done < group.issued.size(); ++done) {
    if (group.issued[done].group >= fiber.open_products - latest) break;
    if (!settings.early) carry_out(group.issued[done]);
  }
  group.issued.erase(group.issued.begin(), group.issued.begin() + ptrdiff_t(done));
}

}  // namespace emulator
