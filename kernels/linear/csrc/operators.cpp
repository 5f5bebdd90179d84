// The operators' schemas and checks.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gradients.h"

namespace swin {
namespace {

// Numbers of a vector, or of a tile register, of the code that is chosen for those of a tensor; 0 where there is none.
int64_t lanes_of(const Tensor& like) {
  if (!is_of_bfloats(like)) return choose(0).lanes;
  return takes_bfloats() ? kAmxBFloats.lanes : 0;
}

// Raised where callers rely on what older builds do not have.
int64_t version_of(const Tensor&) { return 6; }

Norm norm_of(const MaybeTensor& weight, const MaybeTensor& bias, double eps, int64_t C) {
  require(weight.has_value() == bias.has_value(), "a norm has both a weight and a bias, or there is none");
  return {numbers_of_bias(weight, "norm_weight", {C}), numbers_of_bias(bias, "norm_bias", {C}), static_cast<float>(eps)};
}

// What a layer has besides: a norm of x, and what is added to y; or null.
Joined joined_of(const Tensor& x, int64_t N, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
                 const MaybeTensor& added) {
  Joined joined{norm_of(norm_weight, norm_bias, eps, x.size(1)), nullptr};
  if (!added) return joined;
  check(*added, "added", {x.size(0), N}, x.scalar_type());
  joined.added = row_of(*added, 0);
  return joined;
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t lanes, const MaybeTensor& norm_weight,
               const MaybeTensor& norm_bias, double eps, const MaybeTensor& added) {
  check_rows(x);
  const Code& code = choose_for(x, lanes, x.size(0));
  check(weight, "weight", {-1, x.size(1)});
  const int64_t N = weight.size(0), K = weight.size(1);
  require(N > 0 && K > 0, "weight must not be empty");
  const float* start = numbers_of_bias(bias, "bias", {N});
  const Joined joined = joined_of(x, N, norm_weight, norm_bias, eps, added);
  Tensor y = empty(x, {x.size(0), N});
  multiply(x, Matrix{numbers(weight), N, K, true}, start, y, code, joined);
  return y;
}

constexpr int64_t kPadding = 32;  // a multiple of all panels: what is padded has one size for all instruction sets

int64_t padded(int64_t N) { return divide(N, kPadding) * kPadding; }

Numbers packed_sizes(int64_t N, int64_t K, const Code& code) { return {padded(N), code.panel_size(K) / code.panel}; }

// What a row of K numbers has packed.
int64_t packed_width(int64_t K, int64_t lanes) { return packed_sizes(1, K, choose(lanes))[1]; }

Tensor pack_weight(const Tensor& weight, int64_t lanes) {
  check(weight, "weight", {-1, -1});
  require(weight.size(0) > 0 && weight.size(1) > 0, "weight must not be empty");
  const Code& code = choose(lanes);
  const int64_t N = weight.size(0), K = weight.size(1);
  Tensor packed = empty(weight, packed_sizes(N, K, code));
  pack(Matrix{numbers(weight), N, K, true}, packed, code);
  std::fill(numbers_of(packed) + divide(N, code.panel) * code.panel_size(K), numbers_of(packed) + packed.numel(), 0.0f);
  return packed;
}

Tensor forward_packed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t N, int64_t lanes,
                      const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps, const MaybeTensor& added) {
  check_rows(x);
  const Code& code = choose_for(x, lanes);
  require(N > 0 && x.size(1) > 0, "weight must not be empty");
  check(weight, "packed weight", packed_sizes(N, x.size(1), code));
  const float* start = numbers_of_bias(bias, "bias", {N});
  const Joined joined = joined_of(x, N, norm_weight, norm_bias, eps, added);
  Tensor y = empty(x, {x.size(0), N});
  multiply(x, numbers(weight), start, y, code, joined);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x,
                                            bool needs_weight, int64_t lanes) {
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1);
  check(x, "x", {-1, -1});
  check(weight, "weight", {-1, K});
  check(grad, "grad", {M, N});
  const Code& code = choose_for(x, lanes, M);
  require(N > 0 && K > 0, "weight must not be empty");
  Tensor grad_x = empty(x, {needs_x ? M : 0, K}), grad_w = empty(x, {needs_weight ? N : 0, K});
  Tensor grad_b = empty(x, {needs_weight ? N : 0});
  if (needs_x) multiply(grad, Matrix{numbers(weight), N, K, false}, nullptr, grad_x, code);
  if (needs_weight)
    PartedGradient(
        {numbers(grad), numbers(x), false, false, M, N, K, numbers_of(grad_w), false, numbers_of(grad_b), nullptr}, x, code)
        .run();
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
  check_rows(x);
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
void run_packed(void (*run)(const Work&, Units&), Work work, const float* w1, const float* w2, const Code& code) {
  work.w1 = w1;
  work.w2 = w2;
  work.blocks = blocks_of(work.M, work.H, code);
  hand_out(run, work, work.blocks);
}

// The two products of MLPs of few rows, until they are run.
struct Few {
  std::vector<FewRows> first, second;
  int64_t rows = 0;

