"""Samples, videos or pictures, on disk and in the tracker."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.nn import functional

from recon.atomic import whole_file
from recon.calibration import ranks
from recon.callbacks.evaluating import Evaluating
from recon.errors import ConfigError

LABELS = {
    "full_precision": "full precision",
    "round_to_nearest": "round to nearest",
    "quantized": "quantized",
}
"""Keys of an evaluation's outputs in the order of the columns, and their captions."""
FPS = 8
"""Frames per second; what CogVideoX is trained at."""
MIN_HEIGHT = 192
"""Pixels; smaller videos are enlarged by a whole factor."""
_GAP, _CAPTION = 8, 16  # pixels


def write_video(path: str | Path, video: Tensor, fps: int = FPS) -> Path:
    """Write a video as gif (loops) or mp4 (H.264), complete or not at all.

    Args:
        path: Ends in .gif or .mp4.
        video: [frames, 3, height, width] in [0, 1]; values outside are clipped.
        fps: Frames per second.

    Raises:
        ConfigError: Another suffix, or not a video.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ConfigError(f"{path.name} ends in {path.suffix!r}. Write .gif or .mp4.")
    if video.ndim != 4 or video.shape[1] != 3:
        raise ConfigError(
            f"A video of shape {list(video.shape)} cannot be written to {path}; it must be "
            "[frames, 3, height, width]."
        )
    frames = (video.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    import imageio.v2 as imageio  # heavy: only where something is written

    options: dict[str, Any] = {"loop": 0, "duration": 1000 / fps}
    if path.suffix == ".mp4":
        # H.264 with 4:2:0 colour needs even sides.
        height, width = frames.shape[-2:]
        frames = functional.pad(frames.float(), (0, width % 2, 0, height % 2), mode="replicate")
        options = {"fps": fps, "macro_block_size": 1}
    with whole_file(path) as aside:
        imageio.mimwrite(aside, list(frames.byte().permute(0, 2, 3, 1).numpy()), **options)
    return path


def write_picture(path: str | Path, picture: Tensor) -> Path:
    """Write a picture as png, complete or not at all.

    Args:
        path: Ends in .png.
        picture: [3, height, width] in [0, 1]; values outside are clipped.

    Raises:
        ConfigError: Not a picture.
    """
    path = Path(path)
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ConfigError(
            f"A picture of shape {list(picture.shape)} cannot be written to {path}; it must be "
            "[3, height, width]."
        )
    from PIL import Image

    values = (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    with whole_file(path) as aside:
        Image.fromarray(values.permute(1, 2, 0).numpy()).save(aside)
    return path


def write_sample(folder: Path, name: str, sample: Tensor, format: str, fps: int) -> Path:
    """Write a picture as png, or a video in `format`, under `name` without suffix."""
    if sample.ndim == 3:
        return write_picture(folder / f"{name}.png", sample)
    return write_video(folder / f"{name}.{format}", sample, fps)


def enlarge(video: Tensor, min_height: int = MIN_HEIGHT) -> Tensor:
    """The sample scaled by a whole factor to at least `min_height` pixels, pixels kept sharp."""
    factor = max(1, -(-min_height // video.shape[-2]))
    return video.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def side_by_side(samples: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """One video (or picture) with the given ones as captioned columns.

    Args:
        samples: Each [frames, 3, height, width] or [3, height, width] in [0, 1], of one shape.
        labels: A caption for each.

    Raises:
        ConfigError: Shapes differ, or there is not one label per sample.
    """
    if len({tuple(sample.shape) for sample in samples}) != 1 or len(labels) != len(samples):
        raise ConfigError(
            f"side_by_side got samples of shapes {[list(s.shape) for s in samples]} and "
            f"{len(labels)} labels; it needs equal shapes and one label each."
        )
    columns: list[Tensor] = []
    for sample, label in zip(samples, labels, strict=True):
        large = enlarge(sample.detach().float().cpu().clamp(0, 1))
        *leading, height, width = large.shape
        if columns:
            columns.append(torch.ones(*leading, height + _CAPTION, _GAP))
        columns.append(torch.cat([_caption(label, width).expand(*leading, -1, -1), large], dim=-2))
    return torch.cat(columns, dim=-1)  # beside each other


def _caption(text: str, width: int) -> Tensor:
    """Black text on white, [caption height, width]."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (width, _CAPTION), 255)
    ImageDraw.Draw(image).text((4, 2), text, fill=0)
    flat = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return flat.view(_CAPTION, width) / 255


