// Window attention of one instruction set: LANES floats a vector, ROWS rows of a product at once, in namespace SET.
// Sums and weights are floats, whatever the elements are. No include guard, as of vector.h.

namespace swin {
namespace SET {

#include "vector.h"
#include "bfloat16.h"
#include "products.h"

// Numbers from a row to the next, of heads' channels and of scores: constants for products, as many as there can be and a
// vector more, since rows a power of two apart would share few sets of a cache.
constexpr int64_t kHeadRow = Call::kWidest + LANES, kScoreRow = Call::kMostTokens + LANES;

inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Where a window's tokens lie on their map.
struct Window {
  int64_t* place;   // N: in (B, H, W); -1 for padding
  float* region;    // columns: in the shift mask
  float* hidden;    // columns: what is added for keys that are padding, -inf; else 0
  bool mixed;       // of several regions
  bool padded;
};

inline void locate(const Call& call, int64_t number, Window& window) {
  const int64_t image = number / (call.window_rows * call.window_columns);
  const int64_t row = number / call.window_columns % call.window_rows, column = number % call.window_columns;
  const int64_t tall = call.window_rows * call.h, wide = call.window_columns * call.w;
  window.mixed = window.padded = false;
  for (int64_t i = 0, token = 0; i < call.h; ++i) {
    int64_t y = row * call.h + i;  // on the map that is padded and rolled
    const int region_y = (y >= tall - call.h) + (y >= tall - call.down);
    y = y + call.down < tall ? y + call.down : y + call.down - tall;
    for (int64_t j = 0; j < call.w; ++j, ++token) {
      int64_t x = column * call.w + j;
      const int region_x = (x >= wide - call.w) + (x >= wide - call.right);
      x = x + call.right < wide ? x + call.right : x + call.right - wide;
      const bool exists = y < call.H && x < call.W;
      window.place[token] = exists ? (image * call.H + y) * call.W + x : -1;
      window.hidden[token] = exists ? 0.0f : -__builtin_inff();
      window.region[token] = static_cast<float>(3 * region_y + region_x);
      window.padded |= !exists;
      window.mixed |= window.region[token] != window.region[0];
    }
  }
  window.mixed &= call.shifted;
}

template <typename T>
inline void read(const T* from, float* to, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] = to_float(from[d]);
}

template <typename T>
inline void write(const float* from, float factor, T* to, int64_t count) {
  for (int64_t d = 0; d < count; ++d) from_float(from[d] * factor, to[d]);
}

inline float dot(const float* a, const float* b, int64_t count) {
  Vector total = {};
  for (int64_t d = 0; d < count; d += LANES) total += load(a + d) * load(b + d);
  return sum(total);
}

// Makes a row of unit length; what it was multiplied by.
inline float normalize(float* row, int64_t count, float eps) {
  const float length = __builtin_sqrtf(dot(row, row, count));
  const float inverse = 1.0f / (length > eps ? length : eps);
  for (int64_t d = 0; d < count; ++d) row[d] *= inverse;
  return inverse;
}

// Rows of a window's tokens, `first` channels into each token's `stride`; zeros for padding.
template <typename T>
inline void gather(const T* map, const Window& window, int64_t begin, int64_t end, int64_t stride, int64_t first,
                   int64_t width, float* rows) {
  for (int64_t i = begin; i < end; ++i, rows += kHeadRow) {
    if (window.place[i] >= 0)
      read(map + window.place[i] * stride + first, rows, width);
    else
      __builtin_memset(rows, 0, width * sizeof(float));
  }
}

// Asks for a token's channels ahead of `gather`: pieces of rows so far apart are not fetched ahead by themselves. Into the
// second cache, for in the first rows that are so far apart share few sets, and push each other out.
template <typename T>
inline void fetch(const T* map, int64_t place, int64_t stride, int64_t first, int64_t width) {
  if (place < 0) return;
  const char* from = reinterpret_cast<const char*>(map + place * stride + first);
  for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(from + byte, 0, 2);
}

// Turns a row of products into exponentials of its logits less the highest; gives their sum.
inline float soften(float* row, const float* bias, float factor, int64_t query, const Window& window, int64_t columns) {
  Vector highest = all(-__builtin_inff());
  const Vector own = all(window.region[query]);
  for (int64_t j = 0; j < columns; j += LANES) {
    Vector x = load(row + j) * factor + load(bias + j);
    if (window.mixed) x += load(window.region + j) != own ? all(-100.0f) : Vector{};
    if (window.padded) x += load(window.hidden + j);
    store(row + j, x);
    highest = larger(highest, x);
  }
  const float top = largest(highest);
  Vector total = {};
  for (int64_t j = 0; j < columns; j += LANES) {
    const Vector x = exponential(load(row + j) - top);
    store(row + j, x);
    total += x;
  }
  return sum(total);
}

inline Window take_window(Scratch& scratch, int64_t tokens, int64_t columns) {
  Window window{};
  window.place = scratch.take_zeros<int64_t>(tokens);
  window.region = scratch.take_zeros(columns);
  window.hidden = scratch.take_zeros(columns);
  return window;
}

constexpr int64_t kWindowPieces = 3;
inline int64_t window_floats(int64_t tokens, int64_t columns) { return 2 * tokens + 2 * columns; }

inline float factor_of(const Call& call, int64_t head) {
  return call.logit_scale ? call.scale * call.logit_scale[head] : call.scale;
}

template <typename T>
void forward(const Call& call, int64_t begin, int64_t end) {
  const int64_t N = call.tokens(), D = call.width, C = call.heads * D, columns = call.columns, wide = whole_vectors(D);
  const int64_t floats = 2 * (N + ROWS) * kHeadRow + D * columns + ROWS * kScoreRow;
  Scratch scratch(2 * window_floats(N, columns) + floats, 2 * kWindowPieces + 6);
  Window window = take_window(scratch, N, columns), next = take_window(scratch, N, columns);
  float *q = scratch.take_zeros(ROWS * kHeadRow), *k = scratch.take_zeros(N * kHeadRow);
  float* v = scratch.take_zeros(N * kHeadRow);
  float *across = scratch.take_zeros(D * columns), *weights = scratch.take_zeros(ROWS * kScoreRow);
  float* mixed = scratch.take_zeros(ROWS * kHeadRow);
  const T* qkv = static_cast<const T*>(call.qkv);
  T* out = static_cast<T*>(call.out);
  float totals[ROWS];
  locate(call, begin / call.heads, next);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit % call.heads, next_head = (unit + 1) % call.heads;
    if (unit == begin || head == 0) std::swap(window, next);
    if (next_head == 0 && unit + 1 < end) locate(call, (unit + 1) / call.heads, next);
    const Window& ahead = next_head == 0 ? next : window;
    gather(qkv, window, 0, N, 3 * C, C + head * D, D, k);
    gather(qkv, window, 0, N, 3 * C, 2 * C + head * D, D, v);
    if (call.logit_scale)
      for (int64_t j = 0; j < N; ++j) normalize(k + j * kHeadRow, wide, call.eps);
    transpose(k, kHeadRow, N, D, across, columns);
    const float* bias = call.bias + head * N * columns;
    for (int64_t i = 0; i < N; i += ROWS) {
      const int64_t rows = N - i < ROWS ? N - i : ROWS;
      gather(qkv, window, i, i + rows, 3 * C, head * D, D, q);
      if (call.logit_scale)
        for (int64_t r = 0; r < rows; ++r) normalize(q + r * kHeadRow, wide, call.eps);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t part = 0; part < 3; ++part)
          fetch(qkv, ahead.place[i + r], 3 * C, part * C + next_head * D, D);
      multiply<kHeadRow, 1>(rows, columns, D, q, across, columns, weights, kScoreRow);
      for (int64_t r = 0; r < rows; ++r)
        totals[r] =
            soften(weights + r * kScoreRow, bias + (i + r) * columns, factor_of(call, head), i + r, window, columns);
      multiply<kScoreRow, 1>(rows, wide, N, weights, v, kHeadRow, mixed, kHeadRow);
      for (int64_t r = 0; r < rows; ++r)
        if (window.place[i + r] >= 0)
          write(mixed + r * kHeadRow, 1.0f / totals[r], out + window.place[i + r] * C + head * D, D);
    }
  }
}

