"""The README and the other documents name files, functions and flags that exist."""

import re
from importlib import import_module

import pytest
from conftest import ROOT

DOCUMENTS = {path: path.read_text() for path in ROOT.rglob("*.md") if "goldens" not in path.parts}
DOCUMENTS |= {path: path.read_text() for path in ROOT.glob("docs/*.ipynb")}
DATA = DOCUMENTS[ROOT / "docs/data.md"]
SHELL = "\n".join((ROOT / name).read_text() for name in (
    "README.md", "docs/data.md", "docs/reproduce.sh", "docs/speed.md", "docs/volumes.md",
    "weights/README.md", "weights/make_nano.sh"))  # fmt: skip
COMMANDS = sorted(set(re.findall(r"(?:python|nproc_per_node=\d+) (-m tools\.\w+|\w+\.py)", SHELL)))


def test_every_path_and_link_exists():
    """Files named in code or links are there, unless they are outputs or public checkpoints."""
    for path, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (path.parent / link).exists(), link
        for name in re.findall(r"`((?:tests|docs|weights|support|tools)/[\w./-]+\.\w+)", text):
            assert (ROOT / name).exists() or name == "weights/sd-v1.safetensors", name


def test_functions_named_in_the_documents_exist():
    """`file.py:function` names a function or a class of that file."""
    named = re.findall(r"([\w/]+\.py):(\w+)", "".join(DOCUMENTS.values()))
    assert len(named) >= 10
    for file, function in named:
        code = (ROOT / file).read_text()
        assert re.search(rf"(def|class) {function}\b|import .*\b{function}\b", code), function


def test_addresses_in_the_messages_are_those_of_the_document():
    """What is missing is said with an address; docs/data.md has the same one."""
    for code in (ROOT / "data.py", ROOT / "convert_sd_weights.py"):
        addresses = re.findall(r"https?://[^\s\"]+", code.read_text())
        assert len(addresses) >= 4
        for address in addresses:
            assert f"<{address}>" in DATA, address


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_in_the_commands_exist(command, capsys):
    """Every flag that a command of the documents passes is one of that program."""
    program = import_module(command.removeprefix("-m ").removesuffix(".py"))
    with pytest.raises(SystemExit, match="0"):
        program.parse_args(["--help"])
    known = capsys.readouterr().out
    for line in SHELL.replace("\\\n", " ").splitlines():
        if f" {command} " in line:
            for flag in re.findall(r" (--[\w-]+)", line.split("#")[0].split(command)[1]):
                assert re.search(rf"{flag}(?![\w-])", known), (command, flag)
