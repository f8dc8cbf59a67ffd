// The loss of small images on the CPU, from whole Gram matrices.
//
// With G at hand, the norm of a row is a sum over its elements, and the terms of the gradient that come from the norms
// are folded into K: M q_i = sum_j G_ij q_j, so that U_i - w_i M q_i - M_w q_i = sum_j (K_ij - (w_i + w_j) G_ij) q_j.
// That is one product more than the Gram matrices, and no C x C matrices, which cost more if an image has fewer pixels
// than channels.
//
// An image is computed in five passes over blocks of rows, in parallel: a pass needs the results of all rows of the one
// before. Each block writes its own rows only, so that results do not depend on the order. With many channels and few
// pixels, products are passes over ranges of channels instead.
#include "relation_matrices.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "../common/index.h"
#include "kernels.h"
#include "packed_features.h"
#include "parallel_for.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

constexpr int64_t BLOCK = 64;                       // rows
constexpr int64_t PIECE = 256;                      // channels: as many terms as multiply() adds at a time
constexpr double OPERATIONS_OF_A_THREAD = 1 << 20;  // less is not worth a further thread

// The number of ranges of channels that the products of an image are divided into for several threads. 0 for blocks of
// rows instead: a range has a term of whole Gram matrices.
int64_t ranges_of(int64_t pixels, int64_t channels, int64_t threads) {
  const int64_t blocks = ceil_div(pixels, BLOCK), pieces = ceil_div(channels, PIECE);
  return blocks <= 4 && blocks < std::min(pieces, threads) ? std::min(pieces, threads) : 0;
}

// The arrays of one image. Rows start at multiples of LINE elements, and end with zeros. A further LINE keeps the rows
// of a column from sharing the same few places in a cache.
template <typename S>
class Workspace {
 public:
  using T = SumOf<S>;
  using Packed = PackedFeatures<S>;

  Workspace(int64_t pixels, int64_t channels_s, int64_t channels_t, bool need_grad, int64_t ranges)
      : ranges(ranges),
        stride(round_up(pixels, LINE) + (pixels > BLOCK ? LINE : 0)),
        size(round_up(pixels, LINE) * stride),
        student(pixels, ranges ? 0 : channels_s,
                Packed::LEFT | Packed::RIGHT | (need_grad ? Packed::PRODUCT : Packed::NONE)),
        teacher(pixels, ranges ? 0 : channels_t, Packed::LEFT | Packed::RIGHT),
        memory_(at::empty({3 * stride + 2 * terms() * size}, c10::CppTypeToScalarType<T>::value)) {
    alpha_s = memory_.mutable_data_ptr<T>();
    alpha_t = alpha_s + stride;
    h = alpha_t + stride;
    gram_s = h + stride;
    gram_t = gram_s + terms() * size;
    for (T* const vector : {alpha_s, alpha_t, h}) std::fill(vector + pixels, vector + stride, T(0));
  }

  const int64_t ranges, stride, size;  // size of a Gram matrix
  Packed student, teacher;             // without ranges
  T *alpha_s, *alpha_t, *h;
  T *gram_s, *gram_t;  // (N, stride), and the terms of further ranges; K replaces G_t

 private:
  int64_t terms() const { return std::max<int64_t>(ranges, 1); }

  Tensor memory_;
};

template <typename S>
class Image {
 public:
  using T = SumOf<S>;

  Image(const Relation& relation, Workspace<S>& space, Matrix<const S> student, Matrix<const S> teacher)
      : relation_(relation), space_(space), student_(student), teacher_(teacher), pixels_(student.rows) {
    if (space.ranges > 0) return;
    space.student.set(student);
    space.teacher.set(teacher);
  }

  // Pass 0: the features of the rows.
  void pack(Block rows) {
    space_.student.pack(rows);
    space_.teacher.pack(rows);
  }

  // Pass 1: the rows of both Gram matrices, up to the strip on the diagonal.
  void multiply_features(Block rows) {
    multiply_features(space_.student, rows, space_.gram_s);
    multiply_features(space_.teacher, rows, space_.gram_t);
  }

  // Passes 0 and 1 for a range of channels: its terms of both Gram matrices.
  void multiply_range(int64_t range) {
    PackedFeatures<S> packed(pixels_, PIECE, PackedFeatures<S>::LEFT | PackedFeatures<S>::RIGHT);
    for (const auto& [features, gram] : {std::pair(student_, space_.gram_s), std::pair(teacher_, space_.gram_t)}) {
      T* const term = gram + range * space_.size;
      bool add = false;
      for_each_piece(features, range, [&](Matrix<const S> piece, int64_t) {
        packed.set(piece);
        packed.pack({0, pixels_});
        for (int64_t block = 0; block < ceil_div(pixels_, BLOCK); ++block)
          multiply_features(packed, block_at(block, BLOCK, pixels_), term, add);
        add = true;
      });
      if (!add) std::fill_n(term, space_.size, T(0));
    }
  }

