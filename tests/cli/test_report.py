"""`recon report` as a user types it, on runs that the command line made."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import contents, fit_arguments, process, with_calibration
from tests.report.reading import Page

Call = Callable[[list[str]], tuple[int, str]]

TIMES = re.compile(r'<div class="times">.*?</div>', re.DOTALL)


def test_a_run_gets_its_page_in_its_folder(recon: Call, finished_run: Path, tmp_path: Path) -> None:
    root = with_calibration(tmp_path / "run", finished_run)
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        (root / name).write_bytes((finished_run / name).read_bytes())
    (root / "quantized").symlink_to(finished_run / "quantized")
    status, said = recon(["report", "--run", str(root)])
    assert (status, said.strip().splitlines()[-1]) == (0, f"Written: {root / 'report.html'}")
    text = (root / "report.html").read_text()
    read = Page(text)
    assert str(finished_run) in read.words  # the configuration
    assert f"recon test --run {root}" in read.words
    assert text.count('<g class="chosen"><circle') == 2  # maps of both scores
    # 2 prompts of 4 steps, the first of which is left out; of these, 4 are chosen
    assert len(read.table("prompt")) == 2
    assert sum(len(g.split("<circle")) - 1 for g in re.findall(r'<g class="chosen">.*', text)) == 8


def test_several_runs_need_a_place_and_stand_side_by_side(
    recon: Call, finished_run: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((finished_run / "config.yaml").read_bytes())
    both = ["report", "--run", str(finished_run), "--run", str(unfinished)]
    before = contents(finished_run)
    status, said = recon(both)
    assert status == 2
    assert "recon: --run names 2 folders, and their common page has no place of its own." in said
    status, _ = recon([*both, "--out", str(tmp_path / "new" / "both.html")])
    assert status == 0
    assert contents(finished_run) == before
    words = Page((tmp_path / "new" / "both.html").read_text()).words
    assert "unfinished has not ended: 0 units closed so far." in words
    assert "No unit has been closed yet." in words


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["--run", "nowhere"],
            "nowhere is no run folder: it has neither config.yaml nor quantized",
        ),
        (["--run", "RUN", "--out", "."], "--out . is a folder. Name a file in it"),
        (["--run", "RUN", "--run", "RUN", "--out", "x"], "--run names the same folder twice"),
    ],
    ids=["no run", "a folder", "twice"],
)
def test_what_cannot_work_is_a_sentence_and_writes_nothing(
    given: list[str], says: str, recon: Call, finished_run: Path, tmp_path: Path
) -> None:
    before = contents(finished_run)
    status, said = recon(["report", *(str(finished_run) if g == "RUN" else g for g in given)])
    assert status == 2
    assert said.startswith(f"recon: {says}")
    assert "Traceback" not in said
    assert contents(finished_run) == before
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
def test_samples_and_metrics_of_a_test_are_in_the_page(
    recon: Call, finished_run: Path, tmp_path: Path
) -> None:
    root = with_calibration(tmp_path / "run", finished_run)
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        (root / name).write_bytes((finished_run / name).read_bytes())
    for name in ("quantized", "checkpoints"):
        (root / name).symlink_to(finished_run / name)
    assert recon(["test", "--run", str(root)])[0] == 0
    assert recon(["report", "--run", str(root)])[0] == 0
    read = Page((root / "report.html").read_text())
    gifs = len(list((root / "samples").glob("*.gif")))
    assert gifs > 0
    assert sum(r.startswith("data:image/gif") for r in read.references) == gifs
    assert read.words.count("dB to full precision") == gifs  # each found its row of test.json
    assert "PSNR, dB" in read.table("against full precision")


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_page_of_an_uninterrupted_one(
    recon: Call,
    pipeline: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The same relative folder in two places: paths are part of the configuration.
    arguments = [
        *fit_arguments(Path("run"), pipeline, "--model.epochs", "4"),
        *("--step_checkpoint.every_n_steps", "7", "--ckpt_path", "last"),
    ]
    pages = []
    for place in (tmp_path / "whole", tmp_path / "killed"):
        root = with_calibration(place / "run", finished_run)
        if place.name == "killed":
            running = process(arguments, place / "log")
            started = time.monotonic()
            while not (root / "checkpoints" / "unit=001.ckpt").exists():
                assert running.poll() is None
                assert time.monotonic() - started < 120
                time.sleep(0.01)
            os.killpg(running.pid, signal.SIGKILL)
            running.wait(60)
            assert not (root / "summary.json").exists()
        monkeypatch.chdir(place)
        assert recon(arguments)[0] == 0
        assert recon(["report", "--run", "run"])[0] == 0
        pages.append((root / "report.html").read_text())
    assert [len(TIMES.findall(page)) for page in pages] == [1, 1]
    whole, resumed = (TIMES.sub("", page) for page in pages)
    assert resumed == whole
    manifest = json.loads((root / "quantized" / "manifest.json").read_text())
    assert all(f"Loss of {unit}" in whole for unit in manifest["units"])
