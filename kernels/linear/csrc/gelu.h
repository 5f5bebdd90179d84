// GELU and its slope, to about 3e-7, of a large x to 3e-7 times x; and GELU for results in bfloat16. No include guard, as of vector.h.

// One half plus c p(c^2) / q(c^2), c being x between -end and end: what goes from 0, far on the left, to 1. It is 0 left
// of -end. NaN stays NaN. Coefficients are those of the highest power first.
inline Vector from_zero_to_one(Vector x, float end, const float (&p)[6], const float (&q)[6]) {
  Vector c = x < -end ? all(-end) : x;
  c = c > end ? all(end) : c;
  const Vector u = c * c;
  Vector above = all(p[0]), below = all(q[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) {
    above = above * u + p[i];
    below = below * u + q[i];
  }
  const Vector y = 0.5f + c * above / below;
  return x < -end ? Vector{} : y;
}

// x times the normal distribution's share below it, (1 + erf(x / sqrt 2)) / 2, which is fitted to 2e-8.
inline Vector gelu(Vector x) {
  constexpr float p[] = {2.28315824e-08f, 6.29903987e-06f, 0.000165212396f,
                         0.00465524057f,  0.0335286032f,   0.398942274f};
  constexpr float q[] = {1.19593965e-06f, 7.23357811e-05f, 0.00186428062f, 0.028454699f, 0.250710136f, 1.0f};
  return x * from_zero_to_one(x, 5.5154329f, p, q);
}

// GELU to 1e-5, whatever its size, by half the instructions: x / 2 and an even function, which is |x| / 2 but for a polynomial below 4.6.
inline Vector gelu_for_bfloats(Vector x) {
  constexpr float p[] = {-0.00196109393f, 0.00566761202f, -0.00762607157f, 0.0108733825f, -0.0191551173f,
                         0.0295638166f,   -0.0405855922f, 0.0541317166f,   -0.0757574589f, 0.153543545f};
  constexpr float kEnd = 4.6f;
  const Vector u = x * x, v = u * (2 / (kEnd * kEnd)) - 1.0f, half = x * 0.5f;  // v: from -1 to 1
  Vector y = all(p[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 10; ++i) y = y * v + p[i];
  return half + (u < kEnd * kEnd ? u * y : half < 0.0f ? -half : half);
}

// That share plus x times the normal density, fitted to 1.1e-7; NaN of what is infinite, as in PyTorch.
inline Vector gelu_slope(Vector x) {
  constexpr float p[] = {1.9216728e-07f, 3.5899287e-05f, 1.9751302e-05f, 0.014226069f, -0.03097536f, 0.79788536f};
  constexpr float q[] = {8.928171e-06f, 0.0001920518f, 0.0035226375f, 0.04098374f, 0.29451957f, 1.0f};
  return from_zero_to_one(x, 5.6f, p, q) + x * 0.0f;
}
