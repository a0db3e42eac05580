"""VideoCalibration: refusals, reuse, streaming, ranks, evaluation batches."""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, multiprocessing

from recon.calibration.artefact import CalibrationSet
from recon.calibration.selection import SalientSelection, gram_norm, latent_change, select
from recon.datamodules.candidates import patch_tokens
from recon.datamodules.prompts import draw, noise_seed, read_prompts, world_prompts
from recon.datamodules.video import VideoCalibration
from recon.errors import (
    BudgetError,
    CalibrationError,
    CapabilityMissing,
    ConfigError,
    NumericsError,
)
from recon.models.adapter import ModelAdapter
from tests.datamodules.fakes import FakeAdapter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products of tiny matrices: on a busy machine, waiting for a second thread takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(**changes: Any) -> VideoCalibration:
    settings: dict[str, Any] = {
        "num_prompts": 4, "steps": 6, "held_out_prompts": 2, "held_out_samples": 5,
        "num_test_prompts": 5, "test_batch_size": 2,
    }  # fmt: skip
    rule = {k: changes.pop(k) for k in list(changes) if k in SalientSelection.__annotations__}
    sds = SalientSelection(**{"top_k": 7, **rule})
    return VideoCalibration(**{**settings, "sds": sds, **changes})


def teacher(fake: FakeAdapter) -> ModelAdapter:
    return cast(ModelAdapter, fake)


def made(root: Path, fake: FakeAdapter | None = None, **changes: Any) -> CalibrationSet:
    adapter = fake if fake is not None else FakeAdapter()
    return module(**changes).calibrate(teacher(adapter), root, CPU)


def places(found: CalibrationSet) -> list[tuple[str, int]]:
    facts = [found.samples.facts(i) for i in range(len(found.samples))]
    return [(fact["prompt"], fact["step"]) for fact in facts]


def lines(path: Path, count: int, word: str = "prompt") -> str:
    path.write_text("".join(f"{word} {i}\n\n" for i in range(count)))
    return str(path)


