// The product of the gradient and the upstream gradient, in backward. Free of torch.
#pragma once

#include "panels.cuh"
#include "phases.cuh"

namespace srpkd::cuda::algebra {

// T: of the result. Stored: of the gradient. The product is that of floats, rounded to T once. Grid: (blocks, 1).
template <class T, class Stored>
struct Backward {
  using Arguments = BackwardArguments;
  static constexpr int THREADS = 256, UNIT = 8;  // adjacent elements of a thread
  // as many as the threads of a multiprocessor allow: 2048 on GPUs for data centres, 1536 on others
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
  static constexpr int MIN_BLOCKS = 2048 / THREADS;
#else
  static constexpr int MIN_BLOCKS = 1536 / THREADS;
#endif
  static constexpr int PER_WORD = 4 / sizeof(T), WORDS = UNIT / PER_WORD;

  const Arguments& p;
  const BlockIndex own_block;

  SRPKD_DEVICE Backward(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    const int64_t first = (int64_t{own_block.x} * THREADS + thread_index()) * UNIT;
    if (first >= p.count) return;
    const int valid = p.count - first < UNIT ? static_cast<int>(p.count - first) : UNIT;
    Raw<Stored, UNIT> x;
    x.load(static_cast<const Stored*>(p.gradient) + first, valid, true);
    float product_of[UNIT];
    const int64_t image = image_of(first);
    const float factor = factor_of(image);
    if (image_of(first + valid - 1) == image) {
#pragma unroll
      for (int e = 0; e < UNIT; ++e) product_of[e] = x[e] * factor;
    } else {
#pragma unroll
      for (int e = 0; e < UNIT; ++e) product_of[e] = e < valid ? x[e] * factor_of(image_of(first + e)) : 0.f;
    }
    store(first, valid, product_of);
  }

  SRPKD_DEVICE int64_t image_of(int64_t at) const { return p.image_elements < p.count ? at / p.image_elements : 0; }
  SRPKD_DEVICE float factor_of(int64_t image) const { return load_input(p.grad_loss + image * p.grad_loss_stride); }

  SRPKD_DEVICE void store(int64_t first, int valid, const float (&value)[UNIT]) const {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    Bits* const to = static_cast<Bits*>(p.result) + first;
    uint32_t word[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(T) == 4)
        word[i] = as_bits(value[i]);
      else
        word[i] = pack<T>(value[2 * i], value[2 * i + 1]);
    }
    if (valid == UNIT) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint32_t part[4] = {word[i], word[i + 1], word[i + 2], word[i + 3]};
        store_words(to + i * PER_WORD, part);
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < UNIT; ++e)
      if (e < valid) store_global(to + e, static_cast<Bits>(word[e / PER_WORD] >> e % PER_WORD * 16));
  }
};

template <class T, class Launch>
void launch_backward(const BackwardArguments& p, Launch& launch) {
  using Kernel = Backward<T, float>;
  const int blocks = static_cast<int>(ceil_div(p.count, Kernel::THREADS * Kernel::UNIT));
  p.narrow ? launch(Phase<Backward<T, BFloat16>>{p, blocks, 1, 0}) : launch(Phase<Kernel>{p, blocks, 1, 0});
}

}  // namespace srpkd::cuda::algebra
