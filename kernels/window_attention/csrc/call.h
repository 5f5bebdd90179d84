// One call of window attention on a CPU, behind plain pointers, and the code of each instruction set that serves it.

#pragma once

#include <cstdint>
#include <utility>

namespace swin {

// B maps of H x W tokens in image order, C = heads * width channels; windows of N = h * w tokens that begin `down` and
// `right` of a map's corner and wrap around its edges. Sides that are no multiple of a window's are padded.
struct Call {
  static constexpr int64_t kMostTokens = 24 * 24, kWidest = 128;  // of a window, of a head

  const void* qkv;            // B, H, W, 3 C; of the call's type of elements, as are grad, out and grad_qkv
  const float* bias;          // heads, N, columns; -inf beyond N
  const float* logit_scale;   // heads, for cosine attention; else null
  const void* grad;           // B, H, W, C
  void* out;                  // B, H, W, C
  void* grad_qkv;             // B, H, W, 3 C
  float* grad_bias;           // chunks, heads, N, columns; zeros at first
  float* grad_scale;          // chunks, heads; zeros at first
  int64_t H, W, heads, width, h, w, down, right;
  int64_t windows, window_rows, window_columns;  // of all maps; of one map
  int64_t chunks;             // parts of the windows in the backward pass
  int64_t columns;            // N, rounded up to whole vectors
  float scale, eps;
  bool shifted;               // -100 between tokens that only the wrapping brings together

  int64_t tokens() const { return h * w; }
};

// forward: of units from begin to end, window * heads + head. backward: chunk * heads + head.
using Range = void (*)(const Call& call, int64_t begin, int64_t end);

// Null pointers where the compiler cannot make it.
struct Code {
  int64_t lanes;  // numbers of a vector
  Range forward, backward;  // of float
  Range forward_bfloat16, backward_bfloat16;
};

// Each in a file of its own, compiled for that instruction set. Data alone: what asks the processor is compiled for any.
extern const Code kPlain, kAvx2, kAvx512;

}  // namespace swin