def _file_name(prompt: str, seed: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{words or 'prompt'}_{seed}"


class SampleWriter(Callback):
    """Writes what `recon predict` samples to `<run folder>/predictions`, and an index of it.

    Args:
        format: Of videos, gif or mp4; pictures are png.
        fps: Frames per second.
        min_height: Smaller videos are enlarged by a whole factor; 0 keeps their size.
    """

    def __init__(
        self, format: Literal["gif", "mp4"] = "gif", fps: int = FPS, min_height: int = MIN_HEIGHT
    ) -> None:
        if format not in ("gif", "mp4"):
            raise ConfigError(f"SampleWriter.format is {format!r}. Choose gif or mp4.")
        if fps < 1:
            raise ConfigError(f"SampleWriter.fps must be at least 1, got {fps}.")
        self.format, self.fps, self.min_height = format, fps, min_height

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's quantised samples, each with its prompt in the index."""
        if not isinstance(outputs["quantized"], Tensor):  # answers are another callback's
            return
        folder = Path(trainer.default_root_dir) / "predictions"
        lines = []
        for prompt, seed, sample in zip(
            outputs["prompt"], outputs["seed"], outputs["quantized"], strict=True
        ):
            large = enlarge(sample, self.min_height)
            path = write_sample(folder, _file_name(prompt, int(seed)), large, self.format, self.fps)
            lines.append(json.dumps({"file": path.name, "prompt": prompt, "seed": int(seed)}))
        # Each rank has its own index: two processes must not append to one file.
        index = folder / f"index_rank{ranks.rank()}.jsonl"
        with index.open("a" if batch_idx else "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


class MediaLogger(Evaluating):
    """Keeps samples of all models side by side in `<run folder>/samples`, and sends them to W&B.

    At validation and test they are the first samples of the evaluation. After fit, whose own
    validation is off, the module's `validation_step` samples the first prompts.

    Args:
        count: Samples per evaluation.
        after_fit: Samples made when fit has ended; 0: none.
        fps: Frames per second.
    """

    def __init__(self, count: int = 4, after_fit: int = 2, fps: int = FPS) -> None:
        for name, value, least in (
            ("count", count, 0),
            ("after_fit", after_fit, 0),
            ("fps", fps, 1),
        ):
            if value < least:
                raise ConfigError(f"MediaLogger.{name} must be at least {least}, got {value}.")
        self.count, self.after_fit, self.fps = count, after_fit, fps
        self._kept = 0

    def begin(self, trainer: Trainer) -> None:
        """See `Evaluating`."""
        self._kept = 0

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """Keeps the first samples."""
        self._kept += self.keep(trainer, outputs, verb, self.count - self._kept)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample a few prompts with the finished network, on rank 0."""
        batches = getattr(getattr(trainer, "datamodule", None), "evaluation_batches", None)
        if batches is None or not self.after_fit or not trainer.is_global_zero:
            return
        left = self.after_fit
        for batch in batches():
            few = {key: values[:left] for key, values in batch.items()}
            with torch.no_grad():
                outputs = pl_module.validation_step(few, 0)
            left -= self.keep(trainer, outputs, "fit", left)
            if left <= 0:
                return

    def keep(self, trainer: Trainer, outputs: Any, verb: str, most: int) -> int:
        """Write and log up to `most` samples of one step's outputs; returns how many."""
        if not isinstance(outputs, Mapping) or not trainer.is_global_zero:
            return 0
        if not isinstance(outputs["quantized"], Tensor):  # answers are no pictures
            return 0
        models = [name for name in LABELS if name in outputs]
        paths, captions = [], []
        for index, (prompt, seed) in enumerate(
            zip(outputs["prompt"], outputs["seed"], strict=True)
        ):
            if index >= most or not models:
                break
            grid = side_by_side(
                [outputs[name][index] for name in models], [LABELS[name] for name in models]
            )
            name = f"{verb}_{_file_name(prompt, int(seed))}"
            folder = Path(trainer.default_root_dir) / "samples"
            paths.append(str(write_sample(folder, name, grid, "gif", self.fps)))
            captions.append(f"{prompt} (seed {seed}): {', '.join(LABELS[m] for m in models)}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and paths:
                if paths[0].endswith(".png"):
                    logger.log_image(f"samples/{verb}", paths, caption=captions)
                    continue
                formats = ["gif"] * len(paths)
                logger.log_video(f"samples/{verb}", paths, caption=captions, format=formats)
        return len(paths)
