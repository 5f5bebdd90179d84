// The operators' schemas, their checks, and the choice of the code that this processor runs.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "choose.h"
#include "threads.h"

namespace swin {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSumsBytes = 32 << 20;  // of sums of the bias's gradient, at most
constexpr int64_t kUnits = 128;           // of the backward pass, about: fixed, so that sums do not depend on threads

// Tensors of one call, kept while it runs.
struct Inputs {
  Tensor qkv, bias;
  std::vector<float> logit_scale{}, padded_bias{};
};

Call make_call(Inputs& in, const MaybeTensor& logit_scale, int64_t heads, const Numbers& window, const Numbers& shift,
               bool masked, double scale, const Code& code) {
  const Tensor& qkv = in.qkv;
  require(qkv.dim() == 4 && heads > 0 && qkv.size(3) % (3 * heads) == 0, "qkv must be (B, H, W, 3 * heads * d)");
  require(qkv.is_contiguous() && in.bias.is_contiguous() && (!logit_scale || logit_scale->is_contiguous()),
          "qkv, bias and logit_scale must be contiguous");
  const auto type = qkv.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16, "qkv must be float32 or bfloat16");
  require(window.size() == 2 && std::min(window[0], window[1]) > 0, "window must be two positive numbers");
  require(shift.size() == 2 && std::min(shift[0], shift[1]) >= 0 && shift[0] < window[0] && shift[1] < window[1],
          "shift must be two numbers within the window");
  require(window[0] * window[1] <= Call::kMostTokens, "a window must have 576 tokens or fewer");
  require(qkv.size(3) / (3 * heads) <= Call::kWidest, "heads must be 128 channels wide or fewer");
  Call call{};
  call.H = qkv.size(1);
  call.W = qkv.size(2);
  call.heads = heads;
  call.width = qkv.size(3) / (3 * heads);
  call.h = window[0];
  call.w = window[1];
  call.down = shift[0];
  call.right = shift[1];
  call.window_rows = (call.H + call.h - 1) / call.h;
  call.window_columns = (call.W + call.w - 1) / call.w;
  call.windows = qkv.size(0) * call.window_rows * call.window_columns;
  call.columns = (call.tokens() + code.lanes - 1) / code.lanes * code.lanes;
  call.scale = static_cast<float>(scale);
  call.eps = 1e-12f;
  call.shifted = masked;
  const int64_t N = call.tokens();
  require(in.bias.scalar_type() == ScalarType::Float && in.bias.dim() == 3 && in.bias.size(0) == heads &&
              in.bias.size(1) == N && in.bias.size(2) == N,
          "bias must be (heads, N, N), float32");
  in.padded_bias.assign(heads * N * call.columns, -std::numeric_limits<float>::infinity());
  const float* bias = static_cast<const float*>(in.bias.const_data_ptr());
  for (int64_t row = 0; row < heads * N; ++row)
    std::copy_n(bias + row * N, N, in.padded_bias.begin() + row * call.columns);
  if (logit_scale) {
    require(logit_scale->numel() == heads && logit_scale->scalar_type() == ScalarType::Float,
            "logit_scale must have a number for each head, float32");
    const float* numbers = static_cast<const float*>(logit_scale->const_data_ptr());
    in.logit_scale.assign(numbers, numbers + heads);
    call.logit_scale = in.logit_scale.data();
  }
  call.qkv = qkv.const_data_ptr();
  call.bias = in.padded_bias.data();
  return call;
}

Tensor attend(const Tensor& qkv, const Tensor& bias, const MaybeTensor& logit_scale, int64_t heads, Numbers window,
              Numbers shift, bool masked, double scale, int64_t lanes) {
  const Code& code = choose_code(kPlain, kAvx2, kAvx512, lanes);
  Inputs in{qkv, bias};
  Call call = make_call(in, logit_scale, heads, window, shift, masked, scale, code);
  Tensor out = torch::stable::new_empty(qkv, Numbers{qkv.size(0), call.H, call.W, heads * call.width});
  call.out = out.mutable_data_ptr();
  const Range run = qkv.scalar_type() == ScalarType::Float ? code.forward : code.forward_bfloat16;
  share_pieces(call.windows * heads, [&](int64_t begin, int64_t end) { run(call, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& grad, const Tensor& qkv, const Tensor& bias,
                                                   const MaybeTensor& logit_scale, int64_t heads, Numbers window,
                                                   Numbers shift, bool masked, double scale, int64_t lanes) {
  const Code& code = choose_code(kPlain, kAvx2, kAvx512, lanes);
  Inputs in{qkv, bias};
  Call call = make_call(in, logit_scale, heads, window, shift, masked, scale, code);
  require(grad.dim() == 4 && grad.size(0) == qkv.size(0) && grad.size(1) == call.H && grad.size(2) == call.W &&
              grad.size(3) == heads * call.width && grad.scalar_type() == qkv.scalar_type() && grad.is_contiguous(),
          "grad must be (B, H, W, heads * d), contiguous, of qkv's type");
  const int64_t N = call.tokens(), head_sums = N * call.columns, sums = heads * head_sums;
  const int64_t most = std::max<int64_t>(1, kSumsBytes / (sums * static_cast<int64_t>(sizeof(float))));
  call.chunks = std::max<int64_t>(1, std::min({call.windows, (kUnits + heads - 1) / heads, most}));
  Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  Tensor grad_bias = torch::stable::new_empty(bias, bias.sizes());
  Tensor grad_scale = torch::stable::new_empty(bias, Numbers{heads});
  std::vector<float> bias_sums(call.chunks * sums), scale_sums(call.chunks * heads);
  call.grad = grad.const_data_ptr();
  call.grad_qkv = grad_qkv.mutable_data_ptr();
  call.grad_bias = bias_sums.data();
  call.grad_scale = scale_sums.data();
  const Range run = qkv.scalar_type() == ScalarType::Float ? code.backward : code.backward_bfloat16;
  share_pieces(call.chunks * heads, [&](int64_t begin, int64_t end) { run(call, begin, end); });
  float* to = static_cast<float*>(grad_bias.mutable_data_ptr());
  torch::stable::parallel_for(0, heads * N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t j = 0; j < N; ++j) {
        float total = 0;
        for (int64_t chunk = 0; chunk < call.chunks; ++chunk) total += bias_sums[chunk * sums + row * call.columns + j];
        to[row * N + j] = total;
      }
  });
  float* scales = static_cast<float*>(grad_scale.mutable_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    scales[head] = 0;
    for (int64_t chunk = 0; chunk < call.chunks; ++chunk) scales[head] += scale_sums[chunk * heads + head];
  }
  return {grad_qkv, grad_bias, grad_scale};
}

}  // namespace
}  // namespace swin

STABLE_TORCH_LIBRARY(swin_cpu, m) {
  m.def(
      "attend(Tensor qkv, Tensor bias, Tensor? logit_scale, int heads, int[] window, int[] shift, bool masked, "
      "float scale, int lanes=0) -> Tensor");
  m.def(
      "attend_backward(Tensor grad, Tensor qkv, Tensor bias, Tensor? logit_scale, int heads, int[] window, int[] shift, "
      "bool masked, float scale, int lanes=0) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swin_cpu, CPU, m) {
  m.impl("attend", TORCH_BOX(&swin::attend));
  m.impl("attend_backward", TORCH_BOX(&swin::attend_backward));
}
