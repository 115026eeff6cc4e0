"""The notebooks of docs/notebooks, run as Jupyter runs them.

    python tests/notebooks.py

runs them all and writes their outputs anew, to be committed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs that its cells have now, without logs and progress bars.

    Cells find the commands that are installed beside this Python. Raises CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **{name: folder for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR", "HF_HOME")},
            **{name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")},
            "TOKENIZERS_PARALLELISM": "false",
        }
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env=env)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for each in NOTEBOOKS:
        nbformat.write(run(each), each)
        print(each.name, "done", file=sys.stderr)
