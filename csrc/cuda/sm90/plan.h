// What host and device share: the kernels' arguments and configurations, and the use of shared memory. Compiles without
// nvcc.
#pragma once

#include <cmath>
#include <type_traits>

#include "coverage.h"
#include "tensor_map.h"

namespace srpkd::cuda::sm90 {

constexpr int CHUNK = TILE * GROUP * 2;    // bytes: a group of channels of a block of pixels, in 16 bits
constexpr int U_BLOCK = TILE * GROUP;      // floats: U of a block of pixels and a group of channels
constexpr int MAX_CHUNKS = 12;             // that stay in shared memory, and slots of the ring
constexpr int CONSUMERS = 2;               // warpgroups, each with half of the rows of a tile
constexpr int LOSS_TERMS = 4 * CONSUMERS;  // one of each warp

// The scales of a pixel: D_ij = alpha_i (G_s,ij - ratio_i G_t,ij), with one fused multiply-add that is exactly 0 for
// equal features. alpha is the student's times Params::powers; ratio is the teacher's alpha divided by the
// student's. See prepare.cuh for zero-norm pixels.
struct alignas(8) PixelScale {
  float alpha, ratio;
};

// The same for row if each pixel has a unit of its own (Config::UNITS_OF_COLUMNS). alpha_i does not depend on column j:
// D_ij = alpha_i unit_j (G_s,ij - ratio_i ratio_of_units_j G_t,ij). unit is the student's relative to the largest of
// the image; ratio_of_units is the teacher's unit divided by the student's. Products with powers of two are exact, so
// D_ij is still exactly 0 for equal features.
struct alignas(16) PixelScaleWithUnits {
  float alpha, ratio, unit, ratio_of_units;
};

// Features that the kernel first copies to 16-bit terms with adjacent pixels.
struct Source {
  const void* data;
  int64_t strides[3];  // elements, between images, pixels and channels
  int channels;
  int element_bytes;  // 4: float32; 2: the element type of the kernel
  int64_t line;       // elements from one channel of `terms` to the next
  uint16_t* terms;    // (images, TERMS, channels, line); null if the features are read in place
};

struct Params {
  TensorMap student, teacher;
  Source sources[2];  // of the student and the teacher
  int images, pixels;
  Work work;
  int channel_splits;                  // groups of U's channels, which count as images of `work`; 1 without gradient
  int student_groups, teacher_groups;  // of channels
  int resident;                        // groups of the row block that stay in shared memory; others come with each tile
  int slots;                           // of the ring
  bool turns;                          // of the consumers: they need a ring for the chunks of a whole tile
  bool zero_diagonal;                  // D_ii = 0
  float delta;                         // infinity for l2, which is twice a Huber distance
  float loss_factor, sum_factor;       // of the loss, and of U and h
  float h_scale;                       // h is stored in units of 1 / h_scale
  const float* alpha_student;          // (images, pixels), null if it is 1
  const float* alpha_teacher;
  void* scales;         // Config::Scale (images, blocks * TILE), zeros beyond the last pixel
  float* powers;        // (images): K, h and the loss are multiplied by it, see unit_of_sums
  double* loss;         // (images, blocks, parts, LOSS_TERMS)
  int64_t* h;           // (images, blocks * TILE), null if not computed
  float* U_columns;     // (copies, images of work, blocks, U_BLOCK): sums over tiles above the diagonal
  float* U_rows;        // (parts, images of work, blocks, U_BLOCK): of the other tiles
  uint32_t* additions;  // (copies, images of work, blocks): to U_columns, so far
  int64_t loss_count, additions_count;
  // Of the student and the teacher, (images, pixels): the powers of two by which the features of a pixel are divided
  // before they become float16 terms. Null if features are multiplied as they are, see has_units.
  float* units[2];
  float* measured_units[2];  // those of the pixels' own features; 0 for pixels that have none but 0
};

// The template arguments of one kernel. TERMS: how many 16-bit terms a feature consists of: two float16 terms have 22
// bits or more of a float32 in units, one has 11, as many as TF32. In the tensor maps, term t of image b is image
// b * TERMS + t.
template <class Element_, bool PIXELS_ADJACENT_, bool SYMMETRIC_, bool L1_, bool GRAD_, int TERMS_>
struct Config {
  using Element = Element_;
  static constexpr bool PIXELS_ADJACENT = PIXELS_ADJACENT_;
  static constexpr bool SYMMETRIC = SYMMETRIC_;  // A_ij = G_ij alpha_i alpha_j, else G_ij alpha_i
  static constexpr bool L1 = L1_;                // else Huber, of which l2 is a limit
  static constexpr bool GRAD = GRAD_;
  static constexpr int TERMS = TERMS_;
  static constexpr bool SCALED = std::is_same_v<Element, Half>;  // so that K is in the range of float16
  static constexpr bool TWO_TERMS = TERMS == 2;
  static_assert(TERMS == 1 || (TWO_TERMS && SCALED));
  // Whether row has a unit for each pixel. Otherwise those of an image have the same, and PixelScale suffices.
  static constexpr bool UNITS_OF_COLUMNS = TWO_TERMS && !SYMMETRIC;
  using Scale = std::conditional_t<UNITS_OF_COLUMNS, PixelScaleWithUnits, PixelScale>;

