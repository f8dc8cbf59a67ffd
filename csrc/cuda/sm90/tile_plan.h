// From features to everything that a launch needs: parameters, tensor maps and the parts of a workspace. Compiles and
// runs without nvcc.
#pragma once

#include "plan.h"

namespace srpkd::cuda::sm90 {

// Features (images, pixels, channels) with any strides, in elements.
struct Features {
  const void* data;
  int64_t strides[3];
  int channels;
  int element_bytes;  // 4 or 2
};

struct TilePlan {
  Params params;
  TensorMapShape student, teacher;
  Precision precision;
  Variant variant;
};

// Describes features for TMA, which may not support them.
inline TensorMapShape shape_of(const Problem& problem, const Features& x, bool pixels_adjacent) {
  const int64_t adjacent = pixels_adjacent ? problem.pixels : x.channels;
  const int64_t lines = pixels_adjacent ? x.channels : problem.pixels;
  // a stride along a dimension of size 1 is arbitrary, but TMA checks it
  const int64_t line = lines == 1 ? round_up(2 * adjacent, 16) : x.element_bytes * x.strides[pixels_adjacent ? 2 : 1];
  const int64_t image = problem.images == 1 ? line * lines : x.element_bytes * x.strides[0];
  return {x.data, {adjacent, lines, problem.images}, {line, image}, {64, pixels_adjacent ? GROUP : TILE, 1}};
}

// Returns whether TMA can read features in place.
inline bool readable(const Problem& problem, const Features& x, bool pixels_adjacent) {
  const int size = pixels_adjacent ? problem.pixels : x.channels;
  return x.element_bytes == 2 && (size == 1 || x.strides[pixels_adjacent ? 1 : 2] == 1) &&
         !unsupported_reason(shape_of(problem, x, pixels_adjacent));
}

// Lets the kernel copy features to 16-bit terms, and returns a description of those.
template <class Workspace>
TensorMapShape split(const Problem& problem, const Features& x, int terms, Source& source, Workspace& workspace) {
  const int64_t line = round_up(problem.pixels, 8), image = line * x.channels;  // multiples of 16 bytes
  const int64_t images = int64_t{problem.images} * terms;
  source = {x.data, {x.strides[0], x.strides[1], x.strides[2]},       x.channels, x.element_bytes,
            line,   workspace.template take<uint16_t>(images * image)};
  return {source.terms, {problem.pixels, x.channels, images}, {2 * line, 2 * image}, {64, GROUP, 1}};
}

// workspace.take<T>(count) returns memory, or null to find out its size.
template <class Workspace>
TilePlan plan_tiles(const Problem& problem, const Features& student, const Features& teacher, int multiprocessors,
                    Workspace& workspace) {
  TilePlan result{};
  Params& p = result.params;
  plan(p, problem, multiprocessors);
  result.precision = problem.precision;
  const int terms = problem.precision == Precision::tf32x3 ? 2 : 1;
  const bool units = has_units(problem);
  const auto both = [&](bool pixels_adjacent) {
    return readable(problem, student, pixels_adjacent) && readable(problem, teacher, pixels_adjacent);
  };
  const bool pixels_adjacent = units || both(true) || !both(false);
  result.variant = {pixels_adjacent, problem.normalize != Normalize::row, problem.distance == Distance::l1,
                    problem.grad};
  const auto describe = [&](const Features& x, Source& source) {
    if (!units && readable(problem, x, pixels_adjacent)) return shape_of(problem, x, pixels_adjacent);
    return split(problem, x, terms, source, workspace);
  };
  result.student = describe(student, p.sources[0]), result.teacher = describe(teacher, p.sources[1]);

  const Work& work = p.work;
  const int64_t padded = int64_t{problem.images} * work.blocks * TILE, U = int64_t{work.images} * work.blocks * U_BLOCK;
  if (terms == 2 && !result.variant.symmetric)
    p.scales = workspace.template take<PixelScaleWithUnits>(padded);
  else
    p.scales = workspace.template take<PixelScale>(padded);
  if (units)
    for (float** of_network : {p.units, p.measured_units})
      for (int network = 0; network < 2; ++network)
        of_network[network] = workspace.template take<float>(int64_t{problem.images} * problem.pixels);
  p.powers = workspace.template take<float>(problem.images);
  p.loss = workspace.template take<double>(p.loss_count);
  if (problem.grad) {
    if (problem.with_h) p.h = workspace.template take<int64_t>(padded);
    p.U_columns = workspace.template take<float>(work.copies * U);
    p.U_rows = workspace.template take<float>(work.parts * U);
    p.additions = workspace.template take<uint32_t>(p.additions_count);
  }
  return result;
}

}  // namespace srpkd::cuda::sm90
