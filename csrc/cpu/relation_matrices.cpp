// The loss of small images on the CPU, from whole Gram matrices that stay in the cache.
//
// With G at hand, the norm of a row is a sum over its elements, and the terms of the gradient that come from the norms
// are folded into K: M q_i = sum_j G_ij q_j, so that U_i - w_i M q_i - M_w q_i = sum_j (K_ij - (w_i + w_j) G_ij) q_j.
// That is one product more than the Gram matrices, and no C x C matrices, which cost more if an image has fewer pixels
// than channels.
//
// An image is computed in four passes over blocks of rows, in parallel: a pass needs the results of all rows of the one
// before. Each block writes its own rows only, so that results do not depend on the order.
#include "relation_matrices.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/arguments.h"
#include "../common/index.h"
#include "kernels.h"
#include "matrix.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

constexpr int64_t MAX_PIXELS = 1024;
constexpr int64_t BLOCK = 64;                       // rows
constexpr double OPERATIONS_OF_A_THREAD = 1 << 20;  // less is not worth a further thread

template <typename T>
Matrix<T> image_of(const Tensor& features, int64_t image, T* data) {
  return {data + image * features.stride(0), features.size(1), features.size(2), features.stride(1),
          features.stride(2)};
}

// Returns features in dtype T and with strides that BLAS accepts: themselves if they are so already.
template <typename T>
Tensor readable(const Tensor& features) {
  const Tensor wide = features.to(c10::CppTypeToScalarType<T>::value);
  return image_of(wide, 0, wide.const_data_ptr<T>()).is_blas() ? wide : wide.contiguous();
}

// The arrays of one image. Rows start at multiples of LINE elements, and end with zeros. A further LINE keeps the rows
// of a column from sharing the same few places in a cache.
template <typename T>
class Workspace {
 public:
  Workspace(int64_t pixels, const at::TensorOptions& options)
      : stride(round_up(pixels, LINE) + (pixels > BLOCK ? LINE : 0)),
        memory_(at::empty({2 * pixels + 3, stride}, options)) {
    gram_s = memory_.mutable_data_ptr<T>();
    gram_t = gram_s + pixels * stride;
    alpha_s = gram_t + pixels * stride;
    alpha_t = alpha_s + stride;
    h = alpha_t + stride;
    for (T* const vector : {alpha_s, alpha_t, h}) std::fill(vector + pixels, vector + stride, T(0));
  }

  const int64_t stride;
  T *gram_s, *gram_t;  // (N, stride); K replaces G_t
  T *alpha_s, *alpha_t, *h;

 private:
  Tensor memory_;
};

template <typename T>
class Image {
 public:
  Image(const Relation& relation, Workspace<T>& space, Matrix<const T> student, Matrix<const T> teacher)
      : relation_(relation), space_(space), student_(student), teacher_(teacher) {}

  // Pass 1: the rows of both Gram matrices, up to the block on the diagonal.
  void multiply_features(Block rows) {
    gram(student_, rows, space_.gram_s);
    gram(teacher_, rows, space_.gram_t);
  }

  // Pass 2: the rest of the rows, by symmetry, and their scales.
  void complete(Block rows) {
    mirror(rows, space_.gram_s);
    mirror(rows, space_.gram_t);
    if (relation_.normalize == Normalize::none) return;
    scale(rows, space_.gram_s, space_.alpha_s);
    scale(rows, space_.gram_t, space_.alpha_t);
  }

  // Pass 3: the rows of K and h. Returns the rows' part of the loss.
  double compare(Block rows, bool need_grad) {
    return kernels_.epilogue(operands(rows),
                             {relation_.normalize, relation_.distance, need_grad, false, relation_.rectify});
  }

  // Pass 4: the rows of the gradient.
  void differentiate(Block rows, T scale, Matrix<T> gradient) {
    const TileOperands<T> tile = operands(rows);
    const bool norms = relation_.differentiates_norms();
    if (norms && relation_.normalize == Normalize::row) kernels_.subtract_norm_terms(tile, space_.h);
    if (norms && relation_.normalize == Normalize::cosine)  // of norms that depend on their own pixel only
      for (int64_t i = 0; i < rows.size; ++i)
        tile.K[i * tile.stride + rows.begin + i] -= tile.h_row[i] * tile.row_s[i] * tile.row_s[i];
    const Matrix<const T> K = {tile.K, rows.size, student_.rows, tile.stride, 1};
    multiply(K, student_, scale, gradient.row_range(rows.begin, rows.size));
  }

 private:
  void gram(const Matrix<const T>& features, Block rows, T* matrix) {
    const int64_t columns = rows.begin + rows.size, stride = space_.stride;
    multiply(features.row_range(rows.begin, rows.size), features.row_range(0, columns).t(), T(1),
             {matrix + rows.begin * stride, rows.size, columns, stride, 1});
  }

