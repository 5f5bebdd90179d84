// Packed matrices of processors whose tile registers multiply bfloat16 (AMX). A float is the sum of three bfloat16, and a
// product of two floats that of six products of them: of all but those that lie below its last digit. So sums are as exact
// as those of floats, and the six take less time than one in vectors. What is below 1.2e-38 counts as zero, a part or a
// product of parts, too.
//
// 32 terms of a panel, or of a tile, are a block: its numbers' first parts, then second, then third ones; of each two tile
// registers of 16 rows of 16 pairs. A panel's row holds a pair of terms of 16 columns, a tile's the pairs of one row. A
// pair is terms i and i + 16 of the block: what vectors hold side by side. Zeros are beyond the last term and column.
// No include guard, as of vector.h.

constexpr int64_t kTermsOfBlock = 32;
constexpr int64_t kTerms = 8 * kTermsOfBlock;  // of a panel at once
constexpr int64_t kNear = kTermsOfBlock;       // rows that are read together as terms
constexpr int64_t kPanel = 2 * LANES;
constexpr int64_t kRegister = LANES * LANES;   // floats' room of a tile register
constexpr int64_t kParts = 3, kPart = 2 * kRegister, kBlock = kParts * kPart;
static_assert(TILE == kPanel && LANES == 16);

// While tile registers are multiplied, 16 cycles each, vectors are free for other work, at half their rate.
constexpr bool kBeside = true;
constexpr int64_t kSteps = 6;  // of a block
constexpr int64_t steps_of(int64_t terms) { return (terms + kTermsOfBlock - 1) / kTermsOfBlock * kSteps; }

// Floats' room from a term of a panel, or of a tile, to a later one, both the first of their blocks.
constexpr int64_t panel_at(int64_t terms) { return terms / kTermsOfBlock * kBlock; }
constexpr int64_t tile_at(int64_t terms) { return panel_at(terms); }

constexpr int64_t panel_size(int64_t terms) { return panel_at(terms + kTermsOfBlock - 1); }
constexpr int64_t tile_size(int64_t terms) { return panel_size(terms); }

inline Bits bits_of(Vector x) {
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline Vector vector_of(Bits bits) {
  Vector x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The parts of x and y, in pairs, into a row of each part of a block. The first is cut off, the second rounded, so that what
// is left out of products has no direction; the third is the rest. Of what is infinite the others are NaN.
inline void store_pairs(Vector x, Vector y, float* row) {
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Bits))));
  constexpr int32_t kHigh = -65536;  // where the bits of a bfloat16 are in a float
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part, row += kPart) {
    const int32_t half = part == 1 ? 32768 : 0;
    const Bits of_x = (bits_of(x) + half) & kHigh, of_y = (bits_of(y) + half) & kHigh;
    store(row, vector_of(reinterpret_cast<Bits>(reinterpret_cast<Unsigned>(of_x) >> 16) | of_y));
    x -= vector_of(of_x);
    y -= vector_of(of_y);
  }
}

// The first numbers of a vector, zeros after them, or no number.
inline Vector load_up_to(const float* from, int64_t count) { return count > 0 ? load_some(from, count) : Vector{}; }

// f of some columns of rows, as so many terms of their tiles, which are `size` apart. f(x, row, column, count) gets up to
// a vector's numbers of a row, zeros after them.
template <typename F>
inline void pack_tiles(int64_t first, int64_t last, int64_t columns, const float* from, int64_t from_row, float* tiles,
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

// A block's 16 numbers of 32 rows, those of the rows and of the numbers exchanged, into a register of each part.
inline void store_transposed(Vector (&rows)[2 * LANES], float* to) {
  transpose_block(rows);
  transpose_block(rows + LANES);
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) store_pairs(rows[i], rows[i + LANES], to + i * LANES);
}

// f of a block's rows or fewer of some columns, as so many terms of a panel. Adds them to sums.
template <typename F>
inline void pack_terms(const float* from, int64_t row, int64_t terms, int64_t columns, float* panel, float* sums, F f) {
  for (int64_t j = 0; j < kPanel; j += LANES, panel += kRegister) {
    Vector of_x = {}, of_y = {};
    const auto pack = [&](auto numbers) __attribute__((always_inline)) {
      for (int64_t k = 0; k < LANES; ++k) {
        const Vector x = numbers(k), y = numbers(k + LANES);
        store_pairs(x, y, panel + k * LANES);
        of_x += x;
        of_y += y;
      }
    };
    if (terms == kTermsOfBlock && columns >= j + LANES)
      pack([&](int64_t k) { return f(load(from + k * row + j)); });
    else
      pack([&](int64_t k) { return k < terms ? f(load_up_to(from + k * row + j, columns - j)) : Vector{}; });
    store(sums + j, load(sums + j) + (of_x + of_y));
  }
}

