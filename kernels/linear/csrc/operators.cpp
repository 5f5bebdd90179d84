// The operators' schemas, their checks, and how their work is handed out. No result depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "call.h"
#include "choose.h"

namespace swin {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kRows = 192;            // of a block, at most
constexpr int64_t kFewestRows = 24;       // at least, that make a panel worth fetching
constexpr int64_t kFewRows = 512;         // for which packing a weight first costs more than it saves
constexpr int64_t kTogether = 4096;       // rows of MLPs of few rows that are computed at once, at most
constexpr int64_t kHidden = 192 * 1024;   // numbers of a block between an MLP's products: those that a cache holds
constexpr int64_t kColumns = 192;         // of a group, whose rows of a weight's gradient are computed together
constexpr int64_t kParts = 64;            // groups times parts of the rows, about
constexpr int64_t kRowsOfPart = 768;      // at least
constexpr int64_t kFewestUnits = 4;       // of a weight's gradient, for threads to share

int64_t divide(int64_t count, int64_t by) { return (count + by - 1) / by; }

const Code& choose(int64_t lanes) { return choose_code(kPlain, kAvx2, kAvx512, lanes); }

const float* numbers(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* numbers_of(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

void check(const Tensor& x, const char* name, const Numbers& sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous();
  std::string expected;
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || x.size(i) == sizes[i];
  for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  require(same && x.scalar_type() == ScalarType::Float && x.device().is_cpu(),
          std::string(name) + " must be contiguous float32 on the CPU, (" + expected + ")");
}

const float* numbers_of_bias(const MaybeTensor& bias, const char* name, const Numbers& sizes) {
  if (!bias) return nullptr;
  check(*bias, name, sizes);
  return numbers(*bias);
}

Tensor empty(const Tensor& like, const Numbers& sizes) { return torch::stable::new_empty(like, sizes); }

// Numbers of a vector, of the code that is chosen; the tensor says on which device.
int64_t lanes_of(const Tensor&) { return choose(0).lanes; }

// Raised where callers rely on what older builds do not have.
int64_t version_of(const Tensor&) { return 2; }

template <typename Work>
void hand_out(void (*run)(const Work&, int64_t, int64_t), const Work& work, int64_t units) {
  if (units > 0) torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

// Blocks of rows, of each of which so many numbers are kept: as many for one thread as for the others. Results do not
// depend on it, for no row depends on another.
int64_t blocks_of(int64_t M, int64_t kept) {
  const int64_t most = std::max(kFewestRows, std::min(kRows, kHidden / std::max<int64_t>(kept, 1)));
  const int64_t threads = torch::stable::get_num_threads();
  return std::min(divide(divide(M, most), threads) * threads, divide(M, kFewestRows));
}

// A matrix of rows x columns, row by row, as the right side of a product: itself, or across, so that rows are columns.
struct Matrix {
  const float* data;
  int64_t rows, columns;
  bool across;
};

int64_t packed_size(int64_t rows, int64_t columns, const Code& code) {  // either way
  return std::max(divide(rows, code.panel) * columns, divide(columns, code.panel) * rows) * code.panel;
}

Packing strides_of(const Matrix& matrix) {
  if (matrix.across) return {matrix.data, 1, matrix.columns, matrix.columns, matrix.rows, nullptr};
  return {matrix.data, matrix.columns, 1, matrix.rows, matrix.columns, nullptr};
}

const float* pack(const Matrix& matrix, Tensor& packed, const Code& code) {
  Packing work = strides_of(matrix);
  work.packed = numbers_of(packed);
  hand_out(code.pack, work, divide(work.N, code.panel));
  return numbers(packed);
}

// Whether products of M rows and N columns, of all experts, are computed panel by panel, of b as it is. The thread with
// most panels must not get much more of the work than that with most blocks of rows would. No result depends on it.
bool are_few(int64_t M, int64_t N, const Code& code) {
  if (M > kFewRows || M == 0) return false;
  const int64_t threads = torch::stable::get_num_threads(), panels = divide(N, code.panel), blocks = blocks_of(M, 1);
  return 4 * divide(panels, threads) * blocks <= 5 * divide(blocks, threads) * panels;
}

FewRows few_rows(const Matrix& b) {
  const Packing strides = strides_of(b);
  FewRows work{};
  work.b = b.data;
  work.b_term = strides.b_term;
  work.b_column = strides.b_column;
  work.N = strides.N;
  work.K = strides.K;
  return work;
}

FewRows few_rows(const float* packed, int64_t N, int64_t K) {
  FewRows work{};
  work.b = packed;
  work.N = N;
  work.K = K;
  return work;
}

FewRows with(FewRows work, const float* a, int64_t M, const float* bias, float* c) {
  work.a = a;
  work.bias = bias;
  work.c = c;
  work.M = M;
  return work;
}

// All at once: threads wait for each other only at the end.
void multiply(const std::vector<FewRows>& works, const Code& code) {
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

void multiply(const Tensor& a, const float* packed, const float* bias, Tensor& c, const Code& code) {
  const int64_t M = a.size(0), N = c.size(1), K = a.size(1);
  if (are_few(M, N, code)) return multiply({with(few_rows(packed, N, K), numbers(a), M, bias, numbers_of(c))}, code);
  const Product work{numbers(a), packed, bias, numbers_of(c), M, N, K, blocks_of(M, 1)};
  hand_out(code.product, work, work.blocks);
}

void multiply(const Tensor& a, const Matrix& b, const float* bias, Tensor& c, const Code& code) {
  const int64_t M = a.size(0);
  if (are_few(M, c.size(1), code)) return multiply({with(few_rows(b), numbers(a), M, bias, numbers_of(c))}, code);
  Tensor packed = empty(a, {packed_size(b.rows, b.columns, code)});
  multiply(a, pack(b, packed, code), bias, c, code);
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t lanes) {
  const Code& code = choose(lanes);
  check(x, "x", {-1, -1});
  check(weight, "weight", {-1, x.size(1)});
  require(weight.size(0) > 0 && weight.size(1) > 0, "weight must not be empty");
  const float* start = numbers_of_bias(bias, "bias", {weight.size(0)});
  Tensor y = empty(x, {x.size(0), weight.size(0)});
  multiply(x, Matrix{numbers(weight), weight.size(0), weight.size(1), true}, start, y, code);
  return y;
}

constexpr int64_t kPadding = 32;  // a multiple of all panels: packed weights have one size for all instruction sets

Numbers packed_sizes(int64_t N, int64_t K) { return {divide(N, kPadding) * kPadding, K}; }

Tensor pack_weight(const Tensor& weight, int64_t lanes) {
  check(weight, "weight", {-1, -1});
  require(weight.size(0) > 0 && weight.size(1) > 0, "weight must not be empty");
  const Code& code = choose(lanes);
  const int64_t N = weight.size(0), K = weight.size(1);
  Tensor packed = empty(weight, packed_sizes(N, K));
  pack(Matrix{numbers(weight), N, K, true}, packed, code);
  std::fill(numbers_of(packed) + divide(N, code.panel) * code.panel * K, numbers_of(packed) + packed.numel(), 0.0f);
  return packed;
}

Tensor forward_packed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t N, int64_t lanes) {
  check(x, "x", {-1, -1});
  require(N > 0 && x.size(1) > 0, "weight must not be empty");
  check(weight, "packed weight", packed_sizes(N, x.size(1)));
  Tensor y = empty(x, {x.size(0), N});
  multiply(x, numbers(weight), numbers_of_bias(bias, "bias", {N}), y, choose(lanes));
  return y;
}

// c and sums of what else `work` says; sums may be null.
void weight_gradient(WeightGradient work, float* c, float* sums, const Tensor& like, const Code& code) {
  work.parts = std::max<int64_t>(1, std::min(divide(kParts, divide(work.N, kColumns)), work.M / kRowsOfPart));
  const int64_t groups = std::max(divide(work.N, kColumns), divide(kFewestUnits, work.parts));
  work.groups = std::max<int64_t>(1, std::min(groups, divide(work.N, kColumns / kFewestUnits)));
  const int64_t size = work.N * work.K;
  Tensor parts = empty(like, {work.parts > 1 ? work.parts * size : 0});
  std::vector<float> parts_of_sums(work.parts * work.N);
  work.c = work.parts > 1 ? numbers_of(parts) : c;
  work.sums = parts_of_sums.data();
  hand_out(code.weight_gradient, work, work.parts * work.groups);
  for (int64_t n = 0; sums && n < work.N; ++n) {
    sums[n] = 0;
    for (int64_t part = 0; part < work.parts; ++part) sums[n] += work.sums[part * work.N + n];
  }
  if (work.parts > 1 && size > 0)
    torch::stable::parallel_for(0, size, 1024, [&](int64_t begin, int64_t end) {
      std::copy(work.c + begin, work.c + end, c + begin);
      for (int64_t part = 1; part < work.parts; ++part)
        for (int64_t i = begin; i < end; ++i) c[i] += work.c[part * size + i];
    });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x,
                                            bool needs_weight, int64_t lanes) {
  const Code& code = choose(lanes);
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1);
  check(x, "x", {-1, -1});
  check(weight, "weight", {-1, K});
  check(grad, "grad", {M, N});
  require(N > 0 && K > 0, "weight must not be empty");
  Tensor grad_x = empty(x, {needs_x ? M : 0, K}), grad_w = empty(x, {needs_weight ? N : 0, K});
  Tensor grad_b = empty(x, {needs_weight ? N : 0});
  if (needs_x) multiply(grad, Matrix{numbers(weight), N, K, false}, nullptr, grad_x, code);
  if (needs_weight)
    weight_gradient({numbers(grad), numbers(x), false, false, nullptr, nullptr, M, N, K, 0, 0}, numbers_of(grad_w),
                    numbers_of(grad_b), x, code);
  return {grad_x, grad_w, grad_b};
}

// E MLPs of C, H and C_out channels, each for its share of M rows.
struct Sizes {
  int64_t M, E, C, H, C_out;
  bool across;  // whether w2 is (E, C_out, H), else (E, H, C_out)

  Numbers w2() const { return across ? Numbers{E, C_out, H} : Numbers{E, H, C_out}; }

  Matrix first(const Tensor& w1, int64_t expert, bool forward) const {
    return {numbers(w1) + expert * H * C, H, C, forward};
  }

  Matrix second(const Tensor& w2, int64_t expert, bool forward) const {
    const float* data = numbers(w2) + expert * H * C_out;
    return across ? Matrix{data, C_out, H, forward} : Matrix{data, H, C_out, !forward};
  }
};

Sizes check_mlp(const Tensor& x, const Numbers& counts, const Tensor& w1, const Tensor& w2, bool across) {
  check(x, "x", {-1, -1});
  check(w1, "w1", {static_cast<int64_t>(counts.size()), -1, x.size(1)});
  require(w2.dim() == 3, "w2 must have three dimensions");
  const Sizes sizes{x.size(0), w1.size(0), x.size(1), w1.size(1), w2.size(across ? 1 : 2), across};
  check(w2, "w2", sizes.w2());
  require(sizes.C > 0 && sizes.H > 0 && sizes.C_out > 0, "w1 and w2 must not be empty");
  int64_t sum = 0;
  for (int64_t count : counts) {
    require(count >= 0, "counts must not be negative");
    require(count <= sizes.M - sum, "counts must be those of x's rows");  // without overflow
    sum += count;
  }
  require(sum == sizes.M, "counts must be those of x's rows");
  return sizes;
}

// An MLP's pass of many rows, block by block.
template <typename Work>
void run_packed(void (*run)(const Work&, int64_t, int64_t), Work work, const float* w1, const float* w2) {
  work.w1 = w1;
  work.w2 = w2;
  work.blocks = blocks_of(work.M, work.H);
  hand_out(run, work, work.blocks);
}

// The two products of MLPs of few rows, until they are run.
struct Few {
  std::vector<FewRows> first, second;
  int64_t rows = 0;

  // a: M x H.
  void add(const Mlp& work, const FewRows& w1, const FewRows& w2, float* a) {
    first.push_back(with(w1, work.x, work.M, work.b1, work.h ? work.h : a));
    first.back().gelu_of = a;
    second.push_back(with(w2, a, work.M, work.b2, work.y));
    rows += work.M;
  }

  void add(const MlpGradient& work, const FewRows& w1, const FewRows& w2) {
    first.push_back(with(w2, work.grad, work.M, nullptr, work.grad_h));
    first.back().slope_of = work.h;
    if (work.grad_x) second.push_back(with(w1, work.grad_h, work.M, nullptr, work.grad_x));
  }

  void run(const Code& code) {
    multiply(first, code);
    multiply(second, code);
    *this = Few{};
  }
};

std::tuple<Tensor, Tensor> mlp(const Tensor& x, Numbers counts, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2,
                               const MaybeTensor& b2, bool across, bool keep, int64_t lanes) {
  const Code& code = choose(lanes);
  const Sizes sizes = check_mlp(x, counts, w1, w2, across);
  const auto [M, E, C, H, C_out, _] = sizes;
  const float* first_bias = numbers_of_bias(b1, "b1", {E, H});
  const float* second_bias = numbers_of_bias(b2, "b2", {E, C_out});
  Tensor y = empty(x, {M, C_out}), h = empty(x, {keep ? M : 0, H});
  const int64_t narrowest = std::min(H, C_out) * E;
  int64_t rows_of_few = 0;
  for (int64_t count : counts) rows_of_few += are_few(count, narrowest, code) ? count : 0;
  Tensor a = empty(x, {std::min(rows_of_few, kTogether), H});
  Few few;
  Tensor packed1 = empty(x, {packed_size(H, C, code)}), packed2 = empty(x, {packed_size(H, C_out, code)});
  for (int64_t expert = 0, row = 0; expert < E; row += counts[expert++]) {
    if (counts[expert] == 0) continue;
    const Matrix first = sizes.first(w1, expert, true), second = sizes.second(w2, expert, true);
    const Mlp work{
        numbers(x) + row * C, nullptr, nullptr,
        first_bias ? first_bias + expert * H : nullptr, second_bias ? second_bias + expert * C_out : nullptr,
        keep ? numbers_of(h) + row * H : nullptr, numbers_of(y) + row * C_out, counts[expert], C, H, C_out, 0};
    if (are_few(work.M, narrowest, code)) {
      if (few.rows + work.M > a.size(0)) few.run(code);
      few.add(work, few_rows(first), few_rows(second), numbers_of(a) + few.rows * H);
      continue;
    }
    run_packed(code.mlp, work, pack(first, packed1, code), pack(second, packed2, code));
  }
  few.run(code);
  return {y, h};
}

Tensor mlp_packed(const Tensor& x, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
                  int64_t H, int64_t C_out, int64_t lanes) {
  check(x, "x", {-1, -1});
  const int64_t M = x.size(0), C = x.size(1);
  require(C > 0 && H > 0 && C_out > 0, "w1 and w2 must not be empty");
  check(w1, "packed w1", packed_sizes(H, C));
  check(w2, "packed w2", packed_sizes(C_out, H));
  const float *first_bias = numbers_of_bias(b1, "b1", {H}), *second_bias = numbers_of_bias(b2, "b2", {C_out});
  Tensor y = empty(x, {M, C_out});
  const Mlp work{numbers(x), nullptr, nullptr, first_bias, second_bias, nullptr, numbers_of(y), M, C, H, C_out, 0};
  const Code& code = choose(lanes);
  if (are_few(M, std::min(H, C_out), code)) {
    Tensor a = empty(x, {M, H});
    Few few;
    few.add(work, few_rows(numbers(w1), H, C), few_rows(numbers(w2), C_out, H), numbers_of(a));
    few.run(code);
  } else {
    run_packed(code.mlp, work, numbers(w1), numbers(w2));
  }
  return y;
}

// Sums of columns, of parts of the rows at first, which loses less to rounding.
void add_rows(const float* rows, int64_t count, int64_t columns, float* sums) {
  constexpr int64_t kTogether = 256;
  std::vector<float> part(columns);
  std::fill_n(sums, columns, 0.0f);
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t i = begin; i < std::min(begin + kTogether, count); ++i)
      for (int64_t j = 0; j < columns; ++j) part[j] += rows[i * columns + j];
    for (int64_t j = 0; j < columns; ++j) sums[j] += part[j];
  }
}

// Before GELU and before the first product, expert by expert.
void input_gradients(const std::vector<MlpGradient>& works, const Sizes& sizes, const Tensor& w1, const Tensor& w2,
                     const Code& code) {
  const auto [M, E, C, H, C_out, _] = sizes;
  Tensor packed1 = empty(w1, {packed_size(H, C, code)}), packed2 = empty(w1, {packed_size(H, C_out, code)});
  Few few;
  for (int64_t expert = 0; expert < E; ++expert) {
    const MlpGradient& work = works[expert];
    const Matrix first = sizes.first(w1, expert, false), second = sizes.second(w2, expert, false);
    if (work.M == 0) continue;
    if (are_few(work.M, std::min(H, C) * E, code)) {
      few.add(work, few_rows(first), few_rows(second));
      continue;
    }
    run_packed(code.mlp_gradient, work, pack(first, packed1, code), pack(second, packed2, code));
  }
  few.run(code);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                                                Numbers counts, const Tensor& w1, const Tensor& w2,
                                                                bool across, bool needs_x, bool needs_weights,
                                                                int64_t lanes) {
  const Code& code = choose(lanes);
  const Sizes sizes = check_mlp(x, counts, w1, w2, across);
  const auto [M, E, C, H, C_out, _] = sizes;
  check(h, "h", {M, H});
  check(grad, "grad", {M, C_out});
  const int64_t experts = needs_weights ? E : 0;
  Tensor grad_h = empty(x, {M, H}), grad_x = empty(x, {needs_x ? M : 0, C});
  Tensor grad_w1 = empty(x, {experts, H, C}), grad_b1 = empty(x, {experts, H});
  Numbers shape = sizes.w2();
  shape[0] = experts;
  Tensor grad_w2 = empty(x, shape), grad_b2 = empty(x, {experts, C_out});
  std::vector<MlpGradient> works;
  for (int64_t expert = 0, row = 0; expert < E; row += counts[expert++])
    works.push_back({numbers(grad) + row * C_out, numbers(h) + row * H, nullptr, nullptr, numbers_of(grad_h) + row * H,
                     needs_x ? numbers_of(grad_x) + row * C : nullptr, counts[expert], C, H, C_out, 0});
  input_gradients(works, sizes, w1, w2, code);
  for (int64_t expert = 0, row = 0; expert < experts; row += counts[expert++]) {
    const MlpGradient& work = works[expert];
    const float* from = numbers(x) + row * C;
    float *to_w1 = numbers_of(grad_w1) + expert * H * C, *to_b1 = numbers_of(grad_b1) + expert * H;
    float *to_w2 = numbers_of(grad_w2) + expert * H * C_out, *to_b2 = numbers_of(grad_b2) + expert * C_out;
    weight_gradient({work.grad_h, from, false, false, nullptr, nullptr, work.M, H, C, 0, 0}, to_w1, to_b1, x, code);
    if (across) {
      weight_gradient({work.grad, work.h, false, true, nullptr, nullptr, work.M, C_out, H, 0, 0}, to_w2, to_b2, x, code);
    } else {
      weight_gradient({work.h, work.grad, true, false, nullptr, nullptr, work.M, H, C_out, 0, 0}, to_w2, nullptr, x, code);
      add_rows(work.grad, work.M, C_out, to_b2);
    }
  }
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace
}  // namespace swin

STABLE_TORCH_LIBRARY(swin_linear, m) {
  m.def("lanes(Tensor like) -> int");
  m.def("version(Tensor like) -> int");
  m.def("forward(Tensor x, Tensor weight, Tensor? bias, int lanes=0) -> Tensor");
  m.def("pack(Tensor weight, int lanes=0) -> Tensor");
  m.def("forward_packed(Tensor x, Tensor weight, Tensor? bias, int N, int lanes=0) -> Tensor");
  m.def("mlp_packed(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int H, int N, int lanes=0) -> Tensor");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor weight, bool needs_x, bool needs_weight, int lanes=0) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "mlp(Tensor x, int[] counts, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool across, bool keep, int lanes=0) -> "
      "(Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor h, int[] counts, Tensor w1, Tensor w2, bool across, bool needs_x, "
      "bool needs_weights, int lanes=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swin_linear, CPU, m) {
  m.impl("lanes", TORCH_BOX(&swin::lanes_of));
  m.impl("version", TORCH_BOX(&swin::version_of));
  m.impl("forward", TORCH_BOX(&swin::forward));
  m.impl("pack", TORCH_BOX(&swin::pack_weight));
  m.impl("forward_packed", TORCH_BOX(&swin::forward_packed));
  m.impl("mlp_packed", TORCH_BOX(&swin::mlp_packed));
  m.impl("backward", TORCH_BOX(&swin::backward));
  m.impl("mlp", TORCH_BOX(&swin::mlp));
  m.impl("mlp_backward", TORCH_BOX(&swin::mlp_backward));
}
