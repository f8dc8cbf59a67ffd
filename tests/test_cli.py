"""The command ``srpkd`` and the help of its commands."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest

import srpkd
from srpkd import cli

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
# The start of a program that imports srpkd.cli without srpkd/__init__.py, which imports torch and so takes seconds
WITHOUT_TORCH = f"""
import os, sys, types
sys.modules["srpkd"] = types.ModuleType("srpkd")
sys.modules["srpkd"].__path__ = {[*srpkd.__path__]!r}
from srpkd import cli
"""


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        cli.main(arguments)
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {command} +\w", out, re.MULTILINE) for command in cli.COMMANDS)
        assert "srpkd COMMAND --help" in out
    commands = {"train", "evaluate", "translate", "profile", "export", "compare", "report", "check", "info"}
    assert cli.COMMANDS.keys() == commands


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    assert re.search(rf"usage: .*srpkd.{command}", out)


@pytest.mark.parametrize("command", ["evaluate", "translate", "profile", "export", "compare", "report", "check"])
def test_every_option_has_a_help_text_and_there_is_an_example(command):
    parser = import_module(f"srpkd.{command}").parser()
    assert "example" in parser.epilog
    assert not [action for action in parser._actions if not action.help]


@pytest.mark.parametrize("name", ["evaluate", "translate", "profile", "export"])
def test_missing_arguments(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name])
    assert caught.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"{srpkd.__version__}\n"
    assert srpkd.__version__ == PYPROJECT["project"]["version"]


def test_info(capsys):
    cli.main(["info"])
    assert "SRPKD_BACKEND" in capsys.readouterr().out


def test_the_package_runs_commands():
    done = subprocess.run([sys.executable, "-m", "srpkd", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{srpkd.__version__}\n"), done.stderr


def test_message_for_a_missing_package_names_the_extra():
    # in another process: importing the modules a second time here would break tests that patch them
    code = "import sys; sys.modules['tqdm'] = None; from srpkd import cli; cli.main(['train', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'srpkd train needs tqdm: pip install "srpkd[train]"' in done.stderr


def run_command(body: str, redirect: str = "") -> subprocess.CompletedProcess[str]:
    """Run `srpkd show`, a command with this body, in a shell that redirects its output."""
    code = f"""{WITHOUT_TORCH}
def show(_):
    {body}
sys.modules["srpkd.show"] = types.SimpleNamespace(main=show)
cli.COMMANDS["show"] = "a command"
sys.argv = ["srpkd", "show"]
cli.main()
"""
    command = f"{shlex.join([sys.executable, '-c', code])} {redirect}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("KeyboardInterrupt", -signal.SIGINT, "resume with: --resume\n"),
        ("ValueError", 1, "resume with: --resume\nTraceback"),
    ],
)
@pytest.mark.core(1)
def test_interrupt_shows_no_traceback(error, status, message):
    """It would scroll away what the command printed before, and other errors still show theirs."""
    done = run_command(f"print('resume with: --resume', file=sys.stderr)\n    raise {error}")
    assert done.returncode == status
    assert done.stderr[: len(message)] == message
    assert (done.stderr == message) == (error == "KeyboardInterrupt")


def test_characters_that_the_terminal_does_not_have(monkeypatch):
    """The table at the end of a training run contains a dash."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = run_command("print(chr(0x2013))")
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_without_a_reader_is_discarded(tmp_path, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    saved = tmp_path / "saved"
    body = f"for _ in range(9999): print('step', flush=True)\n    open({str(saved)!r}, 'w').close()"
    done = run_command(body, "2>&1 | head -n 1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "step\n", "")
    assert saved.exists()


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
@pytest.mark.core(1)
def test_closed_output_is_discarded(tmp_path, closed):
    """A file that the command opens must not get the number of stdout or stderr."""
    saved = tmp_path / "saved"
    body = f"""file = open({str(saved)!r}, "w")
    print("a", flush=True)
    print("b", file=sys.stderr, flush=True)
    os.write(1, b"c"), os.write(2, b"d"), file.write(str(file.fileno()))"""
    done = run_command(body, " ".join(f"{number}>&-" for number in closed.split()))
    assert done.returncode == 0, done.stderr
    assert int(saved.read_text("utf-8")) > 2
    assert done.stdout == ("" if "1" in closed else "a\nc")
    assert done.stderr == ("" if "2" in closed else "b\nd")


def test_output_that_cannot_be_written_fails():
    """A full disk, unlike a reader that has seen enough, loses what the user asked for."""
    done = run_command("print('result')\n    print('more')", "> /dev/full")
    message = "error: stdout cannot be written: No space left on device; make room on that disk, or write to another\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_progress_that_cannot_be_written_is_discarded():
    done = run_command("print('step', file=sys.stderr, flush=True)\n    print('result')", "2> /dev/full")
    assert (done.returncode, done.stdout) == (0, "result\n")


def test_console_script():
    assert PYPROJECT["project"]["scripts"] == {"srpkd": "srpkd.cli:main"}
    (entry,) = [entry for entry in metadata.distribution("srpkd").entry_points if entry.name == "srpkd"]
    assert entry.load() is cli.main


def test_help_needs_no_extra():
    code = f"{WITHOUT_TORCH}sys.modules['tqdm'] = None; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage: srpkd COMMAND" in done.stdout, done.stderr
