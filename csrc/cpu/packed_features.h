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

namespace srpkd::cpu {

// The type of sums of features of type S.
template <typename S>
using SumOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Returns an image of features (B, N, C), or of any matrices, with its data at `data`.
template <typename T>
Matrix<T> image_of(const at::Tensor& features, int64_t image, T* data) {
  return {data + image * features.stride(0), features.size(1), features.size(2), features.stride(1),
          features.stride(2)};
}

constexpr int64_t PANEL = 64;  // pixels that microkernels multiply at a time

// Copies of features (N, C) of type S, made by pack(). BLAS reads the features in place if their strides allow it.
//
// The microkernels' operands are row-major: those of a Gram matrix are pixels x channels and channels x pixels. Numbers
// of pixels are filled up with zeros to a multiple of LINE: for each size, a kernel is compiled when it is first needed.
template <typename S>
class PackedFeatures {
 public:
  using T = SumOf<S>;

  // What is read later: the left or the right operand of gram(), by_pixel() or by_channel().
  enum Use : unsigned { LEFT = 1, RIGHT = 2, BY_PIXEL = 4, BY_CHANNEL = 8 };

  PackedFeatures(int64_t pixels, int64_t channels, unsigned uses)
      : channels_(channels), uses_(uses), blas_(!has_microkernels<T>()) {
    if (IS_BFLOAT16 && has_bfloat16_microkernels()) pairs_ = ceil_div(channels, 2);
    if (!pairs_ && uses & LEFT) uses_ |= BY_PIXEL;
    if (!pairs_ && uses & RIGHT) uses_ |= BY_CHANNEL;
    if (blas_) uses_ = BY_PIXEL;  // and by channel it is the same
    const auto space = [&](bool needed, int64_t columns, at::ScalarType type) {
      return needed ? at::empty({round_up(pixels, PANEL) * columns}, type) : at::Tensor();
    };
    constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    by_pixel_ = space(uses_ & BY_PIXEL, channels, type);
    by_channel_ = space(uses_ & BY_CHANNEL, channels, type);
    left_ = space(pairs_, 2 * pairs_, at::kBFloat16);
    right_ = space(pairs_ && uses & RIGHT, pairs_, at::kInt);
  }

  // Sets the features.
  void set(Matrix<const S> features) {
    features_ = features;
    if constexpr (std::is_same_v<S, T>)
      in_place_ = blas_ ? features.is_blas() : features.row_major() && features.rows % LINE == 0;
  }

  // Copies the pixels of a block, which starts at a multiple of PANEL.
  void pack(Block block) const {
    for (int64_t done = 0; done < block.size; done += PANEL) {
      const Block panel = panel_of(block, done);
      const Matrix<const S> from = features_.row_range(panel.begin, panel.size);
      if (uses_ & BY_PIXEL && !in_place_) copy_padded(from, rows<T>(by_pixel_, channels_, panel));
      if (uses_ & BY_CHANNEL) copy_padded(from.t(), columns<T>(by_channel_, channels_, panel));
      if constexpr (IS_BFLOAT16)
        if (pairs_) pack_pairs(from, panel);
    }
  }

  // Returns a block (N, C), for microkernels filled up with zeros.
  Matrix<const T> by_pixel(Block block) const {
    if constexpr (std::is_same_v<S, T>)
      if (in_place_) return features_.row_range(block.begin, block.size);
    return rows<T>(by_pixel_, channels_, block);
  }

  // Returns a panel (C, N), for microkernels filled up with zeros.
  Matrix<const T> by_channel(Block panel) const {
    return blas_ ? by_pixel(panel).t() : Matrix<const T>(columns<T>(by_channel_, channels_, panel));
  }

  // Computes G = left right^T of two blocks into (rows, stride), with zeros after the last column.
  static void gram(const PackedFeatures& left, Block i, const PackedFeatures& right, Block j, T* G, int64_t stride) {
    if (left.blas_) {
      multiply(left.by_pixel(i), right.by_pixel(j).t(), Matrix<T>{G, i.size, j.size, stride, 1});
      for (int64_t row = 0; row < i.size; ++row)
        std::fill_n(G + row * stride + j.size, round_up(j.size, LINE) - j.size, T(0));
      return;
    }
    for (int64_t column = 0; column < j.size; column += PANEL)
      for (int64_t row = 0; row < i.size; row += PANEL) {
        const Block rows = panel_of(i, row), columns = panel_of(j, column);
        const Matrix<T> result = {G + row * stride + column, round_up(rows.size, LINE), round_up(columns.size, LINE),
                                  stride, 1};
        if constexpr (IS_BFLOAT16)
          if (left.pairs_) {
            multiply(left.left_rows(rows), right.right_columns(columns), result);
            continue;
          }
        multiply(left.by_pixel(rows), right.by_channel(columns), result);
      }
  }

  // Returns to how many pixels operands are filled up with zeros.
  int64_t padded(int64_t pixels) const { return blas_ ? pixels : round_up(pixels, LINE); }

 private:
  static constexpr bool IS_BFLOAT16 = std::is_same_v<S, c10::BFloat16>;

  static Block panel_of(Block block, int64_t done) {
    return {block.begin + done, std::min(PANEL, block.size - done)};
  }
  template <typename U>
  Matrix<U> rows(const at::Tensor& memory, int64_t columns, Block block) const {
    return {static_cast<U*>(memory.mutable_data_ptr()) + block.begin * columns, padded(block.size), columns, columns, 1};
  }
  // The rows of a panel are adjacent: with a stride of all pixels, they would share few places in a cache.
  template <typename U>
  Matrix<U> columns(const at::Tensor& memory, int64_t rows, Block panel) const {
    return {static_cast<U*>(memory.mutable_data_ptr()) + panel.begin * rows, rows, padded(panel.size), PANEL, 1};
  }
  Matrix<c10::BFloat16> left_rows(Block block) const { return rows<c10::BFloat16>(left_, 2 * pairs_, block); }
  Matrix<Pair> right_columns(Block panel) const { return columns<Pair>(right_, pairs_, panel); }

  template <typename From, typename To>
  static void copy_padded(const Matrix<From>& from, const Matrix<To>& to) {
    copy(from, to);
    for (int64_t i = 0; from.columns < to.columns && i < from.rows; ++i)
      std::fill_n(to.data + i * to.row_stride + from.columns, to.columns - from.columns, To(0));
    for (int64_t i = from.rows; i < to.rows; ++i) std::fill_n(to.data + i * to.row_stride, to.columns, To(0));
  }

  void pack_pairs(const Matrix<const c10::BFloat16>& from, Block panel) const {
    const Matrix<c10::BFloat16> left = left_rows(panel);
    copy_padded(from, left);
    if (uses_ & RIGHT)
      copy(Matrix<const Pair>{reinterpret_cast<const Pair*>(left.data), left.rows, pairs_, pairs_, 1}.t(),
           right_columns(panel));
  }

  int64_t channels_, pairs_ = 0;  // of channels: not 0 if gram() multiplies bfloat16 numbers
  unsigned uses_;
  bool blas_, in_place_ = false;
  Matrix<const S> features_{};
  at::Tensor by_pixel_, by_channel_, left_, right_;
};

}  // namespace srpkd::cpu