  // Adds the terms of all ranges, for some rows.
  void add_terms(Block rows) {
    for (T* const gram : {space_.gram_s, space_.gram_t})
      for (int64_t range = 1; range < space_.ranges; ++range) {
        const Matrix<T> sum = {gram + rows.begin * space_.stride, rows.size, rows.begin + rows.size, space_.stride, 1};
        Matrix<T> term = sum;
        term.data += range * space_.size;
        for_each_pair(term, sum, [](T one, T& total) { total += one; });
      }
  }

  // Pass 2: the rest of the rows, by symmetry, and their scales.
  void complete(Block rows) {
    mirror(rows, space_.gram_s);
    mirror(rows, space_.gram_t);
    if (relation_.normalize == Normalize::none) return;
    scale(rows, space_.gram_s, student_, space_.alpha_s);
    scale(rows, space_.gram_t, teacher_, space_.alpha_t);
  }

  // Pass 3: the rows of K and h. Returns the rows' part of the loss.
  double compare(Block rows, bool need_grad) {
    return kernels_.epilogue(operands(rows),
                             {relation_.normalize, relation_.distance, need_grad, false, relation_.rectify});
  }

  // Pass 4: the terms of the gradient that come from the norms, added to the rows of K, and the rows of the gradient.
  void add_norm_terms(Block rows) {
    const TileOperands<T> tile = operands(rows);
    const bool norms = relation_.differentiates_norms();
    if (norms && relation_.normalize == Normalize::row) kernels_.subtract_norm_terms(tile, space_.h);
    if (norms && relation_.normalize == Normalize::cosine)  // of norms that depend on their own pixel only
      for (int64_t i = 0; i < rows.size; ++i)
        tile.K[i * tile.stride + rows.begin + i] -= tile.h_row[i] * tile.row_s[i] * tile.row_s[i];
  }
  void differentiate(Block rows, T scale, Matrix<S> gradient) {
    multiply_by_K(space_.student, rows, scale, gradient.row_range(rows.begin, rows.size));
  }

  // Pass 4 for a range of channels.
  void differentiate_range(int64_t range, T scale, Matrix<S> gradient) {
    PackedFeatures<S> packed(pixels_, PIECE, PackedFeatures<S>::PRODUCT);
    for_each_piece(student_, range, [&](Matrix<const S> piece, int64_t channel) {
      packed.set(piece);
      packed.pack({0, pixels_});
      multiply_by_K(packed, {0, pixels_}, scale, gradient.column_range(channel, piece.columns));
    });
  }

 private:
  // Calls f(features of some channels, first channel) for the pieces of a range of channels.
  template <typename F>
  void for_each_piece(const Matrix<const S>& features, int64_t range, const F& f) const {
    const int64_t pieces = ceil_div(features.columns, PIECE);
    for (int64_t i = pieces * range / space_.ranges; i < pieces * (range + 1) / space_.ranges; ++i) {
      const Block channels = block_at(i, PIECE, features.columns);
      f(features.column_range(channels.begin, channels.size), channels.begin);
    }
  }

  // Calls f for the strips of a block of rows. G is computed up to the end of each strip: narrow ones save nearly half
  // of a block on the diagonal. BLAS takes less time for whole blocks.
  template <typename F>
  void for_each_strip(Block rows, const F& f) const {
    const int64_t size = in_strips_ ? LINE : BLOCK;
    for (int64_t i = 0; i < rows.size; i += size) f(Block{rows.begin + i, std::min(size, rows.size - i)});
  }

  void multiply_features(const PackedFeatures<S>& features, Block rows, T* gram, bool add = false) {
    const int64_t begin = in_strips_ ? rows.begin : 0, stride = space_.stride;
    if (begin > 0)
      PackedFeatures<S>::gram(features, rows, features, {0, begin}, {gram + rows.begin * stride, stride}, add);
    for_each_strip(rows, [&](Block strip) {
      const Block columns = {begin, strip.begin + strip.size - begin};
      PackedFeatures<S>::gram(features, strip, features, columns, {gram + strip.begin * stride + begin, stride}, add);
    });
  }

  void multiply_by_K(const PackedFeatures<S>& features, Block rows, T scale, const Matrix<S>& gradient) {
    const int64_t channels = gradient.columns;
    const Tensor memory = at::empty({round_up(rows.size, LINE), channels}, c10::CppTypeToScalarType<T>::value);
    const Matrix<T> part = {memory.mutable_data_ptr<T>(), rows.size, channels, channels, 1};
    features.product({space_.gram_t + rows.begin * space_.stride, space_.stride}, rows.size, {0, pixels_}, part.data);
    std::for_each_n(part.data, rows.size * channels, [&](T& value) { value *= scale; });
    copy(part, gradient);
  }

