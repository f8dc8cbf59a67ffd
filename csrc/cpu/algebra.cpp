// What sums over pixels is formed by one thread, for a strip of channels; what belongs to a pixel, block by block. So
// results do not depend on the number of threads.
#include "algebra.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/mul.h>

#include <cmath>
#include <vector>

#include "blocks.h"

namespace srpkd::cpu {
namespace {

constexpr int64_t STRIP = 64;    // channels
constexpr int64_t PIXELS = 256;  // in a block

// The features of all images, and what a thread works in: a block of features, or of what is made of them.
template <typename T>
struct Features {
  std::vector<Tensor> images;                // (N, C)
  int64_t pixels, channels, strips, blocks;  // of every image
  bool copied;                               // block by block, for products cannot read them where they are
  at::TensorOptions options;                 // of sums

  explicit Features(const Tensor& features)
      : images(features.unbind(0)),
        pixels(features.size(1)),
        channels(features.size(2)),
        strips(ceil_div(channels, STRIP)),
        blocks(ceil_div(pixels, PIXELS)),
        copied(!in_place(features, c10::CppTypeToScalarType<T>::value)),
        options(features.options().dtype(c10::CppTypeToScalarType<T>::value)) {}

  int64_t count() const { return static_cast<int64_t>(images.size()); }
  Tensor buffer() const { return at::empty({PIXELS, channels}, options); }
  Tensor moment() const { return at::empty({count(), channels, channels}, options); }

  // Pixels of an image, in a type and with strides that products can read.
  Tensor at(int64_t image, Block block, const Tensor& buffer) const {
    return loaded(rows_of(images[image], block), copied ? buffer : Tensor());
  }
};

// The strip's rows of Q^T diag(w) Q (C, C), from the diagonal on. Without w, Q^T Q.
template <typename T>
void strip_of_moment(const Features<T>& features, int64_t image, const Tensor& w, int64_t strip, const Tensor& moment) {
  const int64_t begin = strip * STRIP, own = std::min(STRIP, features.channels - begin);
  Tensor sums = moment[image].narrow(0, begin, own).narrow(1, begin, features.channels - begin);
  const bool whole = !features.copied && !w.defined();
  const Tensor buffer = whole ? Tensor() : features.buffer(),
               weighted = whole ? Tensor() : at::empty({PIXELS, own}, features.options);
  const int64_t step = whole ? features.pixels : PIXELS;
  for (int64_t block = 0; block * step < features.pixels; ++block) {
    const Block pixels = block_at(block, step, features.pixels);
    const Tensor q = features.at(image, pixels, buffer).narrow(1, begin, features.channels - begin);
    Tensor left = q.narrow(1, 0, own);
    if (w.defined()) {
      Tensor product = weighted.narrow(0, 0, pixels.size);
      left = at::mul_out(product, left, w[image].narrow(0, pixels.begin, pixels.size).unsqueeze(1));
    }
    at::cpu::addmm_(sums, left.t(), q, block > 0 ? 1 : 0);
  }
}

// Fills in what `strip_of_moment` leaves out.
template <typename T>
void mirror(const Tensor& moments) {
  const int64_t channels = moments.size(1);
  for (int64_t image = 0; image < moments.size(0); ++image) {
    T* const m = moments.mutable_data_ptr<T>() + image * channels * channels;
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < i / STRIP * STRIP; ++j) m[i * channels + j] = m[j * channels + i];
  }
}

// sums_i += p_i . q_i of two blocks (size, C), both contiguous along the pixels, or both along the channels.
template <typename T>
void add_dots(const Tensor& p, const Tensor& q, double* sums) {
  const int64_t rows = p.size(0), channels = p.size(1);
  const T *const p_data = p.const_data_ptr<T>(), *const q_data = q.const_data_ptr<T>();
  if (q.stride(0) == 1) {
    T parts[PIXELS] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const T *const p_c = p_data + c * p.stride(1), *const q_c = q_data + c * q.stride(1);
      for (int64_t i = 0; i < rows; ++i) parts[i] += p_c[i] * q_c[i];
    }
    for (int64_t i = 0; i < rows; ++i) sums[i] += parts[i];
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      const T *const p_i = p_data + i * p.stride(0), *const q_i = q_data + i * q.stride(0);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t c = 0; c < channels; ++c) part += p_i[c] * q_i[c];
      sums[i] += part;
    }
  }
}

