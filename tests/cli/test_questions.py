"""Vision-language models from the command line: fit, test, predict, load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

import recon as package
from recon import zoo
from recon.datamodules.chat import Chat
from recon.datamodules.questions import dataset_examples
from recon.models.answering import AnsweringPipeline
from recon.models.llava import Llava
from tests.cli.command import CONFIGS
from tests.datamodules.test_question_answering import SCIENCE, science
from tests.datamodules.tiny_chat import write_tiny_chat

Call = Callable[[list[str]], tuple[int, str]]

EMBEDDED = ("--model.init_args.adapter.init_args.folder", str(zoo.folder("vlm")))
"""Tests run elsewhere than in the repository's root, to which configurations are relative."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return science(tmp_path_factory.mktemp("science") / "rows")


def config(folder: Path, teacher: Path, dataset: Path, method: str, **settings: int) -> Path:
    """A configuration file of a few steps."""
    columns = {name: value for name, value in vars(SCIENCE).items() if value is not None}
    content = {
        "model": {
            "class_path": method,
            "init_args": {
                "adapter": {
                    "class_path": "recon.models.llava.Llava",
                    "init_args": {"folder": str(teacher)},
                },
                "weight": {"num_bits": 4},
                "activation": {"num_bits": 8, "strategy": "token", "dynamic": True},
                "threads": 1,
                **settings,
            },
        },
        "data": {
            "class_path": "recon.datamodules.question_answering.QuestionAnswering",
            "init_args": {
                "dataset": str(dataset),
                "columns": columns,
                "num_samples": 4,
                "held_out_samples": 2,
                "num_test_questions": None,
                "max_new_tokens": 3,
                "test_batch_size": 2,
            },
        },
    }
    file = folder / "vlm.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("recon.methods.rtn.RoundToNearest", {}),
        ("recon.methods.adaround.AdaRound", {"steps": 5, "batch_size": 2}),
    ],
)
def test_fit_test_and_predict_on_questions(
    method: str, settings: dict[str, int], recon: Call, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    file = config(tmp_path, teacher, dataset, method, **settings)
    common = ["--trainer.accelerator", "cpu", "--wandb", "false"]
    status, printed = recon(
        ["fit", "--config", str(file), "--trainer.default_root_dir", str(root), *common]
    )
    assert status == 0, printed
    summary = json.loads((root / "summary.json").read_text())
    assert summary["block_forwards_per_sample"] == 4  # two layers
    assert 0 < summary["error"]["reconstructed"] < 1
    status, printed = recon(["test", "--run", str(root)])
    assert status == 0, printed
    result = json.loads((root / "test.json").read_text())
    assert result["paired"]["count"] == result["quantized"]["count"] == 3
    assert result["paired"]["kl"] > 0
    assert result["full_precision"]["perplexity"] > 1
    assert {"accuracy", "accuracy/language", "accuracy/nature", "parse_failures"} <= set(
        result["round_to_nearest"]
    )
    assert result["settings"]["decoding"] == "greedy"
    assert "accuracy" in printed
    if "rtn" in method:
        assert result["paired"]["kl"] == result["paired_round_to_nearest"]["kl"]
    status, printed = recon(["predict", "--run", str(root)])
    assert status == 0, printed
    lines = (root / "predictions" / "answers_rank0.jsonl").read_text().splitlines()
    said = [row["quantized"]["text"] for row in result["samples"]]
    assert [json.loads(line)["answer"] for line in lines] == said

    # What was evaluated is what is loaded, bit for bit.
    adapter = Llava(str(teacher))
    chat = Chat(adapter)
    loaded = AnsweringPipeline(package.load(root), adapter.call_arguments, teacher, "cpu")
    examples = list(dataset_examples(str(dataset), "test", SCIENCE, None, "dataset"))
    for example, row in zip(examples, result["samples"], strict=True):
        likely, tokens = loaded.log_probabilities(chat.forced(example))
        loss = -float(likely.gather(1, tokens[:, None]).double().sum())
        assert loss == row["quantized"]["negative_log_likelihood"]
        answer = loaded.answer(chat.prompt(example), 3, chat.end_tokens)
        assert chat.text(answer) == row["quantized"]["text"]


@pytest.mark.slow
def test_runs_that_share_baselines_ask_them_once(
    recon: Call, teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = AnsweringPipeline.answer, list[int]()

    def counted(pipeline: AnsweringPipeline, *given: Any) -> Tensor:
        asked.append(1)
        return ask(pipeline, *given)

    monkeypatch.setattr(AnsweringPipeline, "answer", counted)
    file = config(tmp_path, teacher, dataset, "recon.methods.rtn.RoundToNearest")
    root, common = tmp_path / "run", ["--trainer.accelerator", "cpu", "--wandb", "false"]
    status, printed = recon(
        ["fit", "--config", str(file), "--trainer.default_root_dir", str(root), *common]
    )
    assert status == 0, printed

    def tested(*changed: str) -> tuple[Any, int]:
        asked.clear()
        status, printed = recon(["test", "--run", str(root), *changed])
        assert status == 0, printed
        return json.loads((root / "test.json").read_text())["samples"], len(asked)

    share = ("--data.baselines", str(tmp_path / "baselines"))
    alone, calls = tested()
    assert (len(alone), calls) == (3, 9)
    assert tested(*share) == (alone, 9)
    assert tested(*share) == (alone, 3)
    assert tested(*share, "--data.max_new_tokens", "2")[1] == 9
    for kept in (tmp_path / "baselines").iterdir():
        kept.write_bytes(kept.read_bytes()[:-9])
    assert tested(*share) == (alone, 9)


@pytest.mark.slow
def test_q_vlm_beats_round_to_nearest_on_the_embedded_teacher(recon: Call, tmp_path: Path) -> None:
    root = tmp_path / "run"
    status, printed = recon([
        *("fit", "--config", str(CONFIGS / "q_vlm.yaml"), "--wandb", "false"),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
        *("--data.num_samples", "16", "--data.held_out_samples", "8", "--model.steps", "30"),
        *EMBEDDED,
    ])  # fmt: skip
    assert status == 0, printed
    error = json.loads((root / "summary.json").read_text())["error"]
    assert error["reconstructed"] <= 0.6 * error["round_to_nearest"]
    manifest = json.loads((root / "quantized" / "manifest.json").read_text())
    for unit in manifest["unit_errors"]:
        assert unit["block_error_final"] <= unit["block_error_joint"] <= unit["block_error_warm"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "gptq", "adaround"])
def test_the_baselines_run_on_the_embedded_teacher(
    method: str, recon: Call, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    overlay = CONFIGS / "models" / "vlm_teacher.yaml"
    steps = ["--model.steps", "5"] if method == "adaround" else []
    status, printed = recon([
        *("fit", "--config", str(CONFIGS / f"{method}.yaml"), "--config", str(overlay)),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
        *("--data.num_samples", "8", "--data.held_out_samples", "4", "--wandb", "false", *steps),
        *EMBEDDED,
    ])  # fmt: skip
    assert status == 0, printed
    summary = json.loads((root / "summary.json").read_text())
    assert summary["bits"] == {"weight": 4, "activation": 4}
    assert 0 < summary["error"]["reconstructed"] < 1


def test_refuses_what_cannot_work_before_anything_is_written(
    recon: Call, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    file = config(tmp_path, teacher, dataset, "recon.methods.rtn.RoundToNearest")
    root = tmp_path / "run"
    common = ["fit", "--config", str(file), "--trainer.default_root_dir", str(root)]
    common += ["--wandb", "false", "--trainer.accelerator", "cpu"]
    for more, message in (
        (["--data.columns.hint", "context"], "columns.hint is 'context', but dataset"),
        (["--data.test_split", "train"], "questions serve both calibration and evaluation"),
        (["--model.adapter.init_args.max_tokens", "7"], "at most 7 tokens"),
        (["--model.adapter.init_args.folder", "checkpoints/llava"], "hf download llava-hf/"),
    ):
        status, printed = recon([*common, *more])
        assert status == 2, printed
        assert message in " ".join(printed.split())
        assert not root.exists()


@pytest.mark.parametrize("name", ["llava_1_5_7b", "qwen2_5_vl_7b"])
def test_the_files_of_real_models_say_where_to_get_them(
    name: str, recon: Call, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    file = config(tmp_path, teacher, dataset, "recon.methods.rtn.RoundToNearest")
    real = CONFIGS / "models" / f"{name}.yaml"
    common = ["--wandb", "false", "--trainer.accelerator", "cpu"]
    status, printed = recon(["fit", "--config", str(file), "--config", str(real), *common])
    assert status == 2, printed
    assert "hf download" in printed
