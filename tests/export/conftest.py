"""Tiny teachers, runs of them as recipes say, and a process that loads exports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recon.errors import ExportError
from recon.export import fresh, reload
from tests.export.finished_run import FAMILIES, Recipe, finished_run

Made = Callable[[str, Recipe], Path]


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a finished run of a family; tests must not change it."""
    teachers: dict[str, Path] = {}
    runs: dict[tuple[str, str], Path] = {}

    def made(family: str, recipe: Recipe) -> Path:
        kind = FAMILIES[family]
        if family not in teachers:
            teachers[family] = kind.write(tmp_path_factory.mktemp(family) / "teacher")
        key = (family, repr(recipe))
        if key not in runs:
            root = tmp_path_factory.mktemp("run") / family
            runs[key] = finished_run(root, teachers[family], kind, recipe)
        return runs[key]

    return made


SERVING = """
import importlib.util, json, sys, traceback
spec = importlib.util.spec_from_file_location("fresh", sys.argv[1])
fresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh)
answers = open(int(sys.argv[2]), "w")
for line in sys.stdin:
    try:
        fresh.answer(line.strip())
        said = ""
    except Exception:
        said = traceback.format_exc()
    print(json.dumps(said), file=answers, flush=True)
"""


class Loader:
    """One process that answers requests as fresh ones would: it has not imported recon either.

    Libraries take seconds to import; an export of a tiny network takes none.
    """

    def __init__(self) -> None:
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVING, fresh.__file__, str(write)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        self.answers = os.fdopen(read)

    def __call__(self, request: Path, library: str) -> None:
        assert self.process.stdin is not None
        print(request.absolute(), file=self.process.stdin, flush=True)
        said = json.loads(self.answers.readline())
        if said:
            raise ExportError(reload.unloadable(library, said))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.answers.close()


@pytest.fixture(scope="session")
def loaders() -> Iterator[dict[bool, Loader]]:
    """The processes that are running, by whether they may import recon."""
    running: dict[bool, Loader] = {}
    yield running
    for loader in running.values():
        loader.stop()


@pytest.fixture
def shared_loader(loaders: dict[bool, Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test are loaded by a process that loads those of other tests too."""

    def start(request: Path, library: str) -> None:
        own = library == "recon"
        if own not in loaders:
            loaders[own] = Loader()
        loaders[own](request, library)

    monkeypatch.setattr(reload, "start", start)
