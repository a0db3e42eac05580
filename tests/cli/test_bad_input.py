"""Bad input: a sentence that names key, value, rule and remedy, soon, and nothing written."""

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recon.cli.failures import sentence
from recon.errors import ConfigError
from tests.cli.command import contents, finished, fit_arguments

Call = Callable[[list[str]], tuple[int, str]]

KEYS = [
    ("--model.nonsense", "3", "Option 'nonsense' is not accepted"),
    ("--data.nonsense", "3", "Option 'nonsense' is not accepted"),
    ("--trainer.nonsense", "3", "unrecognized arguments: --trainer.nonsense 3"),
    ("--model.weight.num_bits", "1", r"num_bits must lie in [2, 8], got 1"),
    ("--model.weight.num_bits", "9", r"num_bits must lie in [2, 8], got 9"),
    ("--model.activation.num_bits", "9", r"num_bits must lie in [2, 8], got 9"),
    ("--model.batch_size", "many", "Got value: many"),
    ("--model.batch_size", "5", "4 calibration samples cannot fill a batch of 5"),
    ("--data.sds.top_k", "400", "sds.top_k is 400, but 2 prompts of 4 steps"),
    ("--model.rotation.splits", "{32: [3, 5]}", "(3, 5) has the product 15"),
    ("--model.std.lambda_min", "2", "std.lambda_min is 2.0 and std.lambda_max 1.0"),
    ("--model.adapter.folder", "/nowhere", "CogVideoX.folder is '/nowhere'"),
    ("--trainer.max_epochs", "3", "trainer.max_epochs is 3"),
    ("--trainer.limit_train_batches", "0.5", "trainer.limit_train_batches is 0.5"),
    ("--model.memory", "{device: 0, ram: 0, disk: 1000}", "memory.disk allows 1,000 of"),
    ("--export.formats", "[auto-round]", "export.formats names auto-round, which cannot hold"),
    ("--export.formats", "[onnx]", "Got value: onnx"),
    ("--model.memory.ram", "lots", "'lots' is no number of bytes"),
]


