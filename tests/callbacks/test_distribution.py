"""FID, KID, precision and recall: against formulas, over batches and processes, and refusals."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils.data import DataLoader

from recon.callbacks import manifold
from recon.callbacks.distribution import (
    Comparison,
    Distribution,
    frechet_distance,
    kernel_distance,
    start,
)
from recon.callbacks.evaluation import PairedMetrics
from recon.callbacks.inception import WEIGHTS, Inception, inception_unavailable
from recon.callbacks.manifold import precision_and_recall
from recon.callbacks.reference import drawn_pictures, picture_files, read_pictures
from recon.callbacks.samples import write_picture
from recon.errors import ConfigError, NumericsError
from recon.zoo.image_measure import accuracy
from recon.zoo.image_scenes import CLASSES
from tests.callbacks.colours import Colours
from tests.reference import manifold as restated

CPU = torch.device("cpu")
NUMBERS = {"fid", "kid", "kid_std", "precision", "recall"}


def points(seed: int, count: int = 40, features: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


def colourful(count: int, seed: int, spread: float = 1.0) -> Tensor:
    """Pictures [count, 3, 8, 8] of random colours."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return spread * colour * torch.rand(count, 3, 8, 8, generator=generator)


def folder_of(pictures: Tensor, folder: Path) -> Path:
    for index, picture in enumerate(pictures):
        write_picture(folder / f"class{index % 2}" / f"{index:03}.png", picture)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(colourful(40, seed=0), tmp_path_factory.mktemp("reference"))


# Formulas


def test_the_frechet_distance_is_that_of_two_normal_distributions() -> None:
    one, other = points(0), 2 * points(1) + 1
    values = [(x.mean(dim=0), x.T.cov()) for x in (one, other)]
    (mean, covariance), (other_mean, other_covariance) = values
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors @ eigenvalues.sqrt().diag() @ vectors.T
    product = torch.linalg.eigvalsh(root @ other_covariance @ root).sqrt().sum()
    trace = covariance.trace() + other_covariance.trace() - 2 * product
    expected = float((mean - other_mean).square().sum() + trace)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    one, other = points(0, 12), points(1, 12) + 1

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    same = sum(
        kernel(x[i], x[j]) / (12 * 11)
        for x in (one, other)
        for i in range(12)
        for j in range(12)
        if i != j
    )
    cross = sum(kernel(x, y) for x in one for y in other) / 144
    mean, deviation = kernel_distance(one, other, subsets=3, subset_size=12, seed=0)
    assert mean == pytest.approx(same - 2 * cross)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_subsets_come_from_the_seed_and_leave_the_callers_random_state() -> None:
    state = torch.get_rng_state()
    drawn = [
        kernel_distance(points(0), points(1), subsets=5, subset_size=8, seed=s) for s in (0, 0, 1)
    ]
    frechet_distance(points(0), points(1))
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_the_brute_force(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifold, "_ROWS", 7)  # several rounds of rows
    generated, reference = 0.7 * points(2, 25), points(3, 31)
    expected = restated.precision_and_recall(generated.tolist(), reference.tolist(), k)
    assert precision_and_recall(generated, reference, k) == expected
    assert 0 < expected[1] < expected[0] < 1


def test_precision_falls_with_strangers_and_recall_with_a_missing_mode() -> None:
    both_modes = torch.cat([points(0), points(1) + 50])
    strangers = torch.cat([points(2), points(3) + 500])
    assert precision_and_recall(strangers, both_modes)[0] < 0.55
    precision, recall = precision_and_recall(points(2), both_modes)
    assert precision > 0.8
    assert recall < 0.55
    assert precision_and_recall(both_modes, both_modes) == (1, 1)


def test_too_few_points_for_the_neighbours_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 neighbours were asked of 3 generated and 40 ref"):
        precision_and_recall(points(0, 3), points(1))


# Reference pictures


def test_drawn_scenes_are_of_the_prompts_in_turn() -> None:
    prompts = [CLASSES[3], CLASSES[20]]
    pictures = torch.cat(list(drawn_pictures(prompts, 40, seed=5)))
    assert accuracy(pictures, [3, 20] * 20) == {"colour": 1, "shape": 1, "both": 1}
    assert torch.equal(pictures, torch.cat(list(drawn_pictures(prompts, 40, seed=5))))
    assert not torch.equal(pictures, torch.cat(list(drawn_pictures(prompts, 40, seed=6))))


def test_a_folder_is_read_with_its_subfolders_in_order(reference: Path, tmp_path: Path) -> None:
    files = picture_files(reference)
    assert [file.name for file in files[:2]] == ["000.png", "002.png"]
    batches = list(read_pictures(files))
    assert [len(batch) for batch in batches] == [32, 8]
    first = colourful(40, seed=0)[0]
    torch.testing.assert_close(batches[0][0], first, atol=1 / 255, rtol=0)


