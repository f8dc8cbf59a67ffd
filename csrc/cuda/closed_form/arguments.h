// The l2 distance in O(N C^2), for normalize "cosine" and "none": arguments, geometry and plan. Compiles without nvcc.
//
// Let z_i = alpha_i q_i be the student's scaled features and y_i the teacher's, so that D_ij = z_i . z_j - y_i . y_j.
// With the moments M_ss = sum_i z_i z_i^T, M_st = sum_i z_i y_i^T and M_tt = sum_i y_i y_i^T,
//
//   sum_ij D_ij^2          = |M_ss|^2 - 2 |M_st|^2 + |M_tt|^2       (Frobenius norms)
//   V_i = 4 sum_j D_ij z_j = 4 (M_ss z_i - M_st y_i)
//   N^2 dL/dq_i            = alpha_i (V_i - (z_i . V_i) z_i) for "cosine", V_i for "none"
//                            alpha_i (V_i - 4 D_ii z_i) for "cosine" if the norms are constants
//
// This direct form of the loss cancels as the student converges. If both networks have the same number of channels, the
// loss is computed from f_i = z_i + y_i and e_i = z_i - y_i: D_ij = (f_i . e_j + e_i . f_j) / 2, and hence
//
//   sum_ij D_ij^2 = (<S_ff, S_ee> + <S_fe, S_fe^T>) / 2,  S_fe = sum_i f_i e_i^T and so on
//
// in which nothing large cancels. docs/kernels.md has the measured errors of both forms.
#pragma once

#include "../loss_plan.h"

namespace srpkd::cuda::closed_form {

using algebra::BLOCK;
using algebra::blocks_of;
using algebra::MATRIX_TERMS;
using algebra::Ranges;
using algebra::STUDENT;
using algebra::TEACHER;
using algebra::tiles_of;

// The moments of two kinds of features, a and b: z and y, or f and e in the difference form. The tiles of 64 x 64
// channels of M_aa (on and above the diagonal), M_ab (all) and M_bb (on and above the diagonal) follow one another.
enum Moment { AA, AB, BB };

struct Tiles {
  int blocks_a, blocks_b;

  SRPKD_HOST_DEVICE constexpr int first(Moment moment) const {
    const int aa = blocks_a * (blocks_a + 1) / 2;
    return moment == AA ? 0 : moment == AB ? aa : aa + blocks_a * blocks_b;
  }
  SRPKD_HOST_DEVICE constexpr int count() const { return first(BB) + blocks_b * (blocks_b + 1) / 2; }

  SRPKD_HOST_DEVICE constexpr int index(Moment moment, int row, int column) const {
    const int blocks = moment == AA ? blocks_a : blocks_b;
    return first(moment) + (moment == AB ? row * blocks + column : row * blocks - row * (row - 1) / 2 + column - row);
  }
};

struct TileOfMoments {
  Moment moment;
  int row, column;
};
SRPKD_HOST_DEVICE constexpr TileOfMoments tile_at(const Tiles& tiles, int index) {
  const int ab = tiles.first(AB), bb = tiles.first(BB);
  if (index >= ab && index < bb) return {AB, (index - ab) / tiles.blocks_b, (index - ab) % tiles.blocks_b};
  const algebra::TileOfMoment at =
      index < ab ? algebra::tile_of_moment(index, tiles.blocks_a) : algebra::tile_of_moment(index - bb, tiles.blocks_b);
  return {index < ab ? AA : BB, at.row, at.column};
}

struct Arguments {
  sm80::Features features[2];  // of the teacher, of the student
  const float* alpha[2];       // (images, pixels); null for "none"
  int images, pixels;
  Tiles tiles;
  bool difference;
  Ranges ranges;
  float* partial;        // moments: (images, tiles, splits, BLOCK, BLOCK)
  double* losses;        // (images, tiles): partial losses
  uint16_t* factors[2];  // -4 M_st and 4 M_ss, in terms: panels (block of C_s, block of C_t or C_s), for each image
  bool per_image;
  int loss_blocks;  // images if per_image, else 1
  float* loss;      // (images,) if per_image, else ()
  void* gradient;   // (images, pixels, channels): bfloat16 for bfloat16 features, else float32; null if not required
  int64_t gradient_strides[3];
  double scale;  // of the loss and the gradient: 1/N^2, for the mean over images also 1/images
};

SRPKD_HOST_DEVICE constexpr int64_t elements_of_factor(int blocks_s, int blocks) {
  return int64_t{blocks_s} * blocks * MATRIX_TERMS * BLOCK * BLOCK;
}

struct Plan {
  algebra::NormArguments norms;
  Arguments arguments;
  Normalize normalize;
  bool detach_norms;
  int64_t largest_grid;  // thread blocks
};

inline Plan make_plan(const LossArguments& a, int multiprocessors, Workspace& workspace) {
  const int64_t images = a.images, pixels = a.pixels;
  const int blocks_s = blocks_of(a.features[STUDENT].channels), blocks_t = blocks_of(a.features[TEACHER].channels);
  Plan plan{};
  plan.normalize = a.relation.normalize, plan.detach_norms = a.relation.detach_norms;
  Arguments& p = plan.arguments;
  p.images = a.images, p.pixels = a.pixels, p.tiles = {blocks_s, blocks_t};
  p.difference = a.features[STUDENT].channels == a.features[TEACHER].channels;
  for (int i = 0; i < 2; ++i) p.features[i] = a.features[i];
  if (a.relation.normalize == Normalize::cosine) {
    algebra::NormArguments& n = plan.norms;
    n.images = a.images, n.pixels = a.pixels, n.eps = static_cast<float>(a.relation.eps);
    for (int i = 0; i < 2; ++i) {
      n.features[i] = a.features[i];
      p.alpha[i] = n.alpha[i] = workspace.take<float>(images * pixels);
    }
  }
  const int64_t tiles = p.tiles.count();
  p.ranges = ranges_of(images * tiles, a.pixels, int64_t{multiprocessors} * 2);
  p.partial = workspace.take<float>(images * tiles * p.ranges.splits * BLOCK * BLOCK);
  p.losses = workspace.take<double>(images * tiles);
  if (a.need_grad) {
    p.factors[TEACHER] = workspace.take<uint16_t>(images * elements_of_factor(blocks_s, blocks_t));
    p.factors[STUDENT] = workspace.take<uint16_t>(images * elements_of_factor(blocks_s, blocks_s));
  }
  p.per_image = a.reduction == Reduction::none, p.loss_blocks = p.per_image ? a.images : 1, p.loss = a.loss;
  p.gradient = a.gradient;
  for (int i = 0; i < 3; ++i) p.gradient_strides[i] = a.gradient_strides[i];
  const double count = static_cast<double>(pixels);
  p.scale = 1 / (count * count * (a.reduction == Reduction::mean ? static_cast<double>(images) : 1));
  const int64_t row_blocks = images * (2 * ceil_div(pixels, BLOCK) + 1), moments = images * tiles;
  plan.largest_grid = row_blocks > moments ? row_blocks : moments;
  return plan;
}

}  // namespace srpkd::cuda::closed_form