// Writes the gradients of a window's rows, `first` channels into each token of grad_qkv; through `normalize` where the
// rows were made units, by inverses. The sum of the units' products with their gradients.
template <typename T>
inline float scatter(const Call& call, const Window& window, float* grads, const float* units, const float* inverses,
                     float factor, int64_t first, int64_t wide) {
  const int64_t D = call.width, stride = 3 * call.heads * D;
  T* to = static_cast<T*>(call.grad_qkv) + first;
  float along = 0;
  for (int64_t i = 0; i < call.tokens(); ++i, grads += kHeadRow, units += kHeadRow) {
    if (window.place[i] < 0) continue;
    float by = factor;
    if (inverses) {
      const float own = dot(grads, units, wide);
      for (int64_t d = 0; d < D; ++d) grads[d] -= own * units[d];
      by *= inverses[i];
      along += own;
    }
    write(grads, by, to + window.place[i] * stride, D);
  }
  return along;
}

template <typename T>
void backward(const Call& call, int64_t begin, int64_t end) {
  const int64_t N = call.tokens(), D = call.width, C = call.heads * D, columns = call.columns, wide = whole_vectors(D);
  const int64_t floats = N * (5 * kHeadRow + 2 * kScoreRow + 2) + 2 * D * columns;
  Scratch scratch(2 * window_floats(N, columns) + floats, 2 * kWindowPieces + 11);
  Window window = take_window(scratch, N, columns), next = take_window(scratch, N, columns);
  float *q = scratch.take_zeros(N * kHeadRow), *k = scratch.take_zeros(N * kHeadRow);
  float *v = scratch.take_zeros(N * kHeadRow), *g = scratch.take_zeros(N * kHeadRow);
  float* grads = scratch.take_zeros(N * kHeadRow);
  float *k_across = scratch.take_zeros(D * columns), *v_across = scratch.take_zeros(D * columns);
  float *weights = scratch.take_zeros(N * kScoreRow), *slopes = scratch.take_zeros(N * kScoreRow);
  float *q_inverse = scratch.take_zeros(N), *k_inverse = scratch.take_zeros(N);
  const T *qkv = static_cast<const T*>(call.qkv), *grad = static_cast<const T*>(call.grad);
  const bool cosine = call.logit_scale != nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / call.heads, head = unit % call.heads, first = head * D;
    const float* bias = call.bias + head * N * columns;
    float* grad_bias = call.grad_bias + unit * N * columns;
    const float factor = factor_of(call, head);
    const int64_t start = chunk * call.windows / call.chunks, stop = (chunk + 1) * call.windows / call.chunks;
    if (start == stop) continue;  // no windows: maps without tokens
    locate(call, start, next);
    for (int64_t number = start; number < stop; ++number) {
      std::swap(window, next);
      locate(call, number + 1 < stop ? number + 1 : number, next);
      gather(qkv, window, 0, N, 3 * C, first, D, q);
      gather(qkv, window, 0, N, 3 * C, C + first, D, k);
      gather(qkv, window, 0, N, 3 * C, 2 * C + first, D, v);
      gather(grad, window, 0, N, C, first, D, g);
      for (int64_t i = 0; cosine && i < N; ++i) {
        q_inverse[i] = normalize(q + i * kHeadRow, wide, call.eps);
        k_inverse[i] = normalize(k + i * kHeadRow, wide, call.eps);
      }
      transpose(k, kHeadRow, N, D, k_across, columns);
      transpose(v, kHeadRow, N, D, v_across, columns);
      multiply<kHeadRow, 1>(N, columns, D, q, k_across, columns, weights, kScoreRow);
      multiply<kHeadRow, 1>(N, columns, D, g, v_across, columns, slopes, kScoreRow);
      for (int64_t i = 0; i < N; ++i) {
        float *weight = weights + i * kScoreRow, *slope = slopes + i * kScoreRow;
        for (int64_t part = 0; part < 3; ++part) fetch(qkv, next.place[i], 3 * C, part * C + first, D);
        fetch(grad, next.place[i], C, first, D);
        const float inverse = 1.0f / soften(weight, bias + i * columns, factor, i, window, columns);
        for (int64_t j = 0; j < columns; j += LANES) store(weight + j, load(weight + j) * inverse);
        const float delta = dot(weight, slope, columns);
        for (int64_t j = 0; j < columns; j += LANES) {
          const Vector x = load(weight + j) * (load(slope + j) - delta);
          store(slope + j, x);
          store(grad_bias + i * columns + j, load(grad_bias + i * columns + j) + x);
        }
      }
      multiply<1, kScoreRow>(N, wide, N, weights, g, kHeadRow, grads, kHeadRow);
      scatter<T>(call, window, grads, v, nullptr, 1.0f, 2 * C + first, wide);
      multiply<1, kScoreRow>(N, wide, N, slopes, q, kHeadRow, grads, kHeadRow);
      scatter<T>(call, window, grads, k, cosine ? k_inverse : nullptr, factor, C + first, wide);
      multiply<kScoreRow, 1>(N, wide, N, slopes, k, kHeadRow, grads, kHeadRow);
      call.grad_scale[unit] +=
          call.scale * scatter<T>(call, window, grads, q, cosine ? q_inverse : nullptr, factor, first, wide);
    }
  }
}

}  // namespace SET
}  // namespace swin