class Recorder:
    """A trajectory kept whole in memory."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, step: int, sample: dict[str, Tensor]) -> None:
        self.calls.append({name: tensor.clone() for name, tensor in sample.items()})


# The set


def test_streamed_selection_equals_in_memory_selection_and_samples_are_exact(
    tmp_path: Path,
) -> None:
    plan = module().plan()
    scores = torch.zeros(4, 6, 2, dtype=torch.float64)
    kept: dict[tuple[str, int], dict[str, Tensor]] = {}
    for index, prompt in enumerate(plan.calibration):
        recorder, pipeline = Recorder(), FakeAdapter().pipeline(CPU)
        pipeline.trajectory(prompt, noise_seed("calibration", 0, index), 6, 6.0, recorder)
        for step, call in enumerate(recorder.calls):
            tokens = patch_tokens(call["hidden_states"][-1], 2)
            if step:
                before = recorder.calls[step - 1]["hidden_states"][-1]
                scores[index, step, 0] = latent_change(tokens, patch_tokens(before, 2))
            scores[index, step, 1] = gram_norm(tokens)
            kept[prompt, step] = {name: tensor[-1:] for name, tensor in call.items()}
    expected = select(scores, SalientSelection(top_k=7))
    found = made(tmp_path)
    assert places(found) == [(plan.calibration[c.prompt], c.step) for c in expected]
    for place, got in zip(places(found), found.samples, strict=True):
        for name, tensor in kept[place].items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor)


def test_the_folder_tells_scores_histogram_and_reasons(tmp_path: Path) -> None:
    found = made(tmp_path)
    content = json.loads((tmp_path / "calibration" / "calibration.json").read_text())
    assert len(content["scores"]) == 4 * 5
    assert sorted(row["chosen"] for row in content["scores"] if row["chosen"]) == list(range(1, 8))
    assert sum(content["histogram"].values()) == 7
    assert -1 <= content["rank_correlation"] <= 1
    assert content["samples"] == {"calibration": 7, "held_out": 5}
    assert found.samples.facts(0)["reason"].startswith("Salience")
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]


def test_held_out_samples_are_of_other_prompts_and_uniform_over_the_steps(tmp_path: Path) -> None:
    found = made(tmp_path, held_out_samples=12)
    facts = [found.held_out.facts(i) for i in range(len(found.held_out))]
    assert {f["prompt"] for f in facts}.isdisjoint({prompt for prompt, _ in places(found)})
    assert sorted(f["step"] for f in facts) == sorted([*range(6), *range(6)])
    assert all(f["score"] is None and f["split"] == "held_out" for f in facts)
    spread = module(held_out_samples=3).plan().held_out_places()
    assert [step // 2 for _, step in spread] == [0, 1, 2]
    assert spread != module(held_out_samples=3, seed=5).plan().held_out_places()


def test_a_held_out_prompt_without_samples_is_not_sampled(tmp_path: Path) -> None:
    fake = FakeAdapter()
    found = made(tmp_path, fake, held_out_samples=1)
    assert len(found.held_out) == 1
    assert len(fake.sampled) == 4 + 1


@pytest.mark.parametrize(("branches", "rows"), [("conditional", 1), ("both", 2)])
def test_branches_decide_the_batch_axis_not_the_choice(
    tmp_path: Path, branches: str, rows: int
) -> None:
    found = made(tmp_path, branches=branches)
    assert found.samples[0]["hidden_states"].shape[0] == rows
    assert found.samples[0]["timestep"].shape == (rows,)
    assert places(found) == places(made(tmp_path / "other"))


@pytest.mark.parametrize(
    "switches",
    [
        {"source": "hidden_patch_embed"},
        {"norm": "spectral"},
        {"quota": "per_prompt"},
        {"quota": "per_step_bin", "quota_bins": 3},
        {"first_step": "zero"},
        {"diversity": "farthest_point"},
        {"metric": "random"},
        {"metric": "uniform"},
    ],
)
def test_every_switch_makes_a_set_of_its_own(tmp_path: Path, switches: dict[str, Any]) -> None:
    found, plain = made(tmp_path, **switches), made(tmp_path / "plain")
    assert len(found.samples) == 7
    assert found.fingerprint != plain.fingerprint


def test_building_does_not_move_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made(tmp_path)
    assert torch.equal(torch.rand(2), expected)


# Reuse


def test_a_fitting_set_is_reused_without_sampling(tmp_path: Path) -> None:
    first = made(tmp_path)
    fake = FakeAdapter()
    second = made(tmp_path, fake, num_test_prompts=3, test_seed=4)  # evaluation is no part of it
    assert fake.sampled == []
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "prompts"),
        ({"guidance": 5.0}, "guidance"),
        ({"top_k": 6}, "sds.top_k"),
        ({"branches": "both"}, "branches"),
        ({"held_out_samples": 4}, "held_out_samples"),
    ],
)
def test_another_configuration_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    made(tmp_path)
    fake = FakeAdapter()
    with pytest.raises(CalibrationError, match=rf"{field} was"):
        made(tmp_path, fake, **changes)
    assert fake.sampled == []


def test_the_set_of_another_teacher_is_refused_or_rebuilt(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(CalibrationError, match=r"teacher\.weights was 'w0', is 'w1'"):
        made(tmp_path, FakeAdapter("w1"))
    fake = FakeAdapter("w1")
    rebuilt = made(tmp_path, fake, stale="rebuild")
    assert len(fake.sampled) == 6
    assert rebuilt.details["fingerprint"]["teacher.weights"] == "w1"
    made(tmp_path, FakeAdapter("w1"))  # fits from here on


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".partial.calibration", "calibration.scratch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompt0000_step0001.safetensors").write_bytes(b"half")
    made(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]


def test_a_half_copied_set_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "calibration" / "calibration.json").unlink()
    with pytest.raises(CalibrationError, match="unfinished"):
        made(tmp_path)


# Faults while sampling


def test_nan_in_a_latent_names_prompt_and_step_and_leaves_nothing(tmp_path: Path) -> None:
    fake = FakeAdapter()
    prompt = module().plan().calibration[2]
    fake.breaks_at = (prompt, 3)
    with pytest.raises(NumericsError, match=rf"hidden_states of prompt '{prompt}', step 3"):
        made(tmp_path, fake)
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_of_several_calls_per_step_is_refused(tmp_path: Path) -> None:
    fake = FakeAdapter()
    fake.extra_calls = 2
    with pytest.raises(CalibrationError, match="in 6 steps called the network 8 times"):
        made(tmp_path, fake)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 4000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(BudgetError, match="4000 bytes are free"):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    fake = FakeAdapter()
    with pytest.raises(ConfigError, match="cannot be written"):
        made(tmp_path / "run", fake)
    assert fake.sampled == []


# Refusals before anything runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"held_out_samples": 0}, "held_out_samples must be at least 1, got 0"),
        ({"held_out_prompts": -1}, "held_out_prompts must be at least 0"),
        ({"test_batch_size": 0}, "test_batch_size must be at least 1"),
        ({"num_test_prompts": 0}, "num_test_prompts must be at least 1, or null"),
        ({"held_out_samples": 13}, "2 held-out prompts of 6 steps give 12"),
        ({"branches": "both", "guidance": 1.0}, "branches is both, but guidance 1.0"),
    ],
)
def test_bad_numbers_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        module(**changes)


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        module(**changes).check(teacher(FakeAdapter()))
    return str(caught.value)


def test_check_refuses_what_the_pool_and_the_files_cannot_give(tmp_path: Path) -> None:
    assert "sds.top_k is 21, but 4 prompts of 6 steps" in refusal(top_k=21)
    assert "does not exist" in refusal(prompts=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert "holds no prompt" in refusal(prompts=str(tmp_path / "empty.txt"))
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    assert "prompts 1 and 3 are both 'a'" in refusal(prompts=str(tmp_path / "twice.txt"))
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(prompts=str(tmp_path / "raw.txt"))
    few = lines(tmp_path / "few.txt", 5)
    assert "num_prompts 4 and held_out_prompts 2 need 6" in refusal(prompts=few)
    assert "num_test_prompts is 9" in refusal(
        prompts=lines(tmp_path / "p.txt", 9), test_prompts=few, num_test_prompts=9
    )


def test_calibration_and_evaluation_may_not_share_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.txt", 8)
    assert "serve both calibration and evaluation" in refusal(prompts=path, test_prompts=path)
    other = lines(tmp_path / "q.txt", 8, word="test")
    module(prompts=path, test_prompts=other).check(teacher(FakeAdapter()))


def test_a_network_without_patches_is_refused_for_latents_only() -> None:
    fake = FakeAdapter(config={})
    with pytest.raises(CapabilityMissing, match="hidden_patch_embed"):
        module().check(teacher(fake))
    module(source="hidden_patch_embed").check(teacher(fake))


def test_the_set_is_asked_for_too_early() -> None:
    with pytest.raises(CalibrationError, match="before setup"):
        _ = module().calibration_set


# Prompts


def test_prompts_are_drawn_by_seed_and_a_larger_draw_only_adds(tmp_path: Path) -> None:
    pool = read_prompts(lines(tmp_path / "p.txt", 30), "prompt", "prompts")
    assert draw(pool, 12, 3)[:8] == draw(pool, 8, 3)
    assert draw(pool, 8, 3) != draw(pool, 8, 4)
    assert len(set(draw(pool, 30, 3))) == 30


def test_a_datasets_folder_gives_prompts(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict({"text": [f"prompt {i}" for i in range(9)]})
    table.save_to_disk(str(tmp_path / "set"))
    path = str(tmp_path / "set")
    plan = module(prompts=path, prompt_column="text").plan()
    assert {*plan.calibration, *plan.held_out} <= set(table["text"])
    assert "prompt_column is 'prompt'" in refusal(prompts=path)
    DatasetDict(train=table).save_to_disk(str(tmp_path / "dict"))
    assert "holds the splits ['train']" in refusal(prompts=str(tmp_path / "dict"))
    (tmp_path / "plain").mkdir()
    assert "load_from_disk does not open" in refusal(prompts=str(tmp_path / "plain"))


def test_the_worlds_prompts_are_many_different_and_disjoint() -> None:
    many = world_prompts("train", 400, 0)
    assert len(set(many)) == 400
    assert many[:50] == world_prompts("train", 50, 0)
    assert set(many).isdisjoint(world_prompts("evaluation", 300, 0))
    with pytest.raises(ConfigError, match="100000 prompts are asked"):
        world_prompts("train", 100_000, 0)


def test_no_two_purposes_share_noise() -> None:
    seeds = {
        noise_seed(purpose, seed, index)
        for purpose, seed, index in itertools.product(
            ("calibration", "evaluation"), range(5), range(50)
        )
    }
    assert len(seeds) == 500
    assert all(0 <= seed < 2**31 for seed in seeds)


# Inside a trainer


class Engine(LightningModule):
    """As much of the engine as the DataModule meets."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = FakeAdapter()
        self.threads = None
        self.seen: list[dict[str, Any]] = []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def train_dataloader(self) -> Any:
        found = self.trainer.datamodule.calibration_set  # type: ignore[attr-defined]
        return torch.utils.data.DataLoader(range(len(found.samples)))  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(batch)

    test_step = validation_step
    predict_step = validation_step


