"""The notebook shows what the code computes, and `tools/notebook.py` runs it without Jupyter."""

import base64
import io
import json
import re
import sys

import pytest
from conftest import ROOT
from PIL import Image

from support.cli import UserError
from tools import notebook

WALKTHROUGH = ROOT / "docs/walkthrough.ipynb"
NUMBER = r"-?\d+(?:\.\d+)?"


def printed(cell):
    """What a cell printed, and the sizes of the images that it showed."""
    outputs = cell.get("outputs", [])
    text = "".join(line for output in outputs for line in output.get("text", []))
    pngs = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "data" in o]
    return text, [Image.open(io.BytesIO(png)).size for png in pngs]


def test_the_walkthrough_prints_what_it_stores(monkeypatch):
    """Every cell runs; numbers agree within 0.01 or 1 %, those of 36 training steps within 0.1."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    stored, again = (notebook.read_notebook(WALKTHROUGH) for _ in range(2))
    notebook.run_notebook(again, WALKTHROUGH.parent)
    for before, after in zip(stored["cells"], again["cells"]):
        (old_text, old_sizes), (new_text, new_sizes) = printed(before), printed(after)
        assert new_sizes == old_sizes, before["id"]
        assert re.sub(NUMBER, "#", new_text) == re.sub(NUMBER, "#", old_text)
        old, new = ([float(x) for x in re.findall(NUMBER, text)] for text in (old_text, new_text))
        assert new == pytest.approx(old, rel=0.01, abs=0.1 if before["id"] == "overfit" else 0.01)
    assert WALKTHROUGH.stat().st_size < 2e6


def write_notebook(path, *sources):
    cells = [{"cell_type": "markdown", "source": ["# text"]}]
    cells += [{"cell_type": "code", "source": s.splitlines(keepends=True)} for s in sources]
    path.write_text(json.dumps({"nbformat": 4, "cells": cells}))
    return notebook.parse_args([str(path)])


def test_outputs_are_stored(tmp_path):
    """Cells share one namespace; print and the value of the last line are stored, None is not."""
    image = "from PIL import Image\nImage.new('RGB', (x, 5))"
    args = write_notebook(tmp_path / "a.ipynb", "x = 4\nprint('a')\nprint('b')", image, "x + 1", "")
    notebook.main(args)
    text, *cells = notebook.read_notebook(args.notebook)["cells"]
    assert "outputs" not in text and [cell["execution_count"] for cell in cells] == [1, 2, 3, 4]
    assert [printed(cell) for cell in cells[:2]] == [("a\nb\n", []), ("", [(4, 5)])]
    assert cells[2]["outputs"][0]["data"] == {"text/plain": ["5"]} and cells[3]["outputs"] == []


def test_what_cannot_be_run_leaves_the_file_alone(tmp_path):
    """An error of a cell comes through; a file that is no notebook is refused in one line."""
    args = write_notebook(tmp_path / "a.ipynb", "print('a')", "1 / 0")
    before = (tmp_path / "a.ipynb").read_text()
    with pytest.raises(ZeroDivisionError):
        notebook.main(args)
    assert (tmp_path / "a.ipynb").read_text() == before
    for text in ("", "[]", '{"nbformat": 3, "worksheets": []}', '{"nbformat": 4, "cells": [1]}'):
        (tmp_path / "a.ipynb").write_text(text)
        with pytest.raises(UserError, match="a.ipynb: not a notebook"):
            notebook.main(args)
