// The l2 distance in O(N C^2): arguments, geometry and plan. Compiles without nvcc.
//
// Let z_i = alpha_i q_i be the student's scaled features and y_i the teacher's, from raw features q_i and p_i. For
// "cosine" and "none" D_ij = z_i . z_j - y_i . y_j. With the moments M_ss = sum_i z_i z_i^T, M_st = sum_i z_i y_i^T and
// M_tt = sum_i y_i y_i^T,
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
//
// For "row" D_ij = z_i . q_j - y_i . p_j, and there are two stages: the moments M of the raw features, which determine
// alpha, and then those of the scaled features, W. With the cosine distance d_i of row i of both relation matrices,
//
//   d_i           = z_i . (M_ss z_i - M_st y_i)
//   sum_ij D_ij^2 = sum_i (z_i . M_ss z_i - 2 z_i . M_st y_i + y_i . M_tt y_i)     (direct form)
//                 = (<T_ff, S_ee> + 2 <T_fe, S_fe^T> + <T_ee, S_ff>) / 4           (difference form)
//   N^2 dL/dq_i   = 2 (alpha_i ((1 - d_i) M_ss z_i - M_st y_i) + (W_ss - W_d) q_i - W_st p_i)
//
// where W_d = sum_i d_i z_i z_i^T, S are the moments of q + p and q - p, and T those of z + y and z - y. D does not
// depend on the magnitude of the features. The first stage multiplies those of each network by a gain near 1 / mean
// |x|, so that q - p is small if the features differ only in magnitude.
#pragma once

#include "../loss_plan.h"

namespace srpkd::cuda::closed_form {

using algebra::BLOCK;
using algebra::blocks_of;
using algebra::MATRIX_TERMS;
using algebra::Ranges;
using algebra::tiles_of;

// `only`: of "cosine" and "none". The others: of "row".
enum class Stage { only, first, second };

// The moments of two kinds of features, a and b: z and y, or f and e in the difference form. The tiles of 64 x 64
// channels of M_aa (on and above the diagonal), M_ab (all) and M_bb (on and above the diagonal) follow one another. In
// the difference form the second stage also has W_d, like M_aa.
enum Moment { AA, AB, BB, OF_DISTANCES };

struct Tiles {
  int blocks_a, blocks_b, moments;

  SRPKD_HOST_DEVICE constexpr int first(Moment moment) const {
    const int aa = blocks_a * (blocks_a + 1) / 2, bb = blocks_b * (blocks_b + 1) / 2;
    return moment == AA ? 0 : aa + (moment == AB ? 0 : blocks_a * blocks_b + (moment == BB ? 0 : bb));
  }
  SRPKD_HOST_DEVICE constexpr int count() const {
    return moments > OF_DISTANCES ? first(OF_DISTANCES) + blocks_a * (blocks_a + 1) / 2
                                  : first(static_cast<Moment>(moments));
  }

  SRPKD_HOST_DEVICE constexpr int index(Moment moment, int row, int column) const {
    const int blocks = moment == BB ? blocks_b : blocks_a;
    return first(moment) + (moment == AB ? row * blocks_b + column : row * blocks - row * (row - 1) / 2 + column - row);
  }
};

struct TileOfMoments {
  Moment moment;
  int row, column;
};
SRPKD_HOST_DEVICE constexpr TileOfMoments tile_at(const Tiles& tiles, int index) {
  const int ab = tiles.first(AB), bb = tiles.first(BB), of_distances = tiles.first(OF_DISTANCES);
  if (index >= ab && index < bb) return {AB, (index - ab) / tiles.blocks_b, (index - ab) % tiles.blocks_b};
  const Moment moment = index < ab ? AA : index < of_distances ? BB : OF_DISTANCES;
  const algebra::TileOfMoment at =
      algebra::tile_of_moment(index - tiles.first(moment), moment == BB ? tiles.blocks_b : tiles.blocks_a);
  return {moment, at.row, at.column};
}

struct Arguments {
  sm80::Features features[2];  // of the teacher, of the student
  float* alpha[2];             // (images, pixels); null for "none"
  int images, pixels;
  float eps;
  Stage stage;
  Tiles tiles;
  bool difference;
  Ranges ranges;
  float* partial;  // moments: (images, tiles, splits, BLOCK, BLOCK)
  double* losses;  // (images, loss_parts): partial losses
  int loss_parts;
  uint16_t* factors[2];  // -4 M_st and 4 M_ss, in terms: panels (block of C_s, block of C_t or C_s), for each image. Of
                         // the second stage: -4 W_st and 4 (W_ss - W_d). Null if not required.
  bool per_image;
  float factor_scale;  // a power of two by which the factors are multiplied: see LARGEST_TERM in moments.cuh
  int loss_blocks;     // images if per_image, else 1
  float* loss;         // (images,) if per_image, else ()
  void* gradient;      // (images, pixels, channels): bfloat16 for bfloat16 features, else float32; null if not required
  int64_t gradient_strides[3];
  double scale;  // of the loss and the gradient: 1/N^2, for the mean over images also 1/images

