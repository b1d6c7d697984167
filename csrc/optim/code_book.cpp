// SPDX-License-Identifier: Apache-2.0
#include "optim/code_book.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace tenfold {
namespace {

// Grows with x; equal upper halves name a bucket.
int32_t ordered_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

// The largest float32 x with x <= (a + b) / 2; the sum is exact in double unless the two are far
// apart, and then b / 2 rounds down as well.
float cut_between(float a, float b) {
  const double middle = (static_cast<double>(a) + static_cast<double>(b)) * 0.5;
  auto cut = static_cast<float>(middle);
  if (static_cast<double>(cut) > middle) cut = std::nextafterf(cut, -INFINITY);
  return cut + 0.0f;  // -0 to 0: they are one number, but not in ordered bits
}

int count_below(const CodeBook& book, int32_t bits) {  // cuts below
  const float* const end = book.cut + kCodes - 1;
  return static_cast<int>(
      std::partition_point(book.cut, end, [&](float c) { return ordered_bits(c) < bits; }) -
      book.cut);
}

// Fills the bucket of the ordered bits [low, low | 0xFFFF]; false if it has more than one cut.
bool fill_bucket(const CodeBook& book, int32_t low, uint32_t* entry) {
  const int32_t high = low | 0xFFFF;
  const int lower = count_below(book, low), upper = count_below(book, high);
  if (upper - lower > 1) return false;
  const uint32_t cut = upper == lower ? 0xFFFFu : ordered_bits(book.cut[lower]) & 0xFFFF;
  *entry = static_cast<uint32_t>(lower) << 16 | cut;
  return true;
}

bool fill_table(CodeBook* book) {
  uint32_t* const middle = book->table + CodeBook::kBuckets;
  const float edge = std::ldexp(1.0f, -24);
  const int lower = count_below(*book, ordered_bits(-edge) + 1);
  if (lower != count_below(*book, ordered_bits(edge))) return false;
  *middle = static_cast<uint32_t>(lower) << 16 | 0xFFFFu;
  for (int i = 1; i <= CodeBook::kBuckets; ++i) {
    const int32_t upper = CodeBook::kSmallest + i - 1;
    if (!fill_bucket(*book, upper << 16, middle + i)) return false;
    if (!fill_bucket(*book, static_cast<int32_t>(static_cast<uint32_t>(~upper) << 16), middle - i))
      return false;
  }
  return true;
}

}  // namespace

bool make_code_book(const float* code, CodeBook* book) {
  for (int j = 0; j < kCodes; ++j)
    if (!std::isfinite(code[j]) || (j > 0 && code[j] < code[j - 1])) return false;
  std::memcpy(book->code, code, sizeof book->code);
  bool distinct = true;
  for (int j = 0; j < kCodes; ++j) {
    const bool again = j > 0 && code[j] == code[j - 1];
    book->first[j] = static_cast<uint8_t>(again ? book->first[j - 1] : j);
    distinct = distinct && !again;
    book->cut[j] = j + 1 < kCodes ? cut_between(code[j], code[j + 1]) : INFINITY;
  }
  book->zero = book->first[count_below(*book, 0)];
  book->has_table = distinct && fill_table(book);
  return true;
}

const CodeBook* cached_code_book(const float* code, int which) {
  thread_local std::unique_ptr<CodeBook> kept[2];
  auto& book = kept[which];
  if (book != nullptr && std::memcmp(book->code, code, sizeof book->code) == 0) return book.get();
  auto fresh = std::make_unique<CodeBook>();
  if (!make_code_book(code, fresh.get())) return nullptr;
  book = std::move(fresh);
  return book.get();
}

}  // namespace tenfold
