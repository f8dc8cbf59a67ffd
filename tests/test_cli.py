"""The command ``srpkd`` and the help of its verbs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest

import srpkd
from srpkd import cli
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_help_names_every_verb_and_how_to_go_on(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        cli.main(arguments)
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {verb} +\w", out, re.MULTILINE) for verb in cli.COMMANDS)
        assert "srpkd VERB --help" in out
    assert cli.COMMANDS.keys() >= {"train", "evaluate", "translate", "profile", "export", "info"}


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_help_of_a_verb(verb, capsys):
    if verb == "info":
        cli.main([verb, "--help"])
    else:
        with pytest.raises(SystemExit) as caught:
            cli.main([verb, "--help"])
        assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    assert re.search(rf"usage: .*srpkd.{verb}", out)
    if verb not in ("info", "train"):
        assert "example" in out
        # every option is explained
        options = [action for action in import_module(f"srpkd.{verb}").parser()._actions if not action.help]
        assert not options


@pytest.mark.parametrize("name", ["evaluate", "translate", "profile", "export"])
def test_a_command_without_arguments_says_what_it_needs(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name])
    assert caught.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_arguments_reach_the_verb(tmp_path, capsys):
    save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    cli.main(["profile", str(tmp_path / "net.pth"), "--modes", "--size", "16"])
    assert "GMACs of one 16 x 16 image" in capsys.readouterr().out


def test_info_and_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"{srpkd.__version__}\n"
    cli.main(["info"])
    assert "SRPKD_BACKEND" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="takes no options; received now"):
        cli.main(["info", "now"])


@pytest.mark.parametrize(("verb", "hint"), [("trian", "did you mean train?"), ("xyz", "there are: train, evaluate,")])
def test_unknown_verbs(verb, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb])
    assert caught.value.code == 2
    assert f"there is no verb '{verb}'; {hint}" in capsys.readouterr().err


def test_a_missing_package_names_the_extra():
    # in a process of its own: modules that were imported twice are two, and tests that patch one would miss the other
    code = "import sys; sys.modules['tqdm'] = None; from srpkd import cli; cli.main(['train', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "srpkd train needs tqdm: pip install 'srpkd[train]'" in done.stderr


def test_it_is_installed_as_a_command():
    assert PYPROJECT["project"]["scripts"] == {"srpkd": "srpkd.cli:main"}
    (entry,) = [entry for entry in metadata.distribution("srpkd").entry_points if entry.name == "srpkd"]
    assert entry.load() is cli.main


def test_help_needs_no_extra():
    code = "import sys; sys.modules['tqdm'] = None; from srpkd import cli; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage: srpkd VERB" in done.stdout, done.stderr
