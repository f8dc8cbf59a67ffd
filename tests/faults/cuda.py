"""Faults in the CUDA kernels for all architectures."""

from __future__ import annotations

from .kinds import Backend, Fault

CUDA_TILES, CUDA_EPILOGUE = "csrc/cuda/sm80/relation_tiles.cuh", "csrc/cuda/sm80/epilogue.cuh"
CUDA_CONFIG, CUDA_FRAGMENTS = "csrc/cuda/sm80/config.h", "csrc/cuda/sm80/fragments.cuh"
CUDA_MOMENTS, CUDA_NORMS = "csrc/cuda/algebra/moments.cuh", "csrc/cuda/algebra/norms.cuh"
CUDA_GRADIENT, CUDA_PANELS = "csrc/cuda/algebra/gradient.cuh", "csrc/cuda/algebra/panels.cuh"
CUDA_MATRICES, CUDA_SEQUENCE = "csrc/cuda/algebra/matrices.cuh", "csrc/cuda/algebra/sequence.cuh"
LOSS_PLAN = "csrc/cuda/loss_plan.h"
CUDA_CLOSED_MOMENTS, CUDA_CLOSED_GRADIENT, CUDA_CLOSED_PRODUCTS, CUDA_CLOSED_ROW = (
    f"csrc/cuda/closed_form/{name}.cuh" for name in ("moments", "gradient", "products", "row")
)

