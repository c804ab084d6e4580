// Divides by every kind of divisor, around every multiple that could go wrong, and at random; exits
// with 1 at the first quotient that is not the one of C++.
#include "cuda/kernels/fast_divisor.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

using convext::cuda::FastDivisor;

namespace {

constexpr int32_t kMost = INT32_MAX;

bool check(const FastDivisor& fast, int32_t n) {
  const auto [quotient, remainder] = fast.divide(n);
  const int32_t d = fast.divisor();
  if (quotient == n / d && remainder == n % d && fast.quotient(n) == n / d) return true;
  std::printf("%d / %d = %d remainder %d, not %d remainder %d\n", n, d, n / d, n % d, quotient,
              remainder);
  return false;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> any(1, kMost);
  std::set<int32_t> divisors;
  for (int32_t d = 1; d <= 2000; ++d) divisors.insert(d), divisors.insert(kMost - d + 1);
  for (int bit = 0; bit < 31; ++bit) {
    for (int64_t around = -2; around <= 2; ++around) {
      const int64_t d = (int64_t(1) << bit) + around;
      if (d >= 1 && d <= kMost) divisors.insert(int32_t(d));
    }
  }
  for (int i = 0; i < 2000; ++i) divisors.insert(any(random) >> i % 31 | 1);
  long checks = 0;
  for (const int32_t d : divisors) {
    const FastDivisor fast(d);
    const int64_t multiples = kMost / d;
    auto at_multiple = [&](int64_t multiple) {
      for (int64_t n = multiple * d - 1; n <= multiple * d + 1; ++n) {
        if (n < 0 || n > kMost) continue;
        ++checks;
        if (!check(fast, int32_t(n))) std::exit(1);
      }
    };
    for (int64_t i = 0; i <= 200; ++i) {
      if (i <= multiples) at_multiple(i), at_multiple(multiples - i);
      at_multiple(any(random) % (multiples + 1));
    }
    ++checks;
    if (!check(fast, kMost)) return 1;
  }
  std::printf("%ld quotients\n", checks);
  return checks < 1000000;
}
