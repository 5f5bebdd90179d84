// Products of matrices, the right one in panels: kPanel columns each, of a panel all terms, of a term its columns, zeros
// beyond the last. No include guard, as of vector.h. Needs TILE, the rows whose sums the registers hold.

constexpr int64_t kPanel = 2 * LANES;
constexpr int64_t kTerms = 1024;  // of a panel at once

// A panel of b, whose term k and column j lie at k * b_term + j * b_column.
inline void pack_panel(const float* b, int64_t b_term, int64_t b_column, int64_t terms, int64_t columns, float* panel) {
  if (b_column == 1 && columns == kPanel) {
    for (int64_t k = 0; k < terms; ++k, panel += kPanel) {
      store(panel, load(b + k * b_term));
      store(panel + LANES, load(b + k * b_term + LANES));
    }
    return;
  }
  if (b_term == 1)
    transpose(b, b_column, columns, terms, panel, kPanel);
  else
    for (int64_t k = 0; k < terms; ++k)
      for (int64_t j = 0; j < columns; ++j) panel[k * kPanel + j] = b[k * b_term + j * b_column];
  for (int64_t k = 0; columns < kPanel && k < terms; ++k)
    for (int64_t j = columns; j < kPanel; ++j) panel[k * kPanel + j] = 0;
}

// c (R x kPanel) = start + a panel; start null for zeros, start_row 0 for a row that serves all. c may be start.
template <int R>
inline void multiply_panel(const float* a, int64_t a_row, int64_t a_term, const float* panel, int64_t terms,
                           const float* start, int64_t start_row, float* c, int64_t c_row) {
  Vector total[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) total[r][j] = start ? load(start + r * start_row + j * LANES) : Vector{};
  for (int64_t k = 0; k < terms; ++k, panel += kPanel) {
    const Vector left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = all(a[r * a_row + k * a_term]);
      total[r][0] += x * left;
      total[r][1] += x * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(c + r * c_row + j * LANES, total[r][j]);
}

// The same of at most R rows.
template <int R>
inline void multiply_panel_of(int64_t rows, const float* a, int64_t a_row, int64_t a_term, const float* panel,
                              int64_t terms, const float* start, int64_t start_row, float* c, int64_t c_row) {
  if (rows == R)
    multiply_panel<R>(a, a_row, a_term, panel, terms, start, start_row, c, c_row);
  else if constexpr (R > 1)
    multiply_panel_of<R - 1>(rows, a, a_row, a_term, panel, terms, start, start_row, c, c_row);
}

// The same, of which only so many columns exist, in start and in c.
inline void multiply_some(int64_t rows, int64_t columns, const float* a, int64_t a_row, int64_t a_term,
                          const float* panel, int64_t terms, const float* start, int64_t start_row, float* c,
                          int64_t c_row) {
  if (columns == kPanel) {
    multiply_panel_of<TILE>(rows, a, a_row, a_term, panel, terms, start, start_row, c, c_row);
    return;
  }
  float whole[TILE * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) whole[r * kPanel + j] = start[r * start_row + j];
  multiply_panel_of<TILE>(rows, a, a_row, a_term, panel, terms, whole, kPanel, whole, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * c_row + j] = whole[r * kPanel + j];
}

// The same of any number of rows, tile by tile.
inline void multiply_rows(int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* panel, int64_t terms,
                          const float* start, int64_t start_row, float* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i += TILE)
    multiply_some(rows - i < TILE ? rows - i : TILE, columns, a + i * a_row, a_row, 1, panel, terms,
                  start ? start + i * start_row : nullptr, start_row, c + i * c_row, c_row);
}

// c (rows x N) = a (rows x K) b + bias, b packed. finish(n, columns) follows once columns from n on are whole.
template <typename Finish>
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, int64_t a_row, const float* packed,
                            const float* bias, float* c, int64_t c_row, Finish finish) {
  for (int64_t k = 0; k < K; k += kTerms) {
    const int64_t terms = K - k < kTerms ? K - k : kTerms;
    for (int64_t n = 0; n < N; n += kPanel) {
      const int64_t columns = N - n < kPanel ? N - n : kPanel;
      multiply_rows(rows, columns, a + k, a_row, packed + n * K + k * kPanel, terms, k ? c + n : bias ? bias + n : nullptr,
                    k ? c_row : 0, c + n, c_row);
      if (k + terms == K) finish(n, columns);
    }
  }
}
