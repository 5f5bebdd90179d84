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
