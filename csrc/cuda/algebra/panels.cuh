// Panels of 64 pixels x 64 channels: global memory -> registers -> bfloat16 terms in shared memory -> tensor cores.
//
// Every number is a sum of bfloat16 terms: one for bfloat16, two for float16, three for float32, each with 8 bits. The
// products of terms whose indices sum to at most two give 24 bits. Free of torch.
#pragma once

#include "../sm80/fragments.cuh"
#include "arguments.h"

namespace srpkd::cuda::algebra {

using sm80::for_each;

// The bfloat16 terms that represent a number of type T exactly.
template <class T>
constexpr int TERMS = std::is_same_v<T, BFloat16> ? 1
                      : std::is_same_v<T, Half>   ? 2
                                                  : 3;

// The terms of an element of a matrix: 24 bits in three of bfloat16, 23 in two of float16. Those need values below
// 2^16, and are wrong by up to 2^-25.
template <class Term>
constexpr int TERMS_OF_MATRIX = std::is_same_v<Term, Half> ? 2 : MATRIX_TERMS;

constexpr int PANEL_THREADS = 128;  // that load one panel

// The warps of a thread block: WARPS_M x 2, each with 32 x 32 elements of a product. A template argument of sm80::Warp.
// STEPS: how many steps of a product are unrolled.
template <int WARPS_M_, bool PIXELS_ADJACENT_, int STEPS_ = 4>
struct Geometry {
  static constexpr int STEPS = STEPS_;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = 2, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int M_TILES = 2, N_TILES = 4, ROWS = 16 * M_TILES * WARPS_M;
  static constexpr int SIZE = 2, PANEL_LINES = BLOCK, FEATURE_TERMS = 1;
  static constexpr bool NARROW = true, PIXELS_ADJACENT = PIXELS_ADJACENT_;
};

template <class G>
using Sums = sm80::Accumulator<G>;

// COUNT adjacent elements in registers.
template <class T, int COUNT>
struct Raw {
  static constexpr int WORDS = COUNT * sizeof(T) / 4, PER_LOAD = WORDS < 4 ? WORDS : 4;
  uint32_t word[WORDS];

  // Reads the first `valid` elements; the others become 0. The address is a multiple of 16 bytes if `aligned`. INPUT:
  // no kernel of this call writes them, see load_input.
  template <bool INPUT = true>
  SRPKD_DEVICE void load(const T* from, int valid, bool aligned) {
    const auto load_one = [](const auto* element) { return INPUT ? load_input(element) : load_global(element); };
    if (aligned && valid >= COUNT) {
#pragma unroll
      for (int first = 0; first < WORDS; first += PER_LOAD) {
        uint32_t part[PER_LOAD];
        const void* const at = reinterpret_cast<const char*>(from) + first * 4;
        INPUT ? load_input_words(part, at) : load_words(part, at);
#pragma unroll
        for (int i = 0; i < PER_LOAD; ++i) word[first + i] = part[i];
      }
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) word[i] = i < valid ? load_one(reinterpret_cast<const uint32_t*>(from) + i) : 0u;
    } else {
      const auto* elements = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        word[i] = (2 * i < valid ? load_one(elements + 2 * i) : 0u) |
                  (2 * i + 1 < valid ? load_one(elements + 2 * i + 1) : 0u) << 16;
    }
  }

  SRPKD_DEVICE float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return as_float(word[i]);
    return as_float(i % 2 ? widen<T, true>(word[i / 2]) : widen<T, false>(word[i / 2]));
  }
};

// Returns the next term of adjacent numbers, two in a word, and subtracts it from them.
template <class Term, int COUNT>
SRPKD_DEVICE void take_term(uint32_t (&word)[COUNT / 2], float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    word[i] = pack<Term>(x[2 * i], x[2 * i + 1]);
    x[2 * i] -= as_float(widen<Term, false>(word[i])), x[2 * i + 1] -= as_float(widen<Term, true>(word[i]));
  }
}

// Adjacent pixels in groups of 8, whose first pixels are `stride` apart: 8 for a range of pixels.
struct Pixels {
  int first, end, stride = 8;
};

