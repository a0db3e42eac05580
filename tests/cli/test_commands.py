"""Commands that work: run folders, `--run`, `--ckpt_path last`, `compare`, every configuration."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recon import __version__
from recon.callbacks.progress import UnitProgress
from recon.callbacks.samples import MediaLogger
from recon.callbacks.summary import RunSummary
from recon.cli.arguments import run_name, with_run_folder
from recon.cli.lightning import prepared
from recon.cli.main import COMMANDS
from tests.cli.command import CONFIGS, codes, fit_arguments, result, with_calibration

Call = Callable[[list[str]], tuple[int, str]]


def test_a_run_leaves_its_configuration_its_results_and_its_metrics(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    expected = {"calibration", "checkpoints", "command.txt", "config.yaml", "metrics.csv"}
    assert names == expected | {"quantized", "salience.safetensors", "summary.json"}
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["model"]["init_args"]["epochs"] == 1
    assert config["trainer"]["default_root_dir"] == str(finished_run)
    rows = (finished_run / "metrics.csv").read_text().splitlines()
    assert "unit/error_after" in rows[0]


def test_the_command_that_started_a_run_can_be_pasted(finished_run: Path, pipeline: Path) -> None:
    typed = shlex.split((finished_run / "command.txt").read_text())
    assert typed == ["recon", *fit_arguments(finished_run, pipeline, "--model.epochs", "1")]


def test_last_without_a_checkpoint_says_that_it_starts_anew(
    recon: Call,
    pipeline: Path,
    finished_run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = with_calibration(tmp_path / "run", finished_run)
    more = ("--model.epochs", "1", "--ckpt_path", "last")
    status, _ = recon(fit_arguments(root, pipeline, *more))
    assert status == 0
    assert f"No checkpoint in {root}: starting anew." in caplog.text
    assert codes(root) == codes(finished_run)


def test_a_finished_run_continued_does_nothing(
    recon: Call, pipeline: Path, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    before = result(tmp_path / "run")
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    status, _ = recon(["fit", "--run", str(tmp_path / "run")])
    assert status == 0
    assert result(tmp_path / "run") == before
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary
    for name in ("metrics.csv", "command.txt"):  # the command that started it
        assert (tmp_path / "run" / name).read_text() == (finished_run / name).read_text()


def test_a_run_folder_that_was_moved_is_still_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert with_run_folder(["test", "--run", str(tmp_path), "--data.steps", "3"]) == [
        "test",
        *("--config", str(tmp_path / "config.yaml")),
        *("--trainer.default_root_dir", str(tmp_path)),
        *("--ckpt_path", "last"),
        *("--data.steps", "3"),
    ]
    joined = with_run_folder(["test", f"--run={tmp_path}", "--data.steps", "3"])
    assert joined == with_run_folder(["test", "--run", str(tmp_path), "--data.steps", "3"])
    chosen = with_run_folder(["fit", "--run", str(tmp_path), "--ckpt_path", "a.ckpt"])
    assert chosen.count("--ckpt_path") == 1


def test_the_folder_is_named_after_the_first_configuration() -> None:
    assert run_name(["fit", "-c", "configs/rtn.yaml", "--config", "configs/models/x.yaml"]) == "rtn"
    assert run_name(["fit"]) == "unnamed"


def test_compare_prints_runs_side_by_side(recon: Call, finished_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((finished_run / "summary.json").read_text())
    content["method"] = "Another"
    (other / "summary.json").write_text(json.dumps(content))
    paired = {"paired": {"psnr": 31.256}}
    (other / "test.json").write_text(json.dumps(paired))
    status, printed = recon(["compare", str(finished_run), str(other)])
    assert status == 0
    for word in ("S2QVDiT", "Another", "run", "other", "31.26", "–", "error, reconstructed"):
        assert word in printed
    assert f"{content['error']['reconstructed']:.4e}" in printed


@pytest.mark.parametrize(
    "config",
    sorted(CONFIGS.rglob("*.yaml")),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_configuration_parses(recon: Call, config: Path) -> None:
    # A model's configuration goes on top of a method's.
    bases = {"dit": "ptq4dit.yaml", "llava": "q_vlm.yaml", "qwen2": "q_vlm.yaml"}
    base = bases.get(config.name.partition("_")[0], "s2q_vdit.yaml")
    files = [config] if config.parent == CONFIGS else [CONFIGS / base, config]
    arguments = [part for file in files for part in ("--config", str(file))]
    status, printed = recon(["fit", *arguments, "--print_config"])
    assert status == 0, printed
    parsed = yaml.safe_load(printed[printed.index("seed_everything") :])
    assert parsed["model"]["class_path"].startswith("recon.methods.")
    assert parsed["trainer"]["max_epochs"] == -1
    assert parsed["trainer"]["reload_dataloaders_every_n_epochs"] == 1
    text = config.read_text()
    assert text.startswith("#"), "a configuration begins with what it is and how it is run"
    assert "recon fit" in text


def test_help_names_every_command_at_once(recon: Call) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        status, printed = recon(arguments)
        assert status == 0
        for name, what in COMMANDS.items():
            assert f"  {name} " in printed
            assert what in printed
    assert recon(["--version"]) == (0, f"recon {__version__}\n")


@pytest.mark.parametrize("word", ["quantize", "--run", "--config"])
def test_what_is_no_command_is_refused_with_those_there_are(word: str, recon: Call) -> None:
    status, printed = recon([word, "here"])
    assert status == 2
    assert printed.startswith(f"recon: {word} is no command. There are fit, validate, test")
    assert len(printed.splitlines()) == 1


def test_results_are_written_before_anything_is_sampled_from_them(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    line = prepared(
        ["fit", "--config", str(CONFIGS / "s2q_vdit.yaml"), "--trainer.default_root_dir", root]
    )
    trainer: Any = line.trainer  # a connector sets its callbacks, unseen by type checkers
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.index(UnitProgress) < kinds.index(RunSummary) < kinds.index(MediaLogger)
