"""Paired evaluation: the same prompts and seeds, full precision against quantised.

The module's `validation_step` and `test_step` return {"prompt": list[str], "seed": list[int],
"full_precision": samples, "quantized": samples} and, if it made one, "round_to_nearest": samples;
samples are videos [batch, frames, 3, height, width] or pictures [batch, 3, height, width], in
[0, 1]. Pictures have no numbers of time.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torch.nn import functional

from recon.calibration import ranks
from recon.calibration.artefact import write_json
from recon.callbacks.evaluating import Evaluating
from recon.errors import ConfigError, NumericsError

Oracle = Callable[[Tensor, str], Mapping[str, bool]]
"""(video or picture, prompt) -> answers by name; empty where it cannot judge."""
Row = dict[str, Any]

MODELS = ("full_precision", "round_to_nearest", "quantized")
MAX_PSNR = 100.0
"""dB; identical videos have no finite PSNR, and one of them must not swallow the mean."""
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, which LPIPS reads; the heads on it come with torchmetrics."""
DEFINITIONS = {
    "psnr": "dB over all pixels of a sample, data range 1, capped at 100; mean over samples",
    "psnr_interval": "95 % percentile bootstrap of the mean over samples",
    "ssim": "structural similarity per frame, data range 1; mean over frames, then samples",
    "lpips": "LPIPS (AlexNet) per frame; mean over frames, then samples",
    "temporal_consistency": "1 - |dQ - dF| / (|dQ| + |dF|), L1 norms of frame-to-frame changes",
    "temporal_difference": "mean |dQ - dF| over pixels and frames (the L1 form of dtSSD)",
    "frame_similarity": "mean cosine similarity of consecutive frames, each less its mean",
}


def world_oracle(sample: Tensor, prompt: str) -> Mapping[str, bool]:
    """Answers of the embedded world's exact oracle; none for prompts of another world."""
    from recon.zoo.oracle import judge, judge_picture
    from recon.zoo.world import COLOURS, SHAPES, parse_prompt

    if sample.ndim == 4:
        return judge(sample, prompt) if parse_prompt(prompt) is not None else {}
    colour, _, shape = prompt.partition(" ")
    known = colour in COLOURS and shape in SHAPES
    return judge_picture(sample, colour, shape) if known else {}


# Numbers of one sample or one pair; samples are [frames, 3, height, width] in [0, 1].


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of a pair, dB, at most MAX_PSNR."""
    error = float((one.double() - other.double()).square().mean())  # over all axes
    return min(MAX_PSNR, -10 * math.log10(error)) if error > 0 else MAX_PSNR


def ssim(one: Tensor, other: Tensor) -> float:
    """Structural similarity of a pair, mean over frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(one, other, data_range=1.0))


