"""Registers in machine code as nvdisasm prints it: those that a role has, and those of wgmma while it multiplies.

wgmma.mma_async works asynchronously: until wgmma.wait_group, nothing may read or write its sums or overwrite its
operands, and before it, wgmma.fence must follow the last access to both. The emulation of the kernels checks this for
the source; the compiler moves instructions, and chooses which values share a register.

In machine code, HGMMA is wgmma.mma_async, and a group ends with the one that has the operand gsb0. WARPGROUP.ARRIVE is
wgmma.fence, and WARPGROUP.DEPBAR.LE gsb0, N waits until N groups are left. USETMAXREG is setmaxnreg.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bench.machine_code import INSTRUCTION, PREDICATE

LABEL = re.compile(r"(\.L_x_\d+|\$\S+):")
TARGET = re.compile(r"`\((\S+?)\)")
# instructions without a destination register: their first operand is read
NO_DESTINATION = ("ST", "RED", "UTMA", "UBLK", "SYNCS", "BRA", "BSYNC", "WARPSYNC", "R2UR", "BAR", "CCTL")
MOST_GROUPS = 3  # that are told apart; older ones count as one


class Product(NamedTuple):
    """The registers of a wgmma."""

    sums: frozenset[int]
    operand: frozenset[int]


Groups = tuple[frozenset[Product], ...]  # the last is not complete


class Instruction(NamedTuple):
    """An instruction: its text without predicate, those that may follow, and the registers that it accesses."""

    text: str
    next: tuple[int, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    product: Product | None

    @property
    def accesses(self) -> frozenset[int]:
        return self.reads | self.writes


def instructions(listing: str) -> list[Instruction]:
    """Return the instructions of one function."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(lines)
        elif match := INSTRUCTION.match(line):
            lines.append(match[1].strip().rstrip("; "))
    found = []
    for index, line in enumerate(lines):
        text = PREDICATE.sub("", line)
        opcode, _, operands = text.partition(" ")
        always = text == line and not re.match(r"\s*!?U?P\d", operands) and "." not in opcode
        after = [] if (opcode in ("BRA", "EXIT") and always) or opcode.startswith("RET") else [index + 1]
        if opcode.startswith(("BRA", "CALL", "WARPSYNC")) and (target := TARGET.search(operands)):
            after.append(labels[target[1]])
        reads, writes, product = registers(opcode, operands)
        found.append(Instruction(text, tuple(i for i in after if i < len(lines)), reads, writes, product))
    return found


def registers(opcode: str, operands: str) -> tuple[frozenset[int], frozenset[int], Product | None]:
    """Return the registers that an instruction reads and writes, or those of a product."""
    parts = [part.strip() for part in operands.split(",")]
    if opcode.startswith("HGMMA"):
        columns = int(opcode.split(".")[1].split("x")[1])
        operand = span(parts[1], 4) if parts[1].startswith("R") else frozenset()
        return frozenset(), frozenset(), Product(span(parts[0], columns // 2), operand)
    matrices = re.match(r"(?:LDSM|STSM)\.\S*?(\d)$", opcode.replace(".MT88", ""))
    wide = 4 if ".128" in opcode else 2 if re.search(r"\.64|WIDE|^D(ADD|MUL|FMA)", opcode) else 1
    reads: set[int] = set()
    writes: set[int] = set()
    # a predicate may come before the register
    destination = next((i for i, part in enumerate(parts) if not re.match(r"U?P[T\d]", part)), 0)
    for i, part in enumerate(parts):
        for match in re.finditer(r"\bR\d+(\.64)?", part):
            address = "[" in part
            count = (2 if match[1] else 1) if address else int(matrices[1]) if matrices else wide
            writes_it = i == destination and not address and not opcode.startswith(NO_DESTINATION)
            (writes if writes_it else reads).update(span(match[0], count))
    return frozenset(reads), frozenset(writes), None


def span(first: str, count: int) -> frozenset[int]:
    """Return the numbers of `count` registers, given the name of the first."""
    number = int(re.match(r"R(\d+)", first)[1])  # type: ignore[index]
    return frozenset(range(number, number + count))


def highest_registers(listing: str) -> dict[int, int]:
    """Return the highest register of the code in each role, by the number of registers that setmaxnreg gives it.

    0: before setmaxnreg.
    """
    code = instructions(listing)
    highest: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [(0, 0)]
    while waiting:
        index, limit = waiting.pop()
        if (index, limit) in seen:
            continue
        seen.add((index, limit))
        own = code[index]
        used = own.accesses | (own.product.sums | own.product.operand if own.product else frozenset())
        highest[limit] = max(highest.get(limit, 0), *used, 0)
        after = int(own.text.split()[-1], 16) if own.text.startswith("USETMAXREG") else limit
        waiting.extend((i, after) for i in own.next)
    return highest


def unordered_accesses(listing: str) -> list[str]:
    """Return the instructions of a function that may access registers of products in flight, on any path."""
    code = instructions(listing)
    wrong: dict[int, str] = {}
    seen: list[set[Groups]] = [set() for _ in code]
    waiting: list[tuple[int, Groups]] = [(0, (frozenset(),))]
    while waiting:
        index, groups = waiting.pop()
        if groups in seen[index]:
            continue
        seen[index].add(groups)
        own = code[index]
        if any(conflict(own, product) for group in groups for product in group):
            wrong[index] = own.text
        for after in own.next:
            waiting.append((after, groups_after(own, groups)))
    return [wrong[index] for index in sorted(wrong)]


def conflict(own: Instruction, product: Product) -> bool:
    """Return whether an instruction may not be executed while a product is in flight."""
    if own.product is None:
        return bool(own.accesses & product.sums or own.writes & product.operand)
    sums, operand = own.product
    return bool((sums != product.sums and sums & product.sums) or sums & product.operand or operand & product.sums)


def groups_after(own: Instruction, groups: Groups) -> Groups:
    """Return the groups in flight after an instruction."""
    if own.product is not None:
        groups = (*groups[:-1], groups[-1] | {own.product})
        if own.text.endswith("gsb0"):
            groups = (*groups, frozenset())
        return (groups[0] | groups[1], *groups[2:]) if len(groups) > MOST_GROUPS + 1 else groups
    if own.text.startswith("WARPGROUP.DEPBAR"):
        left = int(own.text.split()[-1], 16)
        return groups[max(0, len(groups) - 1 - left) :]
    return groups


def unfenced_products(listing: str) -> list[str]:
    """Return the products whose registers are accessed after the fence before them, in the order of the code."""
    wrong = []
    accessed: frozenset[int] = frozenset()
    for own in instructions(listing):
        if own.text.startswith("WARPGROUP.ARRIVE"):
            accessed = frozenset()
        elif own.product is None:
            accessed |= own.accesses
        elif accessed & (own.product.sums | own.product.operand):
            wrong.append(own.text)
    return wrong
