import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import yaml

from recon.cli import table as room
from recon.cli import table_rows
from recon.cli.table import Row, markdown, table
from recon.cli.table_rows import TEACHERS
from recon.errors import ReconError
from tests.cli.command import CONFIGS


def pretend(calls: list[list[str]], fail: str = "") -> Callable[[list[str], Path], None]:
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
            "full_precision": {"all": 1.0, "accuracy": 1.0},
            "round_to_nearest": {"all": 0.5, "accuracy": 0.5},
            "quantized": {"all": 0.75, "accuracy": 0.75},
            "paired": numbers | {"kl": 0.1, "same_answer": 0.875},
            "paired_round_to_nearest": {"psnr": 28, "ssim": 0.8, "kl": 0.4, "same_answer": 0.625},
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
    methods = TEACHERS["video"].methods
    assert methods["s2q_base"][0] == methods["s2q_vdit"][0] == ("s2q_vdit",)
    assert set(methods["s2q_base"][1]) == {*table_rows.NO_SDS, *table_rows.NO_STD}


def test_on_images_all_rows_share_teacher_bits_and_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    imitated = pretend([])

    def call(arguments: list[str], root: Path) -> None:
        commands.append(arguments)
        imitated(arguments, root)

    monkeypatch.setattr(room, "_call", call)
    table(["--teacher", "image", "--folder", str(tmp_path), "--bits", "4:4", "--seeds", "0"])
    fits = [command for command in commands if command[0] == "fit"]
    assert len(fits) == len(TEACHERS["image"].methods)
    assert [p.name for p in tmp_path.glob("calibration*")] == ["calibration-stratified-seed0"]
    printed = capsys.readouterr().out
    for name in TEACHERS["image"].methods:
        assert f"| W4A4 | {name} |" in printed


def test_on_questions_rows_are_measured_by_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    imitated = pretend([])

    def call(arguments: list[str], root: Path) -> None:
        commands.append(arguments)
        imitated(arguments, root)

    monkeypatch.setattr(room, "_call", call)
    chosen = ["--methods", "q_vlm", "gptq", "--bits", "4:16", "4:4", "--seeds", "0"]
    table(["--teacher", "vlm", "--folder", str(tmp_path), *chosen])
    fits = [" ".join(command) for command in commands if command[0] == "fit"]
    assert ["--model.activation null" in fit for fit in fits] == [True, False] * 2
    assert ["--model.activation.num_bits 4" in fit for fit in fits] == [False, True] * 2
    assert all(f"--data.baselines {tmp_path / 'baselines'}" in fit for fit in fits)
    printed = capsys.readouterr().out
    assert "| KL to full precision, nats | same answer | right answer |" in printed
    assert "| – | full precision | 0.000 | 0.0000 | 1.000 | 1.000 |" in printed
    assert "| W4A16 | round to nearest | 1.000 | 0.4000 | 0.625 | 0.500 |" in printed
    assert "| W4A4 | q_vlm | 0.500 | 0.1000 | 0.875 | 0.750 |" in printed


def test_the_two_by_two_of_ptq4dit_differs_in_one_key_a_step() -> None:
    methods = TEACHERS["image"].methods
    assert methods["ptq4dit"] == (("ptq4dit",), ())
    assert methods["ptq4dit_reconstruction"] == (("ptq4dit",), ("--model.balance", "none"))
    assert methods["ptq4dit_balancing"] == (("ptq4dit",), ("--model.reconstruct", "false"))
    both = methods["ptq4dit_reconstruction"][1] + methods["ptq4dit_balancing"][1]
    assert methods["ptq4dit_neither"] == (("ptq4dit",), both)


def merged(names: tuple[str, ...]) -> dict[str, Any]:
    """Settings of configurations laid over each other, as far as they are mappings."""

    def over(below: Any, above: Any) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        if above.get("class_path", below.get("class_path")) != below.get("class_path"):
            return above  # another class takes other arguments
        return below | {k: over(below.get(k), v) for k, v in above.items()}

    result: dict[str, Any] = {}
    for name in names:
        result = over(result, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    return result


@pytest.mark.parametrize(
    ("teacher", "reference", "row"),
    [
        (teacher, reference, row)
        for teacher, reference in (("image", "ptq4dit"), ("vlm", "q_vlm"))
        for row in TEACHERS[teacher].methods
    ],
)
def test_every_row_has_the_network_data_and_batches_of_its_method(
    teacher: str, reference: str, row: str
) -> None:
    expected = merged((reference,))
    configs, extra = TEACHERS[teacher].methods[row]
    found = merged(configs)
    settings, wanted = found["model"]["init_args"], expected["model"]["init_args"]
    for key in ("adapter", "batch_size", "micro_batch", "threads"):
        assert settings.get(key) == wanted[key]
    assert settings["weight"]["num_bits"] == wanted["weight"]["num_bits"]
    assert found["data"] == expected["data"]
    given = dict(zip(extra[::2], extra[1::2], strict=True))
    if "steps" in settings:
        assert int(given.get("--model.steps", settings["steps"])) == wanted["steps"]


def test_a_method_of_the_other_teacher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table(["--teacher", "image", "--methods", "s2q_vdit"])
    assert "--methods s2q_vdit is none of smoothquant" in capsys.readouterr().err


def test_a_run_that_fails_stops_the_table_and_names_its_log(tmp_path: Path) -> None:
    root = tmp_path / Row("gptq", 4, 6, 0).name
    with pytest.raises(ReconError, match=rf"of {root.name} failed\. Read {root}/fit\.log"):
        table([
            *("--folder", str(tmp_path), "--methods", "gptq", "--bits", "4:6", "--seeds", "0"),
            *("--extra", "nonsense=1"),
        ])  # fmt: skip
    assert "nonsense" in (root / "fit.log").read_text()
