// Work that threads share. For any processor, included before the code of an instruction set.

#pragma once

#include <cstdint>

namespace swin {

// Units of a work, which threads take one by one: a core that others use, too, takes fewer.
class Units {
 public:
  explicit Units(int64_t count) : count_(count) {}

  // Whether there was one more, which `unit` is then.
  bool take(int64_t& unit) { return (unit = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < count_; }

 private:
  int64_t next_ = 0, count_;
};

}  // namespace swin
