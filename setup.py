"""Builds the package; every word of its metadata is in settings.ini, every tool's setting in pyproject.toml.

`FASTCGI_COMPILE=1 pip install .` has mypyc compile the hot modules, from the same source: a wheel for one Python on one
platform, with the sources beside. Whoever builds (pip, `build`) is told here that this needs mypy, and gets it.
"""
import os
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
lowest, newest = (int(cfg[o].removeprefix("3.")) for o in ("min_python", "max_python"))

COMPILED = [f"fastcgi/{o}.py" for o in "core framing connection channel session worker paths scope".split()]
MYPYC = ["mypy>=1.11"]


def compiled() -> dict[str, Any]:
    "What `setup` is told so that extension modules are built, nothing unless FASTCGI_COMPILE asks for them."
    if os.environ.get("FASTCGI_COMPILE", "") in ("", "0"): return {}
    try:
        from mypyc.build import mypycify
    except ImportError: return {"setup_requires": MYPYC, "cmdclass": {"build_py": Incomplete}}
    how = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]  # other modules are read for types
    return {"ext_modules": mypycify([*how, *COMPILED], group_name="fastcgi.compiled", debug_level="0")}


class Incomplete(build_py):
    "To be asked for requirements is fine without mypyc; to build is not, for nobody would notice."

    def run(self) -> None:
        raise SystemExit(f"FASTCGI_COMPILE: mypyc is not here; build with isolation, or install {MYPYC[0]!r} first")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license=licenses[cfg["license"]],
    license_files=["LICENSE"],
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Operating System :: POSIX",
        *(f"Programming Language :: Python :: 3.{o}" for o in range(lowest, newest + 1)),
        "Topic :: Internet :: WWW/HTTP :: Dynamic Content :: CGI Tools/Libraries",
        "Typing :: Typed",
    ],
    packages=["fastcgi"],
    package_data={"fastcgi": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={o: cfg[f"{o}_requirements"].split() for o in ("dev", "reload", "uvloop")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    **compiled(),
)
