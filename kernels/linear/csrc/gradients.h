// The gradients of weights and biases, over parts of the rows. No result depends on the number of threads.

#pragma once

#include "products.h"
#include "scratch.h"

namespace swin {

constexpr int64_t kColumns = 192;     // of a weight's gradient, that are computed together, at most
constexpr int64_t kParts = 64;        // of the rows, times the pieces of kColumns by kColumns, about
constexpr int64_t kRowsOfPart = 768;  // at least

// c = a^T b, or across its transpose, and sums of the columns of a (M x N) and of b (M x K), or null.
struct Gradient {
  const float *a, *b;
  bool b_in_strips, gelu_b;
  int64_t M, N, K;
  float* c;
  bool across;
  float *a_sums, *b_sums;
};

class PartedGradient {
 public:
  PartedGradient(const Gradient& gradient, const Tensor& like, const Code& code)
      : code_(code), to_(gradient.c), across_(gradient.across), to_a_sums_(gradient.a_sums), to_b_sums_(gradient.b_sums) {
    const auto [a, b, b_in_strips, gelu_b, M, N, K, c, across, a_sums, b_sums] = gradient;
    const int64_t parts = parts_of(M, N, K), padded = divide(K, code.panel) * code.panel;
    direct_ = parts == 1 && !across;
    parts_ = empty(like, {direct_ ? 0 : parts * N * padded});
    a_sums_.resize(parts * N);
    b_sums_.resize(parts * K);
    work_ = {a, b, b_in_strips, gelu_b, !direct_, across, direct_ ? c : numbers_of(parts_), a_sums_.data(), b_sums_.data(),
             M, N, K, parts, divide(K, kColumns), M, N * padded};
  }
  PartedGradient(const PartedGradient&) = delete;  // its work points into it
  PartedGradient& operator=(const PartedGradient&) = delete;

  static int64_t parts_of(int64_t M, int64_t N, int64_t K) {
    const int64_t pieces = divide(N, kColumns) * divide(K, kColumns);
    return std::max<int64_t>(1, std::min(divide(kParts, pieces), M / kRowsOfPart));
  }

  // All parts, by all threads.
  void run() {
    WeightGradient work = work_;
    const int64_t wanted = divide(2 * static_cast<int64_t>(torch::stable::get_num_threads()), work.parts);
    work.groups = std::max(work.groups, std::min(wanted, divide(work.K, code_.panel)));  // no result depends on it
    hand_out(code_.weight_gradient, work, work.parts * work.groups);
    finish();
  }

  // One part, by this thread; `finish` comes after all of them. b: its rows, in strips of their own, if not among all.
  void run(int64_t part, const float* b) const {
    WeightGradient work = work_;
    const int64_t first = part * work.M / work.parts;
    work.M = (part + 1) * work.M / work.parts - first;
    work.a += first * work.N;
    work.b = b ? b : work.b + first * (work.b_in_strips ? code_.panel : work.K);
    if (b) work.b_rows = work.M;
    work.c += part * work.c_size;
    work.a_sums += part * work.N;
    work.b_sums += part * work.K;
    work.parts = 1;
    Units units(work.groups);
    code_.weight_gradient(work, units);
  }

  void finish() const {
    if (!direct_)
      hand_out(code_.add_parts, Parts{work_.c, to_, across_, work_.N, work_.K, work_.parts, work_.c_size},
               divide(work_.K, code_.panel));
    add_sums(a_sums_, work_.N, to_a_sums_);
    add_sums(b_sums_, work_.K, to_b_sums_);
  }

 private:
  void add_sums(const std::vector<float>& sums, int64_t columns, float* to) const {
    for (int64_t j = 0; to && j < columns; ++j) {
      to[j] = 0;
      for (int64_t part = 0; part < work_.parts; ++part) to[j] += sums[part * columns + j];
    }
  }

  const Code& code_;
  float* to_;
  bool across_;
  float *to_a_sums_, *to_b_sums_;
  WeightGradient work_{};
  Tensor parts_;
  std::vector<float> a_sums_, b_sums_;
  bool direct_;
};

// All gradients of an MLP of many rows, part by part: what is before GELU stays in the cache of the thread that needs it
// next, and is never in memory as a whole.
inline void gradients_by_parts(const MlpGradient& work, PartedGradient& first, PartedGradient& second, int64_t parts,
                               const Code& code) {
  const int64_t padded = divide(work.H, code.panel) * code.panel;
  share_out(parts, [&](Units& units) {
    Scratch scratch(divide(work.M, parts) * padded, 1);
    float* grad_h = scratch.take(divide(work.M, parts) * padded);
    for (int64_t part; units.take(part);) {
      MlpGradient own = work;
      const int64_t row = part * work.M / parts;
      own.M = (part + 1) * work.M / parts - row;
      own.grad += row * work.C_out;
      own.h += row * code.panel;
      own.grad_h = grad_h;
      if (own.grad_x) own.grad_x += row * work.C;
      own.blocks = blocks_of(own.M, own.H, code, 1);
      Units blocks(own.blocks);
      code.mlp_gradient(own, blocks);
      first.run(part, own.grad_h);
      second.run(part, nullptr);
    }
  });
  first.finish();
  second.finish();
}

}  // namespace swin
