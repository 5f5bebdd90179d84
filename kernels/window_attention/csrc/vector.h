// Vectors of LANES floats, by the compiler's own types: the same source serves every instruction set. No include guard:
// each instruction set includes it anew, in its own namespace, after the headers that all of them share.

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(LANES * sizeof(float))));

inline Vector load(const float* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vector x) { __builtin_memcpy(to, &x, sizeof x); }

inline Vector all(float x) { return Vector{} + x; }

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

inline float largest(Vector x) {
  float highest = x[0];
  for (int i = 1; i < LANES; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

inline float sum(Vector x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// exp(x) for x <= 0, to 2e-7; 0 below -86, where floats end; NaN stays NaN.
// x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; exp(r) is its Taylor polynomial, 2^n an addition to the exponent.
inline Vector exponential(Vector x) {
  const Vector bounded = larger(x, all(-86.0f));
  const Vector shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits hold n
  const Vector n = shifted - 12582912.0f;
  const Vector r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  Vector y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Bits bits, power;
  __builtin_memcpy(&bits, &y, sizeof bits);
  __builtin_memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  __builtin_memcpy(&y, &bits, sizeof y);
  return x < -86.0f ? Vector{} : (x == x ? y : x);
}

// c (R x C vectors) = a b over K terms; row r of a has its term k at r * a_row + k * a_term.
template <int R, int C>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_term, const float* b, int64_t b_row, int64_t K,
                          float* c, int64_t c_row) {
  Vector total[R][C] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector y[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) y[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = all(a[r * a_row + k * a_term]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) total[r][j] += x * y[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(c + r * c_row + j * LANES, total[r][j]);
}

template <int R>
inline void multiply_rows(const float* a, int64_t a_row, int64_t a_term, const float* b, int64_t b_row, int64_t K,
                          float* c, int64_t c_row, int64_t columns) {
  int64_t j = 0;
  for (; j + 2 * LANES <= columns; j += 2 * LANES)
    multiply_tile<R, 2>(a, a_row, a_term, b + j, b_row, K, c + j, c_row);
  if (j < columns) multiply_tile<R, 1>(a, a_row, a_term, b + j, b_row, K, c + j, c_row);
}

// The last rows, fewer than ROWS.
template <int R>
inline void multiply_rest(int64_t rows, const float* a, int64_t a_row, int64_t a_term, const float* b, int64_t b_row,
                          int64_t K, float* c, int64_t c_row, int64_t columns) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_rows<R>(a, a_row, a_term, b, b_row, K, c, c_row, columns);
    else
      multiply_rest<R - 1>(rows, a, a_row, a_term, b, b_row, K, c, c_row, columns);
  }
}

// c (rows x columns) = a b over K terms; columns are whole vectors.
inline void multiply(int64_t rows, int64_t columns, int64_t K, const float* a, int64_t a_row, int64_t a_term,
                     const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    multiply_rows<ROWS>(a + i * a_row, a_row, a_term, b, b_row, K, c + i * c_row, c_row, columns);
  multiply_rest<ROWS - 1>(rows - i, a + i * a_row, a_row, a_term, b, b_row, K, c + i * c_row, c_row, columns);
}
