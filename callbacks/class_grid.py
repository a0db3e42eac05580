"""One picture of every class, full precision beside its quantised forms, on a single sheet."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.nn import functional

from recon.calibration import ranks
from recon.callbacks.evaluating import Evaluating
from recon.callbacks.gathering import gather_rows, gather_tensor
from recon.callbacks.samples import LABELS, enlarge, write_picture
from recon.errors import ConfigError

ROWS = 24
"""Classes on a sheet."""
_BAND = 8
"""Rows of a sheet's column of classes; further classes stand to the right."""
_LEAST, _MOST = 112, 256
"""Pixels; sides of a cell."""
_GAP, _BETWEEN, _MARGIN = 4, 28, 12
"""Pixels between cells, between bands and around the sheet."""
_NAME, _HEAD, _FONT = 116, 24, 14
"""Pixels: width of a class's name, height of the captions, size of letters."""


class ClassGrid(Evaluating):
    """Keeps a sheet of pictures in `<run folder>/samples`, and sends it to W&B.

    A row for the first picture of each class, a column for each form of the network. Videos and
    answers are passed over.

    Args:
        rows: Classes shown, those evaluated first; 0: no sheet.
    """

    def __init__(self, rows: int = ROWS) -> None:
        if rows < 0:
            raise ConfigError(f"ClassGrid.rows must be at least 0, got {rows}.")
        self.rows = rows
        self._count = 0
        self._kept: list[dict[str, Any]] = []
        self._pictures: list[Tensor] = []

    def begin(self, trainer: Trainer) -> None:
        """See `Evaluating`."""
        self._count, self._kept, self._pictures = 0, [], []

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """Keeps this rank's first picture of each class, in 8 bits."""
        samples = outputs.get("quantized") if isinstance(outputs, Mapping) else None
        if not isinstance(samples, Tensor) or samples.ndim != 4:  # answers, or videos
            return
        models = [name for name in LABELS if name in outputs]
        for index, prompt in enumerate(outputs["prompt"]):
            order = self._count * ranks.world() + ranks.rank()  # place among all requests
            self._count += 1
            known = {row["prompt"] for row in self._kept}
            if prompt in known or len(known) >= self.rows:
                continue
            forms = torch.stack([outputs[name][index].detach().float().cpu() for name in models])
            self._pictures.append((forms.clamp(0, 1) * 255).round().byte())
            shape = list(forms.shape)
            self._kept.append({"prompt": prompt, "order": order, "models": models, "shape": shape})

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """Writes and logs the sheet of all ranks' classes."""
        rows = gather_rows(self._kept, module.device)
        if not rows:
            return
        none = torch.empty(0, *rows[0]["shape"], dtype=torch.uint8)
        local = torch.stack(self._pictures) if self._pictures else none
        pictures = gather_tensor(local, module.device)
        if not trainer.is_global_zero:
            return
        chosen: dict[str, Tensor] = {}
        for row, forms in sorted(
            zip(rows, pictures, strict=True), key=lambda found: found[0]["order"]
        ):
            chosen.setdefault(row["prompt"], forms / 255)
        first = dict(list(chosen.items())[: self.rows])
        labels = [LABELS[name] for name in rows[0]["models"]]
        folder = Path(trainer.default_root_dir) / "samples"
        path = write_picture(folder / f"{verb}_classes.png", sheet(first, labels))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(
                    f"samples/{verb}_classes", [str(path)], caption=[", ".join(labels)]
                )


def sheet(classes: Mapping[str, Tensor], labels: Sequence[str]) -> Tensor:
    """Rows of pictures with the name of their class, and captions above the columns.

    Small pictures are enlarged and large ones reduced, by whole factors; from the ninth class on,
    rows continue in a further band to the right.

    Args:
        classes: Pictures [forms, 3, height, width] in [0, 1] by class, all of one shape.
        labels: A caption for each form.

    Returns:
        [3, height, width] in [0, 1].

    Raises:
        ConfigError: Shapes differ, there is not one label per form, or there is no class.
    """
    shapes = {tuple(forms.shape) for forms in classes.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != len(labels):
        raise ConfigError(
            f"A sheet got pictures of shapes {sorted(shapes)} and {len(labels)} labels; it needs "
            "at least one class, equal shapes, and one label per form."
        )
    from PIL import Image, ImageDraw, ImageFont

    cells = {name: [_cell(form) for form in forms] for name, forms in classes.items()}
    height, width = next(iter(cells.values()))[0].shape[1:]
    font = ImageFont.load_default(_FONT)
    band_width = _NAME + len(labels) * (width + _GAP)
    bands = -(-len(cells) // _BAND)
    size = (
        2 * _MARGIN + bands * band_width + (bands - 1) * _BETWEEN,
        2 * _MARGIN + _HEAD + min(_BAND, len(cells)) * (height + _GAP),
    )
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for band in range(bands):
        left = _MARGIN + band * (band_width + _BETWEEN) + _NAME
        for column, label in enumerate(labels):
            middle = left + column * (width + _GAP) + width // 2
            draw.text((middle, _MARGIN), label, fill="black", font=font, anchor="ma")
    for index, (name, forms) in enumerate(cells.items()):
        band, row = divmod(index, _BAND)
        left = _MARGIN + band * (band_width + _BETWEEN)
        top = _MARGIN + _HEAD + row * (height + _GAP)
        shown = _fitted(name, lambda text: font.getlength(text) <= _NAME - 8)
        at = (left + _NAME - 8, top + height // 2)
        draw.text(at, shown, fill="black", font=font, anchor="rm")
        for column, form in enumerate(forms):
            values = (form * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            image.paste(Image.fromarray(values), (left + _NAME + column * (width + _GAP), top))
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def _cell(picture: Tensor) -> Tensor:
    factor = -(-max(picture.shape[1:]) // _MOST)
    return functional.avg_pool2d(picture, factor) if factor > 1 else enlarge(picture, _LEAST)


def _fitted(name: str, fits: Callable[[str], bool]) -> str:
    """The name, or as much of its first synonym as fits."""
    text = name if fits(name) else name.split(",")[0]
    if fits(text):
        return text
    while text and not fits(f"{text}…"):
        text = text[:-1]
    return f"{text}…"
