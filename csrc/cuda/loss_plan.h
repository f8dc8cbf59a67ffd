// The plan of a whole relation loss on a GPU: arguments of all kernels, their launch grids and the workspace that they
// share. Free of torch and nvcc: the emulation in tests/csrc runs the same plan without a GPU.
#pragma once

#include "algebra/arguments.h"
#include "sm80/plan.h"

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

// The scales of both relation matrices.
struct ScalesPlan {
  Normalize normalize;
  algebra::FinishArguments moments;  // only for "row"
  algebra::NormArguments norms;
  bool wide;  // see is_wide: a block of the row norms and of the gradient computes 128 pixels instead of 64
};

// From the sums of the tiles to the loss and the gradient. SumsOfTiles: how the tiles store them, SumsOfSplits (sm80)
// or sm90::SumsOfSegments.
template <class SumsOfTiles>
struct GradientPlan {
  algebra::WeightedMomentArguments<SumsOfTiles> weighted;  // only for "row", with a gradient
  algebra::GradientArguments<SumsOfTiles> gradient;
  bool wide;
};

struct LossPlan {
  ScalesPlan scales;
  sm80::Params tiles;
  int u_channels;  // of a thread block of the tiles
  GradientPlan<algebra::SumsOfSplits> gradient;
  int64_t largest_grid;  // thread blocks
};

// Hands out parts of one allocation, or adds up its size if `base` is null.
struct Workspace {
  char* base;
  int64_t bytes = 0;

  explicit Workspace(char* base) : base(base) {}
  virtual ~Workspace() = default;

  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(reserve(count * static_cast<int64_t>(sizeof(T))));
  }

 protected:
  // Tests replace it, to see accesses beyond a part.
  virtual char* reserve(int64_t size) {
    const int64_t begin = bytes;
    bytes += round_up(size, 256);
    return base ? base + begin : nullptr;
  }
};