  // The warpgroups: a producer, which starts all loads and the additions to global memory, the consumers, and one that
  // computes U of the columns.
  static constexpr int THREADS = 128 * (1 + CONSUMERS + GRAD);
  static constexpr int PRODUCER_REGISTERS = GRAD ? 32 : 24, CONSUMER_REGISTERS = GRAD ? 208 : 240,
                       COLUMN_REGISTERS = 64;
  static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS + GRAD * COLUMN_REGISTERS) <= 1 << 16);

  // The student's group whose part of U is computed is the last of each tile. It stays in shared memory until that
  // product is done, so the next tile needs another buffer. With two terms there is no room for it.
  static constexpr int STAGES = TERMS == 1 ? 2 : 1;
  // Two chunks for each term of K. Term 1 is the part that term 0 does not represent.
  static constexpr int K_BYTES = GRAD ? TERMS * 2 * CHUNK : 0;

  // The products of a group start while those of the group before are in flight. The ring must hold the chunks of both.
  static constexpr bool OVERLAP = TERMS == 1 || !GRAD;

  // Offsets in shared memory.
  static constexpr int K = 0;                                    // (TERMS, 2 halves of the columns, TILE rows) lines
  static constexpr int STAGING = K + K_BYTES;                    // half of U_BLOCK
  static constexpr int COLUMNS = STAGING + GRAD * CHUNK;         // (STAGES, TERMS) chunks
  static constexpr int ROWS = COLUMNS + STAGES * TERMS * CHUNK;  // (TERMS) chunks, the last group of the row block
  static constexpr int SCALES = ROWS + TERMS * CHUNK;            // (STAGES, TILE) of the columns
  static constexpr int BARRIERS = SCALES + STAGES * TILE * int{sizeof(Scale)};
  static constexpr int CHUNKS = BARRIERS + 1024;  // (resident, TERMS), then the ring's slots
  static constexpr int FREE_CHUNKS = (SHARED_LIMIT - CHUNKS) / CHUNK;

  static_assert(FREE_CHUNKS >= (OVERLAP ? 4 : 2) * TERMS);

  static constexpr int bytes(const Params& p) { return CHUNKS + (p.resident * TERMS + p.slots) * CHUNK; }

  // Barriers, 8 bytes each.
  static constexpr int ROWS_FULL = BARRIERS;  // (MAX_CHUNKS + 1): resident groups, the last group
  static constexpr int ROWS_EMPTY = ROWS_FULL + 8 * (MAX_CHUNKS + 1);
  static constexpr int COLUMNS_FULL = ROWS_EMPTY + 8, COLUMNS_EMPTY = COLUMNS_FULL + 16;         // (2)
  static constexpr int RING_FULL = COLUMNS_EMPTY + 16, RING_EMPTY = RING_FULL + 8 * MAX_CHUNKS;  // (MAX_CHUNKS)
  static constexpr int TURN = RING_EMPTY + 8 * MAX_CHUNKS;                                       // (CONSUMERS)
  static constexpr int K_FULL = TURN + 8 * CONSUMERS, K_EMPTY = K_FULL + 8, SEGMENT_FULL = K_EMPTY + 8;
  static constexpr int STAGING_FULL = SEGMENT_FULL + 8, STAGING_EMPTY = STAGING_FULL + 8;
  static constexpr int WALKS = BARRIERS + 512, SEGMENT = WALKS + 64;  // of the two loaders; ints, see Published
  static_assert(STAGING_EMPTY + 8 <= WALKS && SEGMENT + 32 <= CHUNKS && CHUNKS % ALIGNMENT == 0);
};

// The template arguments of a kernel except its precision.
struct Variant {
  bool pixels_adjacent, symmetric, l1, grad;
};