@pytest.mark.parametrize(("key", "value", "message"), KEYS, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_named_and_nothing_is_written(
    key: str, value: str, message: str, recon: Call, pipeline: Path, tmp_path: Path
) -> None:
    root, started = tmp_path / "run", time.process_time()  # other work must not decide
    status, printed = recon(fit_arguments(root, pipeline, key, value))
    assert time.process_time() - started < 10
    assert status == 2
    assert message in printed
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("recon: ")
    assert len(printed.splitlines()) <= 6
    assert not root.exists()
    assert not list((tmp_path / "here").iterdir())


def test_an_empty_prompt_file(recon: Call, pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n")
    status, printed = recon(
        fit_arguments(tmp_path / "run", pipeline, "--data.prompts", str(prompts))
    )
    assert status == 2
    assert "prompts" in printed.splitlines()[-1]
    assert "empty" in printed.splitlines()[-1] or "no prompt" in printed.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_weights_that_are_damaged(damage: str, recon: Call, pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher" / "transformer").glob("*.safetensors")
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    status, printed = recon(fit_arguments(tmp_path / "run", tmp_path / "teacher"))
    assert status == 2
    assert "transformer" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written(recon: Call, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, printed = recon(fit_arguments(tmp_path / "file" / "run", pipeline))
    assert status == 2
    assert "cannot be written" in printed
    assert "Set trainer.default_root_dir" in printed
    assert (tmp_path / "file").read_text() == ""


def test_plain_ddp(recon: Call, pipeline: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(
        tmp_path / "run", pipeline, "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )
    status, printed = recon(arguments)
    assert status == 2
    assert "DDPStrategy fixes that set" in printed
    assert "Set trainer.strategy to recon.engine.ReconStrategy" in printed
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_among_processes(
    recon: Call, pipeline: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(tmp_path / "run", pipeline, "--trainer.devices", "2")
    status, printed = recon(arguments)
    assert status == 2
    assert "batch_size 1 does not divide among 2 processes" in printed
    assert not (tmp_path / "run").exists()


# Checkpoints and run folders


@pytest.fixture
def taken(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("given", ["last", "path"])
def test_a_checkpoint_cut_short(recon: Call, pipeline: Path, taken: Path, given: str) -> None:
    (checkpoint,) = (taken / "checkpoints").glob("*.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    before = contents(taken)
    path = str(checkpoint) if given == "path" else given
    status, printed = recon(
        fit_arguments(taken, pipeline, "--model.epochs", "1", "--ckpt_path", path)
    )
    assert status == 2
    assert "(5,000 bytes) cannot be read, it is damaged or cut short" in printed
    assert contents(taken) == before


def test_a_checkpoint_of_another_configuration(recon: Call, pipeline: Path, taken: Path) -> None:
    before = contents(taken)
    more = ("--model.epochs", "1", "--model.alpha", "0.25", "--ckpt_path", "last")
    status, printed = recon(fit_arguments(taken, pipeline, *more))
    assert status == 2
    assert "model.alpha: saved 0.5, now 0.25" in printed
    assert contents(taken) == before


def test_a_checkpoint_that_is_not_there(recon: Call, pipeline: Path, tmp_path: Path) -> None:
    more = ("--ckpt_path", str(tmp_path / "nowhere.ckpt"))
    status, printed = recon(fit_arguments(tmp_path / "run", pipeline, *more))
    assert status == 2
    assert "nowhere.ckpt" in printed
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(
    recon: Call, pipeline: Path, taken: Path
) -> None:
    before = contents(taken)
    status, printed = recon(fit_arguments(taken, pipeline, "--model.epochs", "1"))
    assert status == 2
    assert "already holds a run. Continue it with --ckpt_path last" in printed
    assert contents(taken) == before


def test_evaluating_a_folder_without_a_checkpoint(
    recon: Call, pipeline: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(tmp_path / "run", pipeline)
    arguments[0] = "test"
    status, printed = recon(arguments)
    assert status == 2
    assert "holds no checkpoint. Run `recon fit` first" in printed
    assert not (tmp_path / "run").exists()


def test_run_needs_a_run_folder(recon: Call, tmp_path: Path) -> None:
    assert recon(["test", "--run", str(tmp_path)]) == (
        2, f"recon: {tmp_path} is no run folder: {tmp_path}/config.yaml is missing. Give the "
        "trainer.default_root_dir of a run that `recon fit` has started.\n",
    )  # fmt: skip
    status, printed = recon(["test", "--run"])
    assert (status, "--run needs a run folder" in printed) == (2, True)


def test_comparing_what_is_no_run(recon: Call, tmp_path: Path) -> None:
    status, printed = recon(["compare", str(tmp_path)])
    assert status == 2
    assert "has no summary.json: it is no run folder, or the run did not finish" in printed


# The sentence


def test_a_fault_of_the_program_keeps_its_trace() -> None:
    assert sentence(RuntimeError("a bug")) is None


def test_our_errors_are_found_in_the_chain_of_causes() -> None:
    outer = ValueError("the parser's own")
    outer.__cause__ = ConfigError("the rule")
    assert sentence(outer) == "the rule"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"), [("--model.weight.num_bits", "9"), ("--data.sds.top_k", "400")]
)
def test_a_refusal_takes_less_than_ten_seconds_from_the_shell(
    key: str, value: str, pipeline: Path, tmp_path: Path
) -> None:
    def spent() -> float:
        # Of the processor: other work on the machine must not decide.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-c", "import lightning.pytorch"], check=True)
    imports = spent() - before  # 5 s or 6 on a quiet machine, and most of what a refusal takes
    before = spent()
    status = finished(fit_arguments(tmp_path / "run", pipeline, key, value), tmp_path / "log")
    assert status == 2
    assert spent() - before < max(10, 1.6 * imports)  # busy cores are slow ones
    assert "Traceback" not in (tmp_path / "log").read_text()
