"""Run the notebooks in place, and write README.md from index.ipynb: `make readme`.

README.md holds the text of index.ipynb, the files it writes (`%%writefile`), and the commands it runs (`%%sh`) with
what they print. Its other cells are the checks. Arguments are notebooks to run, without any it is all of them.
"""
import posixpath
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}


def run(path):
    "The notebook at `path`, executed beside it, without what differs from run to run."
    nb = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:  # Unix sockets: a TCP port may be lost to others before it is used
        config = Config(NotebookClient={"kernel_name": "python3", "timeout": 60},
                        KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
        here = {"metadata": {"path": path.parent}}
        NotebookClient(nb, resources=here, coalesce_streams=True, config=config).execute()
    nb.metadata = nbformat.from_dict(KERNEL)
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type != "code": continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]  # notices, of this machine
        cell.execution_count = None
        for o in cell.outputs:
            if "execution_count" in o: o.execution_count = None
    return nb


def readme(nb):
    "What README.md is to say."
    return "\n\n".join(o for cell in nb.cells for o in _blocks(cell)) + "\n"


def _blocks(cell):
    "Markdown for a cell."
    if cell.cell_type == "markdown": yield re.sub(r"\]\((?!\w+:|#)([^)]+)\)", _link, cell.source)
    elif m := re.fullmatch(r"%%writefile (\S+)\n(.*)", cell.source, re.DOTALL):
        yield f"```python\n# {m[1]}\n{m[2]}\n```"
    elif cell.source.startswith("%%sh\n"):
        yield f"```sh\n{cell.source[5:]}\n```"
        for o in cell.outputs: yield f"```text\n{o.text.rstrip()}\n```"


def _link(m): return f"]({posixpath.normpath(posixpath.join(HERE.name, m[1]))})"  # as seen from the README


def main(names):
    for path in [HERE / o for o in names] or sorted(HERE.glob("*.ipynb")):
        nb = run(path)
        nbformat.write(nb, path)
        if path.name == "index.ipynb": (HERE.parent / "README.md").write_text(readme(nb), encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
