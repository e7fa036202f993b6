// The functions of utils/numerics/block.py for a CPU, with its notation and formulas. Each sweeps two or three times
// over an image that stays in the processor's cache, for the sums and then for the pixels. Images are channels-last, of
// 16 n channels.
//
// One thread takes one image and sums in a fixed order, so that results do not depend on the number of threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// --- Some channels of a pixel ----------------------------------------------------------------------------------------

// As many as a register holds in float32. With more, GCC keeps them in memory: up to five times slower with AVX2.
#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif

struct BFloat16 {
  uint16_t bits;
};

// The type of the arithmetic, and of numbers per channel or norm group, for images of type T.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;

template <class N>
struct Vector {
  typedef N type __attribute__((vector_size(LANES * sizeof(N))));
};
template <class N>
using Lanes = typename Vector<N>::type;

template <class T>
inline Lanes<Wide<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#ifdef __AVX512F__  // compilers make slow code of the general form
    const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
    Lanes<uint16_t> halves;
    std::memcpy(&halves, from, sizeof halves);  // a single load; the memory need not be aligned
    return reinterpret_cast<Lanes<float>>(__builtin_convertvector(halves, Lanes<uint32_t>) << 16);
#endif
  } else {
    Lanes<T> values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
}

template <class T>
inline void store(Lanes<Wide<T>> values, T* to) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // to the nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh(values);
#else
    const auto bits = reinterpret_cast<Lanes<uint32_t>>(values);
    const auto rounded = values == values ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    const auto halves = __builtin_convertvector(rounded >> 16, Lanes<uint16_t>);
#endif
    std::memcpy(to, &halves, sizeof halves);
  } else {
    std::memcpy(to, &values, sizeof values);
  }
}

// --- What Python hands over ------------------------------------------------------------------------------------------

struct Shape {
  int64_t images, height, width, channels, groups;
  double eps;
};

struct Tensor {
  char* data;
  int64_t stride;  // bytes from one image to the next; 0 for what all images share
};

// One image's part of every tensor, handed out in the order in which compilation.py lists arguments and results.
class Image {
 public:
  Image(const Tensor* tensors, int64_t index) : tensor_(tensors), index_(index) {}
  template <class N>
  N* next() {
    const Tensor& tensor = *tensor_++;
    return reinterpret_cast<N*>(tensor.data + index_ * tensor.stride);
  }

 private:
  const Tensor* tensor_;
  int64_t index_;
};

// --- Pixels ----------------------------------------------------------------------------------------------------------

constexpr int64_t NONE = -1;

// Calls visit(pixel, cell) with the offset of every pixel of rows y and y + 1, and that of its cell, the pooled pixel
// that it is part of. The pixels of a last odd row or column have no cell.
template <class Visit>
inline void visit_rows(const Shape& s, int64_t y, Visit visit) {
  const int64_t C = s.channels, row = s.width * C, top = y * row, cells = y / 2 * (s.width / 2) * C;
  const bool pair = y + 1 < s.height;
  for (int64_t x = 0; x < s.width / 2; ++x) {
    const int64_t pixel = top + 2 * x * C, cell = pair ? cells + x * C : NONE;
    visit(pixel, cell);
    visit(pixel + C, cell);
    if (pair) visit(pixel + row, cell);
    if (pair) visit(pixel + row + C, cell);
  }
  if (s.width % 2) visit(top + row - C, NONE);
  if (s.width % 2 && pair) visit(top + 2 * row - C, NONE);
}

// Visits all pixels, two rows after two rows and in them LANES channels after LANES, so that what with(c) loads for its
// channels stays in registers. with(c) returns the function (pixel, cell) for the channels from c on.
template <class With>
inline void for_every_pixel(const Shape& s, With with) {
  for (int64_t y = 0; y < s.height; y += 2)
    for (int64_t c = 0; c < s.channels; c += LANES) {
      const auto visit = with(c);
      visit_rows(s, y, [&](int64_t pixel, int64_t cell) { visit(pixel + c, cell == NONE ? NONE : cell + c); });
    }
}

