"""Faults in the CUDA kernels for Hopper."""

from __future__ import annotations

from .kinds import Backend, Fault

HOPPER_TILES, HOPPER_EPILOGUE = "csrc/cuda/sm90/relation_tiles.cuh", "csrc/cuda/sm90/epilogue.cuh"
HOPPER_COLUMNS, HOPPER_LOADERS = "csrc/cuda/sm90/columns.cuh", "csrc/cuda/sm90/loaders.cuh"
HOPPER_PREPARE, HOPPER_WORK = "csrc/cuda/sm90/prepare.cuh", "csrc/cuda/sm90/work.h"
HOPPER_PLAN = "csrc/cuda/sm90/plan.h"
HOPPER_SCHEDULES = "tests/csrc/test_sm90_tiles.py -k schedule or races"
HOPPER_UNITS = "tests/csrc/test_sm90_units.py -k as_eager or any_magnitude or have_features"

BACKENDS = {
    "hopper": Backend(
        "tests/csrc/test_sm90_tiles.py -k every_relation or exactly_zero or schedule or races",
        [
            Fault(
                "missing proxy fence between K and its products",
                HOPPER_TILES,
                "            fence_async_proxy();\n          }\n          sync_warp();",
                "          }\n          sync_warp();",
            ),
            Fault(
                "the turn to add is handed over too early",
                HOPPER_COLUMNS,
                "      wait_for_bulk<0>();\n      fence_async_proxy_global();\n      fence_gpu();",
                "      fence_gpu();",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "additions in any order",
                HOPPER_COLUMNS,
                "            wait_until_at_least(p.additions + at, before);\n",
                "",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "a slot of the ring is released before its products ended",
                HOPPER_TILES,
                "        wait_for_products<1>();\n        release(RESIDENT",
                "        release(RESIDENT",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "missing barrier of the warp before K is announced",
                HOPPER_TILES,
                "          sync_warp();\n          arrive_warp(base + C::K_FULL);",
                "          arrive_warp(base + C::K_FULL);",
            ),
            Fault(
                "K is overwritten while it is read",
                HOPPER_COLUMNS,
                "if (half == 1 && lane == 0) arrive(base + C::K_EMPTY);",
                "if (half == 0 && lane == 0) arrive(base + C::K_EMPTY);",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "what the adder reads is overwritten",
                HOPPER_COLUMNS,
                "        wait_for_bulk_reads<0>();\n",
                "",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "missing proxy fence between sums and their additions",
                HOPPER_COLUMNS,
                "    fence_async_proxy();\n    sync_warp();\n    if (lane == 0) arrive(base + C::STAGING_FULL);",
                "    sync_warp();\n    if (lane == 0) arrive(base + C::STAGING_FULL);",
            ),
            Fault(
                "the bytes of the scales are not expected",
                HOPPER_LOADERS,
                "arrive_expecting(barrier, C::TERMS * CHUNK + SCALES);",
                "arrive_expecting(barrier, C::TERMS * CHUNK);",
            ),
            Fault(
                "missing proxy fence after the features were copied",
                HOPPER_PREPARE,
                "    sync_grid();\n    fence_async_proxy_global();\n",
                "    sync_grid();\n",
            ),
            Fault(
                "an addition waits for a later one",
                HOPPER_WORK,
                "return step < other.step || ",
                "return step > other.step || ",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "sign(0) is not 0",
                HOPPER_EPILOGUE,
                "fused_multiply_add(d, 0x1p127f, 0.5f)",
                "fused_multiply_add(d, 0x1p127f, 1.f)",
            ),
            Fault(
                "float32 features have one term",
                HOPPER_PREPARE,
                "    value -= as_float(widen<Element, false>(term));\n",
                "    value = 0;\n",
                HOPPER_UNITS,
            ),
            Fault(
                "h starts with whatever is in the memory",
                HOPPER_PREPARE,
                "      if (p.h) store_global(p.h + to, int64_t{0});\n",
                "",
            ),
            Fault(
                "K without the unit of the other pixel",
                HOPPER_EPILOGUE,
                "return {own.alpha * other.unit, own.ratio * other.ratio_of_units};",
                "return {own.alpha, own.ratio * other.ratio_of_units};",
                HOPPER_UNITS,
            ),
            Fault(
                "zero-norm pixels have units of their own",
                HOPPER_PREPARE,
                "return OF_PIXELS && alpha && load_global(alpha + pixel) != 0 ? own : largest;",
                "return OF_PIXELS && alpha && pixel >= 0 && own > 0 ? own : largest;",
                HOPPER_UNITS,
            ),
            Fault(
                "scales are computed before all units are measured",
                HOPPER_PREPARE,
                "      measure_all();\n      sync_grid();\n",
                "      measure_all();\n",
                HOPPER_UNITS,
            ),
            Fault(
                "terms are written before all units are final",
                HOPPER_PREPARE,
                "    if (with_units) sync_grid();\n",
                "",
                HOPPER_UNITS,
            ),
            Fault(
                "float16 features with cosine have no units",
                HOPPER_PLAN,
                "  return problem.normalize == Normalize::cosine;\n",
                "  return false;\n",
                HOPPER_UNITS,
            ),
            Fault(
                "float16 features are copied without their units",
                HOPPER_PREPARE,
                "if (from.element_bytes == 4 || with_units) bits[n] = take_term(value);",
                "if (from.element_bytes == 4) bits[n] = take_term(value);",
                HOPPER_UNITS,
            ),
            Fault(
                "row with one term has a unit for each pixel",
                HOPPER_PREPARE,
                "OF_PIXELS = C::SYMMETRIC || C::UNITS_OF_COLUMNS;",
                "OF_PIXELS = true;",
                HOPPER_UNITS,
            ),
            Fault(
                "the teacher's unit in row with one term",
                HOPPER_PREPARE,
                "C::SYMMETRIC ? own.ratio : own.ratio * (units[1] / units[0])",
                "own.ratio",
                HOPPER_UNITS,
            ),
            Fault(
                "the largest alpha of row with one term lacks the unit",
                HOPPER_PREPARE,
                "of_pixels ? result.alpha : result.alpha * units[0]",
                "result.alpha",
                HOPPER_UNITS,
            ),
            Fault(
                "the scale of K ignores the units if no pixel has a norm",
                HOPPER_PREPARE,
                "0x1p-30f * reciprocal(units[0])",
                "1",
                "tests/csrc/test_sm90_units.py -k norms_are_all_zero",
            ),
            Fault(
                "a network without features bounds K",
                HOPPER_PREPARE,
                "    if (units[1] == 0) units[1] = units[0];\n",
                "    if (units[1] == 0) units[1] = 1;\n",
                "tests/csrc/test_sm90_units.py -k without_features",
            ),
            Fault(
                "the largest alpha without normalisation is not the unit",
                HOPPER_PREPARE,
                "of_pixels = OF_PIXELS && p.alpha_student;",
                "of_pixels = OF_PIXELS;",
                "tests/csrc/test_sm90_units.py -k without_normalisation",
            ),
            Fault(
                "the unit of a much smaller student without normalisation",
                HOPPER_PREPARE,
                "    if (!p.alpha_student) units[0] = fmaxf(units[0], 0x1p-40f * units[1]);\n",
                "",
                "tests/csrc/test_sm90_units.py -k without_normalisation",
            ),
            Fault(
                "K of zero-norm pixels in bfloat16 is not small beside a large student's",
                HOPPER_PREPARE,
                "C::SYMMETRIC ? 0x1p-60f : 0x1p-100f, SMALL",
                "0x1p-40f, SMALL",
                "tests/csrc/test_sm90_tiles.py -k zero_norm_pixels",
            ),
            Fault(
                "the product of two ratios is infinite",
                HOPPER_PREPARE,
                "C::SYMMETRIC ? 0x1p-60f : 0x1p-100f, SMALL",
                "0x1p-100f, SMALL",
                "tests/csrc/test_sm90_tiles.py -k zero_norm_pixels",
            ),
        ],
    ),
}
