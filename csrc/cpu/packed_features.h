// Features in the orders of elements that products read fast.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <type_traits>

#include "../common/index.h"
#include "epilogue.h"
#include "matrix.h"
#include "parallel_for.h"

namespace srpkd::cpu {

// The type of sums of features of type S.
template <typename S>
using SumOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Returns features of a type that the functions of with_feature_type() have: torch widens float16 numbers faster than
// their loops.
inline at::Tensor widened(const at::Tensor& features) {
  return features.scalar_type() == at::kHalf ? features.to(at::kFloat) : features;
}

// Calls f(S) with a value of the features' type S: double, float or bfloat16.
template <typename F>
auto with_feature_type(const at::Tensor& features, F f) {
  switch (features.scalar_type()) {
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    default:
      return f(float{});
  }
}

// Returns an image of features (B, N, C), or of any matrices, with its data at `data`.
template <typename T>
Matrix<T> image_of(const at::Tensor& features, int64_t image, T* data) {
  return {data + image * features.stride(0), features.size(1), features.size(2), features.stride(1),
          features.stride(2)};
}

constexpr int64_t PANEL = 64;  // pixels that microkernels multiply at a time

// Calls f(image, panel) for the panels of all images of features (B, N, C), in parallel.
template <typename F>
void for_each_panel(const at::Tensor& features, const F& f) {
  const int64_t pixels = features.size(1), panels = ceil_div(pixels, PANEL);
  parallel_for(0, features.size(0) * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / panels, block_at(i % panels, PANEL, pixels));
  });
}

// Copies of features (N, C) of type S, made by pack(). BLAS reads the features in place if their strides allow it.
//
// The microkernels' operands are row-major: those of a Gram matrix are pixels x channels and channels x pixels. Numbers
// of pixels are filled up with zeros to a multiple of LINE: for each size, a kernel is compiled when it is first
// needed.
template <typename S>
class PackedFeatures {
 public:
  using T = SumOf<S>;

  // A matrix with a row and a column for each pixel. Its rows start at multiples of LINE elements, and rows and columns
  // up to a multiple of LINE are zeros.
  struct Square {
    T* data;
    int64_t stride;

    Matrix<T> part(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
      return {data + row * stride + column, rows, columns, stride, 1};
    }
  };

  // What is needed later: the left or the right operand of gram(), product() or transposed_product().
  enum Use : unsigned { NONE = 0, LEFT = 1, RIGHT = 2, PRODUCT = 4, TRANSPOSED_PRODUCT = 8 };

  PackedFeatures(int64_t pixels, int64_t channels, unsigned uses) : channels_(channels), blas_(!has_microkernels<T>()) {
    if (IS_BFLOAT16 && has_bfloat16_microkernels()) pairs_ = ceil_div(channels, 2);
    const bool wide = pairs_ == 0;  // gram() multiplies numbers of type T
    const auto space = [&](bool needed, int64_t columns, at::ScalarType type) {
      return needed ? at::empty({round_up(pixels, PANEL) * columns}, type) : at::Tensor();
    };
    constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    by_pixel_ = space(blas_ || uses & (wide ? PRODUCT | LEFT : PRODUCT), channels, type);
    by_channel_ = space(!blas_ && uses & (wide ? TRANSPOSED_PRODUCT | RIGHT : TRANSPOSED_PRODUCT), channels, type);
    left_ = space(!wide && uses & (LEFT | RIGHT), 2 * pairs_, at::kBFloat16);
    right_ = space(!wide && uses & RIGHT, pairs_, at::kInt);
  }

  // Sets the features, of which there may be fewer channels than the constructor has space for. The microkernels read
  // adjacent rows in place: others may share few places in the cache.
  void set(Matrix<const S> features) {
    features_ = features;
    channels_ = features.columns;
    if (pairs_ > 0) pairs_ = ceil_div(channels_, 2);
    if constexpr (std::is_same_v<S, T>)
      in_place_ = blas_ ? features.is_blas()
                        : features.row_major() && features.row_stride == channels_ && features.rows % LINE == 0;
  }

  // Copies a block of pixels, whose first one is a multiple of PANEL.
  void pack(Block block) const {
    for_each_panel(block, [&](Block panel) {
      Matrix<const S> from = features_.row_range(panel.begin, panel.size);
      if (by_channel_.defined()) copy_filled_up(from.t(), columns<T>(by_channel_, channels_, panel));
      if constexpr (IS_BFLOAT16) {
        if (left_.defined()) {
          const Matrix<c10::BFloat16> left = left_rows(panel);
          copy_filled_up(from, left);
          const Matrix<const Pair> pairs = {reinterpret_cast<const Pair*>(left.data), left.rows, pairs_, pairs_, 1};
          if (right_.defined()) copy(pairs.t(), right_columns(panel));
          from = left.row_range(0, panel.size).column_range(0, channels_);  // adjacent channels, which widen faster
        }
      }
      if (by_pixel_.defined() && !in_place_) copy_filled_up(from, rows<T>(by_pixel_, channels_, panel));
    });
  }

