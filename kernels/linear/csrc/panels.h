// Products of matrices, in the layout of an instruction set: the right one is packed in panels of kPanel columns each, the
// left one in tiles of TILE rows each, of a panel or tile all terms. No include guard, as of vector.h.

// The first numbers of a vector, zeros after them.
inline Vector load_some(const float* from, int64_t count) {
  Vector x = {};
  if (count >= LANES)
    x = load(from);
  else
    __builtin_memcpy(&x, from, count * sizeof(float));
  return x;
}

inline void store_some(float* to, Vector x, int64_t count) {
  if (count >= LANES)
    store(to, x);
  else
    __builtin_memcpy(to, &x, count * sizeof(float));
}

constexpr int64_t kLine = 16;  // floats of a cache line

// Some terms of a panel, and what may be brought into the second cache while it is multiplied: so many lines from there on.
struct Panel {
  const float* data;
  int64_t terms;
  const float* ahead;
  int64_t lines;
  bool exchanged;  // sums have the same bits as with the sides exchanged
};

// Work on some rows that goes on beside a product, a few of them at each of its steps.
template <typename F>
class Beside {
 public:
  Beside(const F& run, int64_t begin, int64_t end, int64_t steps)
      : run_(run), next_(begin), end_(end), share_(steps > 0 ? (end - begin + steps - 1) / steps : 0) {}

  void step() {
    if (next_ < end_) run_until(end_ - next_ < share_ ? end_ : next_ + share_);
  }
  void finish() {
    if (next_ < end_) run_until(end_);
  }

 private:
  __attribute__((noinline)) void run_until(int64_t last) {
    run_(next_, last);
    next_ = last;
  }

  const F& run_;
  int64_t next_, end_, share_;
};

struct Nothing {
  void step() {}
};

#include LAYOUT

constexpr int64_t tiles_size(int64_t rows, int64_t terms) { return (rows + TILE - 1) / TILE * tile_size(terms); }

// The same, of which only so many columns exist, in start and in c.
template <typename Beside>
inline void multiply_some(int64_t rows, int64_t columns, const float* tile, const Panel& panel, const float* start,
                          int64_t start_row, float* c, int64_t c_row, Beside& beside) {
  if (columns == kPanel) {
    multiply_panel_of(rows, tile, panel, start, start_row, c, c_row, beside);
    return;
  }
  float whole[TILE * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) whole[r * kPanel + j] = start[r * start_row + j];
  multiply_panel_of(rows, tile, panel, whole, kPanel, whole, kPanel, beside);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * c_row + j] = whole[r * kPanel + j];
}

// The same of any number of rows, in tiles that are `size` apart; each fetches its share of what is ahead.
template <typename Beside>
inline void multiply_tiles(int64_t rows, int64_t columns, const float* tiles, int64_t size, Panel panel,
                           const float* start, int64_t start_row, float* c, int64_t c_row, Beside& beside) {
  const int64_t share = panel.lines / ((rows + TILE - 1) / TILE);
  panel.lines = share;
  for (int64_t i = 0; i < rows; i += TILE, tiles += size, panel.ahead += share * kLine)
    multiply_some(rows - i < TILE ? rows - i : TILE, columns, tiles, panel, start ? start + i * start_row : nullptr,
                  start_row, c + i * c_row, c_row, beside);
}

// Some columns of a matrix, and from one of their rows to the next.
struct Strip {
  float* data;
  int64_t row;
};

// c (rows x N) = a (rows x K) b + bias, a in tiles, b packed, strip by strip of kPanel columns. to(n) says where that of
// columns from n on goes; after(n, columns, first, last) follows it, for these of its rows, maybe beside the next strip's
// product, but before the second next.
template <typename To, typename After>
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            To to, After after) {
  const int64_t steps = (rows + TILE - 1) / TILE * steps_of(K);
  for (int64_t n = 0; n < N; n += kPanel) {
    const auto before = [&](int64_t first, int64_t last) { after(n - kPanel, kPanel, first, last); };
    Beside<decltype(before)> beside{before, 0, kBeside && n > 0 ? rows : 0, steps};
    const int64_t columns = N - n < kPanel ? N - n : kPanel;
    const Strip c = to(n);
    for (int64_t k = 0; k < K; k += kTerms) {
      const int64_t terms = K - k < kTerms ? K - k : kTerms, size = panel_size(terms);
      const Panel panel{packed, terms, packed + size, size / kLine, false};  // what comes next, as large
      multiply_tiles(rows, columns, a + tile_at(k), tile_size(K), panel, k ? c.data : bias ? bias + n : nullptr,
                     k ? c.row : 0, c.data, c.row, beside);
      packed += size;
    }
    beside.finish();
    if (!kBeside || n + kPanel >= N) after(n, columns, int64_t{0}, rows);
  }
}

// The same, into a matrix.
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            float* c) {
  multiply_packed(rows, N, K, a, packed, bias, [&](int64_t n) { return Strip{c + n, N}; },
                  [](int64_t, int64_t, int64_t, int64_t) {});
}
