// The plan of a whole relation loss on a GPU: arguments of all kernels, their launch grids and the workspace that they
// share. Free of torch and nvcc: the emulation in tests/csrc runs the same plan without a GPU.
#pragma once

#include "algebra/arguments.h"
#include "sm80/plan.h"
#include "sm90/sums.cuh"
#include "sm90/tile_plan.h"

namespace srpkd::cuda {

struct LossArguments {
  sm80::Features features[2];       // of the teacher, of the student; alpha is null
  sm80::Features tile_features[2];  // as the tiles read them: bfloat16 copies for Precision::bf16 of float32 features
  bool pixels_adjacent;             // in both
  Precision precision;
  int element_bytes;  // of features
  int images, pixels;
  Relation relation;
  Reduction reduction;
  bool need_grad;
  float* loss;     // (images,), or () if it is reduced
  void* gradient;  // (images, pixels, channels)
  int64_t gradient_strides[3];
};

// The kernels before the tiles.
struct ScalesPlan {
  algebra::FinishArguments moments;
  algebra::NormArguments norms;
  Normalize normalize;
  int64_t largest_grid;  // thread blocks
  bool wide;             // whether a block computes 128 instead of 64 pixels of the row norms and of the gradient
};

// The kernels after the tiles.
template <class Sums>
struct GradientPlan {
  algebra::WeightedMomentArguments<Sums> weighted;
  algebra::GradientArguments<Sums> gradient;
};

// With the tiles of sm_80.
struct LossPlan : ScalesPlan, GradientPlan<algebra::SumsOfSplits> {
  sm80::Params tiles;
  int u_channels;  // of a thread block of the tiles
};

// With the tiles of sm_90a.
struct Sm90LossPlan : ScalesPlan, GradientPlan<sm90::SumsOfTiles> {
  sm90::TilePlan tiles;
};

// Hands out parts of one allocation, or adds up its size if `base` is null.
struct Workspace {
  char* base;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = bytes;
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return base ? reinterpret_cast<T*>(base + begin) : nullptr;
  }
};

// Splits the pixels of a sum so that `blocks` thread blocks per range occupy a GPU.
inline algebra::Ranges ranges_of(int64_t blocks, int pixels, int multiprocessors) {
  const int64_t most = ceil_div(pixels, 2 * algebra::BLOCK), wanted = ceil_div(4 * multiprocessors, blocks);
  const int64_t splits = wanted < most ? wanted : most;
  const int64_t chosen = splits < algebra::MAX_SPLITS ? splits : algebra::MAX_SPLITS;
  const int split_pixels = static_cast<int>(round_up(ceil_div(pixels, chosen), algebra::BLOCK));
  return {static_cast<int>(ceil_div(pixels, split_pixels)), split_pixels};
}

inline int terms_of(int element_bytes, Precision precision) {
  return element_bytes == 4 ? 3 : precision == Precision::fp16 ? 2 : 1;
}

// Returns the number of blocks of channels that the row norms keep in shared memory: those of a network that fits.
inline int resident_blocks(const sm80::Features (&features)[2], int feature_bytes, int shared_limit) {
  int resident = 1;
  for (const auto& x : features) {
    const int blocks = algebra::blocks_of(x.channels);
    const int64_t bytes = int64_t{blocks} * feature_bytes + 2 * algebra::MATRIX_TERMS * algebra::PANEL_BYTES;
    if (bytes <= shared_limit && blocks > resident) resident = blocks;
  }
  return resident;
}

inline ScalesPlan plan_scales(const LossArguments& a, const sm80::Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images, pixels = a.pixels;
  const int channels_t = a.features[TEACHER].channels, channels_s = a.features[STUDENT].channels;
  const int64_t both = padded(channels_t) + padded(channels_s);
  const bool row = a.relation.normalize == Normalize::row, scaled = a.relation.normalize != Normalize::none;
  ScalesPlan plan{};
  plan.normalize = a.relation.normalize;
  plan.wide = 2 * images * ceil_div(pixels, 2 * BLOCK) >= device.multiprocessors;

  if (scaled) {
    NormArguments& n = plan.norms;
    n.images = a.images, n.pixels = a.pixels, n.eps = static_cast<float>(a.relation.eps);
    for (int i = 0; i < 2; ++i) n.features[i] = a.features[i], n.alpha[i] = workspace.take<float>(images * pixels);
    n.resident = resident_blocks(a.features, terms_of(a.element_bytes, a.precision) * PANEL_BYTES * (plan.wide ? 2 : 1),
                                 device.shared_of_block);
  }
  if (row) {
    MomentArguments& m = plan.moments.sums;
    MomentResults& results = plan.moments.results;
    const int64_t tiles_s = tiles_of(channels_s), tiles = tiles_of(channels_t) + tiles_s;
    for (int i = 0; i < 2; ++i) m.features[i] = a.features[i];
    m.images = a.images, m.pixels = a.pixels;
    m.ranges = ranges_of(images * tiles, a.pixels, device.multiprocessors);
    m.partial = workspace.take<float>(images * tiles * m.ranges.splits * BLOCK * BLOCK);
    m.sums = workspace.take<float>(images * m.ranges.splits * both);
    m.squares = workspace.take<float>(images * m.ranges.splits * both);
    m.shift = workspace.take<float>(images * both);
    results.centred[TEACHER] = workspace.take<uint16_t>(images * elements_of_terms(channels_t));
    results.centred[STUDENT] = workspace.take<uint16_t>(images * elements_of_terms(channels_s));
    results.whole = workspace.take<uint16_t>(images * elements_of_terms(channels_s));
    results.mean = workspace.take<float>(images * both);
    results.size = workspace.take<float>(images * 2);
    results.counters = workspace.take<int>(images * tiles_s);
    plan.norms.moments = results;
  }
  plan.largest_grid = images * ceil_div(pixels, BLOCK) * (2 + blocks_of(channels_s)) + images * tiles_of(channels_t);
  return plan;
}