// Visits all cells in this order, each with its top left pixel.
template <class With>
inline void for_every_cell(const Shape& s, With with) {
  const int64_t C = s.channels, row = s.width * C;
  for (int64_t y = 0; y < s.height / 2; ++y)
    for (int64_t c = 0; c < C; c += LANES) {
      const auto visit = with(c);
      for (int64_t x = 0; x < s.width / 2; ++x) visit(2 * y * row + 2 * x * C + c, (y * (s.width / 2) + x) * C + c);
    }
}

// The mean of what `value` gives for the four pixels of a cell.
template <class Value>
inline auto pooled(const Shape& s, int64_t pixel, Value value) {
  const int64_t C = s.channels, row = s.width * C;
  return (value(pixel) + value(pixel + C) + value(pixel + row) + value(pixel + row + C)) / 4;
}

// --- Channels and norm groups ----------------------------------------------------------------------------------------

template <class N>
using PerChannel = std::vector<N>;

template <class N, class Value>
PerChannel<N> per_channel(const Shape& s, Value value) {
  PerChannel<N> found(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) found[c] = value(c);
  return found;
}

// K sums over the pixels of each channel. Two rows are added up on their own first, which keeps rounding errors small.
// with(c) returns a function (pixel, cell, sums) that adds one pixel.
template <size_t K, class N, class With>
std::array<PerChannel<N>, K> sums(const Shape& s, With with) {
  std::array<PerChannel<N>, K> found;
  found.fill(PerChannel<N>(s.channels));
  for (int64_t y = 0; y < s.height; y += 2)
    for (int64_t c = 0; c < s.channels; c += LANES) {
      const auto add = with(c);
      std::array<Lanes<N>, K> part{};
      visit_rows(s, y, [&](int64_t pixel, int64_t cell) { add(pixel + c, cell == NONE ? NONE : cell + c, part); });
      for (size_t k = 0; k < K; ++k) store(load(&found[k][c]) + part[k], &found[k][c]);
    }
  return found;
}

// From sums over the pixels of each channel, the mean over every norm group, repeated for all channels of the group.
template <class N>
PerChannel<N> group_mean(const Shape& s, PerChannel<N> values) {
  const int64_t size = s.channels / s.groups;
  for (auto group = values.begin(); group != values.end(); group += size) {
    N sum = 0;
    for (auto value = group; value != group + size; ++value) sum += *value;
    std::fill(group, group + size, sum / static_cast<N>(size * s.height * s.width));
  }
  return values;
}

// One number per norm group, repeated for all its channels.
template <class N>
PerChannel<N> spread(const Shape& s, const N* groups) {
  return per_channel<N>(s, [&](int64_t c) { return groups[c / (s.channels / s.groups)]; });
}

// From a number that all channels of a group have, one per group: undoes `spread`.
template <class N>
void gather(const Shape& s, const PerChannel<N>& values, N* groups) {
  for (int64_t g = 0; g < s.groups; ++g) groups[g] = values[g * (s.channels / s.groups)];
}

// The norm of one image, in terms of t = a - m, which saves a product per pixel: x = r t, and
// y = gamma x + beta = slope t + beta with slope = gamma r.
template <class T, class N = Wide<T>>
struct Norm {
  const T* a;
  const N *gamma, *beta;
  PerChannel<N> m, r, slope;

  Norm(const Shape& s, const T* a, PerChannel<N> m_, PerChannel<N> r_, const N* gamma, const N* beta)
      : a(a), gamma(gamma), beta(beta), m(std::move(m_)), r(std::move(r_)) {
    slope = per_channel<N>(s, [&](int64_t c) { return gamma[c] * r[c]; });
  }

  struct Here {  // functions of LANES channels of a pixel
    const T* a;
    Lanes<N> m, slope, beta;
    Lanes<N> t(int64_t pixel) const { return load(a + pixel) - m; }
    Lanes<N> y(Lanes<N> t) const { return t * slope + beta; }
    Lanes<N> masked(Lanes<N> t, Lanes<N> value) const { return y(t) > 0 ? value : Lanes<N>{}; }
  };
  Here at(int64_t c) const { return {a, load(&m[c]), load(&slope[c]), load(beta + c)}; }
};

