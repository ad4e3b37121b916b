"""The notebooks are documentation that fails when it becomes untrue: each runs, from a clean copy, top to bottom."""
import re
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

NBS = Path(__file__).parent.parent / "nbs"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of nbclient and its relatives, not ours
@pytest.mark.parametrize("name", [o.name for o in sorted(NBS.glob("*.ipynb"))])
def test_notebook_runs(name, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copytree(NBS, tmp_path / "nbs", ignore=ignore_patterns(".*"))
    nb = nbformat.read(tmp_path / "nbs" / name, as_version=4)
    before = {*tmp_path.rglob("*")}
    here = {"metadata": {"path": tmp_path / "nbs"}}
    client = nbclient.NotebookClient(nb, timeout=60, kernel_name="python3", resources=here)
    error = ""
    try: client.execute()
    except nbclient.exceptions.CellExecutionError as e: error = re.sub(r"\x1b\[[\d;]*m", "", str(e))
    if error: pytest.fail(error, pytrace=False)
    assert {*tmp_path.rglob("*")} == before, "it leaves files behind"
