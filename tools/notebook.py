"""Run a notebook and store its outputs: `python -m tools.notebook docs/walkthrough.ipynb`.

Every code cell runs in order, in one namespace and in the notebook's own folder, as Jupyter would
run it; Jupyter is not needed. Stored are what a cell prints and, if its last line is an expression,
the value: a PIL image as PNG, anything else as text. Cells are plain Python, without % commands.
"""

import ast
import base64
import contextlib
import io
import json
from pathlib import Path

from support.cli import ArgumentParser, UserError, atomic_write, print0, run_command


def parse_args(argv=None):
    parser = ArgumentParser("Run every code cell of a notebook and store the outputs in it.")
    parser.add_argument("notebook", metavar="FILE.ipynb", help="it is changed in place")
    return parser.parse_args(argv)


def read_notebook(path):
    """-> the notebook as a dict. Raises UserError for a file that is none."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        known = notebook["nbformat"] == 4 and all("source" in cell for cell in notebook["cells"])
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path}: not a notebook in nbformat 4")
    return notebook


def run_cell(source, namespace, name):
    """Run one cell's code -> the list of its outputs in nbformat 4."""
    body = ast.parse(source, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), name, "exec"), namespace)
        if last:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        outputs.append({"data": as_data(value), "metadata": {}, "output_type": "display_data"})
    return outputs


def as_data(value):
    """A cell's value -> {MIME type: text}: a PIL image as PNG, anything else as its repr."""
    if not hasattr(value, "_repr_png_"):
        return {"text/plain": [repr(value)]}
    png = io.BytesIO()
    value.save(png, "PNG", optimize=True)
    return {"image/png": base64.b64encode(png.getvalue()).decode()}


def run_notebook(notebook, folder):
    """Run all code cells in `folder`; their outputs and counts are put into the dict `notebook`."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for n, cell in enumerate(code, 1):
            outputs = run_cell("".join(cell["source"]), namespace, f"code cell {n}")
            cell.update(execution_count=n, outputs=outputs)


def main(args):
    notebook = read_notebook(args.notebook)
    run_notebook(notebook, Path(args.notebook).parent)
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_write(args.notebook) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print0(f"{args.notebook}: run, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
