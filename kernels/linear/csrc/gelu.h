// GELU, exact, and its slope, to about 3e-7. No include guard, as of vector.h.

// The normal distribution's share below x, (1 + erf(x / sqrt 2)) / 2: one half plus x times a ratio of polynomials of x^2,
// fitted to 2e-8; 0 where that ends. NaN stays NaN.
inline Vector share(Vector x) {
  constexpr float kEnd = 5.5154329f;
  Vector c = x < -kEnd ? all(-kEnd) : x;
  c = c > kEnd ? all(kEnd) : c;
  const Vector u = c * c;
  Vector p = u * 2.28315824e-08f + 6.29903987e-06f;
  Vector q = u * 1.19593965e-06f + 7.23357811e-05f;
  p = p * u + 0.000165212396f;
  q = q * u + 0.00186428062f;
  p = p * u + 0.00465524057f;
  q = q * u + 0.028454699f;
  p = p * u + 0.0335286032f;
  q = q * u + 0.250710136f;
  p = p * u + 0.398942274f;
  q = q * u + 1.0f;
  const Vector y = 0.5f + c * p / q;
  return x < -kEnd ? Vector{} : y;
}

inline Vector gelu(Vector x) { return x * share(x); }

inline Vector gelu_slope(Vector x) { return share(x) + x * exponential(-0.5f * x * x) * 0.398942280f; }
