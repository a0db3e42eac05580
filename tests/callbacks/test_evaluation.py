"""PairedMetrics against direct computation; videos on disk and in W&B."""

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch import Tensor, distributed, multiprocessing
from torch.utils.data import DataLoader

from recon.callbacks import evaluation
from recon.callbacks.evaluation import PairedMetrics, world_oracle
from recon.callbacks.evaluation_result import summarise
from recon.callbacks.gathering import gather_rows
from recon.callbacks.quality import (
    bootstrap_interval,
    frame_similarity,
    lpips_unavailable,
    psnr,
    ssim,
    temporal_consistency,
    temporal_difference,
)
from recon.callbacks.samples import (
    MediaLogger,
    SampleWriter,
    enlarge,
    side_by_side,
    write_picture,
    write_sample,
    write_video,
)
from recon.errors import ConfigError, NumericsError
from recon.zoo import world

PROMPTS = ("a red circle moves left", "the blue ring rests still", "no scene of this world")


def clip(seed: int, frames: int = 4, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def outputs(batch: dict[str, Any], nearest: bool = True) -> dict[str, Any]:
    reference = torch.stack([clip(seed) for seed in batch["seed"]])
    noise = torch.stack([clip(seed + 50) for seed in batch["seed"]])
    made = {**batch, "full_precision": reference, "quantized": 0.9 * reference + 0.1 * noise}
    return made | ({"round_to_nearest": 0.7 * reference + 0.3 * noise} if nearest else {})


class Data(LightningDataModule):
    def batches(self) -> list[dict[str, Any]]:
        return [
            {"prompt": list(PROMPTS[:2]), "seed": [0, 1]},
            {"prompt": [PROMPTS[2]], "seed": [2]},
        ]

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]

    evaluation_batches = batches
    val_dataloader = test_dataloader = predict_dataloader = loader

    def evaluation_settings(self) -> dict[str, Any]:
        return {"steps": 7}


class Module(LightningModule):
    nearest = True

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return outputs(batch, self.nearest)

    test_step = predict_step = validation_step


