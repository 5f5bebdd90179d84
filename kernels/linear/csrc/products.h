// Products of matrices in tensors: how their work is cut and handed out. No result depends on the number of threads.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "call.h"
#include "choose.h"
#include "threads.h"

namespace swin {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kRows = 192;            // of a block, at most
constexpr int64_t kFewestRows = 24;       // at least, that make a panel worth fetching
constexpr int64_t kFewRows = 512;         // for which packing a weight first costs more than it saves
constexpr int64_t kRowsForParts = 96;     // for which splitting a weight into parts costs less than it saves, at least
constexpr int64_t kTogether = 4096;       // rows of MLPs of few rows that are computed at once, at most
constexpr int64_t kHidden = 192 * 1024;   // numbers of a block between an MLP's products: those that a cache holds

inline int64_t divide(int64_t count, int64_t by) { return (count + by - 1) / by; }

inline bool is_of_bfloats(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

inline bool takes_bfloats() { return kAmxBFloats.lanes && may_use_tiles_of_bfloats(); }

// The code of so many lanes, or the one that suits so many rows: fewer do not make up for the parts of a weight.
inline const Code& choose(int64_t lanes, int64_t rows = kRowsForParts) {
  if (lanes && lanes == kAmxBFloats.lanes && takes_bfloats()) return kAmxBFloats;
  return choose_code(kPlain, kAvx2, kAvx512, lanes, lanes || rows >= kRowsForParts ? &kAmx : nullptr);
}

// The same for rows in x.
inline const Code& choose_for(const Tensor& x, int64_t lanes, int64_t rows = kRowsForParts) {
  const bool of_bfloats = is_of_bfloats(x);
  require(!of_bfloats || takes_bfloats(), "bfloat16 needs a processor with AMX and AVX512-BF16, Linux and GCC");
  const Code& code = choose(of_bfloats && lanes == 0 ? kAmxBFloats.lanes : lanes, rows);
  require(of_bfloats == (&code == &kAmxBFloats), "code of " + std::to_string(code.lanes) + " lanes takes other numbers than x");
  return code;
}

inline const float* numbers(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
inline float* numbers_of(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline int64_t bytes_of_row(const Tensor& x) { return x.size(1) * (is_of_bfloats(x) ? 2 : 4); }

inline const void* row_of(const Tensor& x, int64_t row) {
  return static_cast<const char*>(x.const_data_ptr()) + row * bytes_of_row(x);
}

inline void* row_of(Tensor& x, int64_t row) { return static_cast<char*>(x.mutable_data_ptr()) + row * bytes_of_row(x); }

inline void check(const Tensor& x, const char* name, const Numbers& sizes, ScalarType type = ScalarType::Float) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous();
  std::string expected;
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || x.size(i) == sizes[i];
  for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  const std::string kind = type == ScalarType::Float ? "float32" : "bfloat16";
  require(same && x.scalar_type() == type && x.device().is_cpu(),
          std::string(name) + " must be contiguous " + kind + " on the CPU, (" + expected + ")");
}

inline void check_rows(const Tensor& x) {
  check(x, "x", {-1, -1}, is_of_bfloats(x) ? ScalarType::BFloat16 : ScalarType::Float);
}

inline const float* numbers_of_bias(const MaybeTensor& bias, const char* name, const Numbers& sizes) {
  if (!bias) return nullptr;
  check(*bias, name, sizes);
  return numbers(*bias);
}

inline Tensor empty(const Tensor& like, const Numbers& sizes) { return torch::stable::new_empty(like, sizes); }
inline Tensor empty_floats(const Tensor& like, const Numbers& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

template <typename Work>
inline void hand_out(void (*run)(const Work&, int64_t, int64_t), const Work& work, int64_t count) {
  share_pieces(count, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

template <typename Work>
inline void hand_out(void (*run)(const Work&, Units&), const Work& work, int64_t count) {
  share_out(count, [&](Units& units) { run(work, units); });
}

inline int64_t rows_of_block(int64_t kept, const Code& code) {
  const int64_t hidden = &code == &kAmxBFloats ? 2 * kHidden : kHidden;
  return std::max(kFewestRows, std::min(kRows, hidden / std::max<int64_t>(kept, 1)));
}

// Blocks of rows, of each of which so many numbers are kept: as many for one thread as for the others, and none without
// rows. Results do not depend on it, for no row depends on another.
inline int64_t blocks_of(int64_t M, int64_t kept, const Code& code,
                         int64_t threads = torch::stable::get_num_threads()) {
  return std::min(divide(divide(M, rows_of_block(kept, code)), threads) * threads, divide(M, std::max(kFewestRows, code.tile)));
}

// A matrix of rows x columns, row by row, as the right side of a product: itself, or across, so that rows are columns.
struct Matrix {
  const float* data;
  int64_t rows, columns;
  bool across;
};

inline int64_t packed_size(int64_t rows, int64_t columns, const Code& code) {  // either way
  return std::max(divide(rows, code.panel) * code.panel_size(columns), divide(columns, code.panel) * code.panel_size(rows));
}

inline Packing strides_of(const Matrix& matrix) {
  if (matrix.across) return {matrix.data, 1, matrix.columns, matrix.columns, matrix.rows, nullptr};
  return {matrix.data, matrix.columns, 1, matrix.rows, matrix.columns, nullptr};
}

inline const float* pack(const Matrix& matrix, Tensor& packed, const Code& code) {
  Packing work = strides_of(matrix);
  work.packed = numbers_of(packed);
  hand_out(code.pack, work, divide(work.N, code.panel));
  return numbers(packed);
}

// Whether products of M rows and N columns, of all experts, are computed panel by panel, of b as it is. The thread with
// most panels must not get much more of the work than that with most blocks of rows would. No result depends on it.
inline bool are_few(int64_t M, int64_t N, const Code& code) {
  if (M > kFewRows || M == 0) return false;
  const int64_t threads = torch::stable::get_num_threads(), panels = divide(N, code.panel), blocks = blocks_of(M, 1, code);
  return 4 * divide(panels, threads) * blocks <= 5 * divide(blocks, threads) * panels;
}

inline FewRows few_rows(const Matrix& b) {
  const Packing strides = strides_of(b);
  FewRows work{};
  work.b = b.data;
  work.b_term = strides.b_term;
  work.b_column = strides.b_column;
  work.N = strides.N;
  work.K = strides.K;
  return work;
}

inline FewRows few_rows(const float* packed, int64_t N, int64_t K) {
  FewRows work{};
  work.b = packed;
  work.N = N;
  work.K = K;
  return work;
}

inline FewRows with(FewRows work, const void* a, int64_t M, const float* bias, void* c) {
  work.a = a;
  work.bias = bias;
  work.c = c;
  work.M = M;
  return work;
}

// All at once: threads wait for each other only at the end.
inline void multiply(const std::vector<FewRows>& works, const Code& code) {
  Numbers ends;  // of each one's panels among all
  for (const FewRows& work : works) ends.push_back((ends.empty() ? 0 : ends.back()) + divide(work.N, code.panel));
  if (ends.empty()) return;
  torch::stable::parallel_for(0, ends.back(), 1, [&](int64_t begin, int64_t end) {
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; begin = ends[i++]) {
      const int64_t first = i ? ends[i - 1] : 0;
      code.few_rows(works[i], begin - first, std::min(end, ends[i]) - first);
    }
  });
}

// What belongs to a product of rows besides: a norm of them before, and what is added after; or none.
struct Joined {
  Norm norm{};
  const void* added = nullptr;
};

inline void multiply(const Tensor& a, FewRows work, const float* bias, Tensor& c, const Joined& joined, const Code& code) {
  work = with(work, row_of(a, 0), a.size(0), bias, row_of(c, 0));
  work.norm = joined.norm;
  work.added = joined.added;
  multiply({work}, code);
}

inline void multiply(const Tensor& a, const float* packed, const float* bias, Tensor& c, const Code& code,
                     const Joined& joined = {}) {
  const int64_t M = a.size(0), N = c.size(1), K = a.size(1);
  if (are_few(M, N, code)) return multiply(a, few_rows(packed, N, K), bias, c, joined, code);
  const int64_t blocks = blocks_of(M, 1, code);
  const Product work{row_of(a, 0), packed, bias, row_of(c, 0), M, N, K, blocks, joined.norm, joined.added};
  hand_out(code.product, work, work.blocks);
}

inline void multiply(const Tensor& a, const Matrix& b, const float* bias, Tensor& c, const Code& code,
                     const Joined& joined = {}) {
  if (are_few(a.size(0), c.size(1), code)) return multiply(a, few_rows(b), bias, c, joined, code);
  Tensor packed = empty_floats(a, {packed_size(b.rows, b.columns, code)});
  multiply(a, pack(b, packed, code), bias, c, code, joined);
}

}  // namespace swin
