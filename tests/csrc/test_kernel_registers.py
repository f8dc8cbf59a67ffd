"""The analysis of kernel_registers.py, on short listings."""

from __future__ import annotations

import pytest
from kernel_registers import highest_registers, unfenced_products, unordered_accesses

FIRST = "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24"
LAST = "HGMMA.64x64x16.F32 R24, R88, gdesc[UR8], R24, gsb0"
OTHER = "HGMMA.64x64x16.F32 R56, gdesc[UR4], RZ, !UPT, gsb0"
WAIT, FENCE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.ARRIVE"


def listing(*lines: str) -> str:
    """Return code as nvdisasm prints it. A line that starts with a dot or $ is a label."""
    return "\n".join(f"{line}:" if line[0] in ".$" else f"        /*0000*/    {line} ;" for line in lines)


@pytest.mark.parametrize(
    "access",
    [
        "FADD R0, R24, R1",  # reads a sum
        "MOV R55, RZ",  # overwrites the last one
        "@P0 MOV R88, RZ",  # overwrites an operand
        "LDS.128 R85, [R2]",
        "IMAD.WIDE R90, R2, R3, R4",
        "ISETP.GE.AND P0, PT, R30, R5, PT",
        "STG.E.64 [R30.64], R2",
        "HGMMA.64x64x16.F32 R40, gdesc[UR4], R40, gsb0",  # other products with some of the same sums
    ],
)
def test_accesses_in_flight(access: str) -> None:
    found = access.removeprefix("@P0 ")
    assert unordered_accesses(listing(FENCE, FIRST, LAST, access, WAIT, "EXIT")) == [found]
    assert unordered_accesses(listing(access, WAIT, FENCE, FIRST, LAST, WAIT, access, "EXIT")) == []


@pytest.mark.parametrize("access", ["FADD R0, R88, R1", "MOV R92, RZ", "STS.128 [R2], R84", FIRST])
def test_other_registers_are_free(access: str) -> None:
    """Operands may be read, and products of the same sums follow each other."""
    assert unordered_accesses(listing(FENCE, FIRST, LAST, access, WAIT, "EXIT")) == []


def test_a_wait_leaves_the_last_groups() -> None:
    one_left = WAIT.replace("0x0", "0x1")
    code = (FENCE, LAST, OTHER, one_left, "MOV R24, RZ", "MOV R56, RZ", WAIT, "MOV R56, RZ", "EXIT")
    assert unordered_accesses(listing(*code)) == ["MOV R56, RZ"]
    assert unordered_accesses(listing(FENCE, LAST, WAIT, FIRST, "MOV R24, RZ", "EXIT")) == ["MOV R24, RZ"]


def test_every_path_is_followed() -> None:
    loop = (".L_x_0", "MOV R2, RZ", FENCE, LAST, "@P0 BRA `(.L_x_0)", "EXIT")
    assert unordered_accesses(listing(*loop)) == []
    assert unordered_accesses(listing(*loop[:1], "MOV R24, RZ", *loop[2:])) == ["MOV R24, RZ"]
    skipped = (LAST, "@!P1 BRA `(.L_x_0)", WAIT, ".L_x_0", "MOV R24, RZ", "EXIT")
    assert unordered_accesses(listing(*skipped)) == ["MOV R24, RZ"]
    assert unordered_accesses(listing(LAST, "BRA `(.L_x_1)", ".L_x_0", "MOV R24, RZ", ".L_x_1", "EXIT")) == []


def test_fences() -> None:
    assert unfenced_products(listing("MOV R24, RZ", "MOV R88, RZ", FENCE, "MOV R2, RZ", FIRST, LAST)) == []
    assert unfenced_products(listing(FENCE, "MOV R88, RZ", FIRST, LAST)) == [LAST]
    assert unfenced_products(listing(FENCE, "FADD R0, R55, R1", FIRST)) == [FIRST]


def test_registers_of_roles() -> None:
    roles = (
        *("MOV R9, RZ", "@P0 BRA `(.L_x_0)", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd0", FIRST, WAIT, "EXIT"),
        *(".L_x_0", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "CALL.REL.NOINC `($__divide)", "EXIT"),
        *("$__divide", "LDS.64 R20, [R2]", "RET.REL.NODEC R2"),
    )
    assert highest_registers(listing(*roles)) == {0: 9, 208: 55, 24: 21}