def trainer(root: Path) -> Trainer:
    return Trainer(
        default_root_dir=root, accelerator="cpu", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_fit_calibrates_and_does_not_validate(tmp_path: Path) -> None:
    engine, data = Engine(), module()
    trainer(tmp_path).fit(engine, datamodule=data)
    assert len(data.calibration_set.samples) == 7
    assert engine.seen == []
    assert engine.adapter.checked == 1


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_batches_are_prompts_and_seeds_and_need_no_calibration(
    tmp_path: Path, verb: str
) -> None:
    engine, data = Engine(), module()
    getattr(trainer(tmp_path), verb)(engine, datamodule=data)
    assert [len(batch["prompt"]) for batch in engine.seen] == [2, 2, 1]
    flat = [pair for b in engine.seen for pair in zip(b["prompt"], b["seed"], strict=True)]
    assert flat == data.evaluation_requests()
    assert engine.adapter.sampled == []
    assert data.evaluation_settings()["prompts"] == 5
    assert list(data.evaluation_batches()) == engine.seen


# Ranks


def _rank(rank: int, world: int, store: str, root: str, fault: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    fake = FakeAdapter()
    data = module(diversity="farthest_point")
    if fault:
        fake.breaks_at = (data.plan().calibration[1], 3)  # on rank 1 alone
    try:
        found = data.calibrate(teacher(fake), Path(root), CPU)
        outcome = {"places": places(found), "sampled": fake.sampled}
    except NumericsError as error:
        outcome = {"error": str(error)}
    outcome["share"] = [b["prompt"] for b in data.evaluation_batches()]
    (Path(store).parent / f"rank{rank}.json").write_text(json.dumps(outcome))
    distributed.destroy_process_group()


def _on_two_ranks(root: Path, fault: bool = False) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        multiprocessing.spawn(_rank, (2, store, str(root), fault), nprocs=2)  # type: ignore[attr-defined]
        return [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.distributed
def test_two_ranks_choose_and_write_what_one_does(tmp_path: Path) -> None:
    alone = made(tmp_path / "one", diversity="farthest_point")
    outcomes = _on_two_ranks(tmp_path / "two")
    assert [o["places"] for o in outcomes] == [[list(p) for p in places(alone)]] * 2
    assert [len(o["sampled"]) for o in outcomes] == [3, 3]
    together = CalibrationSet.load(tmp_path / "two" / "calibration")
    assert together.details["scores"] == alone.details["scores"]
    assert together.fingerprint == alone.fingerprint
    for one, other in zip(alone.samples, together.samples, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = ([p for batch in o["share"] for p in batch] for o in outcomes)
    every = [prompt for prompt, _ in module().evaluation_requests()]
    assert (first, second) == (every[0::2], every[1::2])


@pytest.mark.distributed
def test_a_fault_on_one_rank_ends_both_with_its_message(tmp_path: Path) -> None:
    outcomes = _on_two_ranks(tmp_path, fault=True)
    assert all("step 3, holds NaN" in outcome["error"] for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_cannot_read_is_refused_or_rebuilt_here_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    monkeypatch.setattr("recon.datamodules.kept.ranks.anywhere", lambda fact, device: True)
    with pytest.raises(CalibrationError, match="Another process cannot read the calibration set"):
        made(tmp_path)
    fake = FakeAdapter()
    made(tmp_path, fake, stale="rebuild")
    assert len(fake.sampled) == 6
