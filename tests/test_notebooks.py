"""The notebooks are documentation that fails when it becomes untrue: each runs, from a clean copy, top to bottom.

What they print is what is in the repository, and README.md is made from index.ipynb; `make readme` puts both right.
"""
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"

pytestmark = [
    pytest.mark.skipif(not NBS.exists(), reason="the sources are not here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of nbclient and its relatives, not ours


@pytest.fixture(scope="module")
def refresh():
    """The script that runs notebooks and makes README.md."""
    for o in ("nbformat", "nbclient", "ipykernel"): pytest.importorskip(o)
    spec = spec_from_file_location("refresh", NBS / "refresh.py")
    res = module_from_spec(spec)
    spec.loader.exec_module(res)
    return res


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", [o.name for o in sorted(NBS.glob("*.ipynb"))])
def test_notebook_runs_and_prints_what_it_says(name, refresh, tmp_path, short_dir, monkeypatch):
    from nbclient.exceptions import CellExecutionError
    copytree(NBS, tmp_path / "nbs", ignore=ignore_patterns(".*", "__pycache__"))
    for o in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (short_dir / o).mkdir(mode=0o700)
        monkeypatch.setenv(o, str(short_dir / o))
    before, error = {*(tmp_path / "nbs").rglob("*")}, ""
    try: nb = refresh.run(tmp_path / "nbs" / name)
    except CellExecutionError as e: error = re.sub(r"\x1b\[[\d;]*m", "", str(e))
    if error: pytest.fail(error, pytrace=False)
    assert {*(tmp_path / "nbs").rglob("*"), *(short_dir / "TMPDIR").iterdir()} == before, "it leaves files behind"
    assert refresh.nbformat.writes(nb) + "\n" == (NBS / name).read_text(encoding="utf-8"), "see `make readme`"


def test_readme_is_that_of_index(refresh):
    nb = refresh.nbformat.read(NBS / "index.ipynb", as_version=4)
    assert refresh.readme(nb) == (ROOT / "README.md").read_text(encoding="utf-8"), "see `make readme`"
