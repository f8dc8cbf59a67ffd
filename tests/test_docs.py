"""The pages of docs/ and the README: links, the navigation, Python blocks, commands and API references."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import srpkd
from srpkd import cli
from srpkd.data.synthetic import write_synthetic
from srpkd.defaults import KD_WEIGHT, SRP_WEIGHT
from srpkd.kernels.formulas import DEFAULT_DISTANCE, DEFAULT_NORMALIZE
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator
from srpkd.reporting.comparison_server import ComparisonServer
from srpkd.training.config import parse_arguments, read_config
from srpkd.training.option_groups import LossOptions
from srpkd.training.options import check_keys

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
# copies of the tree for GPU machines leave some of them out
TEXTS = [page for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES) if page.exists()]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, in order, as lists of words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_links_and_languages(page):
    text = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if target.startswith("https://"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    assert set(re.findall(r"^```(\S+)", text, re.MULTILINE)) <= {"bash", "python", "yaml", "text"}
    assert text.count("```") % 2 == 0


def marks(page):
    """The recipes take longest, above all the one that imports diffusers."""
    if page.parent.name != "recipes":
        return ()
    return pytest.mark.slow, pytest.mark.core(0 if page.stem == "diffusion" else 3)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=marks(page)) for page in TEXTS if blocks(page, "python")], ids=page_id
)
def test_python_runs(page, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    for package in ("accelerate", "diffusers", "lightning", "skimage", "sklearn", "timm"):
        if re.search(rf"^(from|import) {package}\b", page.read_text("utf-8"), re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    if "onnxruntime" in page.read_text("utf-8"):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        from srpkd.models.exporters import to_onnx

        (tmp_path / "student.onnx").write_bytes(to_onnx(define_generator("resnet_1blocks", ngf=1)))
    if "torch.export.load" in page.read_text("utf-8"):
        from srpkd.models.exporters import to_pt2

        run = tmp_path / "runs" / "h2z"
        run.mkdir(parents=True)
        (run / "latest_net_G_A.pt2").write_bytes(to_pt2(define_generator("resnet_1blocks", ngf=1)))
    names: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def srpkd_command(command: str, arguments: list[str]) -> None:
    """Parse a command line of srpkd as the command does."""
    assert command in cli.COMMANDS
    if command == "train":
        if "--resume" not in arguments:  # which reads the run
            assert parse_arguments(arguments).name
    else:
        import_module(f"srpkd.{command}").parser().parse_args(arguments)


def bench_command(command: str, arguments: list[str]) -> None:
    """Parse a command line of the benchmarks as they do."""
    parser = argparse.ArgumentParser()
    import_module(f"bench.{command}").add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("page", [page for page in TEXTS if commands(page)], ids=page_id)
def test_commands_have_options_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)[1]
        (tmp_path / name).write_text(block)
        for variant, options in read_config(name)["variants"].items():
            check_keys(options, variant)
    for line in commands(page):
        if line[0] == "srpkd":
            srpkd_command(line[1], line[2:])
        elif line[0] == "make":
            assert re.search(rf"^{line[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        else:
            assert line[:3] == ["python", "-m", "bench"]
            bench_command(line[3], line[4:])


@pytest.mark.parametrize("page", [page for page in PAGES if "\n::: " in page.read_text("utf-8")], ids=page_id)
def test_api_reference_names_objects_that_exist(page):
    for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        try:
            documented = import_module(path)
        except ModuleNotFoundError:
            documented = getattr(import_module(module), name)
        assert documented.__doc__, path


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the file, and the text without its code, of every docstring in a folder."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield page_id(path), re.sub(r"(`+)[^`]*\1", "", text)


@pytest.mark.parametrize("folder", ["srpkd", "kernels"])
def test_docstrings_are_markdown_that_the_site_shows_in_full(folder):
    """Markdown drops <words> that look like HTML tags, and knows no roles of reStructuredText."""
    for file, text in docstrings(ROOT / folder):
        assert not re.findall(r"<\w[\w ]*>|:[a-z]+:(?=\s|$)", text), file


@pytest.mark.parametrize(
    ("documented", "defaults"),
    [
        (srpkd.relation_loss, [f'``"{DEFAULT_NORMALIZE}"`` (default)', f'``"{DEFAULT_DISTANCE}"`` (default)']),
        (LossOptions, [f"{DEFAULT_NORMALIZE} (default)", f"{DEFAULT_DISTANCE} (default)"]),
        (srpkd.distill, [f"{KD_WEIGHT['distill']:g} by default", f"{SRP_WEIGHT['distill']:g} by default"]),
    ],
)
def test_docstrings_state_the_defaults_that_a_signature_only_names(documented, defaults):
    for default in defaults:
        assert default in documented.__doc__


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings[python] is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "relation_loss" in (tmp_path / "reference" / "loss" / "index.html").read_text("utf-8")


SMALL = {
    "train": "--load_size 32 --crop_size 32 --n_epochs 1 --n_epochs_decay 0 --epoch_steps 1 --num_threads 0 --ndf 2 "
    "--netD n_layers --n_layers_D 1 --netG resnet_1blocks --ngf 2 --samples 1 --device cpu",
    "profile": "--size 32 --modes",
    "translate": "--device cpu",
    "compare": "--device cpu --no_browser",
    "evaluate": "--device cpu",
    "export": "",
}


@pytest.mark.slow
def test_your_own_cyclegan_from_end_to_end(tmp_path, monkeypatch, capsys, one_thread):
    """Run the page's commands in order, on small images. Leave FID out: its network is a download."""
    for package in ("onnxscript", "onnxruntime", "torchmetrics"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ComparisonServer, "serve_forever", lambda self: None)
    write_synthetic(tmp_path / "data", 2, 2, size=32, layout="unaligned")
    for name in ("A", "B"):
        save_weights(define_generator("resnet_2blocks", ngf=4), tmp_path / "teacher" / f"latest_net_G_{name}.pth")
    save_weights(define_generator("resnet_2blocks", ngf=4, antialias="both"), tmp_path / "cut" / "latest_net_G.pth")
    for _, command, *arguments in commands(DOCS / "your-own-cyclegan.md"):
        if "--inception_weights" in arguments:
            continue
        try:
            cli.main([command, *arguments, *SMALL[command].split()])
        except SystemExit as end:
            assert end.code in (0, None), end.code
    out = capsys.readouterr().out
    assert {"index.html", "latest_net_G_A.pth"} <= {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert len(list((tmp_path / "out" / "student").glob("*.png"))) == 2
    assert "SSIM" in out and "PSNR to float32" in out and (tmp_path / "costs.json").exists()
    assert (tmp_path / "small.int8.onnx").exists() and (tmp_path / "student.onnx").exists()


def test_environment_variables_are_those_that_the_code_reads():
    files = [path for name in ("srpkd", "kernels", "csrc", "bench") for path in (ROOT / name).rglob("*.*")]
    sources = "\n".join(path.read_text("utf-8") for path in files if path.suffix in (".py", ".cpp", ".h"))
    read = set(re.findall(r'(?:os\.environ(?:\.get\(|\[)|std::getenv\(|\bis_set\()"(\w+)"', sources))
    # those of the system and of torchrun are not settings, and PyTorch reads two that are
    read -= {"PATH", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"}
    names = re.findall(r"^\| (`.*?) \|", (DOCS / "environment.md").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(names))) == read | {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"}


def test_quick_start_names_files_that_the_demo_writes():
    config = parse_arguments([])
    variants = {f"{name} seed 0".replace(" ", "-") for name in config.variants} | {"teacher"}
    named = {word for line in commands(DOCS / "quickstart.md") for word in line if word.startswith("runs/demo/")}
    assert named and {Path(word).parent.name for word in named} <= variants
