// Tiles for AMX's registers, and their products: registers 0 to 3 hold sums, of the upper 16 rows both halves of the columns,
// then of the lower ones. Needs store_pairs(x, y, row), which stores 32 terms of a row, and multiply_block<H, EXCHANGED>(a, b,
// next, step), which adds a block's products, of H halves of the rows, and calls `step` kSteps times. No include guard, as of
// vector.h.

// f of some columns of rows, as so many terms of their tiles, which are `size` apart. f(x, row, column, count) gets up to
// a vector's numbers of a row, zeros after them.
template <typename T, typename F>
inline void pack_tiles(int64_t first, int64_t last, int64_t columns, const T* from, int64_t from_row, float* tiles,
                       int64_t size, F f) {
  from += first * from_row;
  for (int64_t i = first; i < last; ++i, from += from_row) {
    float* row = tiles + i / TILE * size + i % TILE * LANES;
    for (int64_t k = 0; k < columns; k += kTermsOfBlock, row += kBlock) {
      const auto numbers = [&](int64_t t) {
        const int64_t count = columns - t < LANES ? columns - t : LANES;
        return count > 0 ? f(load_some(from + t, count), i, t, count) : Vector{};
      };
      store_pairs(numbers(k), numbers(k + LANES), row);
    }
  }
}

// Brings cache lines nearer, a few at each step: those of c, to be written, and those ahead.
class Fetch {
 public:
  Fetch(float* c, int64_t c_row, int64_t rows, const Panel& panel)
      : c_(c), c_row_(c_row), rows_(rows), ahead_(panel.ahead), lines_(panel.lines),
        share_((panel.lines + steps_of(panel.terms) - 1) / steps_of(panel.terms)) {}

  void step() {
    for (int64_t i = 0; i < 4 && rows_ > 0; ++i, --rows_, c_ += c_row_) {
      __builtin_prefetch(c_, 1);
      __builtin_prefetch(c_ + kLine, 1);
    }
    for (int64_t i = 0; i < share_ && lines_ > 0; ++i, --lines_, ahead_ += kLine) __builtin_prefetch(ahead_, 0, 2);
  }

 private:
  float* c_;
  int64_t c_row_, rows_;
  const float* ahead_;
  int64_t lines_, share_;
};

// c (16 H x kPanel) = start + a panel; start null for zeros, start_row 0 for a row that serves all. c may be start.
template <int H, bool EXCHANGED, typename Beside>
inline void multiply_panel(const float* a, const Panel& panel, const float* start, int64_t start_row, float* c,
                           int64_t c_row, Beside& beside) {
  static constexpr float kZeros[kPanel] = {};
  if (!start) {
    start = kZeros;
    start_row = 0;
  }
  load_register<0>(start, start_row);
  load_register<1>(start + LANES, start_row);
  if constexpr (H == 2) {
    load_register<2>(start + LANES * start_row, start_row);
    load_register<3>(start + LANES * start_row + LANES, start_row);
  }
  Fetch fetch(c, c_row, LANES * H, panel);
  const float* b = panel.data;
  for (int64_t k = 0; k < panel.terms; k += kTermsOfBlock, a += kBlock, b += kBlock) {
    const Next next{a + kBlock, b + kBlock};
    const auto step = [&] {
      fetch.step();
      beside.step();
    };
    multiply_block<H, EXCHANGED>(a, b, next, step);
  }
  store_register<0>(c, c_row);
  store_register<1>(c + LANES, c_row);
  if constexpr (H == 2) {
    store_register<2>(c + LANES * c_row, c_row);
    store_register<3>(c + LANES * c_row + LANES, c_row);
  }
}

// The same of some rows of a tile.
template <typename Beside>
inline void multiply_panel_of(int64_t rows, const float* tile, const Panel& panel, const float* start, int64_t start_row,
                              float* c, int64_t c_row, Beside& beside) {
  const auto all_rows = panel.exchanged ? multiply_panel<2, true, Beside> : multiply_panel<2, false, Beside>;
  const auto half = panel.exchanged ? multiply_panel<1, true, Beside> : multiply_panel<1, false, Beside>;
  const auto multiply = rows > LANES ? all_rows : half;
  if (rows % LANES == 0) return multiply(tile, panel, start, start_row, c, c_row, beside);
  float whole[TILE * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    __builtin_memcpy(whole + r * kPanel, start + r * start_row, kPanel * sizeof(float));
  multiply(tile, panel, whole, kPanel, whole, kPanel, beside);
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(c + r * c_row, whole + r * kPanel, kPanel * sizeof(float));
}

// A work's run with the tile registers set up.
template <auto RUN, typename Work, typename... Share>
void with_registers(const Work& work, Share... share) {
  Registers registers;
  RUN(work, share...);
}