def temporal_difference(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of the frame-to-frame changes of a pair, in [0, 2].

    Source: dtSSD of Erofeev et al. (BMVC 2015), with L1 in place of L2.
    """
    return float((one.diff(dim=0) - other.diff(dim=0)).abs().mean())  # diff over frames


def temporal_consistency(one: Tensor, other: Tensor) -> float:
    """How alike a pair moves, in [0, 1]: 1 where all frame-to-frame changes are equal.

    0 where one is still and the other is not, or moves the opposite way. Relative to how much
    the videos move, unlike `temporal_difference`. Ours.
    """
    first, second = one.double().diff(dim=0), other.double().diff(dim=0)  # over frames
    size = float(first.abs().sum() + second.abs().sum())
    return 1.0 - float((first - second).abs().sum()) / size if size > 0 else 1.0


def frame_similarity(video: Tensor) -> float:
    """Mean cosine similarity of consecutive frames, each less its own mean, in [-1, 1].

    Flicker lowers it, and a still has 1: compare with full precision, higher is not better.

    Source: the temporal consistency of CLIP-Temp (EvalCrafter), on pixels instead of features.
    """
    flat = video.double().flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)  # over channels and pixels
    return float(functional.cosine_similarity(flat[1:], flat[:-1], dim=1).mean())


def bootstrap_interval(values: Sequence[float], resamples: int = 2000) -> list[float] | None:
    """95 % percentile interval of the mean over seeded resamples; None for fewer than 2 values."""
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1)  # over the resample
    bounds = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [float(bound) for bound in bounds]


def lpips_unavailable() -> str | None:
    """Why LPIPS cannot be computed without a download; None if it can."""
    if importlib.util.find_spec("torchvision") is None:
        return "not available: torchvision is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    return None if weights.is_file() else f"not available: {weights} is not there"


class PairedMetrics(Evaluating):
    """Measures full-precision and quantised samples of the same prompts and seeds.

    Writes `test.json` (or `validate.json`) into the run folder, logs the means and prints a
    table. What each number means is in the file, under `settings.definitions`.

    Args:
        oracle: Judges single samples, as a dotted path; null: none. `world_oracle` passes over
            prompts that are not of the embedded world.
        show: Print the table.
    """

    def __init__(self, oracle: Oracle | None = world_oracle, show: bool = True) -> None:
        self.oracle = oracle
        self.show = show
        self._rows: list[Row] = []
        self._lpips = lpips_unavailable()

    def begin(self, trainer: Trainer) -> None:
        """See `Evaluating`."""
        self._rows = []

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """Measures the batch; the samples are not kept."""
        # Answers, a list, are another callback's.
        if isinstance(outputs, Mapping) and isinstance(outputs.get("quantized"), Tensor):
            self._rows += self.measure(outputs)

    def measure(self, outputs: Mapping[str, Any]) -> list[Row]:
        """One row per prompt: its numbers for each model, and for each pair with full precision.

        Raises:
            ConfigError: The samples of the models differ in shape.
            NumericsError: A sample holds NaN or Inf.
        """
        models = [name for name in MODELS if name in outputs]
        rows = []
        for index, (prompt, seed) in enumerate(
            zip(outputs["prompt"], outputs["seed"], strict=True)
        ):
            samples = {name: outputs[name][index].detach().float().cpu() for name in models}
            _check_samples(samples, prompt)
            row: Row = {"prompt": prompt, "seed": int(seed)}
            row |= {name: self._single(sample, prompt) for name, sample in samples.items()}
            for name in models[1:]:
                row[_pair(name)] = self._paired(samples["full_precision"], samples[name])
            rows.append(row)
        return rows

    def _single(self, sample: Tensor, prompt: str) -> dict[str, Any]:
        moving = sample.ndim == 4
        numbers: dict[str, Any] = {"frame_similarity": frame_similarity(sample)} if moving else {}
        answers = self.oracle(sample, prompt) if self.oracle is not None else {}
        if answers:
            numbers |= {name: bool(answer) for name, answer in answers.items()}
            numbers["all"] = all(answers.values())
        return numbers

    def _paired(self, reference: Tensor, sample: Tensor) -> dict[str, Any]:
        moving = sample.ndim == 4
        if not moving:
            reference, sample = reference[None], sample[None]
        numbers: dict[str, Any] = {"psnr": psnr(reference, sample), "ssim": ssim(reference, sample)}
        if moving:
            numbers["temporal_consistency"] = temporal_consistency(reference, sample)
            numbers["temporal_difference"] = temporal_difference(reference, sample)
        if self._lpips is None:
            from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

            distance = learned_perceptual_image_patch_similarity(
                sample.clamp(0, 1), reference.clamp(0, 1), net_type="alex", normalize=True
            )
            numbers["lpips"] = float(distance)
        return numbers

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """Writes `validate.json` or `test.json`, logs and shows the means."""
        if trainer.sanity_checking:
            return
        rows = gather_rows(self._rows, module.device)
        if not rows:
            return
        result = summarise(rows)
        settings = {"lpips": self._lpips or "available"}
        report(trainer, module, verb, result, rows, settings, DEFINITIONS, show=self.show)


def report(
    trainer: Trainer,
    module: LightningModule,
    verb: str,
    result: dict[str, Any],
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    definitions: Mapping[str, str],
    *,
    show: bool,
) -> None:
    """Logs the means and writes them with the rows to `<run folder>/<verb>.json`.

    Args:
        trainer: Its data module says what the numbers depend on.
        module: Logs; its class is the method.
        verb: `test` or `validate`.
        result: Means by model and by pair.
        rows: Of all ranks, in order.
        settings: Further ones.
        definitions: What each number means; those of the result are written.
        show: Print the table.
    """
    source = getattr(trainer, "datamodule", None)
    given: dict[str, Any] = getattr(source, "evaluation_settings", dict)()
    content = {
        **result,
        "settings": {
            **given,
            "method": type(module).__name__,
            **settings,
            "definitions": _definitions(result, definitions),
        },
        "samples": rows,
    }
    module.log_dict(
        {f"{verb}/{name}": value for name, value in _scalars(result).items()},
        rank_zero_only=False,
        sync_dist=False,  # every rank holds all rows
    )
    if trainer.is_global_zero:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / f"{verb}.json", content)
        if show:
            show_table(result, verb)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the rows, by model and by pair; an oracle's answers become accuracies.

    Rows that lack a number (prompts an oracle cannot judge) do not count for it.
    """
    result: dict[str, Any] = {}
    for part in [*MODELS, "paired", "paired_round_to_nearest"]:
        found = [row[part] for row in rows if part in row]
        if not found:
            continue
        names = dict.fromkeys(name for numbers in found for name in numbers)
        result[part] = {name: _mean([n[name] for n in found if name in n]) for name in names}
        result[part]["count"] = len(found)
        if "psnr" in names:
            result[part]["psnr_interval"] = bootstrap_interval([n["psnr"] for n in found])
            result[part].setdefault("lpips", None)
    return result


def gather_rows(rows: list[Row], device: torch.device) -> list[Row]:
    """The rows of all ranks on every rank, in the order of the prompts' loader."""
    if not ranks.active():
        return rows
    # As bytes of JSON: collectives of objects would pickle.
    local = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks.world())]
    distributed.all_gather(sizes, torch.tensor([len(local)], device=device))
    padded = functional.pad(local, (0, int(max(map(int, sizes))) - len(local)))
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    lists = [
        json.loads(bytes(part[: int(size)].tolist()).decode())
        for part, size in zip(parts, sizes, strict=True)
    ]
    # Prompt i went to rank i % world.
    longest = max(map(len, lists))
    return [share[i] for i in range(longest) for share in lists if i < len(share)]


