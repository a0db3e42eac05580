"""ImageCalibration: strata, salience, classes, branches, refusals; on a tiny random DiT."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from recon.calibration.artefact import CalibrationSet
from recon.datamodules.image import ImageCalibration
from recon.errors import ConfigError
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from tests.models.tiny import write_tiny_cogvideox, write_tiny_dit

CPU = torch.device("cpu")
CLASSES = 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    return write_tiny_dit(folder, layers=1, classes=CLASSES, pipeline=True)


def module(**changes: Any) -> ImageCalibration:
    settings: dict[str, Any] = {
        "timesteps": 4, "samples_per_timestep": 3, "steps": 10, "held_out_trajectories": 2,
        "held_out_samples": 4, "num_test_images": 7, "test_batch_size": 3,
    }  # fmt: skip
    return ImageCalibration(**{**settings, **changes})


def made(root: Path, teacher: Path, **changes: Any) -> CalibrationSet:
    return module(**changes).calibrate(DiT(str(teacher)), root, CPU)


def facts(found: CalibrationSet) -> list[dict[str, Any]]:
    return [found.samples.facts(i) for i in range(len(found.samples))]


def test_strata_reach_the_last_step_and_take_classes_in_turn(teacher: Path, tmp_path: Path) -> None:
    found = made(tmp_path, teacher)
    rows = facts(found)
    assert Counter(row["step"] for row in rows) == {0: 3, 3: 3, 6: 3, 9: 3}
    assert sorted(Counter(row["prompt"] for row in rows).values()) == [2, 2, 2, 3, 3]
    assert len({row["seed"] for row in rows}) == len(rows)  # noise of its own for each
    assert found.details["samples"] == {"calibration": 12, "held_out": 4}
    timesteps = [int(sample["timestep"][0]) for sample in found.samples]
    assert len(set(timesteps)) == 4
    assert min(timesteps) == 0


def test_a_sample_holds_the_null_row_and_the_conditional_one_of_the_same_latent(
    teacher: Path, tmp_path: Path
) -> None:
    adapter = DiT(str(teacher))
    found = made(tmp_path / "both", teacher)
    for sample, row in zip(found.samples, facts(found), strict=True):
        null, label = sample["class_labels"].tolist()
        assert (null, label) == (CLASSES, adapter.class_names()[row["prompt"]])
        assert torch.equal(sample["hidden_states"][0], sample["hidden_states"][1])
    alone = made(tmp_path / "one", teacher, branches="conditional")
    for pair, single in zip(found.samples, alone.samples, strict=True):
        assert torch.equal(pair["hidden_states"][1:], single["hidden_states"])
        assert torch.equal(pair["class_labels"][1:], single["class_labels"])


def test_few_trajectories_are_used_at_several_steps(teacher: Path, tmp_path: Path) -> None:
    rows = facts(made(tmp_path, teacher, num_trajectories=4))
    assert len({(row["seed"], row["step"]) for row in rows}) == 12
    assert set(Counter(row["seed"] for row in rows).values()) == {3}
    assert set(Counter(row["step"] for row in rows).values()) == {3}


def test_salient_selection_is_the_video_modules_and_both_keeps_the_strata(
    teacher: Path, tmp_path: Path
) -> None:
    salient = made(tmp_path / "salient", teacher, select="salient", num_trajectories=4)
    scores = [row["score"] for row in facts(salient)]
    assert scores == sorted(scores, reverse=True)
    both = made(tmp_path / "both", teacher, select="both", num_trajectories=4)
    bins = Counter(row["step"] * 4 // 10 for row in facts(both))
    assert bins == {0: 3, 1: 3, 2: 3, 3: 3}
    assert {tuple(r.values()) for r in facts(salient)} != {tuple(r.values()) for r in facts(both)}


def test_classes_are_chosen_by_name_or_number_and_evaluated_in_turn(teacher: Path) -> None:
    adapter = DiT(str(teacher))
    names = list(adapter.class_names())
    data = module(classes=[names[1], 2])
    data.check(adapter)
    assert [name for name, _ in data.evaluation_requests()] == [names[1], names[2]] * 3 + names[1:2]
    assert set(data.calibration_prompts()) == {names[1], names[2]}
    seeds = [seed for _, seed in data.evaluation_requests()]
    assert len(set(seeds)) == 7
    trained = {t.seed for t in data.plan().trajectories()}
    assert not trained & set(seeds)


def test_a_set_is_used_again_and_one_of_another_selection_refused(
    teacher: Path, tmp_path: Path
) -> None:
    first = made(tmp_path, teacher)
    assert made(tmp_path, teacher).fingerprint == first.fingerprint
    with pytest.raises(Exception, match="made for another configuration"):
        made(tmp_path, teacher, select="salient")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timesteps": 1}, "timesteps must be at least 2, got 1"),
        ({"held_out_samples": 0}, "held_out_samples must be at least 1, got 0"),
        ({"num_test_images": 0}, "num_test_images must be at least 1"),
        ({"classes": []}, r"data\.classes is empty"),
        ({"classes": ["hexagon"]}, r"'hexagon', which is none of the 5 classes"),
        ({"classes": [77]}, r"77, which is none of the 5 classes"),
        ({"num_trajectories": 2}, r"top_k is 12, but 2 prompts at 4 of 10 steps give 8"),
        ({"guidance": 1.0}, "branches is both, but guidance 1.0"),
        ({"steps": 3, "timesteps": 3}, "steps is 3, which does not divide 1000"),
        (
            {"steps": 5, "num_trajectories": 2},
            r"samples_per_timestep 3 are 12 samples, but .* give only 10",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_sampled(
    changed: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, teacher, **changed)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_classes_is_refused(tmp_path: Path) -> None:
    video = CogVideoX(str(write_tiny_cogvideox(tmp_path / "video", layers=1)))
    with pytest.raises(ConfigError, match="samples classes, which CogVideoX does not have"):
        module().check(video)
