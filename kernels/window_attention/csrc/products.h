// Small products of matrices whose rows lie anywhere. No include guard, as of vector.h. Needs ROWS, those of a tile.

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
