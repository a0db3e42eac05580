import json
from pathlib import Path
from threading import Lock

import pytest

from recon.cli import table as room
from recon.cli.table import Row, markdown, table
from recon.errors import ReconError


def pretend(calls: list[list[str]], fail: str = "") -> object:
    """In place of a process: writes what the real one would, and a result that tells the row."""
    busy: dict[str, Lock] = {}

    def call(arguments: list[str], root: Path) -> None:
        if fail and fail in root.name:
            raise ReconError(f"{root.name} failed")
        calls.append([arguments[0], root.name])
        better = "s2q" in root.name
        if arguments[0] == "fit":
            calibration = arguments[arguments.index("--data.folder") + 1]
            if not Path(calibration).exists():
                assert busy.setdefault(calibration, Lock()).acquire(blocking=False)
                Path(calibration).mkdir()
            error = {"round_to_nearest": 4.0, "reconstructed": 1.0 if better else 2.0}
            (root / "summary.json").write_text(json.dumps({"error": error}))
            return
        numbers = {"psnr": 30.0 + int(root.name[-1]) + 3 * better, "ssim": 0.9}
        result = {
            "full_precision": {"all": 1.0},
            "round_to_nearest": {"all": 0.5},
            "quantized": {"all": 0.75},
            "paired": numbers,
            "paired_round_to_nearest": {"psnr": 28.0, "ssim": 0.8},
        }
        (root / "test.json").write_text(json.dumps(result))

    return call


def test_rows_are_run_once_and_printed_with_their_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(room, "_call", pretend(calls))
    chosen = ["--folder", str(tmp_path), "--methods", "gptq", "s2q_vdit", "--bits", "4:6"]
    table([*chosen, "--seeds", "0", "2", "--jobs", "4"])
    assert len(calls) == 2 * 2 * 2
    assert len(list(tmp_path.glob("calibration-salient-seed*"))) == 2
    printed = capsys.readouterr().out
    assert "| W4A6 | s2q_vdit | 0.250 ± 0.000 | 34.00 ± 1.41 | 0.9000 ± 0.0000 |" in printed
    assert "| W4A6 | gptq | 0.500 ± 0.000 | 31.00 ± 1.41 |" in printed
    assert "| W4A6 | round to nearest | 1.000 ± 0.000 | 28.00 ± 0.00 |" in printed
    table([*chosen, "--seeds", "0", "2"])
    assert len(calls) == 2 * 2 * 2  # nothing was run again
    assert "0.250 | 33.00 |" in "\n".join(markdown(tmp_path, ["s2q_vdit"], [(4, 6)], [0]))


def test_the_ablation_is_one_method_under_four_settings() -> None:
    assert room.METHODS["s2q_base"][0] == room.METHODS["s2q_vdit"][0] == "s2q_vdit"
    assert set(room.METHODS["s2q_base"][1]) == {*room.NO_SDS, *room.NO_STD}


def test_a_run_that_fails_stops_the_table_and_names_its_log(tmp_path: Path) -> None:
    root = tmp_path / Row("gptq", 4, 6, 0).name
    with pytest.raises(ReconError, match=rf"of {root.name} failed\. Read {root}/fit\.log"):
        table([
            *("--folder", str(tmp_path), "--methods", "gptq", "--bits", "4:6", "--seeds", "0"),
            *("--extra", "nonsense=1"),
        ])  # fmt: skip
    assert "nonsense" in (root / "fit.log").read_text()
