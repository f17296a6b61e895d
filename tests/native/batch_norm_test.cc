// The four stages against a plain loop in double, over shapes, dtypes, weights and activations.
// Run by `make sanitize`; exits with 1 after naming each case that is off.
#include "stages/batch_norm.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "system/cache.h"
#include "system/parallel.h"

using namespace batchnorm;

namespace {

int failures = 0;

// A tensor in the storage type under test, and what it holds as doubles. Its memory is allocated to
// the byte, so that a sanitizer sees every read or write beyond it.
struct Tensor {
  Dtype dtype;
  int64_t size;
  char* bytes;

  Tensor(Dtype d, int64_t n)
      : dtype(d), size(n), bytes(static_cast<char*>(std::malloc(n * width() + 1))) {}
  ~Tensor() { std::free(bytes); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int64_t width() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
  void set(int64_t i, double value) {
    const float f = static_cast<float>(value);
    if (dtype == Dtype::float64) std::memcpy(bytes + 8 * i, &value, 8);
    if (dtype == Dtype::float32) std::memcpy(bytes + 4 * i, &f, 4);
    if (dtype == Dtype::bfloat16) {
      uint32_t u;
      std::memcpy(&u, &f, 4);
      const uint16_t h = static_cast<uint16_t>(u >> 16);
      std::memcpy(bytes + 2 * i, &h, 2);
    }
    if (dtype == Dtype::float16) {
      // Values here are normal halves: 11 bits are kept by rounding to a multiple of their spacing.
      int exponent;
      const double mantissa = std::frexp(value, &exponent);
      uint16_t h = 0;
      if (value != 0) {
        int m = static_cast<int>(std::nearbyint(std::fabs(mantissa) * 2048));
        if (m == 2048) m = 1024, ++exponent;
        h = static_cast<uint16_t>(((exponent + 14) << 10) | (m - 1024));
      }
      if (value < 0) h |= 0x8000;
      std::memcpy(bytes + 2 * i, &h, 2);
    }
  }
  double get(int64_t i) const {
    if (dtype == Dtype::float64) {
      double d;
      std::memcpy(&d, bytes + 8 * i, 8);
      return d;
    }
    if (dtype == Dtype::float32) {
      float f;
      std::memcpy(&f, bytes + 4 * i, 4);
      return f;
    }
    uint16_t h;
    std::memcpy(&h, bytes + 2 * i, 2);
    if (dtype == Dtype::bfloat16) {
      const uint32_t u = static_cast<uint32_t>(h) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    }
    const int exponent = (h >> 10) & 31;
    const double magnitude =
        exponent == 0 ? std::ldexp(h & 1023, -24) : std::ldexp(1024 + (h & 1023), exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
  }
};

// One unit in the last place of the storage type, relative.
double epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 1e-12;
    case Dtype::float32:
      return 2e-6;
    case Dtype::float16:
      return 1e-3;
    default:
      return 8e-3;
  }
}

void expect(const std::string& what, double got, double wanted, double tolerance) {
  if (std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
  std::printf("%s: got %.9g, wanted %.9g\n", what.c_str(), got, wanted);
  ++failures;
}

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
double act(double z, Activation a) {
  if (a == Activation::relu) return z <= 0 ? 0 : z;
  return a == Activation::silu ? z * sigmoid(z) : z;
}
double slope(double z, Activation a) {
  if (a == Activation::relu) return z <= 0 ? 0 : 1;
  return a == Activation::silu ? sigmoid(z) * (1 + z * (1 - sigmoid(z))) : 1;
}

void check(const Shape& shape, Dtype dtype, Activation activation, int64_t weight_channels,
           bool with_residual, bool one_call) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const int64_t n = shape.size(), C = shape.channels;
  Tensor x(dtype, n), residual(dtype, n), dy(dtype, n), y(dtype, n), dx(dtype, n), dr(dtype, n);
  for (int64_t i = 0; i < n; ++i) {
    x.set(i, 0.5 + normal(random));
    residual.set(i, normal(random));
    dy.set(i, normal(random));
  }
  Tensor weights(dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32,
                 shape.outer * weight_channels * shape.inner);
  for (int64_t i = 0; i < weights.size; ++i) {
    weights.set(i, random() % 3 == 0 ? 0 : (random() % 4) * 0.5);
  }
  std::vector<double> scale(C), bias(C), count(C), mean(C), var(C), sum_g(C), sum_g_xhat(C);
  for (int64_t c = 0; c < C; ++c) {
    scale[c] = c % 5 == 1 ? 0 : 1 + 0.1 * normal(random);
    bias[c] = normal(random);
  }

  const Problem problem = {shape,
                           dtype,
                           activation,
                           1e-3,
                           x.bytes,
                           with_residual ? residual.bytes : nullptr,
                           scale.data(),
                           bias.data(),
                           weight_channels ? weights.bytes : nullptr,
                           weight_channels,
                           nullptr};
  const NewStatistics found = {count.data(), mean.data(), var.data()};
  const Statistics by = {count.data(), mean.data(), var.data()};
  const double of_another = one_call ? 0 : 1;
  if (one_call) {
    batch_norm(problem, found, y.bytes);
    batch_norm_gradients(problem, by, dy.bytes, sum_g.data(), sum_g_xhat.data(), dx.bytes,
                         dr.bytes);
  } else {
    statistics(problem, found);
    normalize(problem, by, y.bytes);
    gradient_sums(problem, by, dy.bytes, sum_g.data(), sum_g_xhat.data());
    // Beside another device, whose scale is larger by 1 and whose gradients are as large.
    std::vector<double> scaled_g(C), scaled_g_xhat(C);
    for (int64_t c = 0; c < C; ++c) {
      scaled_g[c] = (scale[c] + of_another) * sum_g[c];
      scaled_g_xhat[c] = (scale[c] + of_another) * sum_g_xhat[c];
    }
    input_gradient(problem, by, scaled_g.data(), scaled_g_xhat.data(), dy.bytes, dx.bytes,
                   dr.bytes);
  }

  const std::string name =
      "[" + std::to_string(shape.outer) + ", " + std::to_string(C) + ", " +
      std::to_string(shape.inner) + "] dtype " + std::to_string(static_cast<int>(dtype)) +
      " activation " + std::to_string(static_cast<int>(activation)) + " weights " +
      std::to_string(weight_channels) + " threads " + std::to_string(num_threads()) + " " +
      instruction_set() + " cache " + std::to_string(last_level_cache_bytes()) + " ";
  const double tolerance = epsilon(dtype);
  const double sum_tolerance = dtype == Dtype::float64 ? 1e-12 : 2e-6;
  for (int64_t c = 0; c < C; ++c) {
    const auto each = [&](auto body) {
      for (int64_t o = 0; o < shape.outer; ++o) {
        for (int64_t i = 0; i < shape.inner; ++i) {
          const int64_t wc = weight_channels == 1 ? 0 : c;
          body((o * C + c) * shape.inner + i,
               weight_channels ? weights.get((o * weight_channels + wc) * shape.inner + i) : 1.0);
        }
      }
    };
    double m = 0, first = 0, second = 0;
    each([&](int64_t i, double w) { m += w, first += w * x.get(i); });
    const double average = m > 0 ? first / m : 0;
    each([&](int64_t i, double w) { second += w * (x.get(i) - average) * (x.get(i) - average); });
    const double variance = m > 0 ? second / m : 0;
    const double rstd = 1 / std::sqrt(variance + problem.eps);
    expect(name + "count", count[c], m, 1e-12);
    expect(name + "mean", mean[c], average, sum_tolerance);
    expect(name + "var", var[c], variance, sum_tolerance);

    double total_g = 0, total_g_xhat = 0, magnitude = 1;
    const auto z_of = [&](int64_t i) {
      return (x.get(i) - average) * rstd * scale[c] + bias[c] +
             (with_residual ? residual.get(i) : 0);
    };
    each([&](int64_t i, double) {
      const double g = dy.get(i) * slope(z_of(i), activation);
      total_g += g;
      total_g_xhat += g * (x.get(i) - average) * rstd;
      magnitude += std::fabs(g * (x.get(i) - average) * rstd);
    });
    expect(name + "sum_g", sum_g[c], total_g, sum_tolerance * magnitude);
    expect(name + "sum_g_xhat", sum_g_xhat[c], total_g_xhat, sum_tolerance * magnitude);
    each([&](int64_t i, double w) {
      const double z = z_of(i), xhat = (x.get(i) - average) * rstd;
      const double g = dy.get(i) * slope(z, activation);
      const double share = m > 0 ? w / m * (total_g + xhat * total_g_xhat) : 0;
      const bool at_kink = activation == Activation::relu && std::fabs(z) < 1e-4;
      expect(name + "y", y.get(i), act(z, activation), tolerance * (1 + std::fabs(z)));
      if (at_kink) return;
      expect(name + "dx", dx.get(i), rstd * (scale[c] * g - (scale[c] + of_another) * share),
             tolerance * (2 + std::fabs(xhat)) * rstd);
      expect(name + "dresidual", dr.get(i), g, tolerance);
    });
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1},      {7, 5, 1},      {3, 2, 4},     {130, 3, 1},   {65, 17, 1},
                          {9, 130, 1},    {4, 2100, 1},   {3, 4, 49},    {20, 3, 70},   {2, 3, 700},
                          {1, 1, 9999},   {1, 3, 70001},  {4096, 40, 1}, {40, 33, 100}, {0, 3, 2},
                          {12, 250, 200}, {1, 1, 140001}, {2, 2100, 32}};
  const int64_t cache = last_level_cache_bytes();
  for (const char* level : instruction_sets()) {
    set_instruction_set(level);
    // A cache of 2 MB holds blocks of channels of the last shape, but not that; one of none,
    // nothing.
    for (const int64_t bytes : {cache, int64_t{2} << 20, int64_t{0}}) {
      const bool large = bytes != cache;
      set_last_level_cache_bytes(bytes);
      set_num_threads(large ? 3 : 1);
      for (const Shape& shape : shapes) {
        for (int d = 0; d < 4; ++d) {
          for (int a = 0; a < 3; ++a) {
            for (const int64_t weight_channels : {int64_t{0}, int64_t{1}, shape.channels}) {
              if (shape.size() > 50000 && (a > 0 || d > 1)) continue;
              check(shape, static_cast<Dtype>(d), static_cast<Activation>(a), weight_channels,
                    a != 1, large);
            }
          }
        }
      }
    }
    std::printf("%s: %d values off\n", level, failures);
  }
  return failures != 0;
}
