"""Every command line of README.md is run here, or by CI, or is read by the parser it is meant for.

A fit of a real checkpoint takes hours: of such lines, every option, class and file name is read as
the command reads it, and nothing is run.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from recon.cli import export, plan, table
from recon.cli.main import COMMANDS
from recon.export.exporting import FORMATS
from recon.models.adapter import ModelAdapter
from tests.cli.command import CONFIGS, REPOSITORY

Call = Callable[[list[str]], tuple[int, str]]

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BY_CI = ("main", "tests")
"""Markers of the blocks that .ci/run takes out of the page and runs."""
WITH_RUN = ("fit", "compare", "report")
"""Commands on finished runs that take seconds."""


def blocks(text: str) -> Iterator[str]:
    """Contents of the fenced blocks for a shell."""
    yield from re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Words of each command line that CI does not run, comments left out."""
    text = re.sub(r"<!-- ci:\w+ -->.*?<!-- ci:end -->", "", README, flags=re.DOTALL)
    lines = [line for block in blocks(text) for line in block.splitlines()]
    # In running text, those that have arguments; a line may end inside.
    fences = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`(recon [a-z-]+\s[^`]+)`", fences.sub("", text))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


RECON = [words[1:] for words in commands() if words[0] == "recon"]
EVALUATIONS = [words for words in RECON if words[0] in ("test", "validate", "predict")]


class Reached(Exception):
    """The command has read its arguments and begins its work."""


def begin(*arguments: Any, **keywords: Any) -> NoReturn:
    raise Reached


@pytest.fixture
def recon(recon: Call, finished_run: Path) -> Call:
    """`recon` where a reader of the page stands: in the repository, after some runs."""
    for name in ("configs", "recon"):
        Path(name).symlink_to(REPOSITORY / name)
    for name in {word for words in RECON for word in words if word.startswith("runs/")}:
        shutil.copytree(finished_run, name)
    return recon


def accepted(recon: Call, arguments: list[str]) -> None:
    """Asserts that every option, class and configuration of a Lightning command is known."""
    status, printed = recon([*arguments, "--print_config"])
    assert status == 0, printed
    assert "seed_everything" in printed


def identity(words: list[str]) -> str:
    return " ".join(words)


# Nothing is left out ------------------------------------------------------------------------------


def test_every_block_is_known_to_ci_or_to_this_file() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    for name in BY_CI:
        assert f"ci:{name} -->/,/<!-- ci:end" in script
        assert README.count(f"<!-- ci:{name} -->\n```bash\n") == 1
    assert README.count("<!-- ci:end -->") == len(BY_CI)
    assert {words[0] for words in commands()} == {"recon", "pip"}
    assert len(RECON) >= 15


def test_every_command_of_the_page_exists() -> None:
    named = {*re.findall(r"`recon ([a-z-]+)", README), *(words[0] for words in RECON)}
    assert named <= set(COMMANDS)


def test_extras_that_are_installed_are_defined() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [extra for words in commands() if words[0] == "pip" for extra in words if "[" in extra]
    assert asked
    for requirement in asked:
        (names,) = re.findall(r"\[([^]]*)\]", requirement)
        assert set(names.split(",")) <= set(project["optional-dependencies"])


def test_adding_a_family_names_all_that_an_adapter_must_have() -> None:
    (section,) = re.findall(r"^## A model family is one file$.*?(?=^```)", README, re.S | re.M)
    assert set(re.findall(r"`(\w+)`", section)) >= ModelAdapter.__abstractmethods__
    assert len(section.strip().splitlines()) <= 16  # its heading among them


# Run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [w for w in RECON if w[0] in WITH_RUN and "--config" not in w], ids=identity
)
def test_what_takes_seconds_runs(words: list[str], recon: Call) -> None:
    status, printed = recon(words)
    assert status == 0, printed


@pytest.mark.slow
@pytest.mark.parametrize("words", EVALUATIONS, ids=identity)
def test_what_samples_runs(words: list[str], recon: Call) -> None:
    status, printed = recon(words)
    assert status == 0, printed
    assert list(Path(words[words.index("--run") + 1]).glob("*/*.gif"))


# Read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [*[w for w in RECON if w[0] == "fit" and "--config" in w], *EVALUATIONS], ids=identity
)
def test_options_of_fits_and_evaluations_are_known(words: list[str], recon: Call) -> None:
    accepted(recon, words)


@pytest.mark.parametrize("words", [w for w in RECON if w[0] == "plan"], ids=identity)
def test_options_of_plans_are_those_of_fits(
    words: list[str], recon: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def prepared(arguments: list[str]) -> NoReturn:
        seen.append(arguments)
        raise Reached

    with monkeypatch.context() as patched:
        patched.setattr(plan, "prepared", prepared)
        with pytest.raises(Reached):
            recon(words)
    accepted(recon, seen[0])


@pytest.mark.parametrize("words", [w for w in RECON if w[0] == "export"], ids=identity)
def test_formats_of_exports_exist(
    words: list[str], recon: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(export, "write_export", lambda run, name, *_, **__: written.append(name))
    monkeypatch.setattr(export, "_show", lambda folder: None)
    assert recon(words)[0] == 0
    assert written
    assert set(written) <= set(FORMATS)


@pytest.mark.parametrize(
    "words", [w for w in RECON if w[0] in ("bench", "bench-step")], ids=identity
)
def test_options_of_measurements_are_known(
    words: list[str], recon: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon.cli.bench.Finished.open", begin)
    monkeypatch.setattr("recon.cli.bench_step._network", begin)
    with pytest.raises(Reached):
        recon(words)


@pytest.mark.parametrize("words", [w for w in RECON if w[0] == "table"], ids=identity)
def test_rows_of_tables_are_fits(
    words: list[str], recon: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[list[str]] = []

    def call(arguments: list[str], root: Path) -> NoReturn:
        fits.append(arguments)
        raise Reached

    monkeypatch.setattr(table, "_call", call)
    with pytest.raises(Reached):
        recon(words)
    accepted(recon, fits[0])
    for name in re.findall(r"configs/[\w/]+\.yaml", " ".join(word for f in fits for word in f)):
        assert (CONFIGS.parent / name).is_file()