// At most 64 pixels from all over an image, in eight groups.
SRPKD_DEVICE Pixels sample_of(int pixels) { return {0, pixels, pixels < BLOCK ? 8 : pixels / BLOCK * 8}; }

// One thread's part of a panel: units of 8 adjacent elements of four lines.
template <class T, bool PIXELS_ADJACENT>
struct PanelPart {
  static constexpr int UNIT = 8, UNITS = BLOCK / UNIT, LINES = PANEL_THREADS / UNITS, COUNT = BLOCK / LINES;
  const int thread = thread_index() % PANEL_THREADS, unit = thread % UNITS, first_line = thread / UNITS;
  Raw<T, UNIT> raw[COUNT];

  SRPKD_DEVICE int line(int i) const { return first_line + LINES * i; }
  // The pixel and the channel in the panel of element e of raw[i].
  SRPKD_DEVICE int pixel(int i, int e) const { return PIXELS_ADJACENT ? unit * UNIT + e : line(i); }
  SRPKD_DEVICE int channel(int i, int e) const { return PIXELS_ADJACENT ? line(i) : unit * UNIT + e; }

  SRPKD_DEVICE static int pixel_at(const Pixels& pixels, int pixel) {
    return pixels.first + pixel / 8 * pixels.stride + pixel % 8;
  }

  // Reads a panel, with zeros beyond the last pixel or channel.
  SRPKD_DEVICE void load(const Features& from, int image, const Pixels& pixels, int channel) {
    const bool aligned = from.copy_bytes == 16;
    const T* data = static_cast<const T*>(from.data) + image * from.image_stride;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = pixel_at(pixels, PIXELS_ADJACENT ? unit * UNIT : line(i));
      const int c = channel + (PIXELS_ADJACENT ? line(i) : unit * UNIT);
      const bool inside = at < pixels.end && c < from.channels;
      const int valid = inside ? minimum(PIXELS_ADJACENT ? pixels.end - at : from.channels - c, UNIT) : 0;
      raw[i].load(data + (PIXELS_ADJACENT ? c * from.line_stride + at : at * from.line_stride + c), valid, aligned);
    }
  }

  // Writes the first COUNT_TERMS terms, of type Term, of value(raw element, pixel, channel), `stride` bytes apart.
  template <int COUNT_TERMS, class G, class Term = BFloat16, class F>
  SRPKD_DEVICE void store(Address to, int stride, F value) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float x[UNIT];
#pragma unroll
      for (int e = 0; e < UNIT; ++e) x[e] = value(raw[i][e], pixel(i, e), channel(i, e));
      store_terms<COUNT_TERMS, G, Term>(to, stride, i, x);
    }
  }

  // The same for the features themselves.
  template <class G>
  SRPKD_DEVICE void store(Address to, int stride) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) store_unit<G>(to, i, raw[i].word);
    } else {
      store<TERMS<T>, G>(to, stride, [](float x, int, int) { return x; });
    }
  }

 private:
  template <class G>
  SRPKD_DEVICE void store_unit(Address to, int i, const uint32_t (&word)[4]) const {
    store_shared(to + sm80::swizzled<G>(line(i), unit * 16), sm80::Words{{word[0], word[1], word[2], word[3]}});
  }

  template <int COUNT_TERMS, class G, class Term>
  SRPKD_DEVICE void store_terms(Address to, int stride, int i, float (&x)[UNIT]) const {
#pragma unroll
    for (int term = 0; term < COUNT_TERMS; ++term) {
      uint32_t word[UNIT / 2];
      take_term<Term>(word, x);
      store_unit<G>(to + term * stride, i, word);
    }
  }
};