// Splits the pixels of a sum by `blocks` thread blocks per range, of which `resident` fit on the GPU at once: into the
// ranges that take the fewest steps, a step being BLOCK pixels. A thread block starts and ends in about as long as
// START steps take.
inline algebra::Ranges ranges_of(int64_t blocks, int pixels, int64_t resident, int64_t limit = algebra::MAX_SPLITS) {
  constexpr int64_t START = 4;
  const int64_t steps = ceil_div(pixels, algebra::BLOCK), most = ceil_div(steps, 2);
  int64_t chosen = 1, least = 0;
  for (int64_t splits = 1; splits <= limit && splits <= most; ++splits) {
    const int64_t cost = ceil_div(blocks * splits, resident) * (ceil_div(steps, splits) + START);
    if (splits == 1 || cost < least) chosen = splits, least = cost;
  }
  const int split_pixels = static_cast<int>(ceil_div(steps, chosen)) * algebra::BLOCK;
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

// Returns whether the pixels fill the GPU. If not, launches take longer on the host than the kernels on the GPU, and
// kernels share launches.
inline bool is_wide(const LossArguments& a, int multiprocessors) {
  return int64_t{2} * a.images * ceil_div(a.pixels, 2 * algebra::BLOCK) >= multiprocessors;
}

inline ScalesPlan plan_scales(const LossArguments& a, const Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images, pixels = a.pixels;
  ScalesPlan plan{};
  plan.normalize = a.relation.normalize;
  plan.wide = is_wide(a, device.multiprocessors);
  if (a.relation.normalize == Normalize::none) return plan;

  NormArguments& n = plan.norms;
  n.images = a.images, n.pixels = a.pixels, n.eps = static_cast<float>(a.relation.eps);
  for (int i = 0; i < 2; ++i) n.features[i] = a.features[i], n.alpha[i] = workspace.take<float>(images * pixels);
  if (a.relation.normalize != Normalize::row) return plan;

  const int feature_bytes = terms_of(a.element_bytes, a.precision) * PANEL_BYTES * (plan.wide ? 2 : 1);
  n.resident = resident_blocks(a.features, feature_bytes, device.shared_of_block);
  // In small calls, a step would wait for its copy. A third slot must leave two thread blocks on a multiprocessor.
  const int bytes = n.resident * feature_bytes + 3 * MATRIX_TERMS * PANEL_BYTES;
  n.slots = !plan.wide && 2 * bytes <= device.shared_of_block ? 3 : 2;
  MomentArguments& m = plan.moments.sums;
  MomentResults& results = plan.moments.results;
  const int channels_t = a.features[TEACHER].channels, channels_s = a.features[STUDENT].channels;
  const int64_t both = padded(channels_t) + padded(channels_s);
  const int64_t tiles_s = tiles_of(channels_s), tiles = tiles_of(channels_t) + tiles_s;
  for (int i = 0; i < 2; ++i) m.features[i] = a.features[i];
  m.images = a.images, m.pixels = a.pixels;
  m.ranges = ranges_of(images * tiles, a.pixels, int64_t{device.multiprocessors} * (a.element_bytes == 4 ? 2 : 3));
  m.partial = workspace.take<float>(images * tiles * m.ranges.splits * BLOCK * BLOCK);
  m.sums = workspace.take<float>(images * m.ranges.splits * both);
  m.squares = workspace.take<float>(images * m.ranges.splits * both);
  m.shift = workspace.take<float>(images * both);
  results.centred[TEACHER] = workspace.take<uint16_t>(images * elements_of_terms(channels_t));
  results.centred[STUDENT] = workspace.take<uint16_t>(images * elements_of_terms(channels_s));
  results.whole = workspace.take<uint16_t>(images * elements_of_terms(channels_s));
  results.mean = workspace.take<float>(images * both);
  results.size = workspace.take<float>(images * 2);
  if (plan.wide) results.counters = workspace.take<int>(images * tiles_s);
  n.moments = results;
  return plan;
}

// Sets where a kernel writes the loss and the gradient, and the scale of both.
template <class Arguments>
void set_results(Arguments& p, const LossArguments& a) {
  p.gradient = a.gradient;
  for (int i = 0; i < 3; ++i) p.gradient_strides[i] = a.gradient_strides[i];
  p.per_image = a.reduction == Reduction::none, p.loss_blocks = p.per_image ? a.images : 1, p.loss = a.loss;
  const double pixels = a.pixels, images = a.reduction == Reduction::mean ? a.images : 1;
  p.scale = 1 / (pixels * pixels * images);
}

template <class SumsOfTiles>
GradientPlan<SumsOfTiles> plan_gradient(const LossArguments& a, const ScalesPlan& scales, const SumsOfTiles& sums,
                                        const Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images;
  const algebra::MomentResults& moments = scales.moments.results;
  GradientPlan<SumsOfTiles> plan{};
  plan.wide = scales.wide;
  GradientArguments<SumsOfTiles>& g = plan.gradient;
  g.features = a.features[STUDENT], g.images = a.images, g.pixels = a.pixels;
  g.normalize = a.relation.differentiates_norms() ? a.relation.normalize : Normalize::none, g.sums = sums;
  g.alpha = scales.norms.alpha[STUDENT], g.size = moments.size, g.moment = moments.whole;
  set_results(g, a);
  if (g.normalize != Normalize::row || !a.need_grad) return plan;

  WeightedMomentArguments<SumsOfTiles>& w = plan.weighted;
  const int channels = g.features.channels;
  w.features = g.features, w.images = a.images, w.pixels = a.pixels, w.sums = sums;
  w.alpha = g.alpha, w.size = g.size, w.counters = moments.counters;
  w.ranges = ranges_of(images * tiles_of(channels), a.pixels, int64_t{device.multiprocessors} * 2,
                       plan.wide ? MAX_WEIGHTED_SPLITS : MAX_SPLITS);
  w.partial = workspace.take<float>(images * tiles_of(channels) * w.ranges.splits * BLOCK * BLOCK);
  w.weighted = workspace.take<uint16_t>(images * elements_of_terms(channels));
  g.weighted = w.weighted;
  return plan;
}

// Returns at least the thread blocks of any kernel, of which the tiles have `tile_blocks` for a block of pixels.
inline int64_t largest_grid(const LossArguments& a, int tile_blocks) {
  using namespace algebra;
  const int channels_t = a.features[TEACHER].channels, channels_s = a.features[STUDENT].channels;
  const int64_t most = tile_blocks > 2 ? tile_blocks : 2;  // the norms have two, for two networks
  const bool moments = a.relation.normalize == Normalize::row;
  return a.images * (ceil_div(a.pixels, BLOCK) * (most + blocks_of(channels_s)) +
                     (moments ? tiles_of(channels_t) + tiles_of(channels_s) : 0));
}

// The whole loss with the tiles of sm80.
inline LossPlan make_plan(const LossArguments& a, const Device& device, Workspace& workspace) {
  using namespace algebra;
  const int64_t images = a.images, pixels = a.pixels, channels = a.features[STUDENT].channels;
  LossPlan plan{};
  plan.scales = plan_scales(a, device, workspace);

  sm80::Params& t = plan.tiles;
  for (int i = 0; i < 2; ++i) t.features[i] = a.tile_features[i], t.features[i].alpha = plan.scales.norms.alpha[i];
  t.images = a.images, t.pixels = a.pixels;
  t.distance = a.relation.distance, t.delta = static_cast<float>(a.relation.delta);
  t.row = a.relation.normalize == Normalize::row, t.zero_diagonal = a.relation.normalize == Normalize::cosine;
  t.rectify = a.relation.rectify;
  plan.u_channels = sm80::plan(t, a.precision, a.need_grad, device);
  t.loss = workspace.take<double>(images * t.splits * t.blocks);
  if (a.need_grad) {
    const int64_t image = pixels * channels;
    t.U = workspace.take<float>(t.splits * images * image);
    t.U_strides[0] = images * image, t.U_strides[1] = image;
    t.U_strides[2] = a.pixels_adjacent ? 1 : channels, t.U_strides[3] = a.pixels_adjacent ? pixels : 1;
    if (a.relation.differentiates_norms()) t.h = workspace.take<float>(t.splits * images * pixels);
  }

  SumsOfSplits sums{};
  sums.losses = t.loss, sums.loss_parts = t.splits * t.blocks, sums.U = t.U, sums.h = t.h, sums.splits = t.splits;
  for (int i = 0; i < 4; ++i) sums.U_strides[i] = t.U_strides[i];
  sums.h_strides[0] = images * pixels, sums.h_strides[1] = pixels;
  plan.gradient = plan_gradient(a, plan.scales, sums, device, workspace);
  plan.largest_grid = largest_grid(a, t.channel_splits);
  return plan;
}

}  // namespace srpkd::cuda
