"""Wheel and source distribution hold what they should, and work outside the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*argv: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel made from it), offline."""
    folder = tmp_path_factory.mktemp("dist")
    argv = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    run(*argv, cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_source_distribution_holds_tests_docs_configs_and_benchmarks(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for part in ("tests", "docs", "configs", "benchmarks"):
        tracked = run("git", "ls-files", part, cwd=ROOT).split() if (ROOT / ".git").exists() else []
        assert set(tracked) <= names, part
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= names


def test_the_wheel_trains_outside_the_checkout(built, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(built[1]) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith(("tests/", "docs/"))]
        wheel.extractall(site)
    away = tmp_path / "away"
    away.mkdir()
    env = {"PYTHONPATH": str(site), "XLA_FLAGS": ""}
    where = run(sys.executable, "-c", "import jft; print(jft.__file__)", cwd=away, **env)
    assert Path(where.strip()).is_relative_to(site)
    argv = (sys.executable, "-m", "jft", "train", "--config=digits_vit:tiny", "--workdir=run")
    run(*argv, cwd=away, **env)
    assert (away / "run" / "report.html").is_file()
    assert "quickstart" in run(sys.executable, "-m", "jft", "recipes", cwd=away, **env)
