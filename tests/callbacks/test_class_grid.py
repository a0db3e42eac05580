"""The sheet of classes: its layout, what it shows, and several processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor, distributed, multiprocessing

from recon.callbacks.class_grid import ClassGrid, sheet
from recon.errors import ConfigError

LABELS = ["full precision", "quantized"]


def forms(*greys: float, side: int = 64) -> Tensor:
    return torch.stack([torch.full((3, side, side), grey) for grey in greys])


def batch(names: list[str], greys: list[float]) -> dict[str, Any]:
    pictures = [forms(grey, grey / 2) for grey in greys]
    return {
        "prompt": names,
        "seed": list(range(len(names))),
        "full_precision": torch.stack([pair[0] for pair in pictures]),
        "quantized": torch.stack([pair[1] for pair in pictures]),
    }


def trainer(root: Path, logger: Any = False) -> Trainer:
    return Trainer(
        default_root_dir=root, accelerator="cpu", logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def shown(root: Path, *batches: dict[str, Any], rows: int = 24, logger: Any = False) -> Path:
    grid, run = ClassGrid(rows), trainer(root, logger)
    grid.begin(run)
    for outputs in batches:
        grid.look(run, outputs, "test")
    grid.finish(run, LightningModule(), "test")
    return root / "samples" / "test_classes.png"


def greys(path: Path) -> list[float]:
    """Grey of the cells of a sheet's first band, row by row."""
    with Image.open(path) as image:
        # Cells of 128 pixels and a gap of 4, right of the names and below the captions.
        rows = (image.height - 24 - 24) // 132
        found = [
            image.getpixel((12 + 116 + column * 132 + 64, 12 + 24 + row * 132 + 64))
            for row in range(rows)
            for column in range(2)
        ]
    return [round(value[0] / 255, 1) for value in found]  # type: ignore[index]


def test_each_row_is_the_first_picture_of_a_class_and_each_column_a_form(tmp_path: Path) -> None:
    path = shown(
        tmp_path, batch(["red ring", "tench"], [0.8, 0.4]), batch(["tench", "ox"], [1.0, 0.6])
    )
    assert greys(path) == [0.8, 0.4, 0.4, 0.2, 0.6, 0.3]
    assert greys(shown(tmp_path, batch(["a", "b", "c"], [0.8, 0.4, 0.2]), rows=2)) == [
        *(0.8, 0.4),
        *(0.4, 0.2),
    ]


def test_names_and_captions_are_written() -> None:
    one = sheet({"red ring": forms(0.0, 0.0)}, LABELS)
    other = sheet({"blue bar": forms(0.0, 0.0)}, LABELS)
    difference = (one - other).abs().amax(dim=0)
    assert difference[36:, 12:128].max() > 0.5  # the name, left of the pictures
    assert difference[:, 128:].max() == 0
    assert one[:, 12:36, 128:256].min() < 0.2  # a caption
    named = sheet({"great white shark, white shark, man-eater": forms(0.0, 0.0)}, LABELS)
    assert named[:, 36:, :12].min() == 1  # what does not fit is cut


def test_further_classes_stand_in_further_bands_and_large_pictures_are_reduced() -> None:
    many = sheet({f"class {i}": forms(0.5, 0.5) for i in range(9)}, LABELS)
    few = sheet({f"class {i}": forms(0.5, 0.5) for i in range(8)}, LABELS)
    assert many.shape[1] == few.shape[1]
    assert many.shape[2] == 2 * few.shape[2] - 24 + 28
    large = sheet({"a": forms(0.5, 0.5, side=512)}, LABELS)
    assert large.shape[1:] == (24 + 24 + 260, 24 + 116 + 2 * 260)


def test_a_sheet_needs_equal_shapes_labels_and_a_class(tmp_path: Path) -> None:
    for classes in ({}, {"a": forms(0.5)}, {"a": forms(0, 0), "b": forms(0, 0, side=32)}):
        with pytest.raises(ConfigError, match="at least one class, equal shapes, and one label"):
            sheet(classes, LABELS)
    with pytest.raises(ConfigError, match=r"ClassGrid\.rows must be at least 0, got -1"):
        ClassGrid(-1)


def test_videos_and_zero_rows_leave_no_sheet(tmp_path: Path) -> None:
    video = torch.zeros(1, 4, 3, 8, 8)
    outputs = {"prompt": ["a"], "seed": [0], "full_precision": video, "quantized": video}
    assert not shown(tmp_path, outputs).exists()
    assert not shown(tmp_path, batch(["a"], [0.5]), rows=0).exists()


def test_the_sheet_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    shown(tmp_path, batch(["a"], [0.5]), logger=logger)
    logger.experiment.finish()
    assert len(list(tmp_path.glob("wandb/offline-*/files/media/**/*.png"))) == 1


def _rank(rank: int, root: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = f"file://{root}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Classes 0 1 2 0 1 in turn: rank 0 gets 0 2 1, rank 1 gets 1 0.
    mine = [("a", 0.2), ("c", 0.6), ("b", 0.9)] if rank == 0 else [("b", 0.4), ("a", 0.9)]
    grid, run = ClassGrid(), trainer(Path(root) / str(rank))
    grid.begin(run)
    for name, grey in mine:
        grid.look(run, batch([name], [grey]), "test")
    grid.finish(run, LightningModule(), "test")
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_show_what_one_shows(tmp_path: Path) -> None:
    spawn: Callable[..., Any] = multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(_rank, (str(tmp_path),), nprocs=2)
    assert greys(tmp_path / "0" / "samples" / "test_classes.png") == [0.2, 0.1, 0.4, 0.2, 0.6, 0.3]
