// Whether the wgmma kernel is known to be right and faster than the mma.sync kernel for a loss.
#pragma once

#include <array>

#include "types.h"

namespace srpkd::cuda {

struct VerifiedKind {
  Precision precision;
  int element_bytes;  // of a feature
  Normalize normalize;
  Distance distance;
  bool need_grad;
  int student_panels, teacher_panels;  // of 64 channels
};

}  // namespace srpkd::cuda

#include "verified_rows.h"  // VERIFIED_SM90

namespace srpkd::cuda {

// Returns whether the wgmma kernel may compute such a loss without being asked for: at any N and B.
constexpr bool sm90_verified(Precision precision, int element_bytes, Normalize normalize, Distance distance,
                             bool need_grad, int student_channels, int teacher_channels) {
  const int64_t student_panels = ceil_div(student_channels, 64), teacher_panels = ceil_div(teacher_channels, 64);
  for (const VerifiedKind& kind : VERIFIED_SM90) {
    if (kind.precision == precision && kind.element_bytes == element_bytes && kind.normalize == normalize &&
        kind.distance == distance && kind.need_grad == need_grad && kind.student_panels == student_panels &&
        kind.teacher_panels == teacher_panels) {
      return true;
    }
  }
  return false;
}

}  // namespace srpkd::cuda