// The gradient of a cell's mean with respect to one of its pixels.
template <class T>
inline Lanes<Wide<T>> unpool(const T* h, int64_t cell) {
  return cell == NONE ? Lanes<Wide<T>>{} : load(h + cell) / 4;
}

// --- The functions, for one image ------------------------------------------------------------------------------------

template <class T, class N = Wide<T>>
void forward(const Shape& s, Image image) {
  const auto a = image.next<const T>();
  const auto gamma = image.next<const N>(), beta = image.next<const N>();
  const auto h = image.next<T>();
  const auto m_out = image.next<N>(), r_out = image.next<N>();

  const auto [total] = sums<1, N>(s, [&](int64_t) {
    return [=](int64_t pixel, int64_t, auto& sum) { sum[0] += load(a + pixel); };
  });
  const auto m = group_mean(s, total);
  const auto [squares] = sums<1, N>(s, [&](int64_t c) {
    return [=, mean = load(&m[c])](int64_t pixel, int64_t, auto& sum) {
      const auto t = load(a + pixel) - mean;
      sum[0] += t * t;
    };
  });
  auto r = group_mean(s, squares);
  for (N& value : r) value = 1 / std::sqrt(value + static_cast<N>(s.eps));
  gather(s, m, m_out);
  gather(s, r, r_out);

  const Norm<T> norm(s, a, m, r, gamma, beta);
  for_every_cell(s, [&](int64_t c) {
    return [=, &s, here = norm.at(c)](int64_t pixel, int64_t cell) {
      const auto relu = [&](int64_t p) {
        const auto y = here.y(here.t(p));
        return y <= 0 ? Lanes<N>{} : y;  // NaN stays NaN
      };
      store(pooled(s, pixel, relu), h + cell);
    };
  });
}

// da may be a: a pixel of a is read before the same pixel of da is written, and not again.
template <class T, class N = Wide<T>>
void backward(const Shape& s, Image image) {
  const auto a = image.next<const T>();
  const auto m = spread(s, image.next<const N>()), r = spread(s, image.next<const N>());
  const auto gamma = image.next<const N>(), beta = image.next<const N>();
  const auto dh = image.next<const T>();
  const auto da = image.next<T>();
  const auto s0 = image.next<N>(), s1 = image.next<N>();

  const Norm<T> norm(s, a, m, r, gamma, beta);
  const auto [up, up_t] = sums<2, N>(s, [&](int64_t c) {
    return [=, here = norm.at(c)](int64_t pixel, int64_t cell, auto& sum) {
      const auto t = here.t(pixel), d = here.masked(t, unpool(dh, cell));
      sum[0] += d;
      sum[1] += d * t;
    };
  });
  // da = slope mask up(dh) - r mean(g) - r^2 mean(x g) t: the last two are one number per channel each.
  const N pixels = s.height * s.width;
  for (int64_t c = 0; c < s.channels; ++c) {
    s0[c] = up[c] / pixels;
    s1[c] = up_t[c] * r[c] / pixels;
  }
  const auto g0 = group_mean(s, per_channel<N>(s, [&, &up = up](int64_t c) { return gamma[c] * up[c]; }));
  const auto g1 = group_mean(s, per_channel<N>(s, [&, &up_t = up_t](int64_t c) { return norm.slope[c] * up_t[c]; }));
  const auto constant = per_channel<N>(s, [&](int64_t c) { return -r[c] * g0[c]; });
  const auto along_t = per_channel<N>(s, [&](int64_t c) { return -r[c] * r[c] * g1[c]; });
  for_every_pixel(s, [&](int64_t c) {
    return [=, here = norm.at(c), k0 = load(&constant[c]), kt = load(&along_t[c])](int64_t pixel, int64_t cell) {
      const auto t = here.t(pixel);
      store(here.masked(t, here.slope * unpool(dh, cell)) + (t * kt + k0), da + pixel);
    };
  });
}

