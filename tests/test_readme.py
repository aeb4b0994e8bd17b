"""The README's commands are what is tested, word for word."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

DEMO = "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && .venv/bin/python -m scripts.demo"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def test_the_two_commands_stand_in_the_readme() -> None:
    assert DEMO in README
    assert TESTS in README


def test_ci_calls_the_readmes_test_command() -> None:
    assert TESTS in (ROOT / ".ci" / "run").read_text().splitlines()


def commands() -> list[str]:
    """Return every ``python -m`` command line of the README, comments removed."""
    found = re.findall(r"^(python -m .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    return sorted(set(found) | set(re.findall(r"`(python -m scripts\.[^`]*)`", README)))


@cache
def help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_names_a_module_and_options_that_exist(command: str) -> None:
    shown = help_of(command.split()[2])
    for argument in command.split()[3:]:
        name = argument.strip("'").partition("=")[0]
        if "=" in argument:
            leaf = name.rpartition(".")[2]
            assert re.search(rf"^\s*{re.escape(leaf)}:", shown, flags=re.MULTILINE), f"{name} in {command}"
