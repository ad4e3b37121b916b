"""What is built from the sources: one version, an sdist that builds, a wheel with the package and nothing else."""
import os
import subprocess
import sys
import tarfile
import venv
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns
from sysconfig import get_path
from zipfile import ZipFile

import pytest

import fastcgi

ROOT = Path(__file__).parent.parent
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
CFG = INI["DEFAULT"]
NOT_SOURCE = ignore_patterns(".*_cache", ".git", ".venv*", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def run(*args, **kw):
    """What a command prints; if it fails, that is the explanation."""
    res = subprocess.run([*map(str, args)], text=True, capture_output=True, timeout=120, **kw)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Directory of an sdist, and of the wheel built from it, as a release makes them."""
    if not find_spec("build"): pytest.skip("`build` is not installed")
    tmp = tmp_path_factory.mktemp("build")
    copytree(ROOT, tmp / "src", ignore=NOT_SOURCE)
    here = ["--no-isolation"] if find_spec("setuptools") and find_spec("wheel") else []
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run(sys.executable, "-m", "build", *here, "--outdir", tmp / "dist", tmp / "src", cwd=tmp, env=env)
    return tmp / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    res, = built.glob("*.whl")
    return res


def test_version_is_that_of_settings_ini():
    assert fastcgi.__version__ == CFG["version"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_sdist_carries_all_that_building_and_testing_need(built):
    sdist, = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar: names = {o.partition("/")[2] for o in tar.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "fastcgi/py.typed",
            "tests/conftest.py", "tests/frontends/nginx.conf", "tests/frontends/install.sh", "tests/budget.json",
            "benchmarks/run.py", "benchmarks/load.c", "benchmarks/programs/floor.py"} <= names
    assert not [o for o in names if "__pycache__" in o or o.startswith(".venv")]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_wheel_holds_the_package_alone(wheel):
    names = ZipFile(wheel).namelist()
    assert {o.partition("/")[0] for o in names} == {"fastcgi", f"fastcgi-{CFG['version']}.dist-info"}
    assert {o for o in names if o.startswith("fastcgi/")} == {
        "fastcgi/py.typed", *(f"fastcgi/{o.name}" for o in (ROOT / "fastcgi").glob("*.py"))}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_wheel_says_what_settings_ini_says(wheel):
    with ZipFile(wheel) as z: meta = z.read(f"fastcgi-{CFG['version']}.dist-info/METADATA").decode()
    lines = meta.partition("\n\n")[0].splitlines()
    assert f"Version: {CFG['version']}" in lines
    assert f"Summary: {CFG['description']}" in lines
    assert f"Requires-Python: >={CFG['min_python']}" in lines
    needed = [o for o in lines if o.startswith("Requires-Dist:") and "extra ==" not in o]
    assert needed == [f"Requires-Dist: {CFG['requirements']}"]
    assert {f"Provides-Extra: {o}" for o in ("dev", "reload", "uvloop")} <= set(lines)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_wheel_installs_and_imports_in_a_fresh_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python,
        "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # the dependencies are those of this environment; a .pth file puts them behind the wheel's own directory
    site, = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "deps.pth").write_text(get_path("purelib"))
    code = "import fastcgi as lib; from fastcgi import *; print(lib.__version__, lib.__file__)"
    version, file = run(python, "-W", "error", "-c", code, cwd=tmp_path).split()
    assert version == CFG["version"]
    assert Path(file).is_relative_to(site)
    assert "usage" in run(tmp_path / "env/bin/fastcgi", "--help", cwd=tmp_path).lower()
