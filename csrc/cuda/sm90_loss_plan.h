// The plan of a whole relation loss with the tiles of sm_90a. Free of torch and nvcc.
#pragma once

#include "loss_plan.h"
#include "sm90/sums.cuh"
#include "sm90/tile_plan.h"

namespace srpkd::cuda {

struct Sm90LossPlan {
  ScalesPlan scales;
  sm90::TilePlan tiles;
  GradientPlan<sm90::SumsOfSegments> gradient;
  int64_t largest_grid;  // thread blocks
};

inline sm90::Problem problem_of(const LossArguments& a) {
  return {a.images,
          a.pixels,
          a.features[STUDENT].channels,
          a.features[TEACHER].channels,
          a.precision,
          a.need_grad,
          a.relation.normalize,
          a.relation.distance,
          static_cast<float>(a.relation.delta),
          a.relation.rectify,
          a.relation.differentiates_norms()};
}

inline Sm90LossPlan make_sm90_plan(const LossArguments& a, const Device& device, Workspace& workspace) {
  Sm90LossPlan plan{};
  plan.scales = plan_scales(a, device, workspace);
  const auto features = [&](const sm80::Features& x) {
    const int64_t pixel = a.pixels_adjacent ? 1 : x.line_stride, channel = a.pixels_adjacent ? x.line_stride : 1;
    return sm90::Features{x.data, {x.image_stride, pixel, channel}, x.channels, a.element_bytes};
  };
  plan.tiles = sm90::plan_tiles(problem_of(a), features(a.features[STUDENT]), features(a.features[TEACHER]),
                                device.multiprocessors, workspace);
  sm90::Params& t = plan.tiles.params;
  t.alpha_student = plan.scales.norms.alpha[STUDENT], t.alpha_teacher = plan.scales.norms.alpha[TEACHER];
  plan.gradient = plan_gradient(a, plan.scales, sm90::sums_of(t, plan.tiles.variant.symmetric), device, workspace);
  plan.largest_grid = largest_grid(a, 1);
  return plan;
}

}  // namespace srpkd::cuda