  void mirror(Block rows, T* matrix) {
    const int64_t stride = space_.stride;
    const Matrix<T> whole = {matrix, pixels_, pixels_, stride, 1};
    for_each_strip(rows, [&](Block strip) {
      const int64_t end = strip.begin + strip.size, left = pixels_ - end;
      copy(whole.row_range(end, left).column_range(strip.begin, strip.size).t(),
           whole.row_range(strip.begin, strip.size).column_range(end, left));
    });
    for (int64_t i = rows.begin; i < rows.begin + rows.size; ++i)
      std::fill(matrix + i * stride + pixels_, matrix + (i + 1) * stride, T(0));
  }

  void scale(Block rows, const T* matrix, const Matrix<const S>& features, T* alpha) {
    std::array<double, BLOCK> squares;
    if (relation_.normalize == Normalize::row)
      for (int64_t i = 0; i < rows.size; ++i)
        squares[i] = kernels_.sum_of_squares(matrix + (rows.begin + i) * space_.stride, space_.stride);
    else
      sum_squares(features.row_range(rows.begin, rows.size), squares.data());
    for (int64_t i = 0; i < rows.size; ++i) {
      const T norm = static_cast<T>(std::sqrt(squares[i]));
      // NaN if the norm is NaN or overflows
      alpha[rows.begin + i] = norm <= static_cast<T>(relation_.eps) ? T(0) : 1 / norm + 0 * norm;
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
  Workspace<S>& space_;
  const Matrix<const S> student_, teacher_;
  const int64_t pixels_;
  const bool in_strips_ = has_microkernels<T>();
  const Kernels<T>& kernels_ = select_kernels<T>();
};

template <typename S>
void run(const Tensor& student, const Tensor& teacher, const Relation& relation, double gradient_scale, double* loss,
         const Tensor& gradient) {
  using T = SumOf<S>;
  const int64_t images = student.size(0), pixels = student.size(1);
  const bool need_grad = gradient.defined();
  const S* const data_s = student.const_data_ptr<S>();
  const S* const data_t = teacher.const_data_ptr<S>();
  S* const data = need_grad ? gradient.mutable_data_ptr<S>() : nullptr;

  const double pairs = static_cast<double>(pixels) * static_cast<double>(pixels);
  const double operations = pairs * static_cast<double>(2 * teacher.size(2) + 4 * student.size(2) + 32);  // of an image
  const auto grain = [](double operations) {
    return static_cast<int64_t>(std::ceil(OPERATIONS_OF_A_THREAD / operations));
  };
  const int64_t blocks = ceil_div(pixels, BLOCK);
  const int64_t threads = at::get_num_threads();
  const bool whole_images = images >= threads;  // a thread takes whole images, or blocks of rows or ranges of channels
  const int64_t channels = std::max(student.size(2), teacher.size(2));
  const int64_t ranges = whole_images ? 0 : ranges_of(pixels, channels, threads);

  parallel_for(0, images, whole_images ? grain(operations) : images, [&](int64_t begin, int64_t end) {
    Workspace<S> space(pixels, student.size(2), teacher.size(2), need_grad, ranges);
    std::vector<double> parts(blocks);
    for (int64_t image = begin; image < end; ++image) {
      Image<S> current(relation, space, image_of(student, image, data_s), image_of(teacher, image, data_t));
      const auto for_each = [&](int64_t count, const auto& pass) {
        parallel_for(0, count, grain(operations / static_cast<double>(count)), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) pass(i);
        });
      };
      const auto for_each_block = [&](const auto& pass) {
        for_each(blocks, [&](int64_t i) {
          const int64_t block = i % 2 ? blocks - 1 - i / 2 : i / 2;  // two together have equal parts of a triangle
          pass(block, block_at(block, BLOCK, pixels));
        });
      };
      if (ranges > 0) {
        for_each(ranges, [&](int64_t range) { current.multiply_range(range); });
        for_each_block([&](int64_t, Block rows) { current.add_terms(rows); });
      } else {
        for_each_block([&](int64_t, Block rows) { current.pack(rows); });
        for_each_block([&](int64_t, Block rows) { current.multiply_features(rows); });
      }
      for_each_block([&](int64_t, Block rows) { current.complete(rows); });
      for_each_block([&](int64_t block, Block rows) { parts[block] = current.compare(rows, need_grad); });
      loss[image] = 0;
      for (const double part : parts) loss[image] += part / pairs;
      if (!need_grad) continue;
      const Matrix<S> whole = image_of(gradient, image, data);
      const T scale = static_cast<T>(gradient_scale);
      for_each_block([&](int64_t, Block rows) {
        current.add_norm_terms(rows);
        if (ranges == 0) current.differentiate(rows, scale, whole);
      });
      if (ranges > 0) for_each(ranges, [&](int64_t range) { current.differentiate_range(range, scale, whole); });
    }
  });
}

}  // namespace

void relation_matrices(const Tensor& student, const Tensor& teacher, const Relation& relation, double gradient_scale,
                       double* loss, const Tensor& gradient) {
  with_feature_type(student, [&](auto element) {
    run<decltype(element)>(student, teacher, relation, gradient_scale, loss, gradient);
  });
}

}  // namespace srpkd::cpu