  // only for "row"
  float* gains[2];                 // (images,)
  float* distances;                // (images, pixels): d
  uint16_t* teacher_factor;        // 4 M_tt, as factors; first stage
  float* sums;                     // (images, tiles of AA, AB and BB, BLOCK, BLOCK): S, for the difference form
  int* counters;                   // (images, groups): how many blocks of the second stage are done
  int groups;                      // of tiles that are finished together
  const uint16_t* raw_factors[2];  // factors of the first stage
};

SRPKD_HOST_DEVICE constexpr int64_t elements_of_factor(int block_rows, int block_columns) {
  return int64_t{block_rows} * block_columns * MATRIX_TERMS * BLOCK * BLOCK;
}

struct Plan {
  Normalize normalize;
  bool detach_norms;
  algebra::NormArguments norms;  // only for "cosine"
  Arguments arguments;           // for "row" of the first stage
  Arguments second;              // only for "row"
  bool has_second;               // the direct form needs it only for the gradient
  bool wide;                     // see is_wide: a block of SumMoments has 256 threads instead of 128
  int64_t largest_grid;          // thread blocks
};

inline void plan_factors(Arguments& p, Workspace& workspace) {
  for (int i = 0; i < 2; ++i)
    p.factors[i] = workspace.take<uint16_t>(
        p.images * elements_of_factor(p.tiles.blocks_a, i == STUDENT ? p.tiles.blocks_a : p.tiles.blocks_b));
}

inline void plan_moments(Arguments& p, int multiprocessors, Workspace& workspace) {
  const int64_t tiles = int64_t{p.images} * p.tiles.count();
  p.ranges = ranges_of(tiles, p.pixels, int64_t{multiprocessors} * 3);
  p.partial = workspace.take<float>(tiles * p.ranges.splits * BLOCK * BLOCK);
}

// Plans what the two stages of "row" have in common, and the second stage.
inline void plan_row(Plan& plan, bool need_grad, int multiprocessors, Workspace& workspace) {
  Arguments& first = plan.arguments;
  const Tiles tiles = first.tiles;
  const int64_t images = first.images, pixels = images * first.pixels;
  for (int i = 0; i < 2; ++i)
    first.alpha[i] = workspace.take<float>(pixels), first.gains[i] = workspace.take<float>(images);
  first.stage = Stage::first, first.distances = workspace.take<float>(pixels);
  plan_factors(first, workspace);
  first.teacher_factor = workspace.take<uint16_t>(images * elements_of_factor(tiles.blocks_b, tiles.blocks_b));
  plan.has_second = first.difference || need_grad;
  if (plan.has_second) {
    const int moments = !first.difference ? BB : need_grad ? OF_DISTANCES + 1 : OF_DISTANCES;
    const Tiles scaled{tiles.blocks_a, tiles.blocks_b, moments};
    first.groups = first.difference ? tiles.first(AB) : scaled.count();
    first.counters = workspace.take<int>(images * first.groups);
    if (first.difference) first.sums = workspace.take<float>(images * tiles.count() * BLOCK * BLOCK);
    plan.second = first, plan.second.stage = Stage::second, plan.second.tiles = scaled;
  }
  first.loss_parts = first.difference ? first.groups : static_cast<int>(ceil_div(first.pixels, BLOCK));
  first.losses = workspace.take<double>(images * first.loss_parts);
  if (!plan.has_second) return;
  Arguments& second = plan.second;
  second.loss_parts = first.loss_parts, second.losses = first.losses;
  for (int i = 0; i < 2; ++i) second.raw_factors[i] = first.factors[i], second.factors[i] = nullptr;
  if (need_grad) plan_factors(second, workspace);
  plan_moments(second, multiprocessors, workspace);
}

inline Plan make_plan(const LossArguments& a, int multiprocessors, Workspace& workspace) {
  const int64_t images = a.images, pixels = a.pixels;
  Plan plan{};
  plan.normalize = a.relation.normalize, plan.detach_norms = a.relation.detach_norms;
  plan.wide = is_wide(a, multiprocessors);
  Arguments& p = plan.arguments;
  p.images = a.images, p.pixels = a.pixels, p.eps = static_cast<float>(a.relation.eps);
  p.tiles = {blocks_of(a.features[STUDENT].channels), blocks_of(a.features[TEACHER].channels), BB + 1};
  p.difference = a.features[STUDENT].channels == a.features[TEACHER].channels;
  for (int i = 0; i < 2; ++i) p.features[i] = a.features[i];
  set_results(p, a);
  p.factor_scale = a.relation.normalize == Normalize::cosine ? 0x1p13f : 1.f;
  if (a.relation.normalize == Normalize::cosine) {
    // an element of a factor is at most 4 N; 2^15 fits into float16
    for (int64_t largest = 1; largest < pixels; largest *= 2) p.factor_scale /= 2;
    algebra::NormArguments& n = plan.norms;
    n.images = a.images, n.pixels = a.pixels, n.eps = p.eps;
    for (int i = 0; i < 2; ++i) {
      n.features[i] = a.features[i];
      p.alpha[i] = n.alpha[i] = workspace.take<float>(images * pixels);
    }
  }
  plan_moments(p, multiprocessors, workspace);
  if (a.relation.normalize == Normalize::row) {
    plan_row(plan, a.need_grad, multiprocessors, workspace);
  } else {
    p.loss_parts = p.tiles.count() * algebra::STRIPS, p.losses = workspace.take<double>(images * p.loss_parts);
    if (a.need_grad) plan_factors(p, workspace);
  }
  const int64_t row_blocks = images * (2 * ceil_div(pixels, BLOCK) + 1);
  const int moments =
      plan.has_second && plan.second.tiles.count() > p.tiles.count() ? plan.second.tiles.count() : p.tiles.count();
  plan.largest_grid = row_blocks > images * moments ? row_blocks : images * moments;
  return plan;
}

}  // namespace srpkd::cuda::closed_form
