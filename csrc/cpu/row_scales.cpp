// The scales of row normalisation.
//
// ||G_i||^2 = q_i^T M q_i = q_i^T M' q_i + N (m . q_i)^2, where m is the mean of the features and M' the moment of
// q - m: neither term is negative, so pixels that do not share a large common mean keep the digits that would cancel in
// q_i^T M q_i.
//
// T, the type of products and sums, is SumOf<S>, or double where multiply() may round floats: scales have at least the
// precision of float32.
#include "row_scales.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/index.h"
#include "matrix.h"
#include "packed_features.h"
#include "parallel_for.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

constexpr int64_t RANGES = 16;  // of pixels, of which each is a term of the moments: their order decides the last bits

// The features of a panel, by pixel, and a product with them.
template <typename T>
struct Panel {
  std::vector<T> pixels, products;

  explicit Panel(int64_t channels) : pixels(PANEL * channels), products(PANEL * channels) {}
};

template <typename S, typename T>
Matrix<T> load(const Tensor& features, int64_t image, Block panel, std::vector<T>& memory) {
  const int64_t channels = features.size(2);
  const Matrix<T> result = {memory.data(), panel.size, channels, channels, 1};
  copy(image_of(features, image, features.const_data_ptr<S>()).row_range(panel.begin, panel.size), result);
  return result;
}

// Returns the moments (B, C, C) of features minus their means (B, 1, C).
template <typename S, typename T>
Tensor centred_moments(const Tensor& features, const Tensor& means) {
  const int64_t images = features.size(0), pixels = features.size(1), channels = features.size(2);
  const int64_t panels = ceil_div(pixels, PANEL);
  const int64_t affordable = ceil_div(4 * pixels, channels);  // the terms take about four times the features' memory
  const int64_t ranges = std::min({panels, affordable, ceil_div(RANGES, images)});
  const Tensor terms = at::empty({images, ranges, channels, channels}, means.options());
  const T* const mean = means.const_data_ptr<T>();
  T* const data = terms.mutable_data_ptr<T>();
  parallel_for(0, images * ranges, 1, [&](int64_t begin, int64_t end) {
    Panel<T> space(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / ranges, range = task % ranges;
      const Matrix<T> sum = {data + task * channels * channels, channels, channels, channels, 1};
      for (int64_t i = panels * range / ranges; i < panels * (range + 1) / ranges; ++i) {
        const Matrix<T> centred = load<S>(features, image, block_at(i, PANEL, pixels), space.pixels);
        for (int64_t row = 0; row < centred.rows; ++row)
          for (int64_t c = 0; c < channels; ++c) centred.data[row * channels + c] -= mean[image * channels + c];
        const Matrix<T> by_channel = {space.products.data(), channels, centred.rows, PANEL, 1};
        copy(centred.t(), by_channel);
        multiply(by_channel, centred, sum, i > panels * range / ranges);
      }
    }
  });
  return terms.sum(1);
}

// Returns the dot product of vectors in `LINE` sums, which a compiler would not form by itself: they change the order.
template <typename T>
T dot(const T* left, const T* right, int64_t count) {
  T sums[LINE] = {};
  int64_t c = 0;
  for (; c + LINE <= count; c += LINE)
    for (int64_t lane = 0; lane < LINE; ++lane) sums[lane] += left[c + lane] * right[c + lane];
  for (; c < count; ++c) sums[0] += left[c] * right[c];
  return std::accumulate(sums, sums + LINE, T(0));
}

// Returns q_i^T M' q_i + N (m . q_i)^2 (B, N), for matrices M' (B, C, C) and vectors m (B, C).
template <typename S, typename T>
Tensor squared_norms(const Tensor& features, const Tensor& matrices, const Tensor& vectors) {
  const int64_t images = features.size(0), pixels = features.size(1), channels = features.size(2);
  const int64_t panels = ceil_div(pixels, PANEL);
  const Tensor result = at::empty({images, pixels}, matrices.options());
  const T* const M = matrices.const_data_ptr<T>();
  const T* const m = vectors.const_data_ptr<T>();
  T* const squares = result.mutable_data_ptr<T>();
  parallel_for(0, images * panels, 1, [&](int64_t begin, int64_t end) {
    Panel<T> space(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / panels;
      const Block panel = block_at(task % panels, PANEL, pixels);
      const Matrix<T> q = load<S>(features, image, panel, space.pixels);
      const Matrix<T> product = {space.products.data(), panel.size, channels, channels, 1};
      multiply(q, Matrix<const T>{M + image * channels * channels, channels, channels, channels, 1}, product);
      for (int64_t i = 0; i < panel.size; ++i) {
        const T* const q_i = q.data + i * channels;
        const T linear = dot(q_i, m + image * channels, channels);
        squares[image * pixels + panel.begin + i] =
            dot(q_i, product.data + i * channels, channels) + static_cast<T>(pixels) * linear * linear;
      }
    }
  });
  return result;
}

template <typename S, typename T>
RowScales run(const Tensor& features, double eps) {
  const auto count = static_cast<double>(features.size(1));
  const Tensor mean = features.sum({1}, true, c10::CppTypeToScalarType<T>::value).div_(count).contiguous();
  const Tensor centred = centred_moments<S, T>(features, mean);
  const Tensor moment = at::addcmul(centred, mean.mT(), mean, count), size = power_of_two_scale(moment);
  const Tensor square = squared_norms<S, T>(features, centred.div_(size.square()), mean / size);
  const Tensor alpha = inverse(square.clamp_min_(0).sqrt_() * size.squeeze(2), eps);
  const at::ScalarType type = c10::CppTypeToScalarType<SumOf<S>>::value;
  return {alpha.to(type), moment.to(type)};
}

}  // namespace

RowScales row_scales(const Tensor& features, double eps) {
  return with_feature_type(features, [&](auto element) {
    using S = decltype(element);
    return may_round_floats() ? run<S, double>(features, eps) : run<S, SumOf<S>>(features, eps);
  });
}

Tensor power_of_two_scale(const Tensor& moment) {
  const double tiny =
      moment.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  return moment.diagonal(0, 1, 2).amax(1).clamp_min(tiny).log2().div(2).floor().exp2().view({-1, 1, 1});
}

Tensor inverse(const Tensor& norm, double eps) {
  return at::where(norm <= eps, at::zeros({}, norm.options()), norm.reciprocal() + norm * 0);
}

}  // namespace srpkd::cpu
