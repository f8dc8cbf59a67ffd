"""Faults in the C++ operator and its CPU kernels."""

from __future__ import annotations

from .kinds import Backend, Fault

EPILOGUE, CPU_TILES, INDEX = "csrc/cpu/epilogue_body.h", "csrc/cpu/relation_tiles.cpp", "csrc/common/index.h"
INDEXED, PACKED, ROW_SCALES = "csrc/cpu/indexed_tiles.cpp", "csrc/cpu/packed_features.h", "csrc/cpu/row_scales.cpp"
MATRIX, WORKERS, PRODUCTS = "csrc/cpu/matrix.cpp", "csrc/cpu/tile_workers.h", "tests/kernels/test_native_products.py"
CPU_LOSS, CPU_MATRICES, AUTOGRAD = "csrc/cpu/loss.cpp", "csrc/cpu/relation_matrices.cpp", "csrc/autograd.cpp"

BACKENDS = {
    "native": Backend(
        "tests/kernels/test_native.py tests/kernels/test_backends.py -k native",
        [
            Fault("sign(0) is not 0", EPILOGUE, " & (d != Vector{}));", ");"),
            Fault(
                "the tie is beside the diagonal", EPILOGUE, "if (j == tie / LANES) d[", "if (j == tie / LANES + 1) d["
            ),
            Fault("h of the columns dropped", EPILOGUE, "if constexpr (mirrored) h_column[j] += q * b;", ""),
            Fault("row: K is not symmetric", EPILOGUE, "p * row_s + q * column_s[j];", "p * row_s + q * row_s;"),
            Fault("the mirrored half of the loss counts once", EPILOGUE, "(!row && mirrored ? 2 : 1)", "1"),
            Fault(
                "missing transpose",
                CPU_TILES,
                "{U_j, j.size, channels, 1, stride}",
                "{U_j, j.size, channels, channels, 1}",
            ),
            Fault(
                "the padding of a tile is not cleared",
                PACKED,
                "from.columns < to.columns && i < from.rows",
                "from.columns < to.columns && i < from.rows - 1",
            ),
            Fault("the panels of a block's part of U are not added up", PACKED, "      add = true;\n", ""),
            Fault(
                "each panel replaces the first",
                PACKED,
                "+ panel.begin * rows, rows,",
                "+ 0, rows,",
            ),
            Fault("the tie of a block is that of the first", EPILOGUE, "tie = tile.diagonal + i;", "tie = i;"),
            Fault(
                "norm terms are not symmetric",
                EPILOGUE,
                "gram[j] * column_s[j] * (h_column[j] * column_s[j])",
                "gram[j] * row_s * weight",
            ),
            Fault(
                "rows are not completed by symmetry",
                CPU_MATRICES,
                "copy(whole.row_range(end, left).column_range(strip.begin, strip.size).t(),",
                "copy(whole.row_range(strip.begin, strip.size).column_range(end, left),",
            ),
            Fault(
                "cosine: wrong sign of the correction",
                CPU_MATRICES,
                "+ rows.begin + i] -= tile.h_row",
                "+ rows.begin + i] += tile.h_row",
            ),
            Fault(
                "row: correction dropped",
                CPU_MATRICES,
                "if (norms && relation_.normalize == Normalize::row) kernels_.subtract_norm_terms(tile, space_.h);",
                "",
            ),
            Fault("rectify: K is masked by the teacher", EPILOGUE, "zero = a <= Vector{};", "zero = a <= d;"),
            Fault(
                "detach_norms: correction kept",
                CPU_MATRICES,
                "norms = relation_.differentiates_norms();",
                "norms = relation_.normalize != Normalize::none;",
            ),
            Fault(
                "tiles: detach_norms: correction kept",
                CPU_LOSS,
                "need_grad && relation.differentiates_norms() ?",
                "need_grad && scale.alpha.defined() ?",
            ),
            Fault("a norm of exactly eps counts as nonzero", CPU_MATRICES, "norm <= static_cast", "norm < static_cast"),
            Fault(
                "blocks of rows are skipped",
                CPU_MATRICES,
                "i % 2 ? blocks - 1 - i / 2 : i / 2",
                "i % 2 ? blocks - 2 - i / 2 : i / 2",
            ),
            Fault("a range's terms are dropped", CPU_MATRICES, "int64_t range = 1;", "int64_t range = 2;"),
            Fault(
                "a range without channels keeps old terms",
                CPU_MATRICES,
                "if (!add) std::fill_n",
                "if (add) std::fill_n",
            ),
            Fault(
                "ranges share a piece of channels",
                CPU_MATRICES,
                "i < pieces * (range + 1) / space_.ranges; ++i",
                "i <= pieces * (range + 1) / space_.ranges && i < pieces; ++i",
            ),
            Fault(
                "tiles: row: correction M_w q dropped",
                CPU_LOSS,
                "  sum.baddbmm_(at::bmm(weighted.mT(), features) / size.square(), features.mT(), 1, -1);\n",
                "",
            ),
            Fault(
                "tiles: the mean of the features is lost",
                ROW_SCALES,
                " + static_cast<T>(pixels) * linear * linear",
                "",
            ),
            Fault(
                "tiles: moments are those of the last panel of a range",
                ROW_SCALES,
                "i > panels * range / ranges);",
                "false);",
            ),
            Fault("long sums in one part", MATRIX, "DEPTH = 256;", "DEPTH = 1 << 20;", f"{PRODUCTS} -k long_sums"),
            Fault(
                "threads flush denormals independently",
                WORKERS,
                "std::fesetenv(&of_other);",
                "",
                f"{PRODUCTS} -k all_threads",
            ),
            Fault(
                "row norms by rounded products",
                MATRIX,
                "return sgemm_ == nullptr && !has_microkernels<float>();",
                "return false;",
                f"{PRODUCTS} -k row_norms",
            ),
            Fault(
                "the gradient of a mean is that of a sum",
                CPU_LOSS,
                "if (reduction == Reduction::mean) gradient_scale",
                "if (false) gradient_scale",
            ),
            Fault(
                "a mean is a sum",
                CPU_LOSS,
                "reduction == Reduction::mean ? total",
                "reduction == Reduction::none ? total",
            ),
            Fault(
                "the upstream gradient is ignored",
                "csrc/common/backward.h",
                "gradient, view ? grad_loss.view({-1, 1, 1}) : grad_loss)",
                "gradient, grad_loss.new_ones({1}))",
                "tests/kernels/test_op.py -k native",
            ),
            Fault(
                "the batch's gradient is that of one image",
                AUTOGRAD,
                "viewed(gradient, {images, pixels, gradient.sym_size(2)}).transpose(1, 2)",
                "gradient.transpose(1, 2)",
                "tests/kernels/test_distributed.py -k large_image",
            ),
            Fault(
                "a gradient is computed without need",
                AUTOGRAD,
                "loss_and_gradient(student, teacher, options, false));\n}\n\n// Where",
                "loss_and_gradient(student, teacher, options, true));\n}\n\n// Where",
                "tests/kernels/test_op.py -k native",
            ),
            Fault("the last pixel is skipped", INDEX, "left = pixels - begin;", "left = pixels - begin - (begin > 0);"),
        ],
        compiled=True,
    ),
    "native-indexed": Backend(
        "tests/kernels/test_sampling.py -k native",
        [
            Fault("ties of sampled columns are kept", INDEXED, "gram_t[row * stride + column] *= 0;", ""),
            Fault(
                "ties are those of the first block of rows",
                INDEXED,
                "const int64_t row = (pixel - space.rows.pixels.front()) / sets;",
                "const int64_t row = pixel / sets;",
            ),
            Fault(
                "the scales of an earlier tile remain",
                INDEXED,
                "std::fill(place + size(), place + copy.numel(), T(0));",
                "",
            ),
            Fault("columns are those of the first image", INDEXED, "(image * sets + set) * listed", "set * listed"),
            Fault(
                "the gradient of the columns is dropped",
                INDEXED,
                "if (mirrored) space.columns.add_columns(U, h, image, round_up(space.columns.size(), LINE));",
                "",
            ),
            Fault(
                "the columns that do not fill a square are dropped",
                INDEXED,
                "k < std::min(first + SIDE, size()); ++k)",
                "k < first + SIDE && first + SIDE <= size(); ++k)",
            ),
            Fault(
                "only the first panel of features is copied",
                PACKED,
                "block_at(i % panels, PANEL,",
                "block_at(0, PANEL,",
            ),
            Fault(
                "sampled pairs count once",
                CPU_LOSS,
                "2 * static_cast<double>(student.size(1)) * static_cast<double>(columns.size(2))",
                "static_cast<double>(student.size(1)) * static_cast<double>(columns.size(2))",
            ),
            Fault(
                "autograd records the formulas",
                CPU_LOSS,
                "c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset",
                "c10::autocast_dispatch_keyset",
            ),
            Fault(
                "sets with a row less repeat a row",
                INDEXED,
                "if (set + k * sets < pixels) space.rows.pixels.push_back(set + k * sets);",
                "space.rows.pixels.push_back(std::min(set + k * sets, pixels - 1));",
            ),
        ],
        compiled=True,
    ),
}
