// The scales alpha = 1 / norm of both networks, see formulas.py. Free of torch.
#pragma once

#include "matrices.cuh"

namespace srpkd::cuda::algebra {

// alpha: 0 for a zero-norm pixel, NaN if the norm is NaN or overflows.
SRPKD_DEVICE float inverse(float norm, float eps) { return norm <= eps ? 0.f : 1.f / norm + 0.f * norm; }

// Row norms: r_i^2 = q_i^T M' q_i + N (m . q_i)^2. Grid: (2 * images * row blocks, 1); the teacher's blocks come first.
//
// A block computes Y = Q M' for ROWS pixels in blocks of 64 channels n, and r_i^2 as the sum of Y_in q_in. As M' is
// symmetric, only its blocks (n, k) with k >= n are multiplied, those with k > n twice.
template <class T, bool PIXELS_ADJACENT, int WARPS_M>
struct RowNorms {
  using Arguments = NormArguments;
  using G = Geometry<WARPS_M, PIXELS_ADJACENT, 2>;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  // Two blocks of 128 pixels need the shared memory of Hopper; for other architectures the compiler would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr bool TWO_BLOCKS = TERMS<T> == 1;
#else
  static constexpr bool TWO_BLOCKS = false;
#endif
  static constexpr int THREADS = G::THREADS, MIN_BLOCKS = WARPS_M == 2 ? 2 : TWO_BLOCKS ? 2 : 1;
  static constexpr int TERM_BYTES = G::ROWS / BLOCK * PANEL_BYTES;  // of one term of the features
  static constexpr int FEATURE_BYTES = TERMS<T> * TERM_BYTES, MATRIX_BYTES = MATRIX_TERMS * PANEL_BYTES;

  const Arguments& p;
  const BlockIndex own_block;
  const sm80::Warp<G> warp{};
  const Address shared = shared_memory();
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, G::ROWS)), count = p.images * row_blocks;
  const int network = own_block.x < count ? TEACHER : STUDENT;
  const int index = own_block.x - (network == TEACHER ? 0 : count);
  const int image = index / row_blocks, pixel = index % row_blocks * G::ROWS;
  const Features& features = p.features[network];
  const int channels = features.channels, blocks = blocks_of(channels);
  const int first = network == STUDENT ? padded(p.features[TEACHER].channels) : 0;
  const int both = padded(p.features[TEACHER].channels) + padded(p.features[STUDENT].channels);
  const bool resident = blocks <= p.resident;
  const int slots = WARPS_M == 2 ? p.slots : 2;  // a constant in the kernel that is short of registers
  const uint16_t* const matrix = p.moments.centred[network] + image * elements_of_terms(channels);

  SRPKD_DEVICE RowNorms(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE Address features_at(int block) const { return shared + (resident ? block : 0) * FEATURE_BYTES; }
  SRPKD_DEVICE Address matrix_at(int slot) const { return shared + p.resident * FEATURE_BYTES + slot * MATRIX_BYTES; }

  SRPKD_DEVICE void load(Part& part, int block) const {
    part.load(features, image, {pixel + thread_index() / PANEL_THREADS * BLOCK, p.pixels}, block * BLOCK);
  }
  SRPKD_DEVICE void store_part(const Part& part, int block) const {
    part.template store<G>(features_at(block) + thread_index() / PANEL_THREADS * PANEL_BYTES, TERM_BYTES);
  }
  SRPKD_DEVICE void load_features(int block) const {
    Part part;
    load(part, block);
    store_part(part, block);
  }
  // The same for all blocks. The loads of two blocks are under way together.
  SRPKD_DEVICE void load_all_features() const {
    Part even, odd;
    load(even, 0);
#pragma unroll 1
    for (int block = 0; block < blocks; block += 2) {
      if (block + 1 < blocks) load(odd, block + 1);
      store_part(even, block);
      if (block + 2 < blocks) load(even, block + 2);
      if (block + 1 < blocks) store_part(odd, block + 1);
    }
  }

  SRPKD_DEVICE int slot_after(int slot) const { return slot + 1 < slots ? slot + 1 : 0; }

  // A step multiplies the panel (n, k) of M; those of a row n go from the last k to n.
  struct Step {
    int n, k, slot;
  };

  // Starts to copy the panel of a step, and moves on to the next.
  SRPKD_DEVICE void copy(Step& step) const {
    if (step.n < blocks) copy_matrix<THREADS, G>(matrix, step.n, step.k, blocks, matrix_at(step.slot));
    commit_copies();
    step.k > step.n ? --step.k : (++step.n, step.k = blocks - 1);
    step.slot = slot_after(step.slot);
  }

  SRPKD_DEVICE void run() const {
    sm80::RowVector<G> square{}, along{};
    Step next{0, blocks - 1, 0};
    for (int i = 1; i < slots; ++i) copy(next);
    if (resident) load_all_features();
    int slot = 0;
#pragma unroll 1
    for (int n = 0; n < blocks; ++n) {
      Sums<G> total{}, sum{};
#pragma unroll 1
      for (int k = blocks - 1; k >= n; --k) {
        if (!resident) {
          sync_block();  // the panel is free
          load_features(k);
        }
        slots == 2 ? wait_for_copies<0>() : wait_for_copies<1>();
        sync_block();  // the panels have arrived, and the slot of the step before is free
        copy(next);
        if (k == n) for_each<G::M_TILES, G::N_TILES>([&](int m, int j, int i) { total[m][j][i] *= 2; });
        const Address a = features_at(k) + warp.template lane_offset<!PIXELS_ADJACENT, true>(warp.first_row, 0);
        const Address b = matrix_at(slot) + warp.template lane_offset<true, false>(warp.first_column, 0);
        add_product<G, !PIXELS_ADJACENT, true, TERMS<T>, MATRIX_TERMS>(sum, a, TERM_BYTES, b, PANEL_BYTES);
        move_sums<G>(total, sum);
        slot = slot_after(slot);
      }
      const float* const mean = p.moments.mean + int64_t{image} * both + first;
#pragma unroll
      for (int j = 0; j < G::N_TILES; ++j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int column = warp.column(j, odd);
          const float mean_of_column = load_global(mean + n * BLOCK + column);
#pragma unroll
          for (int m = 0; m < G::M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float q =
                  element<TERMS<T>, PIXELS_ADJACENT, G>(features_at(n), TERM_BYTES, warp.row(m, half), column);
              square[m][half] += total[m][j][2 * half + odd] * q;
              along[m][half] += mean_of_column * q;
            }
        }
    }
    wait_for_copies<0>();
    sync_block();  // the panels are free
    RowNorms(p, own_block)
        .store(square, along);  // computes its members again, so that they do not occupy registers before
  }

  // Adds the parts of the lanes and warps of a row, and writes alpha.
  SRPKD_DEVICE void store(const sm80::RowVector<G>& square, const sm80::RowVector<G>& along) const {
    const float size = load_global(p.moments.size + image * 2 + network);
    const auto place = [&](int row, int warp_n, bool of_mean) {
      return shared + ((of_mean * G::WARPS_N + warp_n) * G::ROWS + row) * 4;
    };
    for (int m = 0; m < G::M_TILES; ++m)
      for (int half = 0; half < 2; ++half)
        for (int of_mean = 0; of_mean < 2; ++of_mean) {
          float sum = of_mean ? along[m][half] : square[m][half];
          sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
          if (warp.member == 0) store_shared(place(warp.row(m, half), warp.warp_n, of_mean), sum);
        }
    sync_block();
    const int row = thread_index();
    if (row >= G::ROWS || pixel + row >= p.pixels) return;
    const auto sum = [&](bool of_mean) {
      return load_shared<float>(place(row, 0, of_mean)) + load_shared<float>(place(row, 1, of_mean));
    };
    const float dot = sum(true), total = sum(false) + dot * dot;
    const float norm = sqrtf(total < 0 ? 0 : total) * size;  // rounding can make the sum slightly negative
    store_global(p.alpha[network] + int64_t{image} * p.pixels + pixel + row, inverse(norm, p.eps));
  }
};

