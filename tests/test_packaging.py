"""What is shipped is what is here: the lists in pyproject.toml, the wheel, and what importing costs."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"bench", "tests"}

# Folders where people and machines keep a checkout. Written so that this file does not name one.
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root|home|Users)/\w")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def shipped(pyproject: dict[str, Any]) -> set[str]:
    return set(pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files under version control, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listing = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607 - whichever git the developer uses
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [Path(os.fsdecode(name)) for name in listing.stdout.split(b"\0") if name]
    return [path for path in paths if (ROOT / path).is_file()]


def packages_in_tree() -> set[str]:
    return {init.parent.name for init in ROOT.glob("*/__init__.py")}


def test_every_package_in_the_tree_is_shipped(shipped: set[str]) -> None:
    forgotten = packages_in_tree() - NOT_SHIPPED - shipped

    assert set() == forgotten


def test_every_shipped_folder_exists(shipped: set[str]) -> None:
    missing = {name for name in shipped if not (ROOT / name).is_dir()}

    assert set() == missing


def test_every_package_is_type_checked(pyproject: dict[str, Any]) -> None:
    unchecked = packages_in_tree() - set(pyproject["tool"]["mypy"]["files"])

    assert set() == unchecked


def test_every_room_has_its_import_contract(pyproject: dict[str, Any]) -> None:
    rooms = packages_in_tree() - NOT_SHIPPED - {"models", "samples"}  # these two are data

    assert rooms == set(pyproject["tool"]["importlinter"]["root_packages"])


def test_wheel_holds_every_tracked_file_of_its_packages_and_nothing_else(
    shipped: set[str], tracked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # a build backend works in the project's folder
    expected = {path.as_posix() for path in tracked if path.parts[0] in shipped}

    wheel = zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path)))

    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert set() == expected - files
    assert set() == {name.split("/")[0] for name in files} - shipped


def test_importing_the_command_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, cli.main; print(*sorted({'torch', 'transformers'}.intersection(sys.modules)))"
    )

    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (0, "", "") == (run.returncode, run.stdout.strip(), run.stderr)


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on(tracked: list[Path]) -> None:
    naming = [
        f"{path}: {match.group()!r}"
        for path in tracked
        if (match := MACHINE_PATH.search((ROOT / path).read_bytes()))
    ]

    assert [] == naming