def test_a_reference_that_cannot_be_read_is_refused(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere, which is no folder"):
        picture_files(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no pictures \(\.bmp, "):
        picture_files(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"broken\.png cannot be read .* Replace or remove it"):
        list(read_pictures(picture_files(tmp_path)))
    write_picture(tmp_path / "broken.png", torch.zeros(3, 4, 6))
    write_picture(tmp_path / "second.png", torch.zeros(3, 4, 5))
    with pytest.raises(ConfigError, match=r"second\.png has 4 x 5 pixels, .* has 4 x 6"):
        list(read_pictures(picture_files(tmp_path)))


# The comparison


def compared(settings: Distribution, **models: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    comparison = start(settings, [], CPU)
    assert isinstance(comparison, Comparison)
    comparison.look(models)
    return comparison.results(list(models))


def test_the_numbers_of_a_folder_are_those_of_its_features(reference: Path) -> None:
    settings = Distribution(str(reference), Colours, kid_subset_size=20)
    near, far = colourful(40, seed=1), colourful(40, seed=2, spread=0.3)
    numbers, described = compared(settings, full_precision=near, quantized=far)
    expected = Colours()(torch.cat(list(read_pictures(picture_files(reference))))).double()
    assert numbers["quantized"]["fid"] == pytest.approx(
        frechet_distance(Colours()(far).double(), expected), rel=1e-6
    )
    for name in ("fid", "kid"):
        assert numbers["full_precision"][name] < numbers["quantized"][name]
    assert numbers["full_precision"]["recall"] > numbers["quantized"]["recall"]
    assert described["reference_count"] == described["generated_count"] == 40
    assert described["features"] == 6
    assert described["extractor"].endswith("Colours")
    assert described["left_out"] == {}


def test_what_too_few_generated_pictures_cannot_give_is_left_out_with_the_reason(
    reference: Path,
) -> None:
    numbers, described = compared(Distribution(str(reference), Colours), quantized=colourful(3, 1))
    assert numbers["quantized"] == dict.fromkeys(("fid", "kid", "precision", "recall"))
    reasons = described["left_out"]
    assert "3 generated pictures; a covariance of 6 features needs more than 6" in reasons["fid"]
    assert "3 pictures; subsets have 48. Lower metrics.dist" in reasons["kid"]
    assert "3 pictures; 3 neighbours need more" in reasons["recall"]
    numbers, described = compared(Distribution(str(reference), Colours), quantized=colourful(9, 1))
    assert set(described["left_out"]) == {"kid"}
    assert numbers["quantized"]["fid"] > 0


def test_a_reference_smaller_than_the_features_is_refused_before_sampling(tmp_path: Path) -> None:
    folder = folder_of(colourful(6, seed=0), tmp_path)
    with pytest.raises(ConfigError, match=r"has 6 pictures, but the extractor .*Colours gives 6"):
        start(Distribution(str(folder), Colours), [], CPU)


def test_pictures_and_features_of_a_wrong_shape_are_refused(reference: Path) -> None:
    class Broken(Colours):
        def forward(self, pictures: Tensor) -> Tensor:
            return super().forward(pictures) / 0

    with pytest.raises(ConfigError, match=r"made \[32, 3, 8, 8\] of pictures .* Flatten or pool"):
        start(Distribution(str(reference), nn.Identity), [], CPU)
    with pytest.raises(NumericsError, match=r"Broken gave NaN or Inf"):
        start(Distribution(str(reference), Broken), [], CPU)
    comparison = start(Distribution(str(reference), Colours), [], CPU)
    assert isinstance(comparison, Comparison)
    with pytest.raises(ConfigError, match=r"shape \[3, 16, 16\], the reference pictures \[3, 8"):
        comparison.look({"quantized": torch.zeros(1, 3, 16, 16)})
    with pytest.raises(ConfigError, match=r"shape \[5, 3, 8, 8\], .* metrics.distribution to null"):
        comparison.look({"quantized": torch.zeros(1, 5, 3, 8, 8)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drawn": 1}, "drawn must be at least 2, got 1"),
        ({"kid_subsets": 0}, "kid_subsets must be at least 1, got 0"),
        ({"kid_subset_size": 1}, "kid_subset_size must be at least 2, got 1"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.distribution\.{message}"):
        Distribution(**changed)


# What is not available


def test_without_reference_or_inception_the_reason_is_given(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "metrics.distribution.reference names no folder" in str(start(Distribution(), [], CPU))
    assert "names no folder" in str(start(Distribution(), ["red ring", "tench"], CPU))
    find = importlib.util.find_spec
    present = False

    def find_spec(name: str) -> Any:
        return present or None if name == "torch_fidelity" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    said = str(start(Distribution(str(reference)), [], CPU))
    assert said.startswith("not computed: Inception is not available: torch-fidelity is not inst")
    present = True
    assert inception_unavailable() == (
        f"Inception is not available: {tmp_path}/checkpoints/{WEIGHTS} missing"
    )
    with pytest.raises(ConfigError, match="needs the package torch-fidelity and the file"):
        Inception()
    os.makedirs(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / WEIGHTS).touch()
    assert inception_unavailable() is None
    with pytest.raises(ConfigError, match=f"{WEIGHTS} is damaged, or holds more than tensors"):
        Inception()


# Through a trainer


class Requests(LightningDataModule):
    """Pictures of random colours, dealt over the ranks."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def evaluation_requests(self) -> list[tuple[str, int]]:
        return [(f"picture {seed}", seed) for seed in range(self.count)]

    def test_dataloader(self) -> DataLoader[Any]:
        rank, world = 0, 1
        if distributed.is_initialized():
            rank, world = distributed.get_rank(), distributed.get_world_size()

        def collate(rows: list[tuple[str, int]]) -> dict[str, list[Any]]:
            return {"prompt": [row[0] for row in rows], "seed": [row[1] for row in rows]}

        share = self.evaluation_requests()[rank::world]
        return DataLoader(share, self.batch_size, collate_fn=collate)  # type: ignore[arg-type]


class Painter(LightningModule):
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        clean = torch.cat([colourful(1, 100 + seed) for seed in batch["seed"]])
        return {**batch, "full_precision": clean, "quantized": 0.8 * clean}


def evaluated(root: Path, settings: Distribution | None, batch_size: int = 5) -> dict[str, Any]:
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", logger=False, use_distributed_sampler=False,
        callbacks=[PairedMetrics(distribution=settings)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.test(Painter(), datamodule=Requests(23, batch_size), verbose=False)
    return dict(json.loads((root / "test.json").read_text()))


def test_the_file_and_the_table_have_the_numbers_for_any_batch_size(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Distribution(str(reference), Colours, kid_subset_size=10)
    results = [evaluated(tmp_path / str(size), settings, size) for size in (1, 5, 23)]
    assert results[0] == results[1] == results[2]
    for model in ("full_precision", "quantized"):
        assert set(results[0][model]) >= NUMBERS
    assert set(results[0]["settings"]["definitions"]) >= NUMBERS
    assert results[0]["quantized"]["fid"] > results[0]["full_precision"]["fid"]
    assert results[0]["settings"]["distribution"]["reference"] == str(reference)
    printed = capsys.readouterr().out
    assert f"{results[0]['quantized']['fid']:.4f}" in printed


def test_the_reason_for_a_missing_number_is_in_the_file_and_below_the_table(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated(tmp_path / "none", Distribution())
    assert result["settings"]["distribution"].startswith("not computed: metrics.distribution")
    assert not NUMBERS & set(result["quantized"])
    assert "FID, KID, precision, recall: not computed" in capsys.readouterr().out
    result = evaluated(tmp_path / "few", Distribution(str(reference), Colours))
    assert result["quantized"]["kid"] is None
    assert "kid: not computed from 23 pictures; subsets have 48" in capsys.readouterr().out
    result = evaluated(tmp_path / "off", None)
    assert "distribution" not in result["settings"]


def _rank(rank: int, root: str, reference: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    store = f"file://{root}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    comparison = start(Distribution(reference, Colours, kid_subset_size=10), [], CPU)
    assert isinstance(comparison, Comparison)
    for seed in range(rank, 23, 2):
        clean = colourful(1, 100 + seed)
        comparison.look({"full_precision": clean, "quantized": 0.8 * clean})
    numbers, _ = comparison.results(["full_precision", "quantized"])
    (Path(root) / f"{rank}.json").write_text(json.dumps(numbers))
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(reference: Path, tmp_path: Path) -> None:
    alone = evaluated(tmp_path / "one", Distribution(str(reference), Colours, kid_subset_size=10))
    spawn: Callable[..., Any] = multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(_rank, (str(tmp_path), str(reference)), nprocs=2)
    for rank in range(2):
        numbers = json.loads((tmp_path / f"{rank}.json").read_text())
        for model, found in numbers.items():
            assert found == {name: alone[model][name] for name in NUMBERS}


def test_the_worlds_scenes_are_compared_by_its_classifier() -> None:
    prompts = list(CLASSES)
    comparison = start(Distribution(drawn=72), prompts, CPU)
    assert isinstance(comparison, Comparison)
    fresh = torch.cat(list(drawn_pictures(prompts, 48, seed=1)))
    comparison.look({"full_precision": fresh, "quantized": fresh.roll(1, dims=1)})
    numbers, described = comparison.results(["full_precision", "quantized"])
    assert described["extractor"] == "recon.zoo.classifier_network.Classifier"
    assert (described["features"], described["reference_count"]) == (32, 72)
    assert numbers["full_precision"]["fid"] < 2
    assert numbers["full_precision"]["precision"] > 0.8
    assert numbers["quantized"]["fid"] > 1.5 * numbers["full_precision"]["fid"]
