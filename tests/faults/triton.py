"""Faults in the Triton kernels."""

from __future__ import annotations

from .kinds import Backend, Fault

TRITON_PRIMITIVES, TRITON_SCALES = "kernels/triton/primitives.py", "kernels/triton/scales.py"
TRITON_TILES, TRITON_GRADIENT = "kernels/triton/tiles.py", "kernels/triton/gradient.py"
TRITON_MOMENTS, TRITON_PLANS = "kernels/triton/moments.py", "kernels/triton/plans.py"
TRITON_CLOSED_MOMENTS, TRITON_CLOSED_SUMS, TRITON_CLOSED_ROW, TRITON_CLOSED_GRADIENT = (
    f"kernels/triton/closed_form/{name}.py" for name in ("moments", "sums", "row", "gradient")
)

BACKENDS = {
    "triton": Backend(
        "tests/kernels/triton/test_interpreter.py",
        [
            Fault("sign(0) is not 0", TRITON_TILES, "e30 + 0.5, 0.0), 1.0)", "e30 + 0.75, 0.0), 1.0)"),
            Fault(
                "masked elements are not 0",
                TRITON_PRIMITIVES,
                "BLOCK_R, BLOCK_C), mask=mask, other=0.0)",
                "BLOCK_R, BLOCK_C), mask=mask, other=1.0)",
            ),
            Fault(
                "the diagonal block counts twice",
                TRITON_TILES,
                "(start_n >= start_m + BLOCK_M)",
                "(start_n >= start_m)",
            ),
            Fault("row: K is not symmetric", TRITON_TILES, "DISTANCE) * alpha_n", "DISTANCE) * alpha_m[:, None]"),
            Fault("cosine: h lacks the factor 2", TRITON_TILES, "            h *= 2\n", ""),
            Fault(
                "the tie is beside the diagonal",
                TRITON_TILES,
                "offs_m[:, None] == offs_n[None, :]",
                "offs_m[:, None] == offs_n[None, :] + 1",
            ),
            Fault(
                "the last column is skipped",
                TRITON_TILES,
                "first + split_columns, pixels)",
                "first + split_columns, pixels - 1)",
            ),
            Fault("l2: the mantissa counts once", TRITON_TILES, "return factor * factor", "return factor"),
            Fault(
                "the blocks below the diagonal of M are dropped",
                TRITON_SCALES,
                "start_c, 2.0, 1.0)",
                "start_c, 1.0, 1.0)",
            ),
            Fault(
                "a zero scale of the teacher has a power",
                TRITON_SCALES,
                "tl.where(x == 0, 0.0, tl.max",
                "tl.where(x == 0, 1.0, tl.max",
            ),
            Fault("missing transpose", TRITON_MOMENTS, "tl.trans(tile), start_j", "tile, start_j"),
            Fault(
                "the last partial moment is dropped",
                TRITON_MOMENTS,
                "start + part < splits, channels",
                "start + part < tl.maximum(splits - 1, 1), channels",
            ),
            Fault(
                "the first program of a tile of M_w adds it up", TRITON_MOMENTS, "arrived == splits - 1", "arrived == 0"
            ),
            Fault("the losses are those of the first image", TRITON_GRADIENT, "program.to(tl.int64) * partials", "0"),
            Fault(
                "backward: the factor of the first image",
                "kernels/triton/backward.py",
                "grad_loss_ptr + image * upstream_stride",
                "grad_loss_ptr",
            ),
            Fault("backward: no weight", "kernels/triton/backward.py", "upstream_stride) * weight", "upstream_stride)"),
            Fault(
                "rectify: K is masked by D", TRITON_TILES, "tl.where(gram_s <= 0, 0.0, K)", "tl.where(K <= 0, 0.0, K)"
            ),
            Fault(
                "detach_norms: correction kept",
                "kernels/formulas.py",
                'return self.normalize != "none" and not self.detach_norms',
                'return self.normalize != "none"',
            ),
            Fault(
                "scratch memory overlaps", TRITON_PLANS, "self._live[start] = start + size", "self._live[start] = start"
            ),
            Fault(
                "row: correction M_w q dropped",
                TRITON_GRADIENT,
                "for matrix in range(2):",
                "for matrix in range(1):",
            ),
        ],
        environment={"TRITON_INTERPRET": "1"},
    ),
    "triton_closed": Backend(
        "tests/kernels/triton/test_closed_form.py -k (test_errors and float32) or zero_norm or any_number_of_pixels "
        "or constant_norms or magnitude or below_eps",
        [
            Fault(
                "the weights are those of one network",
                TRITON_CLOSED_MOMENTS,
                "                weights *= load_vector(alpha_r_ptr, start_n, pixels, BLOCK_N)\n",
                "                weights *= weights\n",
            ),
            Fault(
                "the moments of f and e are equal",
                TRITON_CLOSED_MOMENTS,
                "tl.where(matrix == 2, -1.0, tl.where(matrix == 3, 0.0, 1.0))",
                "tl.where(matrix == 3, 0.0, 1.0)",
            ),
            Fault(
                "the last range of pixels is dropped",
                TRITON_CLOSED_SUMS,
                "for split in range(splits):",
                "for split in range(tl.maximum(splits - 1, 1)):",
            ),
            Fault("the cross term counts once", TRITON_CLOSED_SUMS, "loss = -2 * total(", "loss = -1 * total("),
            Fault("difference: a term is dropped", TRITON_CLOSED_SUMS, "total(ff * ee + fe * ef)", "total(ff * ee)"),
            Fault("the diagonal is not a tie", TRITON_CLOSED_SUMS, "!= (alpha_t != 0)", "!= (alpha_s != 0)"),
            Fault(
                "wrong split of the factors",
                TRITON_CLOSED_SUMS,
                "store_tile(moved(second, stride_term), terms[2],",
                "store_tile(moved(second, stride_term), terms[1],",
            ),
            Fault("the gradient is not projected", TRITON_CLOSED_GRADIENT, "V - along[:, None] * z", "V"),
            Fault("constant norms: projected", TRITON_CLOSED_GRADIENT, "COSINE and not DETACH_NORMS\n", "COSINE\n"),
            Fault(
                "constant norms: the diagonal is not a tie",
                TRITON_CLOSED_GRADIENT,
                "== 0, 4.0, 0.0)",
                "== 0, 0.0, 0.0)",
            ),
            Fault("row: one gain for both networks", TRITON_CLOSED_ROW, "ones * gain_t", "ones * gain_s"),
            Fault("row: no gain", TRITON_CLOSED_ROW, "tl.where(gain > LARGEST_GAIN, LARGEST_GAIN, gain)", "1.0"),
            Fault("row: eps is ignored", TRITON_CLOSED_ROW, "tl.where(norm <= eps, 0.0", "tl.where(norm <= 0.0, 0.0"),
            Fault("row: W_d is dropped", TRITON_CLOSED_SUMS, "student -= 4 * sum", "student -= 0 * sum"),
            Fault(
                "row: W_d is dropped in the direct form",
                TRITON_CLOSED_MOMENTS,
                "weights *= 1 - load_vector(",
                "weights *= 1 - 0 * load_vector(",
            ),
            Fault(
                "row: the distances are dropped",
                TRITON_CLOSED_GRADIENT,
                "total *= 1 - load_vector(",
                "total *= 1 - 0 * load_vector(",
            ),
            Fault("row: missing transpose", TRITON_CLOSED_SUMS, "2 * fe * tl.trans(raw_ef)", "2 * fe * raw_ef"),
        ],
        environment={"TRITON_INTERPRET": "1"},
    ),
}