  // a: M x H.
  void add(const Mlp& work, const FewRows& w1, const FewRows& w2, void* a) {
    first.push_back(with(w1, work.x, work.M, work.b1, work.h ? static_cast<void*>(work.h) : a));
    first.back().c_in_strips = work.h != nullptr;
    first.back().gelu_of = a;
    first.back().norm = work.norm;
    second.push_back(with(w2, a, work.M, work.b2, work.y));
    second.back().added = work.residual ? work.x : nullptr;
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

// A single MLP, if its rows are few; else nothing is done.
bool run_few(const Mlp& work, const FewRows& w1, const FewRows& w2, const Tensor& like, const Code& code) {
  if (!are_few(work.M, std::min(work.H, work.C_out), code)) return false;
  Tensor a = empty(like, {work.M, work.H});
  Few few;
  few.add(work, w1, w2, row_of(a, 0));
  few.run(code);
  return true;
}

std::tuple<Tensor, Tensor> mlp(const Tensor& x, Numbers counts, const Tensor& w1, const MaybeTensor& b1,
                               const Tensor& w2, const MaybeTensor& b2, bool across, bool keep, int64_t lanes) {
  const Sizes sizes = check_mlp(x, counts, w1, w2, across);
  const auto [M, E, C, H, C_out, _] = sizes;
  const Code& code = choose_for(x, lanes, M / std::max<int64_t>(E, 1));
  require(!is_of_bfloats(x) || (across && !keep), "of bfloat16 there are no gradients, and w2 lies across");
  const float* first_bias = numbers_of_bias(b1, "b1", {E, H});
  const float* second_bias = numbers_of_bias(b2, "b2", {E, C_out});
  Tensor y = empty(x, {M, C_out}), h = empty_floats(x, {keep ? M : 0, padded(H)});
  if (padded(H) > H) std::fill_n(numbers_of(h), h.numel(), 0.0f);  // where nothing is written: the same in every run
  const int64_t narrowest = std::min(H, C_out) * E;
  int64_t rows_of_few = 0;
  for (int64_t count : counts) rows_of_few += are_few(count, narrowest, code) ? count : 0;
  Tensor a = empty(x, {std::min(rows_of_few, kTogether), H});
  Few few;
  Tensor packed1 = empty_floats(x, {packed_size(H, C, code)}), packed2 = empty_floats(x, {packed_size(H, C_out, code)});
  for (int64_t expert = 0, row = 0; expert < E; row += counts[expert++]) {
    if (counts[expert] == 0) continue;
    const Matrix first = sizes.first(w1, expert, true), second = sizes.second(w2, expert, true);
    const Mlp work{
        row_of(x, row), nullptr, nullptr,
        first_bias ? first_bias + expert * H : nullptr, second_bias ? second_bias + expert * C_out : nullptr,
        keep ? numbers_of(h) + row * padded(H) : nullptr, row_of(y, row), counts[expert], C, H, C_out, 0, {},
        false};
    if (are_few(work.M, narrowest, code)) {
      if (few.rows + work.M > a.size(0)) few.run(code);
      few.add(work, few_rows(first), few_rows(second), row_of(a, few.rows));
      continue;
    }
    run_packed(code.mlp, work, pack(first, packed1, code), pack(second, packed2, code), code);
  }
  few.run(code);
  return {y, h};
}

Tensor mlp_packed(const Tensor& x, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
                  int64_t H, int64_t C_out, int64_t lanes, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                  double eps, bool residual) {
  check_rows(x);
  const Code& code = choose_for(x, lanes);
  const int64_t M = x.size(0), C = x.size(1);
  require(C > 0 && H > 0 && C_out > 0, "w1 and w2 must not be empty");
  check(w1, "packed w1", packed_sizes(H, C, code));
  check(w2, "packed w2", packed_sizes(C_out, H, code));
  const float *first_bias = numbers_of_bias(b1, "b1", {H}), *second_bias = numbers_of_bias(b2, "b2", {C_out});
  const Norm norm = norm_of(norm_weight, norm_bias, eps, C);
  require(!residual || C == C_out, "a residual has as many channels as x");
  Tensor y = empty(x, {M, C_out});
  const Mlp work{row_of(x, 0), nullptr, nullptr, first_bias, second_bias, nullptr, row_of(y, 0), M, C, H, C_out, 0, norm, residual};
  if (!run_few(work, few_rows(numbers(w1), H, C), few_rows(numbers(w2), C_out, H), x, code))
    run_packed(code.mlp, work, numbers(w1), numbers(w2), code);
  return y;
}

// x plus an MLP of its layer norm, without gradients.
Tensor residual_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& w1,
                    const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2, int64_t lanes) {
  check_rows(x);
  const int64_t M = x.size(0), C = x.size(1);
  check(w1, "w1", {-1, C});
  const int64_t H = w1.size(0);
  check(w2, "w2", {C, H});
  require(C > 0 && H > 0, "w1 and w2 must not be empty");
  const Norm norm = norm_of(norm_weight, norm_bias, eps, C);
  const float *first_bias = numbers_of_bias(b1, "b1", {H}), *second_bias = numbers_of_bias(b2, "b2", {C});
  Tensor y = empty(x, {M, C});
  const Mlp work{row_of(x, 0), nullptr, nullptr, first_bias, second_bias, nullptr, row_of(y, 0), M, C, H, C, 0, norm, true};
  const Code& code = choose_for(x, lanes, M);
  const Matrix first{numbers(w1), H, C, true}, second{numbers(w2), C, H, true};
  if (M == 0 || run_few(work, few_rows(first), few_rows(second), x, code)) return y;
  Tensor packed1 = empty_floats(x, {packed_size(H, C, code)}), packed2 = empty_floats(x, {packed_size(C, H, code)});
  run_packed(code.mlp, work, pack(first, packed1, code), pack(second, packed2, code), code);
  return y;
}

// Where the gradients of an expert's weights go.
struct WeightGradients {
  float *w1, *b1, *w2, *b2;
};

// The gradients of an MLP of many rows. to: null pointers where those of weights are not needed.
void gradients_of_many(MlpGradient work, const float* x, const Matrix& w1, const Matrix& w2, bool across,
                       const WeightGradients& to, const Tensor& like, const Code& code) {
  const int64_t M = work.M, C = work.C, H = work.H, C_out = work.C_out;
  Tensor packed1 = empty(like, {packed_size(H, C, code)}), packed2 = empty(like, {packed_size(H, C_out, code)});
  const float *first_packed = pack(w1, packed1, code), *second_packed = pack(w2, packed2, code);
  const auto of_first = [&](const float* grad_h) {
    return PartedGradient({x, grad_h, true, false, M, C, H, to.w1, true, nullptr, to.b1}, like, code);
  };
  const auto of_second = [&] {
    return PartedGradient({work.grad, work.h, true, true, M, C_out, H, to.w2, !across, to.b2, nullptr}, like, code);
  };
  const int64_t parts = PartedGradient::parts_of(M, C, H), threads = torch::stable::get_num_threads();
  const bool shared_evenly = 4 * divide(parts, threads) * threads <= 5 * parts;
  if (to.w1 && parts == PartedGradient::parts_of(M, C_out, H) && shared_evenly) {
    PartedGradient first = of_first(nullptr), second = of_second();
    work.w1 = first_packed;
    work.w2 = second_packed;
    gradients_by_parts(work, first, second, parts, code);
    return;
  }
  Tensor grad_h = empty(like, {M * padded(H)});
  work.grad_h = numbers_of(grad_h);
  run_packed(code.mlp_gradient, work, first_packed, second_packed, code);
  if (!to.w1) return;
  of_first(work.grad_h).run();
  of_second().run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                                                Numbers counts, const Tensor& w1, const Tensor& w2,
                                                                bool across, bool needs_x, bool needs_weights,
                                                                int64_t lanes) {
  const Sizes sizes = check_mlp(x, counts, w1, w2, across);
  const auto [M, E, C, H, C_out, _] = sizes;
  check(x, "x", {M, C});
  const Code& code = choose_for(x, lanes, M / std::max<int64_t>(E, 1));
  check(h, "h", {M, padded(H)});
  check(grad, "grad", {M, C_out});
  const int64_t experts = needs_weights ? E : 0;
  Tensor grad_x = empty(x, {needs_x ? M : 0, C});
  Tensor grad_w1 = empty(x, {experts, H, C}), grad_b1 = empty(x, {experts, H});
  Numbers shape = sizes.w2();
  shape[0] = experts;
  Tensor grad_w2 = empty(x, shape), grad_b2 = empty(x, {experts, C_out});
  const int64_t narrowest = std::min(H, C) * E;
  int64_t rows_of_few = 0;
  for (int64_t count : counts) rows_of_few += are_few(count, narrowest, code) ? count : 0;
  Tensor grad_h = empty(x, {rows_of_few, H});
  std::vector<MlpGradient> works;
  Few few;
  for (int64_t expert = 0, row = 0, row_of_few = 0; expert < E; row += counts[expert++]) {
    works.push_back({numbers(grad) + row * C_out, numbers(h) + row * padded(H), nullptr, nullptr, nullptr,
                     needs_x ? numbers_of(grad_x) + row * C : nullptr, counts[expert], C, H, C_out, 0, counts[expert]});
    if (!are_few(counts[expert], narrowest, code)) continue;
    works.back().grad_h = numbers_of(grad_h) + row_of_few * H;
    few.add(works.back(), few_rows(sizes.first(w1, expert, false)), few_rows(sizes.second(w2, expert, false)));
    row_of_few += counts[expert];
  }
  few.run(code);
  for (int64_t expert = 0, row = 0; expert < E; row += counts[expert++]) {
    const MlpGradient& work = works[expert];
    const float* from = numbers(x) + row * C;
    WeightGradients to{};
    if (needs_weights)
      to = {numbers_of(grad_w1) + expert * H * C, numbers_of(grad_b1) + expert * H,
            numbers_of(grad_w2) + expert * H * C_out, numbers_of(grad_b2) + expert * C_out};
    if (work.M > 0 && !work.grad_h) {  // many
      const Matrix first = sizes.first(w1, expert, false), second = sizes.second(w2, expert, false);
      gradients_of_many(work, from, first, second, across, to, x, code);
    } else if (needs_weights) {
      PartedGradient({work.grad_h, from, false, false, work.M, H, C, to.w1, false, to.b1, nullptr}, x, code).run();
      PartedGradient({work.grad, work.h, true, true, work.M, C_out, H, to.w2, !across, to.b2, nullptr}, x, code).run();
    }
  }
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace
}  // namespace swin

STABLE_TORCH_LIBRARY(swin_linear, m) {
  m.def("lanes(Tensor like) -> int");
  m.def("version(Tensor like) -> int");
  m.def(
      "forward(Tensor x, Tensor weight, Tensor? bias, int lanes=0, Tensor? norm_weight=None, Tensor? norm_bias=None, "
      "float eps=0.0, Tensor? added=None) -> Tensor");
  m.def("pack(Tensor weight, int lanes=0) -> Tensor");
  m.def("packed_width(int K, int lanes=0) -> int");
  m.def(
      "forward_packed(Tensor x, Tensor weight, Tensor? bias, int N, int lanes=0, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, float eps=0.0, Tensor? added=None) -> Tensor");
  m.def(
      "mlp_packed(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int H, int N, int lanes=0, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0, bool residual=False) -> Tensor");
  m.def(
      "residual_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor w1, Tensor? b1, Tensor w2, "
      "Tensor? b2, int lanes=0) -> Tensor");
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
  m.impl("residual_mlp", TORCH_BOX(&swin::residual_mlp));
  m.impl("backward", TORCH_BOX(&swin::backward));
  m.impl("mlp", TORCH_BOX(&swin::mlp));
  m.impl("mlp_backward", TORCH_BOX(&swin::mlp_backward));
}

STABLE_TORCH_LIBRARY_IMPL(swin_linear, CompositeExplicitAutograd, m) {
  m.impl("packed_width", TORCH_BOX(&swin::packed_width));
}