  // Computes G = left right^T of two blocks, rows i and columns j, or with `add` G += left right^T.
  static void gram(const PackedFeatures& left, Block i, const PackedFeatures& right, Block j, Square G,
                   bool add = false) {
    if (left.blas_) {
      multiply(left.by_pixel(i), right.by_pixel(j).t(), G.part(0, i.size, 0, j.size), add);
      for (int64_t row = 0; row < i.size; ++row)
        std::fill_n(G.data + row * G.stride + j.size, round_up(j.size, LINE) - j.size, T(0));
      return;
    }
    for_each_panel(j, [&](Block columns) {
      for_each_panel(i, [&](Block rows) {
        const Matrix<T> result =
            G.part(rows.begin - i.begin, left.padded(rows.size), columns.begin - j.begin, left.padded(columns.size));
        if constexpr (IS_BFLOAT16)
          if (left.pairs_) return multiply(left.left_rows(rows), right.right_columns(columns), result, add);
        multiply(left.by_pixel(rows), right.by_channel(columns), result, add);
      });
    });
    if (left.pairs_) release_microkernels();
  }

  // Computes K q for some rows of K and the features q of a block into `result` (N, C).
  void product(Square K, int64_t rows, Block block, T* result) const {
    const Matrix<const T> features = by_pixel(block);
    for_each_panel({0, rows}, [&](Block panel) {
      const int64_t count = padded(panel.size);
      multiply(K.part(panel.begin, count, 0, features.rows), features,
               Matrix<T>{result + panel.begin * channels_, count, channels_, channels_, 1});
    });
  }

  // Computes K^T q for the features q of a block and some columns of K into `result` (N, C), transposed: (C, stride of
  // K).
  void transposed_product(Square K, int64_t columns, Block block, T* result) const {
    bool add = false;
    for_each_panel(block, [&](Block rows) {
      for_each_panel({0, columns}, [&](Block panel) {
        const int64_t count = padded(panel.size);
        multiply(by_channel(rows), K.part(rows.begin - block.begin, padded(rows.size), panel.begin, count),
                 Matrix<T>{result + panel.begin, channels_, count, K.stride, 1}, add);
      });
      add = true;
    });
  }

 private:
  static constexpr bool IS_BFLOAT16 = std::is_same_v<S, c10::BFloat16>;

  // Calls f for the panels of a block, which starts at a multiple of PANEL.
  template <typename F>
  static void for_each_panel(Block block, F f) {
    for (int64_t done = 0; done < block.size; done += PANEL)
      f(Block{block.begin + done, std::min(PANEL, block.size - done)});
  }

  int64_t padded(int64_t pixels) const { return blas_ ? pixels : round_up(pixels, LINE); }

  template <typename U>
  Matrix<U> rows(const at::Tensor& memory, int64_t columns, Block block) const {
    return {static_cast<U*>(memory.mutable_data_ptr()) + block.begin * columns, padded(block.size), columns, columns,
            1};
  }
  // The rows of a panel are adjacent: with a stride of all pixels, they would share few places in a cache.
  template <typename U>
  Matrix<U> columns(const at::Tensor& memory, int64_t rows, Block panel) const {
    return {static_cast<U*>(memory.mutable_data_ptr()) + panel.begin * rows, rows, padded(panel.size), PANEL, 1};
  }
  Matrix<c10::BFloat16> left_rows(Block block) const { return rows<c10::BFloat16>(left_, 2 * pairs_, block); }
  Matrix<Pair> right_columns(Block panel) const { return columns<Pair>(right_, pairs_, panel); }

  Matrix<const T> by_pixel(Block block) const {
    if constexpr (std::is_same_v<S, T>)
      if (in_place_) return features_.row_range(block.begin, block.size);
    return rows<T>(by_pixel_, channels_, block);
  }
  Matrix<const T> by_channel(Block panel) const {
    return blas_ ? by_pixel(panel).t() : Matrix<const T>(columns<T>(by_channel_, channels_, panel));
  }

  template <typename From, typename To>
  static void copy_filled_up(const Matrix<From>& from, const Matrix<To>& to) {
    copy(from, to);
    for (int64_t i = 0; from.columns < to.columns && i < from.rows; ++i)
      std::fill_n(to.data + i * to.row_stride + from.columns, to.columns - from.columns, To(0));
    for (int64_t i = from.rows; i < to.rows; ++i) std::fill_n(to.data + i * to.row_stride, to.columns, To(0));
  }

  int64_t channels_, pairs_ = 0;  // of channels: not 0 if gram() multiplies bfloat16 numbers
  bool blas_, in_place_ = false;
  Matrix<const S> features_{};
  at::Tensor by_pixel_, by_channel_, left_, right_;
};

}  // namespace srpkd::cpu
