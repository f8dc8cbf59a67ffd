"""Fingerprints of images and teachers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import CYCLE_GAN, TINY, config_of, teacher_of

from srpkd.training.config import parse_arguments
from srpkd.training.datasets import validate_data
from srpkd.training.fingerprints import check_unchanged, fingerprints


@pytest.fixture
def images(unpaired, tmp_path) -> Path:
    return Path(shutil.copytree(unpaired, tmp_path / "images"))


def test_images(images):
    def found(*arguments: str) -> dict[str, str]:
        config = parse_arguments([f"--dataroot={images}", *CYCLE_GAN, *TINY, *arguments])
        return fingerprints(validate_data(config, [config], {}), {})

    def changed(before: dict[str, str]) -> list[str]:
        return [name for name, value in found().items() if before[name] != value]

    before = found()
    assert list(before) == [f"images in {images}/trainA", f"images in {images}/trainB"]
    (images / "testA/00000.png").unlink()
    assert found() == before
    last = max((images / "trainB").iterdir())
    few = found("--max_dataset_size=2")
    content = last.read_bytes()
    last.write_bytes(content + b"0")
    assert changed(before) == [f"images in {images}/trainB"]
    assert found("--max_dataset_size=2") == few
    last.write_bytes(content)
    assert not changed(before)
    last.rename(last.with_name("other \udcff.png"))  # a name that is not UTF-8
    assert changed(before) == [f"images in {images}/trainB"]


def test_teachers():
    config = config_of()
    data = validate_data(config, [config], {})
    before, same = (fingerprints(data, teacher_of()) for _ in range(2))
    assert before == same and list(before) == ["weights of the teacher G"]
    teacher = teacher_of()
    teacher["G"].get_parameter("model.1.weight").data[0, 0, 0, 0] += 1e-3
    assert fingerprints(data, teacher) != before


def test_a_resumed_run_refuses_other_images(run, images):
    """Until they are restored."""
    run("--dataroot=images", *CYCLE_GAN, *TINY, "--name=run")
    path = images / "trainA/00000.png"
    path.rename(images / "elsewhere.png")
    resume = ("--resume=run", "--n_epochs=2")
    with pytest.raises(
        SystemExit, match=r"read other data than before \(images in images/trainA: 4 files, .* 5 files,"
    ):
        run(*resume)
    (images / "elsewhere.png").rename(path)
    assert run(*resume).report["status"] == "finished"


def test_a_state_without_fingerprints_is_accepted():
    check_unchanged("run", {"images": "1"}, {})
    with pytest.raises(ValueError, match=r"--resume run: .*images: 1 now, 2 when it started"):
        check_unchanged("run", {"images": "1"}, {"images": "2"})