constexpr int64_t kSums = TILE;                 // room for a sum of each row of a tile
constexpr int64_t kChunk = 16 * kTermsOfBlock;  // rows that are multiplied at once, for the gradient of a weight
constexpr int64_t kLeft = TILE;                 // columns of its left side, at once: Columns keeps those of one tile
constexpr int64_t kRowsOfStep = 4;              // of a register
constexpr int64_t kHalfSteps = 2 + LANES / kRowsOfStep, kColumnSteps = 2 * kHalfSteps;  // in which pack_columns is done

// What pack_columns keeps between its steps: 16 columns of a block as rows, half of the terms and then the others, and sums
// of the former.
struct Columns {
  Vector rows[2 * LANES], sum;
};

// A block's rows or fewer of some columns, as so many terms of a tile, whose rows the columns are. Adds them to sums.
inline void pack_columns(Columns& kept, int64_t step, const float* from, int64_t row, int64_t terms, int64_t columns,
                         float* tile, float* sums) {
  const int64_t n = step / kHalfSteps * LANES, stage = step % kHalfSteps;
  if (n >= columns) return;
  if (stage < 2) {
    Vector* rows = kept.rows + stage * LANES;
    const int64_t first = stage * LANES;
    if (terms >= first + LANES && columns >= n + LANES) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; ++k) rows[k] = load(from + (first + k) * row + n);
    } else {
      for (int64_t k = 0; k < LANES; ++k)
        rows[k] = first + k < terms ? load_up_to(from + (first + k) * row + n, columns - n) : Vector{};
    }
    Vector sum = {};
#pragma GCC unroll 16
    for (int64_t k = 0; k < LANES; ++k) sum += rows[k];
    if (stage == 0)
      kept.sum = sum;
    else
      store(sums + n, load(sums + n) + (kept.sum + sum));  // in the order of pack_terms
    transpose_block(rows);
    return;
  }
  const int64_t first = (stage - 2) * kRowsOfStep;
#pragma GCC unroll 8
  for (int64_t k = 2 * first; k < 2 * (first + kRowsOfStep); ++k)
    __builtin_prefetch(from + (kTermsOfBlock + k) * row + n);  // for the next block
#pragma GCC unroll 4
  for (int64_t i = first; i < first + kRowsOfStep; ++i)
    store_pairs(kept.rows[i], kept.rows[i + LANES], tile + (n + i) * LANES);
}

// A block of a panel, of some terms and columns that lie at column * b_column + term; ALL of them, or fewer.
template <bool ALL>
inline void pack_across(const float* b, int64_t b_column, int64_t terms, int64_t columns, float* block) {
  for (int64_t j = 0; j < kPanel; j += LANES, block += kRegister) {
    Vector rows[2 * LANES];
#pragma GCC unroll 32
    for (int64_t i = 0; i < 2 * LANES; ++i) {
      const int64_t column = j + i % LANES, term = i / LANES * LANES;
      const float* from = b + column * b_column + term;
      rows[i] = ALL ? load(from) : column < columns ? load_up_to(from, terms - term) : Vector{};
    }
    store_transposed(rows, block);
  }
}

// A panel of b, whose term k and column j lie at k * b_term + j * b_column.
inline void pack_panel(const float* b, int64_t b_term, int64_t b_column, int64_t terms, int64_t columns, float* panel) {
  for (int64_t k = 0; k < terms; k += kTermsOfBlock, b += kTermsOfBlock * b_term, panel += kBlock) {
    const int64_t some = terms - k < kTermsOfBlock ? terms - k : kTermsOfBlock;
    float sums[kPanel] = {};
    if (b_column == 1)
      pack_terms(b, b_term, some, columns, panel, sums, [](Vector x) { return x; });
    else if (some == kTermsOfBlock && columns == kPanel)
      pack_across<true>(b, b_column, some, columns, panel);
    else
      pack_across<false>(b, b_column, some, columns, panel);
  }
}