// alpha of a block of pixels, from ||q_i||^2, or from ||G_i,:||^2 = q_i^T M q_i where there is an M: of its strips on
// and beside the diagonal the latter count twice.
template <typename T>
void scale_block(const Features<T>& features, int64_t image, Block pixels, const Tensor& moment, double eps,
                 const Tensor& buffer, const Tensor& products, const Tensor& alpha) {
  const Tensor q = features.at(image, pixels, buffer);
  const bool by_channel = q.stride(0) == 1;
  double squares[PIXELS] = {};
  if (!moment.defined()) add_dots<T>(q, q, squares);
  for (int64_t begin = 0; moment.defined() && begin < features.channels; begin += STRIP) {
    const int64_t own = std::min(STRIP, features.channels - begin), rest = features.channels - begin - own;
    const Tensor rows = moment[image].narrow(0, begin, own), q_own = q.narrow(1, begin, own);
    Tensor product = products.as_strided({pixels.size, own}, {by_channel ? 1 : own, by_channel ? pixels.size : 1});
    at::cpu::mm_out(product, q_own, rows.narrow(1, begin, own));
    if (rest > 0) at::cpu::addmm_(product, q.narrow(1, begin + own, rest), rows.narrow(1, begin + own, rest).t(), 1, 2);
    add_dots<T>(product, q_own, squares);
  }
  T* const scales = alpha.mutable_data_ptr<T>() + image * features.pixels + pixels.begin;
  for (int64_t i = 0; i < pixels.size; ++i) {
    const T norm = std::sqrt(std::max(squares[i], 0.));  // rounding can leave a square just below 0
    scales[i] = norm > T(eps) ? 1 / norm : 0;
  }
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> scales_as(const Tensor& student, const Tensor& teacher, Normalize normalize,
                                             double eps) {
  const Features<T> sides[] = {Features<T>(teacher), Features<T>(student)};  // the one with more work first
  Tensor moments[2], alphas[2];
  const int64_t images = student.size(0);
  if (normalize == Normalize::row) {
    for (int side : {0, 1}) moments[side] = sides[side].moment();
    for_each_claim(images * (sides[0].strips + sides[1].strips), [&](int64_t claim, int64_t, const auto&) {
      const int64_t strip = claim / images;
      const int side = strip >= sides[0].strips;
      strip_of_moment(sides[side], claim % images, Tensor(), strip - side * sides[0].strips, moments[side]);
    });
  }

  const int64_t blocks = sides[0].blocks, claims = 2 * images * blocks;
  std::vector<Tensor> buffers, products;
  for (int64_t worker = 0; worker < workers_for(claims); ++worker) {
    buffers.push_back(at::empty({PIXELS, std::max(sides[0].channels, sides[1].channels)}, sides[0].options));
    products.push_back(at::empty({PIXELS, STRIP}, sides[0].options));
  }
  for (int side : {0, 1}) alphas[side] = at::empty({images, student.size(1)}, sides[0].options);
  for_each_claim(claims, [&](int64_t claim, int64_t worker, const auto&) {
    const int side = claim >= images * blocks;
    const int64_t image = claim % images, block = claim / images - side * blocks;
    scale_block(sides[side], image, block_at(block, PIXELS, sides[side].pixels), moments[side], eps, buffers[worker],
                products[worker], alphas[side]);
  });
  if (moments[1].defined()) mirror<T>(moments[1]);
  return {alphas[1], alphas[0], moments[1]};
}

template <typename T>
void correct_as(const Tensor& U, const Tensor& h, const Tensor& alpha, const Tensor& moment, const Tensor& student,
                Normalize normalize) {
  const Features<T> features(student);
  const double scale = 1. / (static_cast<double>(features.pixels) * features.pixels);
  const Tensor w = normalize == Normalize::none ? Tensor() : h.mul(alpha).mul_(alpha);  // (B, N)
  Tensor weighted_moment;
  if (normalize == Normalize::row) {
    weighted_moment = features.moment();
    for_each_claim(features.count() * features.strips, [&](int64_t claim, int64_t, const auto&) {
      strip_of_moment(features, claim % features.count(), w, claim / features.count(), weighted_moment);
    });
    mirror<T>(weighted_moment);
  }

  const int64_t claims = features.count() * features.blocks;
  std::vector<Tensor> buffers, products;
  for (int64_t worker = 0; worker < workers_for(claims); ++worker) {
    buffers.push_back(features.buffer());
    products.push_back(features.buffer());
  }
  for_each_claim(claims, [&](int64_t claim, int64_t worker, const auto&) {
    const int64_t image = claim % features.count();
    const Block pixels = block_at(claim / features.count(), PIXELS, features.pixels);
    Tensor gradient = rows_of(U[image], pixels);
    if (normalize == Normalize::none) {
      gradient.mul_(scale);
      return;
    }
    const Tensor q = features.at(image, pixels, buffers[worker]);
    Tensor weighted = loaded(q, products[worker]).mul_(w[image].narrow(0, pixels.begin, pixels.size).unsqueeze(1));
    if (normalize == Normalize::cosine) {
      gradient.sub_(weighted).mul_(scale);
      return;
    }
    at::cpu::addmm_(gradient, weighted, moment[image], scale, -scale);
    at::cpu::addmm_(gradient, q, weighted_moment[image], 1, -scale);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> scales(const Tensor& student, const Tensor& teacher, Normalize normalize,
                                          double eps) {
  return (student.scalar_type() == at::kDouble ? scales_as<double> : scales_as<float>)(student, teacher, normalize,
                                                                                       eps);
}

void correct(const Tensor& U, const Tensor& h, const Tensor& alpha, const Tensor& moment, const Tensor& student,
             Normalize normalize) {
  (student.scalar_type() == at::kDouble ? correct_as<double> : correct_as<float>)(U, h, alpha, moment, student,
                                                                                  normalize);
}

}  // namespace srpkd::cpu