def show_table(result: Mapping[str, Any], title: str) -> None:
    """The result as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    models = [name for name in MODELS if name in result]
    table = Table(title=f"{title}: {result['full_precision']['count']} samples")
    table.add_column("")
    for name in models:
        table.add_column(name.replace("_", " "), justify="right")
    columns = [{**result[name], **result.get(_pair(name), {})} for name in models]
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        if name != "count" and not name.endswith("_interval"):
            table.add_row(name, *(_cell(name, column) for column in columns))
    Console().print(table)


def _cell(name: str, column: Mapping[str, Any]) -> str:
    if name not in column:
        return "–"
    if column[name] is None:
        return "not available"
    interval = column.get("psnr_interval") if name == "psnr" else None
    spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{column[name]:.2f}{spread}" if name == "psnr" else f"{column[name]:.4f}"


def _scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Flat names: `psnr` of the pair, `quantized/colour`, `paired_round_to_nearest/psnr`."""
    flat = {}
    for part in [*MODELS, "paired", "paired_round_to_nearest"]:
        prefix = "" if part == "paired" else f"{part}/"
        for name, value in result.get(part, {}).items():
            if isinstance(value, float):
                flat[f"{prefix}{name}"] = value
    return flat


def _definitions(result: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """What the numbers of `result` mean."""
    named = {name for part in result.values() if isinstance(part, Mapping) for name in part}
    return {name: text for name, text in known.items() if name in named}


def _pair(model: str) -> str:
    return "paired" if model == "quantized" else f"paired_{model}"


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def _check_samples(samples: Mapping[str, Tensor], prompt: str) -> None:
    shapes = {name: list(sample.shape) for name, sample in samples.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ConfigError(
            f"The samples of {prompt!r} differ in shape: {shapes}. Sample all models with the same "
            "frames, height and width."
        )
    for name, sample in samples.items():
        if not bool(sample.isfinite().all()):
            raise NumericsError(
                f"The {name} sample of {prompt!r} holds NaN or Inf. Check the scales of the "
                "quantised layers, or sample in a wider dtype."
            )
