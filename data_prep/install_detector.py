"""Installs the default detector of curation: the npm package @mediapipe/objectron (Apache-2.0).

    python -m data_prep.install_detector                      fetches it with npm, 33 MB
    python -m data_prep.install_detector --package FILE.tgz   for machines without npm or network

One release is pinned and its hash checked, so the same detector decides everywhere. It goes into
the Python environment (share/see3d_jax), like a package; curation itself never downloads. Settings
and results call it by its name, `objectron`, not by where it is.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import atomic_path

PACKAGE, VERSION = "@mediapipe/objectron", "0.4.1675468480"
INTEGRITY = (  # sha512, base64, as in a package-lock.json
    "IoWuW0ojc9GaSW6UoDCIXgwjLSqTEcR5w8NYuGH+R5+q+nKzS7KOIGfY/eyx4DttReumb398W6+PpW0DQ2Rs/w=="
)
COMMAND = "python -m data_prep.install_detector"
NPM_SECONDS = 300.0


def package_path() -> Path:
    """Where the package is, or would be, in this Python environment."""
    return Path(sys.prefix) / "share" / "see3d_jax" / f"mediapipe-objectron-{VERSION}.tgz"


@click.command()
@click.option("--package", type=click.Path(path_type=Path),
              help=f"The file that `npm pack {PACKAGE}@{VERSION}` gave elsewhere.")  # fmt: skip
def app(package: Path | None) -> None:
    """Installs the default detector of data_prep.curate."""
    if package is not None:
        click.echo(install(package))
    elif is_genuine(package_path()):
        click.echo(f"{package_path()}: is there already")
    else:
        with tempfile.TemporaryDirectory() as folder:
            click.echo(install(fetch(Path(folder))))


def fetch(folder: Path) -> Path:
    """The package as npm brings it into `folder`; registry and proxy are those npm is set to.

    Raises InputError without npm, WorkError when npm fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"npm is not installed (Debian: apt-get install npm); or run `npm pack "
            f"{PACKAGE}@{VERSION}` on another machine and `{COMMAND} --package FILE.tgz` here"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder),
               "--fetch-retries=1", "--fetch-timeout=60000"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS)
    except subprocess.TimeoutExpired:
        raise WorkError(f"npm pack {PACKAGE}: no answer in {NPM_SECONDS:g} s") from None
    found = list(folder.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = " ".join((said or ["it made no package"])[0].split())[:160]
        raise WorkError(f"npm pack {PACKAGE}@{VERSION} failed: {reason}")
    return found[0]


def install(package: Path) -> Path:
    """Puts the checked package in its place. Raises InputError when it is not the pinned one."""
    if not package.is_file():
        raise InputError(f"--package {package}: no such file")
    if not is_genuine(package):
        raise InputError(f"{package}: is not {PACKAGE} {VERSION} (its sha512 differs); fetch again")
    with atomic_path(package_path()) as temporary:
        shutil.copyfile(package, temporary)
    return package_path()


def is_genuine(package: Path) -> bool:
    """Whether the file is there and is the pinned release."""
    if not package.is_file():
        return False
    with package.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode() == INTEGRITY


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
