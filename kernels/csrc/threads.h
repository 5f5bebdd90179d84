// How work is handed out to threads. No result depends on which of them does what.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "units.h"

namespace swin {

// Calls run(units) in as many threads as there are, or as units; all take theirs from the same ones.
template <typename F>
inline void share_out(int64_t count, F run) {
  Units units(count);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads == 0) return;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) run(units);
  });
}

// Calls run(begin, end) for pieces of some units, several for each thread.
template <typename F>
inline void share_pieces(int64_t count, F run) {
  constexpr int64_t kPieces = 4;  // of a thread
  const int64_t pieces = std::min<int64_t>(kPieces * torch::stable::get_num_threads(), count);
  share_out(pieces, [&](Units& units) {
    for (int64_t piece; units.take(piece);) run(piece * count / pieces, (piece + 1) * count / pieces);
  });
}

}  // namespace swin
