"""`recon bench` on a tiny random DiT: what is timed, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import image_arguments
from tests.report.reading import Page

Call = Callable[[list[str]], tuple[int, str]]
QUICK = ("--format", "bf16", "--runs", "1")


@pytest.fixture(scope="module")
def exported(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step a unit, and its bf16 export."""
    from recon.cli import main

    root = tmp_path_factory.mktemp("bench") / "run"
    main([*image_arguments(root, images, steps=1), "--media.after_fit", "0"])
    main(["export", "--run", str(root), "--format", "bf16"])
    return root


def result(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "bench.json").read_text())
    return content


def test_step_and_sample_of_both_types_are_timed_and_compared(exported: Path, recon: Call) -> None:
    status, printed = recon(
        ["bench", "--run", str(exported), *QUICK, "--eager", "--steps", "5", "--threads", "1"]
    )
    assert status == 0, printed
    found = result(exported)
    assert found["sampling_steps"] == 5
    rows = {(row["network"], row["dtype"]): row for row in found["networks"]}
    assert list(rows) == [
        (name, dtype) for name in ("full precision", "bf16") for dtype in ("float32", "bfloat16")
    ]
    for row in rows.values():
        assert row["seconds"].keys() == {"step, eager", "sample, eager"}
        assert 0 < row["seconds"]["step, eager"] < row["seconds"]["sample, eager"]
        assert row["disk_bytes"] > 0
        assert row["peak_bytes"] > 2**26  # a process with torch in it
    fastest = min(
        rows["bf16", dtype]["seconds"]["step, eager"] for dtype in ("float32", "bfloat16")
    )
    full = rows["full precision", "float32"]["seconds"]["step, eager"]
    assert found["times_faster"]["float32"]["step, eager"] == pytest.approx(full / fastest)
    assert f"{1000 * full:.1f}" in printed
    assert recon(["report", "--run", str(exported)])[0] == 0
    shown = Page((exported / "report.html").read_text()).table("network")
    assert shown["full precision, float32"][0] == [1000 * full]


@pytest.mark.slow
def test_compiled_networks_are_timed_without_samples_where_none_are_wanted(
    exported: Path, recon: Call
) -> None:
    status, printed = recon(["bench", "--run", str(exported), *QUICK, "--steps", "0"])
    assert status == 0, printed
    for row in result(exported)["networks"]:
        assert row["seconds"].keys() == {"step, eager", "step, compiled"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "torchao"), "is no export. Make it with `recon export --run"),
        (("--format", "native"), "is no export. Make it with"),
        (("--format", "bf16", "--runs", "0"), "--runs must be at least 1, got 0"),
        (("--format", "bf16", "--steps", "-1"), "--steps must be at least 0, got -1"),
        (("--format", "bf16", "--device", "cuda:99"), "'cuda:99', which torch cannot use here ("),
        (("--format", "bf16", "--device", "gpu"), "'gpu', which torch cannot use here ("),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: tuple[str, ...], message: str, exported: Path, recon: Call
) -> None:
    (exported / "bench.json").unlink(missing_ok=True)
    status, printed = recon(["bench", "--run", str(exported), *arguments])
    assert status != 0
    assert message in " ".join(printed.split())
    assert not (exported / "bench.json").exists()


def test_a_simulation_is_not_timed(exported: Path, recon: Call) -> None:
    assert recon(["export", "--run", str(exported), "--format", "native"])[0] == 0
    status, printed = recon(["bench", "--run", str(exported), "--format", "native"])
    assert status != 0
    assert "native is a simulation" in printed
