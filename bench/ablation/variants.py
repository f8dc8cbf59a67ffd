"""Variants of csrc/cuda/sm90: with a part taken out, or with another structure.

The results of those with a part taken out are wrong; only their times mean something. Those with another structure have
bit-equal results. If one is faster, it can replace the kernel: ``git apply`` its files in this folder, in their order.

A patch replaces a text that occurs exactly once in its file. tests/bench/test_ablation.py checks that, runs every
variant in the emulation, and counts the products in its machine code, because ptxas removes wgmmas whose results are
not used. After a change of the kernel, change the patches.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TILES, COLUMNS, LOADERS, PLAN = (
    f"sm90/{name}" for name in ("relation_tiles.cuh", "columns.cuh", "loaders.cuh", "plan.h")
)


class Patch(NamedTuple):
    """A text below csrc/cuda, and its replacement."""

    path: str
    old: str
    new: str


class Variant(NamedTuple):
    """A kernel to measure.

    Attributes:
        meaning: what its time tells.
        patches: its difference to the product's kernel.
        equal: its results are those of the product's kernel, bit by bit.
    """

    meaning: str
    patches: tuple[Patch, ...]
    equal: bool


def variant(meaning: str, *patches: Patch, equal: bool = False) -> Variant:
    """Return a variant of these patches."""
    return Variant(meaning, patches, equal)


def read_patches(name: str) -> tuple[Patch, ...]:
    """Return the hunks of a unified diff of csrc/cuda in this folder, each a patch."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    found = []
    for file in re.split(r"^diff --git .*\n", text, flags=re.MULTILINE)[1:]:
        header, *hunks = re.split(r"^@@ .*\n", file, flags=re.MULTILINE)
        [path] = re.findall(r"^\+\+\+ b/csrc/cuda/(.*)$", header, re.MULTILINE)
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            found.append(Patch(path, old, new))
    return tuple(found)


NO_ADDER = Patch(
    COLUMNS,
    "for (step = step > 0 ? step : 1; step < end; ++step) add(image, row, step);",
    "static_cast<void>(image + row + step + end);",
)
NO_COLUMNS = Patch(COLUMNS, "if (step > 0) {  // otherwise", "if (false) {  // otherwise")

