#include "core/overlap.h"

#include <algorithm>

namespace tenfold {

void Memory::check(const char* op) {
  std::sort(spans_.begin(), spans_.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* any = nullptr;      // reaches furthest of all so far
  const Span* written = nullptr;  // and of those that are written
  for (const Span& s : spans_) {
    const Span* other = s.written ? any : written;
    if (other != nullptr && other->end > s.begin) [[unlikely]] {
      raise(ErrorKind::value, "tenfold::", op, ": ", other->name, "[", other->index, "] and ",
            s.name, "[", s.index, "] must not share memory: ",
            s.written && other->written ? "both are" : "one of them is", " written");
    }
    if (any == nullptr || s.end > any->end) any = &s;
    if (s.written && (written == nullptr || s.end > written->end)) written = &s;
  }
}

}  // namespace tenfold