// WHOLE: gamma and beta move as well. The formula of y_dot is a_dot, t and 1 times numbers per channel; without WHOLE
// all of it is a multiple of slope, which then is left out until the four pixels of a cell have been added.
template <class T, bool WHOLE = false, class N = Wide<T>>
void tangent(const Shape& s, Image image) {
  const auto a = image.next<const T>();
  const auto m = spread(s, image.next<const N>()), r = spread(s, image.next<const N>());
  const auto gamma = image.next<const N>(), beta = image.next<const N>();
  const auto a_dot = image.next<const T>();
  const auto gamma_dot = WHOLE ? image.next<const N>() : nullptr, beta_dot = WHOLE ? image.next<const N>() : nullptr;
  const auto h_dot = image.next<T>();
  const auto t0_out = image.next<N>(), t1_out = image.next<N>();

  const Norm<T> norm(s, a, m, r, gamma, beta);
  const auto [dot, dot_t] = sums<2, N>(s, [&](int64_t c) {
    return [=, here = norm.at(c)](int64_t pixel, int64_t, auto& sum) {
      const auto d = load(a_dot + pixel);
      sum[0] += d;
      sum[1] += d * here.t(pixel);
    };
  });
  const auto t0 = group_mean(s, dot);
  const auto t1 = group_mean(s, per_channel<N>(s, [&, &dot_t = dot_t](int64_t c) { return r[c] * dot_t[c]; }));
  gather(s, t0, t0_out);
  gather(s, t1, t1_out);

  if constexpr (WHOLE) {
    const auto constant = per_channel<N>(s, [&](int64_t c) { return beta_dot[c] - norm.slope[c] * t0[c]; });
    const auto along_t = per_channel<N>(s, [&](int64_t c) {
      return r[c] * (gamma_dot[c] - norm.slope[c] * t1[c]);
    });
    for_every_cell(s, [&](int64_t c) {
      return [=, &s, here = norm.at(c), k0 = load(&constant[c]), kt = load(&along_t[c])](int64_t pixel, int64_t cell) {
        const auto moved = [&](int64_t p) {
          const auto t = here.t(p);
          return here.masked(t, here.slope * load(a_dot + p) + (t * kt + k0));
        };
        store(pooled(s, pixel, moved), h_dot + cell);
      };
    });
  } else {
    const auto along_t = per_channel<N>(s, [&](int64_t c) { return r[c] * t1[c]; });
    for_every_cell(s, [&](int64_t c) {
      return [=, &s, here = norm.at(c), k0 = load(&t0[c]), kt = load(&along_t[c])](int64_t pixel, int64_t cell) {
        const auto moved = [&](int64_t p) {
          const auto t = here.t(p);
          return here.masked(t, load(a_dot + p) - k0 - t * kt);
        };
        store(here.slope * pooled(s, pixel, moved), h_dot + cell);
      };
    });
  }
}

template <class T>
void whole_tangent(const Shape& s, Image image) {
  tangent<T, true>(s, image);
}

