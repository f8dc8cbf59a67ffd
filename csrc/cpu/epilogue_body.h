// The body of the epilogue, included once per instruction set, into the namespace SRPKD_TARGET, with vectors of
// SRPKD_VECTOR_BYTES. It includes no header: inline functions of a standard header would be compiled for that
// instruction set too, and the linker could pick that copy for the whole library. Compile it with -ffp-contract=off:
// if a product were contracted into an fma, D would not be exactly 0 where student and teacher are equal.

namespace srpkd::SRPKD_TARGET {

// Vector types of GCC and clang. Mask is the integer vector with the same bits, Part has as many numbers as fit into a
// vector of doubles.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(SRPKD_VECTOR_BYTES), may_alias));
  typedef int32_t Mask __attribute__((vector_size(SRPKD_VECTOR_BYTES)));
  typedef float Part __attribute__((vector_size(SRPKD_VECTOR_BYTES / 2), may_alias));
  static constexpr int32_t sign = INT32_MIN;
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(SRPKD_VECTOR_BYTES), may_alias));
  typedef int64_t Mask __attribute__((vector_size(SRPKD_VECTOR_BYTES)));
  typedef Vector Part;
  static constexpr int64_t sign = INT64_MIN;
};

template <typename T, Distance distance>
struct DistanceFunction {
  using Vector = typename Lanes<T>::Vector;
  using Mask = typename Lanes<T>::Mask;
  const Vector delta;

  static Vector abs(Vector d) { return (Vector)((Mask)d & ~(Mask{} + Lanes<T>::sign)); }

  Vector value(Vector d) const {
    if constexpr (distance == Distance::l1) return abs(d);
    if constexpr (distance == Distance::l2) return d * d;
    const Vector a = abs(d);
    return a <= delta ? T(0.5) * d * d : delta * (a - T(0.5) * delta);
  }

  Vector grad(Vector d) const {
    if constexpr (distance == Distance::l1) {  // the sign of d, 0 at 0
      const Vector one = Vector{} + T(1);
      return (Vector)(((Mask)one | ((Mask)d & Lanes<T>::sign)) & (d != Vector{}));
    }
    if constexpr (distance == Distance::l2) return d + d;
    return d > delta ? delta : d < -delta ? -delta : d;
  }
};

template <typename T, typename Vector>
T sum(const Vector& v) {
  constexpr int lanes = sizeof(Vector) / sizeof(T);
  T part[lanes];
  for (int lane = 0; lane < lanes; ++lane) part[lane] = v[lane];
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

template <typename T, Normalize normalize, Distance distance, bool rectify, bool need_grad, bool mirrored>
double run(const TileOperands<T>& tile) {
  using Vector = typename Lanes<T>::Vector;
  using Mask = typename Lanes<T>::Mask;
  constexpr int64_t LANES = sizeof(Vector) / sizeof(T);
  constexpr bool row = normalize == Normalize::row, cosine = normalize == Normalize::cosine;
  constexpr bool scaled = normalize != Normalize::none;
  // D and K are symmetric unless normalize is row. Then A_ji = b and D_ji = e differ from A_ij = a and D_ij = d.
  constexpr bool both = row && (mirrored || need_grad);
  const DistanceFunction<T, distance> rho{Vector{} + tile.delta};
  const int64_t vectors = tile.stride / LANES;
  const auto* const column_s = reinterpret_cast<const Vector*>(tile.column_s);
  const auto* const column_t = reinterpret_cast<const Vector*>(tile.column_t);
  auto* const h_column = reinterpret_cast<Vector*>(tile.h_column);
  constexpr bool h_of_columns = need_grad && scaled && mirrored;
  if constexpr (h_of_columns)
    for (int64_t j = 0; j < vectors; ++j) h_column[j] = Vector{};

  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const auto* const gram_s = reinterpret_cast<const Vector*>(tile.gram_s + i * tile.stride);
    const auto* const gram_t = reinterpret_cast<const Vector*>(tile.gram_t + i * tile.stride);
    auto* const K = reinterpret_cast<Vector*>(tile.K + i * tile.stride);
    const int64_t tie = tile.diagonal + i;
    Vector row_s{}, row_t{}, loss{}, h{};
    if constexpr (scaled) row_s += tile.row_s[i], row_t += tile.row_t[i];

    for (int64_t j = 0; j < vectors; ++j) {
      Vector a = gram_s[j], d = gram_t[j], b{}, e{};
      Mask zero{};  // where A_s <= 0: scales are not negative, so A_ij has the sign of G_ij; NaN stays NaN
      if constexpr (rectify) {
        zero = a <= Vector{};
        a = (Vector)((Mask)a & ~zero), d = (Vector)((Mask)d & ~(d <= Vector{}));
      }
      if constexpr (both) b = a * column_s[j], e = b - d * column_t[j];
      if constexpr (scaled) a *= row_s, d *= row_t;
      if constexpr (cosine) a *= column_s[j], d *= column_t[j];
      d = a - d;
      if constexpr (cosine && !mirrored) {  // D_ii is exactly 0; a product, so that NaN stays NaN
        if (j == tie / LANES) d[tie % LANES] *= 0;
      }
      loss += rho.value(d);
      if constexpr (row && mirrored) loss += rho.value(e);
      if constexpr (need_grad) {
        const Vector p = rho.grad(d);
        if constexpr (row) {
          const Vector q = rho.grad(e);
          h += p * a;
          if constexpr (mirrored) h_column[j] += q * b;
          Vector k = p * row_s + q * column_s[j];
          if constexpr (rectify) k = (Vector)((Mask)k & ~zero);
          K[j] = k;
        } else {
          Vector k = p + p;
          if constexpr (rectify) k = (Vector)((Mask)k & ~zero);
          if constexpr (cosine) {
            const Vector term = k * a;
            h += term;
            if constexpr (mirrored) h_column[j] += term;
            K[j] = k * row_s * column_s[j];
          } else {
            K[j] = k;
          }
        }
      }
    }
    total += sum<T>(loss);
    if constexpr (need_grad && scaled) tile.h_row[i] = sum<T>(h);
  }
  return (!row && mirrored ? 2 : 1) * total;
}