def trainer(root: Path, *callbacks: Callback, logger: Any = False) -> Trainer:
    return Trainer(
        default_root_dir=root, accelerator="cpu", logger=logger, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


# Numbers


def test_psnr_is_the_formula_and_identical_videos_are_capped() -> None:
    one, other = clip(0), clip(1)
    error = float(((one - other) ** 2).mean())
    assert psnr(one, other) == pytest.approx(10 * math.log10(1 / error), rel=1e-6)
    assert psnr(one, one) == 100.0
    assert psnr(one, one + 1e-7) <= 100.0


def test_ssim_is_one_for_identical_videos_and_lower_otherwise() -> None:
    assert ssim(clip(0), clip(0)) == pytest.approx(1)
    assert ssim(clip(0), clip(1)) < 0.2


def test_temporal_numbers_see_motion_and_not_a_constant_error() -> None:
    moving, still = clip(0), clip(0)[:1].expand(4, -1, -1, -1)
    assert temporal_consistency(moving, moving * 1.0) == 1.0
    assert temporal_consistency(moving, moving + 0.2) == pytest.approx(1, abs=1e-5)
    assert temporal_consistency(moving, still) == 0.0
    assert temporal_consistency(moving, -moving) == pytest.approx(0)
    assert temporal_consistency(still, still) == 1.0
    expected = float((moving[1:] - moving[:-1]).abs().mean())
    assert temporal_difference(moving, still) == pytest.approx(expected)
    assert frame_similarity(still) == pytest.approx(1)
    assert abs(frame_similarity(moving)) < 0.2


def test_the_bootstrap_interval_holds_the_mean_and_is_seeded() -> None:
    values = [20.0, 22.0, 25.0, 21.0, 30.0]
    low, high = bootstrap_interval(values) or (0.0, 0.0)
    assert low < sum(values) / 5 < high
    assert bootstrap_interval(values) == [low, high]
    assert bootstrap_interval([1.0]) is None


def test_the_worlds_oracle_passes_over_foreign_prompts() -> None:
    assert world_oracle(clip(0), "a dog in the snow") == {}
    assert set(world_oracle(clip(0), PROMPTS[0])) == {"colour", "shape", "motion"}


def test_rows_an_oracle_cannot_judge_do_not_count() -> None:
    rows: list[dict[str, Any]] = [
        {"quantized": {"colour": True}},
        {"quantized": {"colour": False}},
        {"quantized": {}},
    ]
    assert summarise(rows)["quantized"] == {"colour": 0.5, "count": 3}


def test_lpips_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lpips_unavailable() == "not available: torchvision is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    assert "alexnet-owt-7be5be79.pth is not there" in str(lpips_unavailable())


def test_videos_of_different_shapes_and_nan_are_refused() -> None:
    batch = outputs({"prompt": ["p"], "seed": [0]})
    with pytest.raises(ConfigError, match="'p' differ in shape"):
        PairedMetrics().measure({**batch, "quantized": batch["quantized"][:, :2]})
    batch["quantized"][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="quantized sample of 'p' holds NaN"):
        PairedMetrics().measure(batch)


# The callback


@pytest.mark.parametrize(("verb", "file"), [("test", "test.json"), ("validate", "validate.json")])
def test_the_file_holds_what_direct_computation_gives(tmp_path: Path, verb: str, file: str) -> None:
    def oracle(video: Tensor, prompt: str) -> dict[str, bool]:
        return (
            {"red": "red" in prompt, "bright": bool(video.mean() > 0)} if "no" not in prompt else {}
        )

    run = trainer(tmp_path, PairedMetrics(oracle), logger=CSVLogger(tmp_path, name="csv"))
    logged = getattr(run, verb)(Module(), datamodule=Data(), verbose=False)[0]
    result = json.loads((tmp_path / file).read_text())
    batch = outputs({"prompt": list(PROMPTS), "seed": [0, 1, 2]})
    for part, model in (("paired", "quantized"), ("paired_round_to_nearest", "round_to_nearest")):
        pairs = list(zip(batch["full_precision"], batch[model], strict=True))
        for name, number in (("psnr", psnr), ("ssim", ssim)):
            expected = sum(number(one, other) for one, other in pairs) / 3
            assert result[part][name] == pytest.approx(expected)
        low, high = result[part]["psnr_interval"]
        assert low < result[part]["psnr"] < high
    assert result["paired"]["psnr"] > result["paired_round_to_nearest"]["psnr"]
    for model in ("full_precision", "quantized", "round_to_nearest"):
        assert (result[model]["red"], result[model]["bright"], result[model]["all"]) == (
            0.5,
            1,
            0.5,
        )
    assert result["settings"]["steps"] == 7
    assert result["settings"]["lpips"].startswith(("not available", "available"))
    assert [(row["prompt"], row["seed"]) for row in result["samples"]] == list(
        zip(PROMPTS, [0, 1, 2], strict=True)
    )
    assert logged[f"{verb}/psnr"] == pytest.approx(result["paired"]["psnr"])
    assert logged[f"{verb}/quantized/red"] == 0.5
    assert not list(tmp_path.glob(".*"))


def test_without_round_to_nearest_and_oracle_the_rest_is_there(tmp_path: Path) -> None:
    module = Module()
    module.nearest = False
    trainer(tmp_path, PairedMetrics(None)).test(module, datamodule=Data(), verbose=False)
    result = json.loads((tmp_path / "test.json").read_text())
    assert set(result) == {"full_precision", "quantized", "paired", "settings", "samples"}
    assert set(result["quantized"]) == {"frame_similarity", "count"}


def test_the_table_names_what_is_not_available(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "lpips_unavailable", lambda: "not available: test")
    trainer(tmp_path, PairedMetrics()).test(Module(), datamodule=Data(), verbose=False)
    shown = capsys.readouterr().out
    assert "not available" in shown
    assert "test: 3 samples" in shown


def _rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mine = [{"prompt": f"prompt ü {i}", "seed": i} for i in range(rank, 5, 2)]
    rows = gather_rows(mine, torch.device("cpu"))
    (Path(folder) / f"{rank}.json").write_text(json.dumps([row["seed"] for row in rows]))
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_rows_of_two_ranks_come_together_in_order(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [0, 1, 2, 3, 4]


# Videos


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_video_is_read_back_with_its_frames(tmp_path: Path, suffix: str) -> None:
    import imageio.v3 as imageio

    video = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 33, 47)  # odd sides
    path = write_video(tmp_path / f"new/v{suffix}", video)
    frames = torch.stack([torch.as_tensor(frame) for frame in imageio.imiter(path)])
    assert len(frames) == 5
    means = frames.float().flatten(1).mean(dim=1) / 255
    assert torch.allclose(means, torch.linspace(0, 1, 5), atol=0.05)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in '\.avi'"):
        write_video(tmp_path / "v.avi", clip(0))
    with pytest.raises(ConfigError, match=r"must be \[frames, 3"):
        write_video(tmp_path / "v.gif", clip(0)[0])
    with pytest.raises(ConfigError, match="equal shapes and one label each"):
        side_by_side([clip(0), clip(0)[:2]], ["a", "b"])
    with pytest.raises(ConfigError, match="format is 'avi'"):
        SampleWriter(format="avi")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fps must be at least 1, got 0"):
        SampleWriter(fps=0)
    with pytest.raises(ConfigError, match="count must be at least 0, got -1"):
        MediaLogger(count=-1)


def test_small_videos_are_enlarged_by_whole_factors_and_stand_side_by_side() -> None:
    assert enlarge(clip(0)).shape == (4, 3, 192, 256)
    assert enlarge(clip(0), 0).shape == (4, 3, 24, 32)
    grid = side_by_side([clip(0), clip(1)], ["one", "two"])
    assert grid.shape == (4, 3, 192 + 16, 256 + 8 + 256)
    assert torch.equal(grid[:, :, 16:, :256], enlarge(clip(0)))
    assert torch.equal(grid[:, :, 16:, 264:], enlarge(clip(1)))
    assert grid[:, :, :16, :256].min() < 0.5  # the caption is drawn


def test_predict_writes_videos_and_an_index(tmp_path: Path) -> None:
    trainer(tmp_path, SampleWriter()).predict(Module(), datamodule=Data())
    folder = tmp_path / "predictions"
    lines = [json.loads(s) for s in (folder / "index_rank0.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    assert lines[0]["file"] == "a-red-circle-moves-left_0.gif"
    assert {p.name for p in folder.glob("*.gif")} == {line["file"] for line in lines}


def test_media_goes_to_the_run_folder_and_to_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer(tmp_path, MediaLogger(count=2), logger=logger).test(
        Module(), datamodule=Data(), verbose=False
    )
    logger.experiment.finish()
    kept = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert kept == ["test_a-red-circle-moves-left_0.gif", "test_the-blue-ring-rests-still_1.gif"]
    assert len(list(tmp_path.glob("wandb/offline-*/files/media/**/*.gif"))) == 2


def test_after_fit_a_few_videos_are_sampled(tmp_path: Path) -> None:
    run, module = trainer(tmp_path), Module()
    run.datamodule = Data()  # type: ignore[attr-defined]
    MediaLogger(after_fit=3).on_train_end(run, module)
    assert len(list((tmp_path / "samples").glob("fit_*.gif"))) == 3
    MediaLogger(after_fit=0).on_train_end(run, module)


def test_pictures_have_no_numbers_of_time_and_the_worlds_oracle_judges_them() -> None:
    shown = world.random_scene(world.Attributes("red", "ring", "still"), random.Random(0))
    picture = world.draw_frame(shown, height=64, width=64)[None]
    made = {
        "prompt": ["red ring"],
        "seed": [0],
        "full_precision": picture,
        "quantized": 0.9 * picture + 0.01,
    }
    (row,) = PairedMetrics().measure(made)
    assert row["full_precision"] == {"colour": True, "shape": True, "all": True}
    assert set(row["paired"]) - {"lpips"} == {"psnr", "ssim"}
    assert world_oracle(picture[0], "red circle") == {"colour": True, "shape": False}
    assert world_oracle(picture[0], "tench") == {}


def test_pictures_are_kept_side_by_side_as_png(tmp_path: Path) -> None:
    made = {
        "prompt": ["red ring", "tench"],
        "seed": [3, 4],
        "full_precision": torch.rand(2, 3, 32, 32),
        "quantized": torch.rand(2, 3, 32, 32),
    }
    logger = MediaLogger(count=1)
    kept = logger.keep(trainer(tmp_path), made, "test", 1)
    assert kept == 1
    picture = Image.open(tmp_path / "samples" / "test_red-ring_3.png")
    assert picture.size == (2 * 192 + 8, 192 + 16)
    grid = side_by_side([torch.rand(3, 32, 32)], ["one"])
    written = write_sample(tmp_path, "one", grid, "gif", 8)
    assert written.suffix == ".png"
    with pytest.raises(ConfigError, match=r"picture of shape \[2, 3\]"):
        write_picture(tmp_path / "no.png", torch.zeros(2, 3))
