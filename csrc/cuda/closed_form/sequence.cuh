// The order of the kernels of the closed form, for the GPU and for the emulation: five for "row", four for "cosine",
// three for "none". Free of torch. See algebra/sequence.cuh for `launch`.
#pragma once

#include "../algebra/sequence.cuh"
#include "gradient.cuh"
#include "moments.cuh"
#include "row.cuh"

namespace srpkd::cuda::closed_form {

using algebra::Phase;

// The kernels of one form, difference or direct, and of a call that is wide or not.
template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE, bool WIDE, class Launch>
struct Sequence {
  const Plan& plan;
  Launch& launch;
  const Arguments& p = plan.arguments;
  const int row_blocks = p.images * static_cast<int>(ceil_div(p.pixels, BLOCK));

  template <class Kernel>
  Phase<Kernel> moments(const Arguments& arguments) const {
    return {arguments, p.images * arguments.tiles.count(), arguments.ranges.splits, Kernel::SHARED_BYTES};
  }
  template <class Term>
  auto sum_of_moments() const {
    using Kernel = SumMoments<Term, WIDE ? 256 : algebra::PANEL_THREADS>;
    return Phase<Kernel>{p, p.images * p.tiles.count(), STRIPS, Kernel::SHARED_BYTES};
  }
  template <Normalize NORMALIZE, bool DETACH_NORMS = false>
  auto gradient(const Arguments& arguments) const {
    using Kernel = Gradient<T, PIXELS_ADJACENT, NORMALIZE, DETACH_NORMS>;
    return Phase<Kernel>{arguments, p.loss_blocks + (p.gradient ? row_blocks : 0), 1, Kernel::SHARED_BYTES};
  }

  // Together only with the norms' gradient, the default of the loss: nvcc takes long for such a kernel.
  void launch_cosine() const {
    using Norms = algebra::PixelNorms<T, PIXELS_ADJACENT>;
    const Phase<Norms> norms{plan.norms, 2 * row_blocks, 1, Norms::SHARED_BYTES};
    const auto sums = moments<Moments<T, PIXELS_ADJACENT, DIFFERENCE, Half>>(p);
    if (!plan.detach_norms) return launch(norms, sums, sum_of_moments<Half>(), gradient<Normalize::cosine>(p));
    launch(norms), launch(sums), launch(sum_of_moments<Half>()), launch(gradient<Normalize::cosine, true>(p));
  }

  void launch_others() const {
    launch(moments<Moments<T, PIXELS_ADJACENT, DIFFERENCE>>(p)), launch(sum_of_moments<BFloat16>());
    if (plan.normalize == Normalize::none) return launch(gradient<Normalize::none>(p));
    using Scales = RowScales<T, PIXELS_ADJACENT>;
    launch(Phase<Scales>{p, row_blocks, 1, Scales::SHARED_BYTES});
    if (plan.has_second) launch(moments<ScaledMoments<T, PIXELS_ADJACENT, DIFFERENCE>>(plan.second));
    launch(gradient<Normalize::row>(plan.has_second ? plan.second : p));
  }

  void launch_loss() const { plan.normalize == Normalize::cosine ? launch_cosine() : launch_others(); }
};

template <class T, bool PIXELS_ADJACENT, class Launch>
void launch_loss(const Plan& plan, Launch& launch) {
  const auto launch_form = [&](auto difference) {
    constexpr bool DIFFERENCE = decltype(difference)::value;
    plan.wide ? Sequence<T, PIXELS_ADJACENT, DIFFERENCE, true, Launch>{plan, launch}.launch_loss()
              : Sequence<T, PIXELS_ADJACENT, DIFFERENCE, false, Launch>{plan, launch}.launch_loss();
  };
  plan.arguments.difference ? launch_form(std::true_type{}) : launch_form(std::false_type{});
}

}  // namespace srpkd::cuda::closed_form