// Returns an element of a panel: the sum of its terms.
template <int COUNT_TERMS, bool PIXELS_ADJACENT, class G, class Term = BFloat16>
SRPKD_DEVICE float element(Address panel, int stride, int pixel, int channel) {
  const int line = PIXELS_ADJACENT ? channel : pixel, at = PIXELS_ADJACENT ? pixel : channel;
  const Address word = panel + (sm80::swizzled<G>(line % BLOCK, at % BLOCK * 2) & ~3u);
  const Address sub = (PIXELS_ADJACENT ? at : line) / BLOCK * PANEL_BYTES;  // panels of further pixels follow
  float sum = 0;
#pragma unroll
  for (int term = COUNT_TERMS - 1; term >= 0; --term) {
    const auto bits = load_shared<uint32_t>(word + sub + term * stride);
    sum += as_float(at % 2 ? widen<Term, true>(bits) : widen<Term, false>(bits));
  }
  return sum;
}

// sum += A B over 64 elements of k, with A in TERMS_A terms and B in TERMS_B. The addresses include the lane's offset.
template <class G, bool A_ADJACENT, bool B_ADJACENT, int TERMS_A, int TERMS_B, class Term = BFloat16>
SRPKD_DEVICE void add_product(Sums<G>& sum, Address a, int stride_a, Address b, int stride_b) {
  using Warp = sm80::Warp<G>;
#pragma unroll(G::STEPS)
  for (int k = 0; k < BLOCK; k += 16) {
    uint32_t left[TERMS_A][G::M_TILES][4];
#pragma unroll
    for (int term = 0; term < TERMS_A; ++term)
#pragma unroll
      for (int m = 0; m < G::M_TILES; ++m)
        Warp::template load<A_ADJACENT, true>(left[term][m], a + term * stride_a, 16 * m, k);
#pragma unroll
    for (int n = 0; n < G::N_TILES; n += 2) {
      uint32_t right[TERMS_B][4];
#pragma unroll
      for (int term = 0; term < TERMS_B; ++term)
        Warp::template load<B_ADJACENT, false>(right[term], b + term * stride_b, 8 * n, k);
#pragma unroll
      for (int order = TERMS_OF_MATRIX<Term> - 1; order >= 0; --order)  // small products first
#pragma unroll
        for (int i = 0; i <= order; ++i)
          if (i < TERMS_A && order - i < TERMS_B)
#pragma unroll
            for (int m = 0; m < G::M_TILES; ++m)
#pragma unroll
              for (int o = 0; o < 2; ++o)
                multiply_add<Term>(sum[m][n + o], left[i][m], right[order - i][2 * o], right[order - i][2 * o + 1]);
    }
  }
}

// to += from, which becomes 0. Tensor cores round sums towards zero: over many panels their sums would drift.
template <class G>
SRPKD_DEVICE void move_sums(Sums<G>& to, Sums<G>& from) {
  for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) { to[m][n][i] += from[m][n][i], from[m][n][i] = 0; });
}

// A sum of floats with the error of a few additions, however many there are.
struct CompensatedSum {
  float sum = 0, rest = 0;
  SRPKD_DEVICE void add(float value) {
    const float total = sum + value, rounded = total - sum;
    rest += (sum - (total - rounded)) + (value - rounded);
    sum = total;
  }
  SRPKD_DEVICE double value() const { return double{sum} + double{rest}; }
};

// Returns the sum of load(i) for i in [0, count), always in the same order. The loads of a batch are under way
// together.
template <class Load>
SRPKD_DEVICE double sum_in_order(int count, Load load) {
  constexpr int BATCH = 8;
  CompensatedSum sum;
#pragma unroll 1
  for (int first = 0; first < count; first += BATCH) {
    float part[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) part[i] = first + i < count ? load(first + i) : 0.f;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) sum.add(part[i]);
  }
  return sum.value();
}

// Returns the sum over the threads of a block, in thread 0. Needs THREADS / 32 * 8 bytes of shared memory.
template <int THREADS>
SRPKD_DEVICE double sum_of_threads(double value, Address shared) {
  for (int lanes = 1; lanes < 32; lanes *= 2) value += shuffle_xor(value, lanes);
  if (thread_index() % 32 == 0) store_shared(shared + thread_index() / 32 * 8, value);
  sync_block();
  if (thread_index() == 0)
    for (int warp = 1; warp < THREADS / 32; ++warp) value += load_shared<double>(shared + warp * 8);
  return value;
}

}  // namespace srpkd::cuda::algebra
