// AMX's tile registers, and what all packed matrices for them share. 32 terms of a panel, or of a tile of rows, are a block:
// registers of 16 rows of 16 pairs of bfloat16 each. A panel's row holds a pair of terms of 16 columns, a tile's the pairs
// of one row. Zeros are beyond the last term and column. What is below 1.2e-38 counts as zero, a product too.
// A number may be several such parts: a block then has all first parts, then all second ones. No include guard, as of
// vector.h. Needs kParts; kInstructions of tile registers for the products of a block; kSteps of work beside them.

constexpr int64_t kTermsOfBlock = 32;
constexpr int64_t kPanel = 2 * LANES;
constexpr int64_t kRegister = LANES * LANES;  // floats' room of a tile register
constexpr int64_t kPart = 2 * kRegister, kBlock = kParts * kPart;
static_assert(TILE == kPanel && LANES == 16);

// While tile registers are multiplied, 16 cycles each, vectors are free for other work, at half their rate.
constexpr bool kBeside = true;
constexpr int64_t steps_of(int64_t terms) { return (terms + kTermsOfBlock - 1) / kTermsOfBlock * kSteps; }

// Floats' room from a term of a panel, or of a tile, to a later one, both the first of their blocks.
constexpr int64_t panel_at(int64_t terms) { return terms / kTermsOfBlock * kBlock; }
constexpr int64_t tile_at(int64_t terms) { return panel_at(terms); }

constexpr int64_t panel_size(int64_t terms) { return panel_at(terms + kTermsOfBlock - 1); }
constexpr int64_t tile_size(int64_t terms) { return panel_size(terms); }

// The first numbers of a vector, zeros after them, or no number.
template <typename T>
inline Vector load_up_to(const T* from, int64_t count) {
  return count > 0 ? load_some(from, count) : Vector{};
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

// The blocks that come next, brought into the first cache line by line: some after each of the instructions of
// tile registers that a block takes. While another program runs on the core's sibling thread those that follow each other at
// once take 1.7 times as long, and cache lines come late; on a quiet core neither makes a difference.
struct Next {
  const float *a, *b;

  template <int INSTRUCTION>
  __attribute__((always_inline)) void fetch() const {
    constexpr int kAtOnce = 2 * kBlock / kLine / kInstructions, kFirst = INSTRUCTION * kAtOnce;
#pragma GCC unroll 8
    for (int line = kFirst; line < kFirst + kAtOnce; ++line)
      if (line / 2 * kLine < kBlock) __builtin_prefetch((line % 2 ? b : a) + line / 2 * kLine);
  }
};
