// The choices that define a relation loss, shared by CPU and GPU. Free of torch.
#pragma once

namespace srpkd {

enum class Normalize { row, cosine, none };
enum class Distance { l1, l2, huber };
enum class Reduction { mean, sum, none };
enum class Method { tiles, closed_form };  // closed_form: l2 without tiles

// A relation matrix, and the distance between two of them: the Relation of kernels/formulas.py.
struct Relation {
  Normalize normalize;
  Distance distance;
  double delta, eps;
  bool rectify = false, detach_norms = false;

  // Whether the gradient has terms from the norms, for which the tiles sum h.
  constexpr bool differentiates_norms() const { return normalize != Normalize::none && !detach_norms; }
};

}  // namespace srpkd
