// How kernels after the tiles read their sums. Free of torch.
#pragma once

#include "plan.h"

namespace srpkd::cuda::sm90 {

// What the tiles leave in the workspace.
struct SumsOfSegments {
  static constexpr bool PERMUTED = true;  // U is in the order of position_in_U, see for_each_U
  Work work;
  int images, pixels, channel_splits;
  bool symmetric;
  float sum_factor, h_scale;
  int loss_parts;  // of an image
  const double* losses;
  const int64_t* h;
  const float* U_columns;
  const float* U_rows;
  const float* powers;
  const float* units;  // of the student's features, null if it is 1
  const float* alpha;  // of the student, null if it is 1
};

inline SumsOfSegments sums_of(const Params& p, bool symmetric) {
  return {p.work,    p.images,     p.pixels,       p.channel_splits,
          symmetric, p.sum_factor, p.h_scale,      p.work.blocks * p.work.parts * LOSS_TERMS,
          p.loss,    p.h,          p.U_columns,    p.U_rows,
          p.powers,  p.units[0],   p.alpha_student};
}

// The position of a channel of a group and a pixel of a block in U_BLOCK floats. It is the order of the accumulators of
// U_J (channels x pixels), such that a warp stores 512 adjacent bytes.
SRPKD_HOST_DEVICE constexpr int position_in_U(int channel, int pixel) {
  const int lane = channel % 8 * 4 + pixel % 8 / 2;
  return ((pixel / 8 * 4 + channel / 16) * 32 + lane) * 4 + channel % 16 / 8 * 2 + pixel % 2;
}

// The inverse, for multiples of 4 floats. The next float is that of the next pixel, and the two after them are those of
// eight channels further.
struct ChannelAndPixel {
  int channel, pixel;
};
SRPKD_HOST_DEVICE constexpr ChannelAndPixel place_in_U(int position) {
  const int lane = position / 4 % 32, group = position / 128;
  return {group % 4 * 16 + lane / 4, group / 4 * 8 + lane % 4 * 2};
}

// Calls f with each place in the workspace that has a part of U of one block and group of channels, always in the same
// order.
template <class F>
SRPKD_HOST_DEVICE void for_each_part(const SumsOfSegments& sums, int image_of_work, int block, F f) {
  const Work& work = sums.work;
  const int64_t stride = int64_t{work.images} * work.blocks, at = int64_t{image_of_work} * work.blocks + block;
  const int additions = additions_to(work.blocks, block);
  for (int copy = 0; copy < work.copies && copy < additions; ++copy) f(sums.U_columns + (copy * stride + at) * U_BLOCK);
  const Owners owners = owners_of(work, image_of_work, block);
  for (int owner = owners.first; owner < owners.end; ++owner)
    f(sums.U_rows + ((owner - owners.first) * stride + at) * U_BLOCK);
}

// What h and the loss are multiplied by, besides Params::sum_factor, given that of Params::powers: K is that of the
// relation matrices times the power for row, and times its square for cosine and none, where two alphas are multiplied.
template <typename T>
SRPKD_HOST_DEVICE constexpr T unit_of_sums(bool symmetric, T power) {
  return 1 / (symmetric ? power * power : power);
}
// What U of a pixel is multiplied by. `unit`: of its features. The square of a power may be out of range.
SRPKD_HOST_DEVICE constexpr float unit_of_U(bool symmetric, float power, float unit) {
  return symmetric ? 1 / (power * unit) / power : 1 / (power * unit);
}

}  // namespace srpkd::cuda::sm90
