// Products of strided matrices by BLAS, without the cost of tensors and of the dispatcher: small products take less
// time than either.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

namespace srpkd::cpu {

// A view of a matrix in memory that it does not own.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix row_range(int64_t begin, int64_t count) const {
    return {data + begin * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t begin, int64_t count) const { return t().row_range(begin, count).t(); }

  bool row_major() const {
    return (column_stride == 1 || columns == 1) && (row_stride >= columns || rows == 1) &&
           row_stride <= std::numeric_limits<int>::max();
  }
  // Whether multiply() can read or write it in place.
  bool is_blas() const { return row_major() || t().row_major(); }

  template <typename U, typename = std::enable_if_t<std::is_same_v<U, const T>>>
  operator Matrix<U>() const {
    return {data, rows, columns, row_stride, column_stride};
  }
};

// result = scale * left right. All are Matrix::is_blas().
void multiply(Matrix<const float> left, Matrix<const float> right, float scale, Matrix<float> result);
void multiply(Matrix<const double> left, Matrix<const double> right, double scale, Matrix<double> result);

}  // namespace srpkd::cpu
