"""The README says what is true: line counts, files, functions and flags."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = sorted({p for p in re.findall(r"(?:python|nproc_per_node=\d+) (\w+\.py)", README)})


def test_line_counts_are_true():
    """The reading order's line counts are the files' own."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    assert {name: int(n) for name, n in rows} == {
        name: len((ROOT / name).read_text().splitlines()) for name, _ in rows
    }
    assert {name for name, _ in rows} == {p.name for p in ROOT.glob("*.py")}


def test_every_path_and_link_exists():
    """Files named in code or links are there, unless they are outputs or public checkpoints."""
    for folder in (ROOT, ROOT / "weights"):
        text = (folder / "README.md").read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (folder / link).exists(), link
        for name in re.findall(r"`((?:tests|docs|weights)/[\w./-]+)`", text):
            assert (ROOT / name).exists() or name == "weights/sd-v1.safetensors", name


def test_functions_in_the_diagram_exist():
    """`file.py:function` names a function or a class of that file."""
    named = re.findall(r"(\w+\.py):(\w+)", README)
    assert len(named) >= 6
    for file, function in named:
        assert re.search(rf"(def|class) {function}\b", (ROOT / file).read_text()), (file, function)


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_in_the_readme_exist(program):
    """Every flag that a command of the README passes is one of that program."""
    done = subprocess.run(
        [sys.executable, ROOT / program, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for line in README.splitlines():
        if f" {program} " in line:
            for flag in re.findall(r" (--[\w-]+)", line.split("#")[0].split(program)[1]):
                assert flag in done.stdout, (program, flag)