  void mirror(Block rows, T* matrix) {
    const int64_t pixels = student_.rows, stride = space_.stride, end = rows.begin + rows.size;
    for (int64_t left = end; left < pixels; left += LINE)  // LINE columns at a time: their rows stay in the cache
      for (int64_t i = rows.begin; i < end; ++i)
        for (int64_t j = left; j < std::min(left + LINE, pixels); ++j) matrix[i * stride + j] = matrix[j * stride + i];
    for (int64_t i = rows.begin; i < end; ++i) std::fill(matrix + i * stride + pixels, matrix + (i + 1) * stride, T(0));
  }

  void scale(Block rows, const T* matrix, T* alpha) {
    for (int64_t i = rows.begin; i < rows.begin + rows.size; ++i) {
      const T* const row = matrix + i * space_.stride;
      const double square =
          relation_.normalize == Normalize::row ? kernels_.sum_of_squares(row, space_.stride) : row[i];
      const T norm = static_cast<T>(std::sqrt(square));
      // NaN if the norm is NaN or overflows
      alpha[i] = norm <= static_cast<T>(relation_.eps) ? T(0) : 1 / norm + 0 * norm;
    }
  }

  TileOperands<T> operands(Block rows) const {
    const int64_t begin = rows.begin, first = begin * space_.stride;
    return {rows.size,
            space_.stride,
            space_.gram_s + first,
            space_.gram_t + first,
            space_.gram_t + first,
            space_.alpha_s + begin,
            space_.alpha_t + begin,
            space_.alpha_s,
            space_.alpha_t,
            space_.h + begin,
            nullptr,
            static_cast<T>(relation_.delta),
            begin};
  }

  const Relation& relation_;
  Workspace<T>& space_;
  const Matrix<const T> student_, teacher_;
  const Kernels<T>& kernels_ = select_kernels<T>();
};

template <typename T>
void run(const Tensor& student, const Tensor& teacher, const Relation& relation, double gradient_scale, double* loss,
         const Tensor& gradient) {
  const Tensor q_s = readable<T>(student), q_t = readable<T>(teacher);
  const int64_t images = q_s.size(0), pixels = q_s.size(1);
  const bool need_grad = gradient.defined();
  Tensor result = gradient;  // products are written there, if its dtype and strides allow it
  if (need_grad && (gradient.scalar_type() != q_s.scalar_type() || !image_of<T>(gradient, 0, nullptr).is_blas()))
    result = at::empty(q_s.sizes(), q_s.options());
  const T* const data_s = q_s.const_data_ptr<T>();
  const T* const data_t = q_t.const_data_ptr<T>();
  T* const data = need_grad ? result.mutable_data_ptr<T>() : nullptr;

  const double pairs = static_cast<double>(pixels) * static_cast<double>(pixels);
  const double operations = pairs * static_cast<double>(2 * q_t.size(2) + 4 * q_s.size(2) + 32);  // of an image
  const auto grain = [](double operations) {
    return static_cast<int64_t>(std::ceil(OPERATIONS_OF_A_THREAD / operations));
  };
  const int64_t blocks = ceil_div(pixels, BLOCK), size = round_up(ceil_div(pixels, blocks), LINE);
  const bool whole_images = images >= at::get_num_threads();  // a thread takes whole images, or blocks of rows

  at::parallel_for(0, images, whole_images ? grain(operations) : images, [&](int64_t begin, int64_t end) {
    Workspace<T> space(pixels, q_s.options());
    std::vector<double> parts(blocks);
    for (int64_t image = begin; image < end; ++image) {
      Image<T> current(relation, space, image_of(q_s, image, data_s), image_of(q_t, image, data_t));
      const auto for_each_block = [&](const auto& pass) {
        at::parallel_for(0, blocks, grain(operations / static_cast<double>(blocks)), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t block = i % 2 ? blocks - 1 - i / 2 : i / 2;  // two together have equal parts of a triangle
            pass(block, block_at(block, size, pixels));
          }
        });
      };
      for_each_block([&](int64_t, Block rows) { current.multiply_features(rows); });
      for_each_block([&](int64_t, Block rows) { current.complete(rows); });
      for_each_block([&](int64_t block, Block rows) { parts[block] = current.compare(rows, need_grad); });
      loss[image] = 0;
      for (const double part : parts) loss[image] += part / pairs;
      if (!need_grad) continue;
      const Matrix<T> rows_of_gradient = image_of(result, image, data);
      for_each_block(
          [&](int64_t, Block rows) { current.differentiate(rows, static_cast<T>(gradient_scale), rows_of_gradient); });
    }
  });
  if (need_grad && !result.is_same(gradient)) gradient.copy_(result);
}

}  // namespace

bool fit_in_cache(int64_t pixels) { return pixels <= MAX_PIXELS; }

void relation_matrices(const Tensor& student, const Tensor& teacher, const Relation& relation, double gradient_scale,
                       double* loss, const Tensor& gradient) {
  const auto run_as = student.scalar_type() == at::kDouble ? run<double> : run<float>;
  run_as(student, teacher, relation, gradient_scale, loss, gradient);
}

}  // namespace srpkd::cpu