template <class F>
auto with_constant(bool value, F f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

// Returns whether features are divided by the units of their pixels, and thus copied. Those of float32 are, to become
// float16. Those of float16 are where K, float16 too, has a wide range. With cosine it is in proportion to the product
// of two alphas: one pixel whose features are 2^-17 of the others' would leave nothing of the others' K. With none it
// is rho'(D), which may have no other bound than the largest product of features.
inline bool has_units(const Problem& problem) {
  if (problem.precision != Precision::fp16) return problem.precision != Precision::bf16;
  if (problem.normalize == Normalize::none)
    return problem.distance == Distance::l2 || (problem.distance == Distance::huber && problem.delta > 1);
  return problem.normalize == Normalize::cosine;
}

// Calls f(Config<...>{}) for one precision, an integral_constant: bf16, fp16, or tf32x3 for two float16 terms, which
// are as good as three products of tf32. Those are always written with adjacent pixels.
template <class P, class F>
auto with_config(P, const Variant& variant, F f) {
  constexpr bool TWO_TERMS = P::value == Precision::tf32x3;
  using Element = std::conditional_t<P::value == Precision::bf16, BFloat16, Half>;
  return with_constant(variant.symmetric, [&](auto symmetric) {
    return with_constant(variant.l1, [&](auto l1) {
      return with_constant(variant.grad, [&](auto grad) {
        constexpr bool SYMMETRIC = decltype(symmetric)::value, L1 = decltype(l1)::value, GRAD = decltype(grad)::value;
        if constexpr (TWO_TERMS) {
          return f(Config<Element, true, SYMMETRIC, L1, GRAD, 2>{});
        } else {
          return with_constant(variant.pixels_adjacent, [&](auto adjacent) {
            return f(Config<Element, decltype(adjacent)::value, SYMMETRIC, L1, GRAD, 1>{});
          });
        }
      });
    });
  });
}

// Calls f with the precision of a kernel as an integral_constant: that of tf32 is fp16, one float16 term.
template <class F>
auto with_precision(Precision precision, F f) {
  if (precision == Precision::bf16) return f(std::integral_constant<Precision, Precision::bf16>{});
  if (precision == Precision::tf32x3) return f(std::integral_constant<Precision, Precision::tf32x3>{});
  return f(std::integral_constant<Precision, Precision::fp16>{});
}

// Sets all parameters that follow from the problem, except pointers and tensor maps.
inline void plan(Params& p, const Problem& problem, int multiprocessors) {
  p.images = problem.images, p.pixels = problem.pixels;
  p.student_groups = static_cast<int>(ceil_div(problem.student_channels, GROUP));
  p.teacher_groups = static_cast<int>(ceil_div(problem.teacher_channels, GROUP));
  p.channel_splits = problem.grad ? p.student_groups : 1;
  p.work = divide(problem.images * p.channel_splits, problem.pixels, TILE, multiprocessors);
  const auto fill = [&](auto config) {
    using C = decltype(config);
    constexpr int LEAST_SLOTS = (C::OVERLAP ? 4 : 2) * C::TERMS;  // rows and columns of a group, or of two
    const int others = p.teacher_groups + p.student_groups - 1;
    p.resident = minimum(minimum(others, MAX_CHUNKS), (C::FREE_CHUNKS - LEAST_SLOTS) / C::TERMS);
    p.slots = minimum(C::FREE_CHUNKS - p.resident * C::TERMS, MAX_CHUNKS);
    p.turns = C::TERMS * (p.resident + 2 * (others - p.resident)) <= p.slots;
  };
  with_precision(problem.precision, [&](auto chosen) { with_config(chosen, {true, true, true, problem.grad}, fill); });
  p.loss_count = int64_t{p.images} * p.work.blocks * p.work.parts * LOSS_TERMS;
  p.additions_count = int64_t{p.work.copies} * p.work.images * p.work.blocks;
  const bool l2 = problem.distance == Distance::l2;
  p.delta = l2 ? INFINITY : problem.delta;
  p.zero_diagonal = problem.normalize == Normalize::cosine;
  p.loss_factor = l2 ? 2.f : 1.f, p.sum_factor = p.loss_factor * (problem.normalize == Normalize::row ? 1.f : 2.f);
  // |P_ij A_ij| <= 4, and sums of 2 N of them fit into 63 bits. The sum of any order is the same
  int exponent = 57;
  for (int64_t pixels = 1; pixels < problem.pixels; pixels *= 2) --exponent;
  p.h_scale = static_cast<float>(int64_t{1} << exponent);
}

}  // namespace srpkd::cuda::sm90
