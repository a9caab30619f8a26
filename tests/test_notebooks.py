"""Notebooks are committed as they ran. Running them again takes `pytest --nbmake notebooks`."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000
ABSOLUTE = re.compile(r"(?<![\w./:<])/\w+/\w|\b[A-Za-z]:\\\w|file://")  # markup and URLs apart


def texts(cell):
    """What a cell says and, pictures apart, what it has put out."""
    yield "".join(cell["source"])
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", []))
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/png"):
                yield "".join(content)


def test_notebooks_are_there():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_it_ran(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    kinds = {output.get("name", output["output_type"]) for cell in code for output in cell["outputs"]}
    assert not kinds & {"error", "stderr"}
    assert path.stat().st_size < MOST_BYTES
    for cell in notebook["cells"]:
        for text in texts(cell):
            assert not ABSOLUTE.search(text), f"an absolute path: {ABSOLUTE.search(text)}"
