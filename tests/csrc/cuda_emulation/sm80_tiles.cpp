#include "../../../csrc/cuda/sm80/relation_tiles.cuh"
#include "tiles.h"

namespace srpkd::cuda {

TilesKernel sm80_tiles(const sm80::Params& p, Precision precision, bool pixels_adjacent, int u_channels) {
  const auto kernel = [&](auto config) {
    using C = decltype(config);
    return TilesKernel{C::THREADS, sm80::shared_bytes<C>(p), [&p] { run_in_order<sm80::RelationTiles<C>>(p); }};
  };
  return sm80::with_precision(precision, [&](auto chosen) {
    return p.rectify ? sm80::with_config<true>(chosen, pixels_adjacent, u_channels, kernel)
                     : sm80::with_config<false>(chosen, pixels_adjacent, u_channels, kernel);
  });
}

}  // namespace srpkd::cuda
