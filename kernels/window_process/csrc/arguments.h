// What both devices do around their kernel: check the arguments, shape the result.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace swin {

using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

// The message alone: STD_TORCH_CHECK would put a file and a line of this library before it.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename List>
std::string text(const List& numbers) {
  std::ostringstream out;
  const char* separator = "(";
  for (const int64_t number : numbers) {
    out << separator << number;
    separator = ", ";
  }
  out << (numbers.size() == 0 ? "()" : ")");
  return out.str();
}

inline int64_t modulo(int64_t value, int64_t by) {
  const int64_t remainder = value % by;
  return remainder < 0 ? remainder + by : remainder;
}

// Checks that windows fit a map of height x width, and sets everything but parts, batch, heads and vectors.
inline Geometry window_geometry(int64_t height, int64_t width, const Numbers& window, const Numbers& shift) {
  require(window.size() == 2 && window[0] > 0 && window[1] > 0,
          "window_size=", text(window), " must be two positive numbers");
  require(shift.size() == 2, "shift_size=", text(shift), " must be two numbers");
  require(height > 0 && width > 0 && height % window[0] == 0 && width % window[1] == 0,
          "a map of ", text(Numbers{height, width}), " is not a whole number of windows of window_size=", text(window));
  Geometry g{};
  g.rows = height / window[0];
  g.columns = width / window[1];
  g.h = window[0];
  g.w = window[1];
  g.top = modulo(shift[0], height);
  g.left = modulo(shift[1], width);
  g.vectors = 1;
  return g;
}

inline Geometry partition_geometry(
    const Tensor& x, const Numbers& window, const Numbers& shift, int64_t parts, int64_t heads) {
  require(x.dim() == 4, "x has shape ", text(x.sizes()), "; it must be (B, H, W, C)");
  Geometry g = window_geometry(x.size(1), x.size(2), window, shift);
  require(parts > 0 && heads > 0, "parts=", parts, " and heads=", heads, " must be positive");
  require(x.size(3) % parts == 0 && x.size(3) / parts % heads == 0,
          "C=", x.size(3), " is not divisible by parts=", parts, " times heads=", heads);
  g.parts = parts;
  g.batch = x.size(0);
  g.heads = heads;
  return g;
}

inline Geometry merge_geometry(
    const Tensor& windows, const Numbers& resolution, const Numbers& window, const Numbers& shift) {
  require(windows.dim() == 6, "windows has shape ", text(windows.sizes()), "; it must be (parts, B, nW, heads, N, d)");
  require(resolution.size() == 2, "resolution=", text(resolution), " must be two numbers");
  Geometry g = window_geometry(resolution[0], resolution[1], window, shift);
  require(windows.size(2) == g.rows * g.columns && windows.size(4) == g.h * g.w,
          "windows has shape ", text(windows.sizes()), "; resolution=", text(resolution), " and window_size=",
          text(window), " make nW ", g.rows * g.columns, " and N ", g.h * g.w);
  g.parts = windows.size(0);
  g.batch = windows.size(1);
  g.heads = windows.size(3);
  return g;
}

// Calls move(from, to, geometry, bytes of a head's channels) and gives `to`.
template <typename Move>
Tensor windows_of(
    const Tensor& x, const Numbers& window, const Numbers& shift, int64_t parts, int64_t heads, const Move& move) {
  const Geometry g = partition_geometry(x, window, shift, parts, heads);
  const int64_t channels = x.size(3) / (parts * heads);
  const Tensor from = torch::stable::contiguous(x);
  Tensor to = torch::stable::new_empty(x, Numbers{parts, g.batch, g.rows * g.columns, heads, g.h * g.w, channels});
  if (to.numel() > 0) move(from, to, g, channels * static_cast<int64_t>(x.element_size()));
  return to;
}

template <typename Move>
Tensor map_of(
    const Tensor& windows, const Numbers& resolution, const Numbers& window, const Numbers& shift, const Move& move) {
  const Geometry g = merge_geometry(windows, resolution, window, shift);
  const int64_t channels = windows.size(5);
  const Tensor from = torch::stable::contiguous(windows);
  Tensor to = torch::stable::new_empty(
      windows, Numbers{g.batch, resolution[0], resolution[1], g.parts * g.heads * channels});
  if (to.numel() > 0) move(from, to, g, channels * static_cast<int64_t>(windows.element_size()));
  return to;
}

}  // namespace swin
