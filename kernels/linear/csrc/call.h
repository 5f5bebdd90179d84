// The work of linear layers on a CPU, behind plain pointers, and the code of each instruction set that does it. Numbers are
// floats; those behind void pointers are bfloat16 where the code takes that. All matrices are row by row. A packed matrix is in panels: see panels.h. One in strips has all rows of
// the first kPanel columns, then those of the next, so that what is computed strip by strip lies so in memory.
// The last strip is as wide as the others; what it has beyond the last column means nothing.

#pragma once

#include <cstdint>

#include "units.h"

namespace swin {

// b (K x N) by its strides, into panels.
struct Packing {
  const float* b;
  int64_t b_term, b_column, K, N;
  float* packed;
};

// Layer norm of the rows of a left matrix before it is multiplied; none where weight is null.
struct Norm {
  const float *weight, *bias;  // as many as a row has
  float eps;
};

// c (M x N) = a (M x K) b + bias + added.
struct Product {
  const void* a;
  const float* b;     // packed
  const float* bias;  // N, or null
  void* c;
  int64_t M, N, K, blocks;  // of rows
  Norm norm;          // of a
  const void* added;  // M x N, or null
};

// The same of few rows: a panel of b serves all of them while the cache holds it, and is packed only then.
// With gelu_of what GELU makes of c, M x N, where bfloat16 are taken instead of c; with slope_of, M x N in strips, c times GELU's slope there.
struct FewRows {
  const void* a;
  const float* b;          // by its strides; packed before where b_term is 0
  int64_t b_term, b_column;
  const float* bias;       // N, or null
  void* c;
  bool c_in_strips;        // of floats
  void* gelu_of;           // or null; may be c
  const float* slope_of;   // or null
  int64_t M, N, K;
  Norm norm;               // of a
  const void* added;       // M x N, to c; or null
};

// An MLP of C, H and C_out channels: a = gelu(x w1 + b1), y = a w2 + b2. A block's a stays in the cache.
struct Mlp {
  const void* x;          // M x C
  const float *w1, *w2;   // packed
  const float *b1, *b2;   // or null
  float* h;               // M x H in strips, of this instruction set: what gelu is of; or null
  void* y;                // M x C_out
  int64_t M, C, H, C_out, blocks;
  Norm norm;              // of x
  bool residual;          // adds x to y
};

// What its gradient grad (M x C_out) is before gelu and before the first product.
struct MlpGradient {
  const float* grad;
  const float* h;        // in strips, some rows of h_rows
  const float *w1, *w2;  // packed, as grad w2 and grad_h w1 take them
  float* grad_h;         // M x H in strips; of few rows row by row
  float* grad_x;         // M x C, or null
  int64_t M, C, H, C_out, blocks, h_rows;
};

// c (N x K) = a^T b, b or gelu(b), and sums of the columns of both: the gradients of a weight and a bias, by the
// layer's gradient and input. Over parts of the rows, part by part, so that threads make no difference. exchanged: with the
// same bits as b^T a has at the places across.
struct WeightGradient {
  const float* a;  // M x N
  const float* b;  // M x K; in strips, some rows of b_rows
  bool b_in_strips, gelu_b, c_in_strips, exchanged;
  float* c;        // parts, each N x K, c_size apart
  float* a_sums;   // parts, N
  float* b_sums;   // parts, K
  int64_t M, N, K, parts, groups, b_rows, c_size;  // groups of the K columns
};

// to = the sum of a matrix's parts, or its transpose.
struct Parts {
  const float* parts;  // count, each N x K in strips, `size` apart
  float* to;           // N x K, or K x N
  bool across;
  int64_t N, K, count, size;
};

// Units from begin to end, or those that the thread takes. Packing, FewRows: panels. Product, Mlp, MlpGradient: blocks of
// rows. WeightGradient: part * groups + group. Parts: strips. Of bfloat16 there is no backward pass, nor c_in_strips and h.
struct Code {
  int64_t lanes;  // numbers of a vector, or of a tile register; 0 where the compiler cannot make it
  int64_t panel;  // columns of a panel
  int64_t tile;   // rows of a tile
  int64_t (*panel_size)(int64_t terms);  // numbers' room
  void (*pack)(const Packing& work, int64_t begin, int64_t end);
  void (*product)(const Product& work, Units& units);
  void (*few_rows)(const FewRows& work, int64_t begin, int64_t end);
  void (*mlp)(const Mlp& work, Units& units);
  void (*mlp_gradient)(const MlpGradient& work, Units& units);
  void (*weight_gradient)(const WeightGradient& work, Units& units);
  void (*add_parts)(const Parts& work, int64_t begin, int64_t end);
};

// Each in a file of its own, compiled for that instruction set. Data alone: what asks the processor is compiled for any.
extern const Code kPlain, kAvx2, kAvx512, kAmx, kAmxBFloats;

}  // namespace swin
