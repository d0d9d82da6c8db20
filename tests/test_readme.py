"""The README's commands exist: every line that a reader might type parses, and the files it names are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dist_train.cli import make_parser
from dist_train.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(first_word: str) -> list[str]:
    """Lines of shell blocks that begin with a word, continued lines joined."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip().startswith(first_word + " ")]


def test_the_first_commands_are_the_two_for_newcomers() -> None:
    assert commands("make")[:2] == ["make demo", "make test"]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {line.split()[1] for line in commands("make")} <= targets


@pytest.mark.parametrize("line", commands("dist-train"))
def test_every_verb_line_parses(line: str) -> None:
    assert callable(make_parser().parse_args(shlex.split(line)[1:]).run)


@pytest.mark.parametrize("line", [*commands("deepspeed"), *commands("torchrun"), *commands("srun")])
def test_every_launcher_line_ends_in_a_verb_line(line: str) -> None:
    words = shlex.split(line)
    verb = max(place for place, word in enumerate(words) if word in ("dist_train", "dist-train")) + 1
    assert callable(make_parser().parse_args(words[verb:]).run)


def test_every_run_file_it_names_loads() -> None:
    named = set(re.findall(r"launch/runs/\w+\.yaml", README))
    assert named
    for name in named:
        load_config(ROOT / name)


def test_every_path_it_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_example_of_grids_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "voxelize" in code]
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    shape, *poscar = capsys.readouterr().out.splitlines()
    assert f"density_CDHW float32 [{shape.strip('()')}]" in example
    assert poscar[5].split() == ["O", "Sn", "O", "S", "Bi"]


def test_the_python_example_of_latents_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "interpolate_latents" in code]
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    formulas = capsys.readouterr().out.splitlines()
    assert len(formulas) == 11
    assert formulas[4] == "Bi1 O2 S1 Sn1"