// Pixel norms, for "cosine". Grid: (2 * images * blocks of 64 pixels, 1).
template <class T, bool PIXELS_ADJACENT>
struct PixelNorms {
  using Arguments = NormArguments;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  static constexpr int THREADS = PANEL_THREADS, MIN_BLOCKS = 4;
  // Every thread has a sum for each element of a unit (pixels adjacent), or for each of its lines.
  static constexpr int SUMS = PIXELS_ADJACENT ? Part::UNIT : Part::COUNT, PARTS = THREADS * SUMS / BLOCK;
  static constexpr int SHARED_BYTES = PARTS * BLOCK * 4;

  const Arguments& p;
  const BlockIndex own_block;

  SRPKD_DEVICE PixelNorms(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    const int row_blocks = static_cast<int>(ceil_div(p.pixels, BLOCK)), count = p.images * row_blocks;
    const int network = own_block.x < count ? TEACHER : STUDENT;
    const int index = own_block.x - (network == TEACHER ? 0 : count);
    const int image = index / row_blocks, pixel = index % row_blocks * BLOCK;
    const Features& features = p.features[network];
    const Address shared = shared_memory();

    Part part;
    float sums[SUMS] = {};
#pragma unroll 1
    for (int channel = 0; channel < features.channels; channel += BLOCK) {
      part.load(features, image, {pixel, p.pixels}, channel);
#pragma unroll
      for (int i = 0; i < Part::COUNT; ++i)
#pragma unroll
        for (int e = 0; e < Part::UNIT; ++e) sums[PIXELS_ADJACENT ? e : i] += part.raw[i][e] * part.raw[i][e];
    }
    const int part_of_pixel = PIXELS_ADJACENT ? part.first_line : part.unit;
#pragma unroll
    for (int i = 0; i < SUMS; ++i)
      store_shared(shared + (part_of_pixel * BLOCK + part.pixel(PIXELS_ADJACENT ? 0 : i, PIXELS_ADJACENT ? i : 0)) * 4,
                   sums[i]);
    sync_block();
    const int thread = thread_index();
    if (thread >= BLOCK || pixel + thread >= p.pixels) return;
    float square = 0;
    for (int i = 0; i < PARTS; ++i) square += load_shared<float>(shared + (i * BLOCK + thread) * 4);
    store_global(p.alpha[network] + int64_t{image} * p.pixels + pixel + thread, inverse(sqrtf(square), p.eps));
  }
};

}  // namespace srpkd::cuda::algebra
