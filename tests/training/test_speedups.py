"""The option `fast`, and precisions that a CPU is slow in."""

from dataclasses import replace

import pytest
import torch
from runs import PIX2PIX
from small import SMALL

from srpkd.kernels import cpu_info
from srpkd.training import speedups
from srpkd.training.options import TrainConfig
from srpkd.training.plan import check_compiler, prepare, with_usable_precision

X86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f{}\n\nprocessor\t: 1\nflags\t\t: fpu avx2 avx512f{}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd{}\nCPU part\t: 0xd40\n"


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """A function that sets the content of /proc/cpuinfo."""

    def write(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(cpu_info, "PATH", tmp_path / "cpuinfo")

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("", ""), False),
        (X86.format(*2 * [" avx512_bf16"]), True),
        (X86.format(*2 * [" amx_bf16 amx_tile"]), True),
        (ARM.format(""), False),
        (ARM.format(" i8mm bf16"), True),
        ("processor : 0\n", None),
    ],
)
def test_bfloat16_instructions(cpu, text, expected):
    cpu(text)
    assert speedups.cpu_has_bfloat16() is expected


def test_a_system_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_info, "PATH", tmp_path / "missing")
    assert speedups.cpu_has_bfloat16() is None
    assert speedups.slow_precision_reason(torch.device("cpu"), "bf16") == ""


def options(**others):
    return TrainConfig(**SMALL | others).resolved()


def test_fast_on_a_cpu(cpu):
    cpu(X86.format("", ""))
    assert options(fast=True).precision == "fp32"
    cpu(X86.format(" avx512_bf16", ""))
    assert options(fast=True).precision == "bf16"
    assert options(fast=True, precision="fp16").precision == "fp16"  # what a user sets remains
    assert options(fast=True, resume="run").precision == "fp32"  # a resumed run keeps its options
    assert options().precision == "fp32"


@pytest.fixture
def gpu(monkeypatch):
    """A function that lets torch see a GPU of a compute capability, for which torch.compile can compile."""

    def fake(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(speedups, "has_gpu_compiler", lambda: True)
    return fake


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")])
def test_fast_on_a_gpu(monkeypatch, gpu, capability, precision):
    gpu(*capability)
    config = options(fast=True, device="cuda", channels_last=True)
    assert (config.precision, config.compile, config.channels_last) == (precision, True, True)
    monkeypatch.setattr(speedups, "has_gpu_compiler", lambda: False)
    config = options(fast=True, device="cuda")
    assert (config.precision, config.compile) == (precision, False)


def test_fast_on_a_gpu_that_triton_does_not_support(gpu):
    """torch.compile fails on a P100, which has no tensor cores either."""
    gpu(6, 0)
    config = options(fast=True, device="cuda")
    assert (config.precision, config.compile) == ("fp32", False)


def test_a_gpu_compiler_needs_triton_and_a_c_compiler(monkeypatch):
    triton = pytest.importorskip("srpkd.kernels.triton")
    monkeypatch.setattr(triton, "triton", object())
    monkeypatch.setattr(triton, "has_c_compiler", lambda: False)
    assert not speedups.has_gpu_compiler()
    monkeypatch.setattr(triton, "has_c_compiler", lambda: True)
    assert speedups.has_gpu_compiler()
    monkeypatch.setattr(triton, "triton", None)
    assert not speedups.has_gpu_compiler()


def test_precision_of_a_gpu_without_bfloat16_instructions(gpu, monkeypatch, capsys):
    gpu(7, 5)
    assert with_usable_precision(options(precision="bf16", device="cuda")).precision == "fp32"
    printed = capsys.readouterr().out
    assert "precision fp32 instead of bf16: this GPU, of compute capability 7.5, has no bfloat16" in printed
    assert "--precision fp16 uses its tensor cores" in printed
    assert with_usable_precision(options(precision="bf16", device="cuda", force_bf16=True)).precision == "bf16"
    assert with_usable_precision(options(precision="fp16", device="cuda")).precision == "fp16"
    gpu(6, 0)
    with_usable_precision(options(precision="bf16", device="cuda"))
    assert "fp16" not in capsys.readouterr().out
    gpu(8, 0)
    assert with_usable_precision(options(precision="bf16", device="cuda")).precision == "bf16"
    gpu(7, 5)
    monkeypatch.setattr(torch.version, "hip", "7.0")  # its capabilities are others
    assert with_usable_precision(options(precision="bf16", device="cuda")).precision == "bf16"
    assert capsys.readouterr().out == ""


def test_precision_of_a_cpu_without_bfloat16_instructions(cpu, capsys):
    cpu(X86.format("", ""))
    assert with_usable_precision(options(precision="bf16")).precision == "fp32"
    assert "precision fp32 instead of bf16: this CPU has no bfloat16 instructions" in capsys.readouterr().out
    assert with_usable_precision(options(precision="bf16", resume="run")).precision == "bf16"
    assert "a resumed run keeps its precision" in capsys.readouterr().out
    assert with_usable_precision(options(precision="bf16", force_bf16=True)).precision == "bf16"
    assert with_usable_precision(options(precision="fp16")).precision == "fp16"
    cpu(X86.format(" avx512_bf16", ""))
    assert with_usable_precision(options(precision="bf16")).precision == "bf16"
    assert capsys.readouterr().out == ""


def test_a_run_prints_what_fast_selects(cpu, run):
    cpu(X86.format("", ""))
    done = run(*PIX2PIX, "--fast", "--precision=bf16", "--epoch_steps=1")
    assert "precision fp32 instead of bf16" in done.output
    assert "fast: precision=fp32, compile=False, channels_last=False" in done.output


def test_a_compiler_that_does_not_work(monkeypatch):
    """As on Windows without that of Visual Studio."""

    def broken(function):
        def call(_):
            raise RuntimeError("Compiler: cl is not found.\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    check_compiler(options())
    message = r"^compile: torch.compile does not work here \(Compiler: cl is not found.\): it needs .*: install it, or "
    with pytest.raises(ValueError, match=message + "leave out --compile$"):
        prepare(options(compile=True))
    with pytest.raises(ValueError, match=message + "use --precision fp32 instead of --fast$"):
        check_compiler(replace(options(compile=True), fast=True))


def test_a_compiler_that_works(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    check_compiler(options(compile=True))