BACKENDS = {
    "cuda": Backend(
        "tests/csrc/test_cuda_emulation.py",
        [
            Fault("sign(0) is not 0", CUDA_EPILOGUE, "(d > 0 ? 1.f : 0.f) - (d < 0 ? 1.f : 0.f)", "d < 0 ? -1.f : 1.f"),
            Fault(
                "rows are not masked",
                CUDA_TILES,
                "const int left = i < lines ? valid : 0;",
                "const int left = i <= lines ? valid : 0;",
            ),
            Fault(
                "the tie is beside the diagonal",
                CUDA_TILES,
                "== warp.column(n, i % 2)) sum",
                "== warp.column(n, i / 2)) sum",
            ),
            Fault(
                "writes one channel too many",
                CUDA_TILES,
                "channel < p.features[STUDENT].channels)",
                "channel <= p.features[STUDENT].channels)",
            ),
            Fault("some pairs of blocks are skipped", CUDA_CONFIG, "(blocks + 1) / 2 + (", "(blocks + 1) / 2 + 0 * ("),
            Fault(
                "does not wait for a copy", CUDA_TILES, "wait_for_copies<PREFETCH - 1>()", "wait_for_copies<PREFETCH>()"
            ),
            Fault(
                "missing barrier",
                CUDA_TILES,
                "sync_block();  // all parts have",
                "// all parts have",
            ),
            Fault(
                "missing transpose of the accumulator",
                CUDA_TILES,
                "a[1] = as_bits(k[2]), a[2] = as_bits(k[1])",
                "a[1] = as_bits(k[1]), a[2] = as_bits(k[2])",
            ),
            Fault(
                "row: K is not symmetric",
                CUDA_EPILOGUE,
                "mirrored_grad * beta_s : grad",
                "mirrored_grad * alpha_s : grad",
            ),
            Fault(
                "rounding makes 0 of NaN",
                CUDA_FRAGMENTS,
                "fabsf(value) <= FLT_MAX ? nearest_tf32(value) : as_bits(value)",
                "nearest_tf32(value)",
            ),
            Fault(
                "blocks of channels are confused with those of pixels",
                CUDA_TILES,
                "index / p.blocks % p.channel_splits",
                "index % p.channel_splits",
            ),
            Fault("rectify: P is masked by D", CUDA_EPILOGUE, "RECTIFY && relation <= 0", "RECTIFY && relation <= d"),
        ],
    ),
    "cuda_closed": Backend(
        "tests/csrc/test_cuda_closed_form.py -k (test_values and highest) or zero_norm or any_number or order "
        "or (constant_norms and highest) or magnitude or below_eps or ties",
        [
            Fault(
                "the weights are those of one network",
                CUDA_CLOSED_MOMENTS,
                "* alpha_of(network_of_column, pixel)",
                "* alpha_of(network_of_row, pixel)",
            ),
            Fault("the moments of f and e are equal", CUDA_CLOSED_MOMENTS, "at.moment == BB ? -1.f : 1.f", "1.f"),
            Fault(
                "wrong split: a term is dropped",
                CUDA_CLOSED_MOMENTS,
                "PIXELS_ADJACENT, LEFT_TERMS, RIGHT_TERMS, Term>",
                "PIXELS_ADJACENT, LEFT_TERMS, RIGHT_TERMS - 1, Term>",
            ),
            Fault(
                "the power of two of a scale counts twice",
                CUDA_CLOSED_MOMENTS,
                "mantissa_of(of_row) * (LARGEST_TERM / 2)",
                "of_row * (LARGEST_TERM / 2)",
            ),
            Fault(
                "the scales are those of another step",
                CUDA_CLOSED_MOMENTS,
                "scale_at(step + 1, side, place)",
                "scale_at(step, side, place)",
            ),
            Fault(
                "missing barrier",
                CUDA_CLOSED_MOMENTS,
                "      sync_block();  // the panels have arrived\n",
                "",
            ),
            Fault(
                "only a batch of the ranges",
                CUDA_MATRICES,
                "first < splits; first += BATCH) load(first)",
                "first < splits && first < BATCH; first += BATCH) load(first)",
            ),
            Fault(
                "missing barrier before the mirror image",
                CUDA_CLOSED_MOMENTS,
                "    sync_block();\n    strip.store_mirrored();",
                "    strip.store_mirrored();",
            ),
            Fault(
                "one buffer for all strips",
                CUDA_CLOSED_ROW,
                "BUFFERS_AT + strip % 2 * BUFFER_BYTES",
                "BUFFERS_AT",
            ),
            Fault("mirrored tiles count once", CUDA_CLOSED_MOMENTS, "at.row == at.column ? 1 : 2", "1"),
            Fault("difference: a term is dropped", CUDA_CLOSED_MOMENTS, "0.5 * (ff * ee + fe * ef)", "0.5 * (ff * ee)"),
            Fault("the first ties only", CUDA_CLOSED_MOMENTS, "pixel += strips * THREADS", "pixel += p.pixels"),
            Fault("the diagonal is not a tie", CUDA_CLOSED_MOMENTS, "static_cast<double>(count_ties())", "0"),
            Fault(
                "constant norms: the diagonal is not a tie",
                CUDA_CLOSED_GRADIENT,
                "weight_of(TEACHER, of.warp.row(m, half)) == 0 ? 4.f : 0.f",
                "0.f",
            ),
            Fault(
                "the second pass repeats the first",
                CUDA_CLOSED_GRADIENT,
                "blocks > 1 ? 2 * blocks",
                "false ? 2 * blocks",
            ),
            Fault("the gradient is not projected", CUDA_CLOSED_GRADIENT, "- along[m][i / 2] * z[m][n][i]", ""),
            Fault(
                "the lanes of a row are not added",
                CUDA_CLOSED_PRODUCTS,
                "sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);",
                "sum += shuffle_xor(sum, 1);",
            ),
            Fault(
                "the factors of further images are taken as square",
                CUDA_CLOSED_PRODUCTS,
                "image * elements_of_factor(rows, blocks), block",
                "image * elements_of_factor(rows, rows), block",
                "tests/csrc/test_cuda_closed_form.py -k four_blocks",
            ),
            Fault("blocks beside the diagonal count once", CUDA_CLOSED_ROW, "if (!is_last) add(teacher, sums);", ""),
            Fault(
                "row: one gain for both networks",
                CUDA_CLOSED_MOMENTS,
                "return network == STUDENT ? gain[STUDENT] : gain[TEACHER];",
                "return gain[STUDENT];",
            ),
            Fault("row: no gain", CUDA_CLOSED_MOMENTS, "inverse > LARGEST_GAIN ? LARGEST_GAIN", "inverse > 0 ? 1.f"),
            Fault("row: eps is ignored", CUDA_CLOSED_ROW, "norm <= p.eps ?", "norm <= 0 ?"),
            Fault(
                "row: missing barrier",
                CUDA_CLOSED_ROW,
                "      sync_block();  // their place in shared memory is free\n",
                "",
            ),
            Fault(
                "row: one gain for the norms of both networks",
                CUDA_CLOSED_ROW,
                "gain_t = load_global(p.gains[TEACHER]",
                "gain_t = load_global(p.gains[STUDENT]",
            ),
            Fault("row: W_d is dropped", CUDA_CLOSED_MOMENTS, " - 4 * of_distances)", " - 0 * of_distances)"),
            Fault(
                "row: W_d is dropped in the direct form",
                CUDA_CLOSED_MOMENTS,
                "weight *= 1 - distance_of(pixel);",
                "weight *= 1;",
            ),
            Fault(
                "row: the distances are dropped",
                CUDA_CLOSED_GRADIENT,
                "alpha[m][half] * (1 - weights[STUDENT][m][half])",
                "alpha[m][half]",
            ),
            Fault("row: missing transpose", CUDA_CLOSED_MOMENTS, "2 * fe * raw(AB, true)", "2 * fe * raw(AB, false)"),
            Fault(
                "row: finished too early",
                CUDA_CLOSED_ROW,
                "tiles * p.ranges.splits",
                "(tiles + 1) / 2 * p.ranges.splits",
            ),
        ],
    ),
    "cuda_algebra": Backend(
        "tests/csrc/test_cuda_loss.py -k (every_relation and highest and nlc) or pixels_without or plans or "
        "deterministic or reductions or (flags and highest) or different_magnitude",
        [
            Fault(
                "masks one pixel or channel too many",
                CUDA_PANELS,
                "minimum(PIXELS_ADJACENT ? pixels.end - at : from.channels - c, UNIT)",
                "minimum((PIXELS_ADJACENT ? pixels.end - at : from.channels - c) - 1, UNIT)",
            ),
            Fault(
                "pixels outside the image are shifted",
                CUDA_MOMENTS,
                "Part::pixel_at(pixels, pixel) < pixels.end ? x",
                "Part::pixel_at(pixels, pixel) <= pixels.end ? x",
            ),
            Fault(
                "moments: missing barrier",
                CUDA_MOMENTS,
                "      sync_block();  // the panels are free\n      const Pixels pixels{pixel, end};",
                "      const Pixels pixels{pixel, end};",
            ),
            Fault(
                "moments: the last range is dropped",
                CUDA_MATRICES,
                "e < MATRIX_UNIT; ++e) to[n][e].add",
                "e < MATRIX_UNIT && first + i < splits - 1; ++e) to[n][e].add",
            ),
            Fault(
                "moments: missing barrier before the mirror image",
                CUDA_MOMENTS,
                "  sync_block();\n  to.store_mirrored();",
                "  to.store_mirrored();",
            ),
            Fault(
                "weighted moment: every block of a phase adds the first strip",
                CUDA_MOMENTS,
                "(p, own_block.x, own_block.y, shared_memory())",
                "(p, own_block.x, 0, shared_memory())",
            ),
            Fault(
                "weighted moment: more ranges than its last block adds",
                LOSS_PLAN,
                "plan.wide ? MAX_WEIGHTED_SPLITS : MAX_SPLITS",
                "MAX_SPLITS",
                "tests/csrc/test_cuda_loss.py -k all_ranges",
            ),
            Fault(
                "moments: the mirror image of the first strip only",
                CUDA_MATRICES,
                "row = first_row + i % (STRIP / MATRIX_UNIT) * MATRIX_UNIT",
                "row = i % (STRIP / MATRIX_UNIT) * MATRIX_UNIT",
            ),
            Fault("moments: no shift to the mean", CUDA_MOMENTS, "return any;", "return false;"),
            Fault(
                "moments: the shift is not undone",
                CUDA_MOMENTS,
                "count * vector(OFFSETS_AT, 0, row) * vector(OFFSETS_AT, 1, column + i)",
                "0 * vector(OFFSETS_AT, 0, row) * vector(OFFSETS_AT, 1, column + i)",
            ),
            Fault(
                "weighted moment: the first block sums",
                CUDA_MATRICES,
                "== blocks - 1 ? 1 : 0",
                "== blocks - blocks ? 1 : 0",
                "tests/csrc/test_cuda_loss.py -k blocks_of_pixels_and_channels and part and highest",
            ),
            Fault(
                "weighted moment: counted before all threads have written",
                CUDA_MATRICES,
                "  sync_block();\n  if (thread_index() == 0) store_shared(shared, increment",
                "  if (thread_index() == 0) store_shared(shared, increment",
            ),
            Fault("norms: the mean's term is dropped", CUDA_NORMS, "sum(false) + dot * dot", "sum(false) + 0 * dot"),
            Fault("norms: one size for both networks", CUDA_NORMS, "image * 2 + network", "image * 2 + STUDENT"),
            Fault(
                "norms: blocks beside the diagonal count once", CUDA_NORMS, "total[m][j][i] *= 2", "total[m][j][i] *= 1"
            ),
            Fault(
                "norms: missing barrier",
                CUDA_NORMS,
                "sync_block();  // the panels have arrived",
                "// the panels have arrived",
            ),
            Fault(
                "norms: a copy is not waited for",
                CUDA_NORMS,
                "slots == 2 ? wait_for_copies<0>() : wait_for_copies<1>()",
                "wait_for_copies<1>()",
            ),
            Fault(
                "norms: a copy of three is not waited for",
                CUDA_NORMS,
                "slots == 2 ? wait_for_copies<0>() : wait_for_copies<1>()",
                "slots == 2 ? wait_for_copies<0>() : wait_for_copies<2>()",
            ),
            Fault(
                "norms: a copy into the slot in use",
                CUDA_NORMS,
                "for (int i = 1; i < slots; ++i) copy(next)",
                "for (int i = 0; i < slots; ++i) copy(next)",
            ),
            Fault("norms: shared memory of two slots", CUDA_SEQUENCE, "plan.norms.slots * Norms", "2 * Norms"),
            Fault("cosine: correction dropped", CUDA_GRADIENT, "r + e : r) * 4) * q[e]", "r + e : r) * 4) * 0"),
            Fault("row: correction M q dropped", CUDA_GRADIENT, "add_product_with(MOMENT_AT);", ""),
            Fault("row: correction M_w q dropped", CUDA_GRADIENT, "add_product_with(WEIGHTED_AT);", ""),
            Fault(
                "the last part of the loss is dropped",
                CUDA_GRADIENT,
                "i < count; i += THREADS",
                "i < count - 1; i += THREADS",
            ),
            Fault(
                "detach_norms: correction kept",
                "csrc/common/relation.h",
                "return normalize != Normalize::none && !detach_norms;",
                "return normalize != Normalize::none;",
            ),
            Fault(
                "blocks of 128 pixels: the weights overlap U",
                CUDA_GRADIENT,
                "OTHER_WEIGHTS_AT = PERMUTED ? LINES_BYTES : 0",
                "OTHER_WEIGHTS_AT = PERMUTED ? BLOCK * LINE_FLOATS * 4 : 0",
                "tests/csrc/test_cuda_loss.py -k blocks_of_pixels_and_channels",
            ),
            Fault("mean is sum", LOSS_PLAN, "a.reduction == Reduction::mean", "false"),
        ],
    ),
}
