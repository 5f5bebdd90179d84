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

inline Vector all(float x) { return x - Vector{}; }  // less zero is the same number: compilers drop it

// total += *x y, of row r of a product: its number x, and some vectors of the other side. Every other row's vectors of 16
// take the number from memory on their own: the compiler would load it once for them, one more instruction, which with
// another program on the core's sibling thread costs more; with all rows doing so the loads would. The others must be
// fused too, as the build's flags have it: which row a number is in must make no difference.
template <int C>
inline void add_products([[maybe_unused]] int r, Vector (&total)[C], const float* x, const Vector (&y)[C]) {
#if LANES == 16
  if (r % 2 == 0) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(total[j]) : "m"(*x), "v"(y[j]));
    return;
  }
#endif
  const Vector same = all(*x);
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) total[j] += same * y[j];
}

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

// One number of a vector's all, by exchanging ever smaller halves.
#ifdef __clang__  // it has no shuffles of vectors of any length
template <typename F>
inline float reduce(Vector x, F f) {
  for (int i = 1; i < LANES; ++i) x[0] = f(all(x[0]), all(x[i]))[0];
  return x[0];
}
#else
template <int32_t HALF = LANES / 2, typename F>
inline float reduce(Vector x, F f) {
  if constexpr (HALF == 0) {
    return x[0];
  } else {
    Bits other;
    for (int32_t i = 0; i < LANES; ++i) other[i] = i ^ HALF;
    return reduce<HALF / 2>(f(x, __builtin_shuffle(x, other)), f);
  }
}
#endif

inline float largest(Vector x) {
  return reduce(x, [](Vector a, Vector b) { return larger(a, b); });
}

inline float sum(Vector x) {
  return reduce(x, [](Vector a, Vector b) { return a + b; });
}

// exp(x) for x <= 0, to 2e-7; 0 below -87.7, near which normal floats end; NaN stays NaN.
// x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; of exp(r) a polynomial, fitted to 1e-7; times 2^n, by its exponent.
inline Vector exponential(Vector x) {
  const Vector bounded = larger(all(-88.0f), x);  // in this order NaN stays; n is -127 there, whose power is 0
  const Vector shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits hold n
  const Vector n = shifted - 12582912.0f;
  const Vector r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  Vector y = r * 0.008290306f + 0.041897975f;
  y = y * r + 0.16667637f;
  y = y * r + 0.4999915f;
  y = y * r + 0.9999997f;
  y = y * r + 1.0f;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vector power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return y * power;
}

// LANES x LANES numbers, rows to columns, by exchanging ever larger blocks of two rows.
#ifdef __clang__  // it has no shuffles of vectors of any length
inline void transpose_block(Vector* rows) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}
#else
template <int64_t HALF = 1>
inline void transpose_block(Vector* rows) {
  if constexpr (HALF < LANES) {
    Bits low, high;
    for (int32_t i = 0; i < LANES; ++i) {
      low[i] = i & HALF ? LANES + i - HALF : i;
      high[i] = i & HALF ? LANES + i : i + HALF;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) {
      if (i & HALF) continue;
      const Vector upper = rows[i], lower = rows[i + HALF];
      rows[i] = __builtin_shuffle(upper, lower, low);
      rows[i + HALF] = __builtin_shuffle(upper, lower, high);
    }
    transpose_block<HALF * 2>(rows);
  }
}
#endif

// to[d * to_row + j] = from[j * from_row + d], of count x width numbers.
inline void transpose(const float* from, int64_t from_row, int64_t count, int64_t width, float* to, int64_t to_row) {
  const int64_t blocks = width / LANES * LANES;
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES)
    for (int64_t d = 0; d < blocks; d += LANES) {
      Vector rows[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) rows[i] = load(from + (j + i) * from_row + d);
      transpose_block(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) store(to + (d + i) * to_row + j, rows[i]);
    }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = i < j ? blocks : 0; d < width; ++d) to[d * to_row + i] = from[i * from_row + d];
}