// Turns the five runtime options into template arguments.
template <typename T, Normalize normalize, Distance distance, bool rectify>
double dispatch(const TileOperands<T>& tile, Kind kind) {
  if (kind.need_grad)
    return kind.mirrored ? run<T, normalize, distance, rectify, true, true>(tile)
                         : run<T, normalize, distance, rectify, true, false>(tile);
  return kind.mirrored ? run<T, normalize, distance, rectify, false, true>(tile)
                       : run<T, normalize, distance, rectify, false, false>(tile);
}

template <typename T, Normalize normalize, Distance distance>
double dispatch(const TileOperands<T>& tile, Kind kind) {
  return kind.rectify ? dispatch<T, normalize, distance, true>(tile, kind)
                      : dispatch<T, normalize, distance, false>(tile, kind);
}

template <typename T, Normalize normalize>
double dispatch(const TileOperands<T>& tile, Kind kind) {
  switch (kind.distance) {
    case Distance::l1:
      return dispatch<T, normalize, Distance::l1>(tile, kind);
    case Distance::l2:
      return dispatch<T, normalize, Distance::l2>(tile, kind);
    default:
      return dispatch<T, normalize, Distance::huber>(tile, kind);
  }
}

template <typename T>
double dispatch(const TileOperands<T>& tile, Kind kind) {
  switch (kind.normalize) {
    case Normalize::row:
      return dispatch<T, Normalize::row>(tile, kind);
    case Normalize::cosine:
      return dispatch<T, Normalize::cosine>(tile, kind);
    default:
      return dispatch<T, Normalize::none>(tile, kind);
  }
}

template <typename T>
double squares(const T* row, int64_t stride) {
  using Part = typename Lanes<T>::Part;
  using Doubles = Lanes<double>::Vector;
  // not in one vector of twice the size, whose halves GCC 12 passes through general registers: 7 times as slow
  constexpr int PARTS = sizeof(typename Lanes<T>::Vector) / sizeof(Part);
  const auto* const parts = reinterpret_cast<const Part*>(row);
  Doubles total[PARTS] = {};
  for (int64_t j = 0; j < stride / static_cast<int64_t>(sizeof(Part) / sizeof(T)); j += PARTS)
    for (int part = 0; part < PARTS; ++part) {
      const Doubles wide = __builtin_convertvector(parts[j + part], Doubles);
      total[part] += wide * wide;
    }
  for (int part = 1; part < PARTS; ++part) total[0] += total[part];
  return sum<double>(total[0]);
}

template <typename T>
void norm_terms(const TileOperands<T>& tile, const T* h_columns) {
  using Vector = typename Lanes<T>::Vector;
  const auto* const column_s = reinterpret_cast<const Vector*>(tile.column_s);
  const auto* const h_column = reinterpret_cast<const Vector*>(h_columns);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const auto* const gram = reinterpret_cast<const Vector*>(tile.gram_s + i * tile.stride);
    auto* const K = reinterpret_cast<Vector*>(tile.K + i * tile.stride);
    const Vector row_s = Vector{} + tile.row_s[i], weight = Vector{} + tile.h_row[i] * tile.row_s[i];
    // alpha^2 could overflow, alpha G is at most 1
    for (int64_t j = 0; j < tile.stride / static_cast<int64_t>(sizeof(Vector) / sizeof(T)); ++j)
      K[j] -= gram[j] * row_s * weight + gram[j] * column_s[j] * (h_column[j] * column_s[j]);
  }
}

double epilogue(const TileOperands<float>& tile, Kind kind) { return dispatch(tile, kind); }
double epilogue(const TileOperands<double>& tile, Kind kind) { return dispatch(tile, kind); }
double sum_of_squares(const float* row, int64_t stride) { return squares(row, stride); }
double sum_of_squares(const double* row, int64_t stride) { return squares(row, stride); }
void subtract_norm_terms(const TileOperands<float>& tile, const float* h) { norm_terms(tile, h); }
void subtract_norm_terms(const TileOperands<double>& tile, const double* h) { norm_terms(tile, h); }

}  // namespace srpkd::SRPKD_TARGET
