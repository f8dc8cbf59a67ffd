"""What docs/ shows is run: Python as it stands, a whole distillation on small images, and every command's options."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from srpkd import cli
from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator
from srpkd.training.config import parse_arguments, read_config
from srpkd.training.options import check_keys

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, in order, as lists of words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_pages_are_there():
    names = {page.name for page in PAGES}
    assert names >= {
        "quickstart.md",
        "your-own-cyclegan.md",
        "loss-in-your-loop.md",
        "layers-and-weights.md",
        "kernels.md",
        "papers-table.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_languages(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (DOCS / target).exists(), target
    assert set(re.findall(r"^```(\S+)", text, re.MULTILINE)) <= {"bash", "python", "yaml", "text"}
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    if "onnxruntime" in page.read_text():
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        from srpkd.models.exporters import to_onnx

        (tmp_path / "student.onnx").write_bytes(to_onnx(define_generator("resnet_1blocks", ngf=1)))
    names: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_have_options_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)[1]
        (tmp_path / name).write_text(block)
        for variant, options in read_config(name)["variants"].items():
            check_keys(options, variant)
    for program, verb, *arguments in commands(page):
        assert program == "srpkd" and verb in cli.COMMANDS
        if verb == "train":
            assert parse_arguments(arguments).name
        elif verb == "info":
            assert not arguments
        else:
            import_module(f"srpkd.{verb}").parser().parse_args(arguments)


SMALL = {
    "train": "--load_size 32 --crop_size 32 --n_epochs 1 --n_epochs_decay 0 --epoch_steps 1 --num_threads 0 --ndf 2 "
    "--netD n_layers --n_layers_D 1 --netG resnet_1blocks --ngf 2 --samples 1 --device cpu",
    "profile": "--size 32 --modes",
    "translate": "--device cpu",
    "evaluate": "--device cpu",
    "export": "",
}


@pytest.mark.slow
def test_your_own_cyclegan_from_end_to_end(tmp_path, monkeypatch, capsys, one_thread):
    """The page's commands in their order, with less of everything; FID aside, whose network is a download."""
    for package in ("onnxscript", "onnxruntime", "torchmetrics"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    write_synthetic(tmp_path / "data", 2, 2, size=32, layout="unaligned")
    for name in ("A", "B"):
        save_weights(define_generator("resnet_2blocks", ngf=4), tmp_path / "teacher" / f"latest_net_G_{name}.pth")
    for _, verb, *arguments in commands(DOCS / "your-own-cyclegan.md"):
        if "--inception_weights" in arguments:
            continue
        try:
            cli.main([verb, *arguments, *SMALL[verb].split()])
        except SystemExit as end:
            assert end.code in (0, None), end.code
    out = capsys.readouterr().out
    assert {"index.html", "latest_net_G_A.pth"} <= {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert len(list((tmp_path / "out" / "student").glob("*.png"))) == 2
    assert "SSIM" in out and "PSNR to float32" in out and (tmp_path / "costs.json").exists()
    assert (tmp_path / "small.int8.onnx").exists() and (tmp_path / "student.onnx").exists()


def test_the_demos_files_are_where_the_quick_start_says():
    config = parse_arguments([])
    variants = {f"{name} seed 0".replace(" ", "-") for name in config.variants} | {"teacher"}
    named = {word for line in commands(DOCS / "quickstart.md") for word in line if word.startswith("runs/")}
    assert named and {Path(word).parent.name for word in named} <= variants
