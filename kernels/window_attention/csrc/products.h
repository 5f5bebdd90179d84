// Small products of matrices whose rows lie anywhere. Row r of the left one has its term k at r * A_ROW + k * A_TERM:
// constants, so that one address serves all rows. No include guard, as of vector.h. Needs ROWS, those of a tile.

// c (R x C vectors) = a b over K terms.
template <int64_t A_ROW, int64_t A_TERM, int R, int C>
inline void multiply_tile(const float* a, const float* b, int64_t b_row, int64_t K, float* c, int64_t c_row) {
  Vector total[R][C] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k, b += b_row) {  // unrolled: counting costs as much as several products
    Vector y[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) y[j] = load(b + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add_products(r, total[r], a + r * A_ROW + k * A_TERM, y);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(c + r * c_row + j * LANES, total[r][j]);
}

template <int64_t A_ROW, int64_t A_TERM, int R>
inline void multiply_rows(const float* a, const float* b, int64_t b_row, int64_t K, float* c, int64_t c_row,
                          int64_t columns) {
  int64_t j = 0;
  for (; j + 2 * LANES <= columns; j += 2 * LANES)
    multiply_tile<A_ROW, A_TERM, R, 2>(a, b + j, b_row, K, c + j, c_row);
  if (j < columns) multiply_tile<A_ROW, A_TERM, R, 1>(a, b + j, b_row, K, c + j, c_row);
}

// The same of at most R rows.
template <int64_t A_ROW, int64_t A_TERM, int R = ROWS>
inline void multiply_rows_of(int64_t rows, const float* a, const float* b, int64_t b_row, int64_t K, float* c,
                             int64_t c_row, int64_t columns) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_rows<A_ROW, A_TERM, R>(a, b, b_row, K, c, c_row, columns);
    else
      multiply_rows_of<A_ROW, A_TERM, R - 1>(rows, a, b, b_row, K, c, c_row, columns);
  }
}

// c (rows x columns) = a b over K terms; columns are whole vectors.
template <int64_t A_ROW, int64_t A_TERM>
inline void multiply(int64_t rows, int64_t columns, int64_t K, const float* a, const float* b, int64_t b_row, float* c,
                     int64_t c_row) {
  for (int64_t i = 0; i < rows; i += ROWS)
    multiply_rows_of<A_ROW, A_TERM>(rows - i < ROWS ? rows - i : ROWS, a + i * A_ROW, b, b_row, K, c + i * c_row, c_row,
                                    columns);
}
