#include "sm90_primitives.h"
#include "tiles.h"
// after the primitives
#include "../../../csrc/cuda/sm90/relation_tiles.cuh"

namespace srpkd::cuda {

TilesKernel sm90_tiles(const sm90::Params& p, Precision precision, const sm90::Variant& variant) {
  return sm90::with_precision(precision, [&](auto chosen) {
    return sm90::with_config(chosen, variant, [&](auto config) {
      using C = decltype(config);
      return TilesKernel{C::THREADS, C::bytes(p), [&p] { sm90::relation_tiles_of_block<C>(p); }};
    });
  });
}

}  // namespace srpkd::cuda