VARIANTS = {
    "as is": variant("the kernel of the product", equal=True),
    "halves in turn": variant(
        "half of the columns of a tile at a time: K of the first is multiplied while that of the second is computed",
        *read_patches("halves_in_turn.patch"),
        equal=True,
    ),
    "halves in a loop": variant(
        "the same with a loop: half of the instructions, to fit into the instruction cache",
        *read_patches("halves_in_a_loop.patch"),
        equal=True,
    ),
    "half tiles": variant(
        "halves in a loop, with loads and Gram products of half of the columns at a time: no moves, 64 registers less",
        *read_patches("half_tiles.patch"),
        equal=True,
    ),
    "half tiles ahead": variant(
        "half tiles whose Gram products are computed during the elementwise part of the half before, without turns",
        *read_patches("half_tiles.patch"),
        *read_patches("half_tiles_ahead.patch"),
        equal=True,
    ),
    "no elementwise": variant(
        "K is the sum of the Gram matrices: no differences, signs, loss and h",
        Patch(
            TILES,
            "        epilogue.template half<0>(s, t, scales, sums, h_of_columns[0], K);\n"
            "        epilogue.template half<1>(s, t, scales, sums, h_of_columns[1], K);\n",
            """        for (int i = 0; i < 2; ++i) h_of_columns[i][0] = h_of_columns[i][1] = 0;
        static_cast<void>(epilogue);
#pragma unroll
        for (int i = 0; i < 64; i += 2)
          K[0][i / 8][i % 8 / 2] = pack<Element>(s[i] + t[i], s[i + 1] + t[i + 1]);
""",
        ),
    ),
    "no h of columns": variant(
        "h is not summed up over the rows and not added to global memory",
        Patch(TILES, "if (!diagonal) add_h_of_columns(h_of_columns, step);", ""),
    ),
    "no U of rows": variant(
        "the consumers do not multiply K and the features",
        Patch(
            TILES,
            "for (int k = 0; k < TILE / 16; ++k) {\n          const Address chunk = columns + other * CHUNK;",
            "for (int k = 0; k < 0; ++k) {\n          const Address chunk = columns + other * CHUNK;",
        ),
    ),
    "K not stored": variant(
        "K is written to shared memory in two tiles only; U of the columns is computed from that",
        Patch(
            TILES,
            "            store_weights(K, 0, base), store_weights(K, 1, base);\n",
            "            if (tile < 2) store_weights(K, 0, base), store_weights(K, 1, base);\n",
        ),
    ),
    "no U of columns": variant("no product, no staging and no adder for the columns", NO_COLUMNS, NO_ADDER),
    "adder stores nothing": variant(
        "U of the columns is computed and staged, but neither ordered nor added to global memory",
        Patch(COLUMNS, "const int earlier = rank(image, row, step);", "const int earlier = 0;"),
        Patch(
            COLUMNS,
            """        if (before == 0) {  // so that it need not be zero
          store_bulk(to, shared + C::STAGING, CHUNK);
        } else {
          if (half == 0) {
            wait_until_at_least(p.additions + at, before);
            fence_async_proxy_global();
          }
          add_bulk(to, shared + C::STAGING, CHUNK);
        }
        commit_bulk();
        wait_for_bulk_reads<0>();
""",
            "        static_cast<void>(to), static_cast<void>(before);\n",
        ),
        Patch(
            COLUMNS,
            """      wait_for_bulk<0>();
      fence_async_proxy_global();
      fence_gpu();
      add_release(p.additions + at, 1);
""",
            "",
        ),
    ),
    "adder in any order": variant(
        "additions do not wait for earlier ones; all are additions",
        Patch(COLUMNS, "if (before == 0) {  // so that", "if (before < 0) {  // so that"),
        Patch(COLUMNS, "            wait_until_at_least(p.additions + at, before);\n", ""),
    ),
    "Gram products alone": variant(
        "loads, turns and Gram products: no elementwise part, K and U",
        Patch(
            TILES,
            "        Weights<C> K;\n",
            "        if (p.pixels > 0) continue;\n"  # always, but the compiler does not know
            "        Weights<C> K;\n",
        ),
        Patch(COLUMNS, "        wait(base + C::K_FULL, tile & 1);\n", ""),
        NO_COLUMNS,
        NO_ADDER,
    ),
    "no turns": variant(
        "the consumers do not take turns on the tensor cores",
        Patch(
            PLAN,
            "p.turns = C::TERMS * (p.resident + 2 * (others - p.resident)) <= p.slots;",
            "p.turns = false;",
        ),
        equal=True,
    ),
    "half of the loads": variant(
        "two tiles of four load nothing but the scales",
        Patch(
            LOADERS,
            """    arrive_expecting(barrier, CHUNK);
    this->load(""",
            """    if (load_shared<int>(base + C::WALKS + WALK_BYTES + 4 * WALK_COUNT) & 2) {
      arrive(barrier);
      ring.advance(p.slots);
      return;
    }
    arrive_expecting(barrier, CHUNK);
    this->load(""",
        ),
        Patch(
            LOADERS,
            "    arrive_expecting(barrier, C::TERMS * CHUNK + SCALES);\n",
            "    arrive_expecting(barrier, (tile & 2 ? 0 : C::TERMS * CHUNK) + SCALES);\n",
        ),
        Patch(
            LOADERS,
            "    for (int term = 0; term < C::TERMS; ++term)\n      this->load(base + C::WALKS + WALK_BYTES, others,",
            "    for (int term = 0; term < (tile & 2 ? 0 : C::TERMS); ++term)\n"
            "      this->load(base + C::WALKS + WALK_BYTES, others,",
        ),
    ),
    "one stage": variant(
        "one buffer for the columns whose U is computed, and a longer ring",
        Patch(PLAN, "int STAGES = TERMS == 1", "int STAGES = TERMS == 0"),
        equal=True,
    ),
    "no overlap": variant(
        "the products of a group of channels start when those before are done",
        Patch(PLAN, "OVERLAP = TERMS == 1 || !GRAD;", "OVERLAP = false;"),
        equal=True,
    ),
}


def slug(name: str) -> str:
    """Return the name of a variant as a part of a file name."""
    return re.sub(r"\W+", "_", name)


def apply(patches: tuple[Patch, ...], sources: Path) -> None:
    """Patch a copy of csrc/cuda.

    Raises:
        ValueError: a text does not occur exactly once.
    """
    for path, old, new in patches:
        text = (sources / path).read_text(encoding="utf-8")
        if (count := text.count(old)) != 1:
            raise ValueError(
                f"the text of a patch occurs {count} times in csrc/cuda/{path}, expected once: adapt "
                f"bench/ablation/variants.py to the changed kernel: {old.strip()!r}"
            )
        (sources / path).write_text(text.replace(old, new), encoding="utf-8")