template <class T, bool WHOLE = false, class N = Wide<T>>
void adjoint(const Shape& s, Image image) {
  const auto a = image.next<const T>();
  const auto m = spread(s, image.next<const N>()), r = spread(s, image.next<const N>());
  const auto gamma = image.next<const N>(), beta = image.next<const N>();
  const auto dh = image.next<const T>();
  const auto s0 = image.next<const N>(), s1 = image.next<const N>();
  const auto a_dot = image.next<const T>();
  const auto t0 = spread(s, image.next<const N>()), t1 = spread(s, image.next<const N>());
  const auto h_bar = image.next<const T>();
  const auto gamma_dot = WHOLE ? image.next<const N>() : nullptr;
  const auto a_bar = image.next<T>();

  const Norm<T> norm(s, a, m, r, gamma, beta);
  const auto [bar, bar_t, up_dot] = sums<3, N>(s, [&](int64_t c) {
    return [=, here = norm.at(c)](int64_t pixel, int64_t cell, auto& sum) {
      const auto t = here.t(pixel), d = here.masked(t, unpool(h_bar, cell));
      sum[0] += d;
      sum[1] += d * t;
      sum[2] += here.masked(t, unpool(dh, cell)) * load(a_dot + pixel);
    };
  });
  const N pixels = s.height * s.width;
  const auto mean = [&](auto value) { return group_mean(s, per_channel<N>(s, value)); };
  const auto q0 = mean([&, &bar = bar](int64_t c) {
    if constexpr (WHOLE) return gamma[c] * bar[c] + gamma_dot[c] * s0[c] * pixels;
    return gamma[c] * bar[c];
  });
  const auto q1 = mean([&, &bar_t = bar_t](int64_t c) {
    if constexpr (WHOLE) return norm.slope[c] * bar_t[c] + gamma_dot[c] * s1[c] * pixels;
    return norm.slope[c] * bar_t[c];
  });
  const auto g0 = mean([&](int64_t c) { return gamma[c] * s0[c] * pixels; });
  const auto p = mean([&](int64_t c) { return gamma[c] * s1[c] * pixels; });
  const auto ga = mean([&, &up_dot = up_dot](int64_t c) { return gamma[c] * up_dot[c]; });

  // a_bar = slope mask up(h_bar) - r Q slope mask up(dh) + numbers per channel times t, a_dot and 1
  const auto of_g = per_channel<N>(s, [&](int64_t c) {
    if constexpr (WHOLE) return r[c] * (norm.slope[c] * t1[c] - gamma_dot[c]);  // with gamma_dot s, a part of q
    return r[c] * t1[c];
  });
  const auto of_dot = per_channel<N>(s, [&](int64_t c) { return -r[c] * r[c] * p[c]; });
  const auto of_t = per_channel<N>(s, [&](int64_t c) {
    const N k = ga[c] - g0[c] * t0[c];
    return -r[c] * r[c] * (q1[c] + r[c] * (k - 3 * p[c] * t1[c]));
  });
  const auto constant = per_channel<N>(s, [&](int64_t c) {
    return r[c] * (r[c] * (t1[c] * g0[c] + p[c] * t0[c]) - q0[c]);
  });
  for_every_pixel(s, [&](int64_t c) {
    return [=, here = norm.at(c), kg = load(&of_g[c]), kd = load(&of_dot[c]), kt = load(&of_t[c]),
            k0 = load(&constant[c])](int64_t pixel, int64_t cell) {
      const auto t = here.t(pixel);
      const auto up = unpool(h_bar, cell), d = unpool(dh, cell);
      const auto sloped = here.masked(t, WHOLE ? here.slope * up - kg * d : here.slope * (up - kg * d));
      store(sloped + (t * kt + load(a_dot + pixel) * kd + k0), a_bar + pixel);
    };
  });

  if constexpr (WHOLE) {
    const auto u0 = image.next<N>(), u1 = image.next<N>();
    for (int64_t c = 0; c < s.channels; ++c) {
      u0[c] = bar[c] / pixels;
      u1[c] = r[c] * ((bar_t[c] + up_dot[c]) / pixels - t0[c] * s0[c] - t1[c] * s1[c]);
    }
  }
}

template <class T>
void whole_adjoint(const Shape& s, Image image) {
  adjoint<T, true>(s, image);
}

void for_every_image(const Shape& s, const Tensor* tensors, void (*function)(const Shape&, Image)) {
#pragma omp parallel for
  for (int64_t i = 0; i < s.images; ++i) function(s, Image(tensors, i));
}

}  // namespace

// C symbols such as backward_float32, which compilation.py looks up by name.
#define EXPORT(NAME, TYPE, T) \
  extern "C" void NAME##_##TYPE(const Shape* s, const Tensor* tensors) { for_every_image(*s, tensors, NAME<T>); }
#define EXPORT_FOR(TYPE, T) \
  EXPORT(forward, TYPE, T) EXPORT(backward, TYPE, T) \
  EXPORT(tangent, TYPE, T) EXPORT(whole_tangent, TYPE, T) EXPORT(adjoint, TYPE, T) EXPORT(whole_adjoint, TYPE, T)

EXPORT_FOR(float64, double)
EXPORT_FOR(float32, float)
EXPORT_FOR(bfloat16, BFloat16)
