// Division by numbers that do not change while a kernel runs: a GPU has no instruction for it, and
// what stands for one takes 20 (32 bits) to 100 (64 bits).
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace convext::cuda {

template <class Index>
struct QuotientAndRemainder {
  Index quotient, remainder;
};

// Of 0 <= n < 2^31 by 1 <= d < 2^31, with one multiplication. With 2^s the least power of two that
// is not below d, n / d is floor((n + floor(n * m / 2^32)) / 2^s) for m = floor(2^32 * (2^s - d) /
// d) + 1: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994,
// figure 4.1; the sum does not overflow, for n has 31 bits.
class FastDivisor {
 public:
  constexpr FastDivisor() : FastDivisor(1) {}
  constexpr explicit FastDivisor(int32_t divisor)
      : divisor_(divisor), shift_(std::bit_width(uint32_t(divisor) - 1)) {
    const uint64_t d = divisor;
    multiplier_ = uint32_t((((uint64_t(1) << shift_) - d) << 32) / d + 1);
  }

  constexpr int32_t quotient(int32_t n) const {
    const uint32_t high = uint32_t(uint64_t(uint32_t(n)) * multiplier_ >> 32);
    return int32_t((uint32_t(n) + high) >> shift_);
  }
  constexpr QuotientAndRemainder<int32_t> divide(int32_t n) const {
    const int32_t q = quotient(n);
    return {q, n - q * divisor_};
  }
  constexpr int32_t divisor() const { return divisor_; }

 private:
  int32_t divisor_;
  uint32_t multiplier_ = 0;
  uint32_t shift_;
};

// The same of 64 bits, by plain division: for kernels that take the type of their indices as a
// parameter, and are given this one where 31 bits do not do.
class WideDivisor {
 public:
  constexpr WideDivisor() = default;
  constexpr explicit WideDivisor(int64_t divisor) : divisor_(divisor) {}

  constexpr int64_t quotient(int64_t n) const { return n / divisor_; }
  constexpr QuotientAndRemainder<int64_t> divide(int64_t n) const {
    const int64_t q = quotient(n);
    return {q, n - q * divisor_};
  }
  constexpr int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_ = 1;
};

template <class Index>
using Divisor = std::conditional_t<sizeof(Index) == 4, FastDivisor, WideDivisor>;

}  // namespace convext::cuda
