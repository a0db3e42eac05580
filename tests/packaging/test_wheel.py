"""What is shipped: the wheel holds the tree and nothing else; the two links; the floors."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", "*.egg-info", "build", "dist", "runs", "__pycache__", ".*_cache", ".venv", "tests"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built through an sdist from a copy of the tree, links and all."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=LEFT_OUT)
    (copy / "tests").mkdir()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def modules_of_the_tree() -> set[str]:
    found = set()
    for folder, _, files in os.walk(REPOSITORY / "recon", followlinks=True):
        below = Path(folder).relative_to(REPOSITORY)
        found |= {str(below / name) for name in files if name.endswith(".py")}
    return found


@pytest.mark.slow
@pytest.mark.packaging
def test_the_wheel_holds_the_modules_of_the_tree_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"recon"}
    assert "recon/py.typed" in names
    templates = REPOSITORY / "recon" / "report" / "templates"
    assert {f"recon/report/templates/{path.name}" for path in templates.iterdir()} <= names
    for room in ("datamodules", "callbacks"):
        assert f"recon/{room}/__init__.py" in names


@pytest.mark.slow
@pytest.mark.packaging
def test_the_wheel_holds_the_embedded_teacher(wheel: zipfile.ZipFile) -> None:
    teacher = REPOSITORY / "recon" / "zoo" / "video"
    if not (teacher / "model_index.json").exists():
        pytest.skip("The embedded teacher is not in this tree.")
    files = {p.relative_to(REPOSITORY).as_posix() for p in teacher.rglob("*") if p.is_file()}
    assert files <= set(wheel.namelist())
    assert sum((REPOSITORY / name).stat().st_size for name in files) < 9 * 2**20


@pytest.mark.parametrize("room", ["datamodules", "callbacks"])
def test_a_room_is_imported_by_one_name_only(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    sys.modules.pop(room, None)
    with pytest.raises(ImportError, match=rf"is the package recon\.{room}; import it by that name"):
        importlib.import_module(room)
    assert importlib.import_module(f"recon.{room}").__name__ == f"recon.{room}"


@pytest.mark.parametrize("room", ["datamodules", "callbacks"])
def test_a_room_is_a_committed_link(room: str) -> None:
    link = REPOSITORY / "recon" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"


@pytest.mark.slow
@pytest.mark.packaging
def test_imports_point_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "0 broken" in done.stdout


def test_the_command_is_there_without_importing_torch() -> None:
    code = "import sys, recon, recon.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