// The tile registers, set up for the time of a call: eight of 16 rows of 64 bytes. Then as they were, for other libraries.
class Registers {
 public:
  Registers() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Layout layout{};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      layout.bytes[i] = 64;
      layout.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  ~Registers() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      asm volatile("tilerelease");
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  struct Layout {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Layout before_;
};

template <int I>
inline void load_register(const float* from, int64_t row) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(I), "r"(from), "r"(row * sizeof(float)) : "memory");
}

template <int I>
inline void store_register(float* to, int64_t row) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(I), "r"(to), "r"(row * sizeof(float)) : "memory");
}

template <int C, int A, int B>
inline void multiply_registers() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The blocks that come next, brought into the first cache line by line: some after each of the 38 instructions of tile
// registers that a block takes. While another program runs on the core's sibling thread those that follow each other at
// once take 1.7 times as long, and cache lines come late; on a quiet core neither makes a difference.
struct Next {
  const float *a, *b;

  template <int INSTRUCTION>
  __attribute__((always_inline)) void fetch() const {
    constexpr int kAtOnce = 5, kFirst = INSTRUCTION * kAtOnce;
#pragma GCC unroll 5
    for (int line = kFirst; line < kFirst + kAtOnce; ++line)
      if (line / 2 * kLine < kBlock) __builtin_prefetch((line % 2 ? b : a) + line / 2 * kLine);
  }
};

// Registers 0 to 3 hold sums: of the upper 16 rows both halves of the columns, then of the lower ones. 4 and 5 hold a part
// of the left side, 6 and 7 one of the right side. Two halves of a part, or the first of H, as instructions from I on:
template <int REGISTER, int H, int I>
inline __attribute__((always_inline)) void load_halves(const float* part, const Next& next) {
  load_register<REGISTER>(part, LANES);
  next.fetch<I>();
  if constexpr (H == 2) load_register<REGISTER + 1>(part + kRegister, LANES);
  next.fetch<I + 1>();
}

// Another part of one side, and its products with what is there of the other, of H halves of the rows.
template <int H, int I>
inline __attribute__((always_inline)) void multiply_left(const float* part, const Next& next) {
  load_register<4>(part, LANES);
  next.fetch<I>();
  multiply_registers<0, 4, 6>();
  next.fetch<I + 1>();
  multiply_registers<1, 4, 7>();
  next.fetch<I + 2>();
  if constexpr (H == 2) load_register<5>(part + kRegister, LANES);
  next.fetch<I + 3>();
  if constexpr (H == 2) multiply_registers<2, 5, 6>();
  next.fetch<I + 4>();
  if constexpr (H == 2) multiply_registers<3, 5, 7>();
  next.fetch<I + 5>();
}

template <int H, int I>
inline __attribute__((always_inline)) void multiply_right(const float* part, const Next& next) {
  load_register<6>(part, LANES);
  next.fetch<I>();
  multiply_registers<0, 4, 6>();
  next.fetch<I + 1>();
  if constexpr (H == 2) multiply_registers<2, 5, 6>();
  next.fetch<I + 2>();
  load_register<7>(part + kRegister, LANES);
  next.fetch<I + 3>();
  multiply_registers<1, 4, 7>();
  next.fetch<I + 4>();
  if constexpr (H == 2) multiply_registers<3, 5, 7>();
  next.fetch<I + 5>();
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
    if constexpr (EXCHANGED) {
      load_halves<6, 2, 0>(b, next);
      multiply_left<H, 2>(a + 2 * kPart, next), step();
      multiply_left<H, 8>(a, next), step();
      multiply_left<H, 14>(a + kPart, next), step();
      multiply_right<H, 20>(b + kPart, next), step();
      multiply_left<H, 26>(a, next), step();
      multiply_right<H, 32>(b + 2 * kPart, next), step();
    } else {
      load_halves<4, H, 0>(a, next);
      multiply_right<H, 2>(b + 2 * kPart, next), step();
      multiply_right<H, 8>(b, next), step();
      multiply_right<H, 14>(b + kPart, next), step();
      multiply_left<H, 20>(a + kPart, next), step();
      multiply_right<H, 26>(b, next), step();
      multiply_left<H, 32>(a + 2 * kPart, next), step();
    }
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
