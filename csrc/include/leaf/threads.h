#pragma once

#include <cstdint>

namespace leaf {

// The threads that a CPU kernel is given. `run` calls body(begin, end, context) on disjoint ranges
// that cover [0, n), and waits for all of them. Only the last range may be shorter than `grain`.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

  template <class Body>
  void for_ranges(int64_t n, int64_t grain, const Body& body) const {
    run(
        n, grain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<const Body*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace leaf
