"""`recon export` as a user types it."""

from pathlib import Path

import pytest

from recon.cli import main
from tests.export.conftest import Made
from tests.export.finished_run import TOKEN8, Recipe
from tests.export.test_export import leftovers

pytestmark = pytest.mark.usefixtures("shared_loader")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("recon: ")
    assert "Traceback" not in printed
    return printed


def test_several_formats_go_to_the_run_folder_and_say_what_they_are(
    run_of: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run_of("dit", Recipe(activation=TOKEN8, rotated=True))
    main(["export", "--run", str(root), "--format", "native", "bf16"])
    assert leftovers(root / "exports") == ["bf16", "native"]
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "recon.load: simulation on any hardware",
        "Weights only: activations are not quantised in this format.",
        "differs by 0.00e+00 of the output's size",
        "1.000 of bfloat16",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "'gguf', which is none of native, torchao, auto-round"),
        (["--format", "bf16", "gguf"], "'gguf', which is none of native, torchao, auto-round"),
        (["--format", "native", "--out", "file/x"], "file, which is a file and no folder"),
        (["--format", "native", "bf16", "--out", "here"], "--out names one folder"),
        (["--format", "torchao"], "by a learned rotation"),
    ],
    ids=["unknown", "unknown behind another", "in a file", "one folder for two", "misfit"],
)
def test_what_cannot_work_is_a_sentence_and_writes_nothing(
    arguments: list[str],
    message: str,
    run_of: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    root = run_of("cogvideox", Recipe(rotated=True))
    assert message in refused(["--run", str(root), *arguments], capsys)
    assert not (root / "exports").exists()
    assert leftovers(tmp_path) == ["file"]


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = refused(["--run", str(tmp_path), "--format", "native"], capsys)
    assert "holds no finished result" in printed
    assert leftovers(tmp_path) == []