template <class Sums>
GradientPlan<Sums> plan_gradient(const LossArguments& a, const ScalesPlan& scales, const Sums& sums,
                                 const sm80::Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images, channels_s = a.features[STUDENT].channels;
  const bool row = a.relation.normalize == Normalize::row;
  GradientPlan<Sums> plan{};
  GradientArguments<Sums>& g = plan.gradient;
  g.features = a.features[STUDENT], g.images = a.images, g.pixels = a.pixels, g.normalize = a.relation.normalize;
  g.sums = sums;
  g.alpha = scales.norms.alpha[STUDENT], g.size = scales.moments.results.size, g.moment = scales.moments.results.whole;
  g.gradient = a.gradient;
  for (int i = 0; i < 3; ++i) g.gradient_strides[i] = a.gradient_strides[i];
  g.per_image = a.reduction == Reduction::none, g.loss_blocks = g.per_image ? a.images : 1, g.loss = a.loss;
  const double count = static_cast<double>(a.pixels);
  g.scale = 1 / (count * count * (a.reduction == Reduction::mean ? static_cast<double>(images) : 1));

  if (row && a.need_grad) {
    WeightedMomentArguments<Sums>& w = plan.weighted;
    w.features = g.features, w.images = a.images, w.pixels = a.pixels, w.sums = sums;
    w.alpha = g.alpha, w.size = g.size, w.counters = scales.moments.results.counters;
    w.ranges = ranges_of(images * tiles_of(channels_s), a.pixels, device.multiprocessors);
    w.partial = workspace.take<float>(images * tiles_of(channels_s) * w.ranges.splits * BLOCK * BLOCK);
    w.weighted = workspace.take<uint16_t>(images * elements_of_terms(channels_s));
    g.weighted = w.weighted;
  }
  return plan;
}

inline LossPlan make_plan(const LossArguments& a, const sm80::Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images, pixels = a.pixels, channels_s = a.features[STUDENT].channels;
  LossPlan plan{};
  static_cast<ScalesPlan&>(plan) = plan_scales(a, device, workspace);
  const bool row = a.relation.normalize == Normalize::row, scaled = a.relation.normalize != Normalize::none;
  sm80::Params& t = plan.tiles;
  for (int i = 0; i < 2; ++i) t.features[i] = a.tile_features[i], t.features[i].alpha = plan.norms.alpha[i];
  t.images = a.images, t.pixels = a.pixels;
  t.distance = a.relation.distance, t.delta = static_cast<float>(a.relation.delta);
  t.row = row, t.zero_diagonal = a.relation.normalize == Normalize::cosine;
  plan.u_channels = sm80::plan(t, a.precision, a.need_grad, device);
  t.loss = workspace.take<double>(images * t.splits * t.blocks);
  if (a.need_grad) {
    t.U = workspace.take<float>(int64_t{t.splits} * images * pixels * channels_s);
    const int64_t image = pixels * channels_s;
    t.U_strides[0] = images * image, t.U_strides[1] = image;
    t.U_strides[2] = a.pixels_adjacent ? 1 : channels_s, t.U_strides[3] = a.pixels_adjacent ? pixels : 1;
    if (scaled) t.h = workspace.take<float>(t.splits * images * pixels);
  }

  SumsOfSplits sums{};
  sums.losses = t.loss, sums.loss_parts = t.splits * t.blocks, sums.U = t.U, sums.h = t.h, sums.splits = t.splits;
  for (int i = 0; i < 4; ++i) sums.U_strides[i] = t.U_strides[i];
  sums.h_strides[0] = images * pixels, sums.h_strides[1] = pixels;
  static_cast<GradientPlan<SumsOfSplits>&>(plan) = plan_gradient(a, plan, sums, device, workspace);
  const int64_t grid = images * t.blocks * t.channel_splits;
  if (grid > plan.largest_grid) plan.largest_grid = grid;
  return plan;
}

// Returns the problem that the tiles of sm_90a have to solve.
inline sm90::Problem problem_of(const LossArguments& a) {
  return {a.images,
          a.pixels,
          a.features[algebra::STUDENT].channels,
          a.features[algebra::TEACHER].channels,
          a.precision,
          a.need_grad,
          a.relation.normalize,
          a.relation.distance,
          static_cast<float>(a.relation.delta)};
}

inline Sm90LossPlan make_sm90_plan(const LossArguments& a, const sm80::Device& device, Workspace& workspace) {
  Sm90LossPlan plan{};
  static_cast<ScalesPlan&>(plan) = plan_scales(a, device, workspace);
  const auto features = [&](const sm80::Features& x) {
    return sm90::Features{x.data,
                          {x.image_stride, a.pixels_adjacent ? 1 : x.line_stride,
                           a.pixels_adjacent ? x.line_stride : 1},
                          x.channels,
                          a.element_bytes};
  };
  plan.tiles = sm90::plan_tiles(problem_of(a), features(a.features[algebra::STUDENT]),
                                features(a.features[algebra::TEACHER]), device.multiprocessors, workspace);
  plan.tiles.params.alpha_student = plan.norms.alpha[algebra::STUDENT];
  plan.tiles.params.alpha_teacher = plan.norms.alpha[algebra::TEACHER];
  const sm90::SumsOfTiles sums = sm90::sums_of(plan.tiles.params, plan.tiles.variant.symmetric);
  static_cast<GradientPlan<sm90::SumsOfTiles>&>(plan) = plan_gradient(a, plan, sums, device, workspace);
  return plan;
}

}  // namespace srpkd::cuda
