"""Builds the package; every word of its metadata is in settings.ini, every tool's setting in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
lowest, newest = (int(cfg[o].removeprefix("3.")) for o in ("min_python", "max_python"))

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
)
