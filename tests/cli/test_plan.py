"""`recon plan`: as a user types it, and beside what fits on the embedded teachers took."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import CONFIGS, contents, finished, fit_arguments, image_arguments
from tests.report.reading import Page

Call = Callable[[list[str]], tuple[int, str]]

TOLERANCE = 0.2
TEACHERS = {
    "ptq4dit": ("image", "--model.steps", "5"),
    "s2q_vdit": ("video", "--model.epochs", "1"),
    "q_vlm": ("vlm", "--model.steps", "20"),
}
LIBRARIES = {"ptq4dit": 529_100_000, "s2q_vdit": 529_100_000, "q_vlm": 503_700_000}
"""Bytes that interpreter and libraries took there, by the plan; torch with CUDA takes 846 MB."""
OBSERVED: dict[str, dict[str, int]] = {
    "ptq4dit": {
        "host": 693_899_264,
        "linears": 1_269_760,
        "quantized": 4_269_711,
        "calibration": 1_145_030,
        "native": 4_319_511,
        "bf16": 7_690_948,
        "torchao": 5_487_678,
    },
    "s2q_vdit": {
        "host": 740_425_728,
        "linears": 1_341_312,
        "quantized": 1_598_995,
        "calibration": 1_289_230,
    },
    "q_vlm": {
        "host": 583_147_520,
        "linears": 235_968,
        "quantized": 1_103_368,
        "calibration": 2_281_918,
    },
}
"""Bytes of fits with `TEACHERS`'s options on one core (torch 2.13, CPU): peak_memory_bytes.host and
size_bytes.quantized of summary.json, files of quantized/, calibration/ and of the transformer in
each export."""


def arguments(config: str, root: Path) -> list[str]:
    teacher, *options = TEACHERS[config]
    repository = CONFIGS.parent
    return [
        *("--config", str(CONFIGS / f"{config}.yaml"), *options),
        *("--model.adapter.init_args.folder", str(repository / "recon" / "zoo" / teacher)),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
    ]


def planned(config: str, folder: Path, *more: str) -> dict[str, Any]:
    """The plan by a process of its own: what libraries take is measured there."""
    file = folder / "plan.json"
    command = ["plan", *arguments(config, folder / "run"), "--json", str(file), *more]
    assert finished(command, folder / "plan.log") == 0, (folder / "plan.log").read_text()
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def foreseen(plan: dict[str, Any]) -> dict[str, int]:
    """The planned counterparts of what was observed."""
    files = plan["disk"]["artefacts"]
    sizes = {export["format"]: export["bytes"] for export in plan["exports"]}
    rest = files["quantized"] - sizes["native"]
    assert rest == 0
    return {
        "host": plan["memory"]["host"],
        "quantized": files["quantized"],
        "calibration": files["calibration"],
        **sizes,
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("config", TEACHERS)
def test_a_plan_is_near_what_was_observed(config: str, tmp_path: Path) -> None:
    # Ten seconds: a process that imports what a fit does.
    plan = planned(config, tmp_path, "--no-probe")
    found = foreseen(plan)
    found["host"] -= plan["memory"]["libraries"] - LIBRARIES[config]
    for name, observed in OBSERVED[config].items():
        if name != "linears":
            assert found[name] == pytest.approx(observed, rel=TOLERANCE), name
    assert plan["refusals"] == []
    assert plan["seconds"] is None
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", TEACHERS)
def test_a_fit_takes_what_was_planned(config: str, tmp_path: Path) -> None:
    plan = planned(config, tmp_path)
    found = foreseen(plan)
    quiet = ("--wandb", "false", "--media.after_fit", "0")
    root = tmp_path / "run"
    assert finished(["fit", *arguments(config, root), *quiet], tmp_path / "log", 900) == 0
    summary = json.loads((root / "summary.json").read_text())
    assert summary["size_bytes"]["quantized"] == OBSERVED[config]["linears"]
    host = summary["peak_memory_bytes"]["host"]
    assert found["host"] == pytest.approx(host, rel=TOLERANCE)
    for folder in ("quantized", "calibration"):
        assert found[folder] == pytest.approx(size_of(root / folder), rel=TOLERANCE)
    assert size_of(root / "checkpoints") <= plan["disk"]["artefacts"]["checkpoints"]
    assert plan["seconds"]["reconstruction"] > 0


# As a user types it


def test_a_plan_says_everything_in_eighty_columns_and_writes_nothing(
    recon: Call, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = contents(tmp_path)
    line = fit_arguments(tmp_path / "run", pipeline)[1:]
    status, printed = recon(["plan", *line])
    assert status == 0, printed
    assert contents(tmp_path) == before
    shown = printed[printed.index("S2QVDiT on CogVideoXTransformer3DModel") :]
    assert all(len(row) <= 80 for row in shown.splitlines())
    for words in (
        "Quantised", "attention_input", "4 per channel", "6 per token", "Left in full precision",
        "outside the blocks", "Peak memory of a process (estimates)", "Disk (estimates)",
        "calibration/", "Exports (estimates", "would be refused", "torchao: ", "Time (estimate)",
        "Processes (one a GPU)",
    ):  # fmt: skip
        assert words in shown
    assert "would refuse this" not in shown


def test_the_plan_of_a_run_stays_with_it_and_is_in_its_page(
    recon: Call, finished_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished_run, root)
    status, printed = recon(["plan", f"--run={root}", "--no-probe"])
    assert status == 0, printed
    plan = json.loads((root / "plan.json").read_text())
    summary = json.loads((root / "summary.json").read_text())
    assert recon(["report", "--run", str(root)])[0] == 0
    rows = Page((root / "report.html").read_text()).table("estimate")
    assert rows["peak memory, host"] == [
        [plan["memory"]["host"]], [summary["peak_memory_bytes"]["host"]]
    ]  # fmt: skip
    assert rows["quantized/"] == [
        [plan["disk"]["artefacts"]["quantized"]], [size_of(root / "quantized")]
    ]  # fmt: skip
    assert "calibration" not in rows  # no time was measured
    for unnamed in ("--run", "--run="):
        assert recon(["plan", unnamed])[0] == 2


def test_without_weights_a_plan_is_made_all_the_same(
    recon: Call, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "net" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((images / "transformer" / "config.json").read_text())
    index = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    line = image_arguments(tmp_path / "run", folder.parent)[1:]
    started = time.monotonic()
    status, printed = recon(["plan", *line, "--json", str(tmp_path / "plan.json")])
    assert status == 0, printed
    assert time.monotonic() - started < 20
    assert "The weights were not found: bfloat16 is assumed on disk." in printed
    assert "Not counted: vae, which calibration samples with too." in printed
    assert "recon fit would refuse this:" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert any("model_index.json names the class None" in said for said in plan["refusals"])
    assert plan["why_untimed"] == "not measured: the weights were not found"


@pytest.mark.parametrize(
    ("micro_batch", "said"),
    [
        ("4", "among: 1. Each keeps the streams of its share; more of them need a smaller "
              "model.micro_batch (it is 4) or a larger model.batch_size."),
        ("1", "among: 1, 2, 4. Each keeps the streams of its share; more of them need a larger "
              "model.batch_size."),
    ],
)  # fmt: skip
def test_what_keeps_the_batch_from_more_processes_is_named(
    micro_batch: str, said: str, recon: Call, images: Path, tmp_path: Path
) -> None:
    line = image_arguments(tmp_path / "run", images)[1:]
    status, printed = recon(["plan", *line, "--model.micro_batch", micro_batch, "--no-probe"])
    assert status == 0, printed
    assert said in " ".join(printed.split())


def test_a_plan_of_no_network_is_refused(recon: Call, pipeline: Path, tmp_path: Path) -> None:
    line = fit_arguments(tmp_path / "run", tmp_path / "nothing")[1:]
    status, printed = recon(["plan", *line])
    assert status == 2
    assert "config.json is missing" in printed


def test_a_plan_shows_what_fit_refuses_and_fit_refuses_it(
    recon: Call, pipeline: Path, tmp_path: Path
) -> None:
    budgets = [f"--model.memory.{place}=0" for place in ("device", "ram", "disk")]
    line = fit_arguments(tmp_path / "run", pipeline, *budgets)
    status, printed = recon(["plan", "--no-probe", *line[1:]])
    assert status == 0, printed
    flat = " ".join(printed.split())
    assert flat.count("The carried streams fit nowhere") == 1
    status, printed = recon(line)
    assert status == 2
    assert "The carried streams fit nowhere" in " ".join(printed.split())


def test_fit_refuses_a_disk_that_is_too_small_before_anything_is_written(
    recon: Call, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon.engine.artefacts.free_bytes", lambda *unused: 1000)
    status, printed = recon(fit_arguments(tmp_path / "run", pipeline))
    assert status == 2
    assert "and 1,000 are free. Free some space" in " ".join(printed.split())
    assert not (tmp_path / "run").exists()
