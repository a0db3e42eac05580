"""Paired evaluation: the same prompts and seeds, full precision against quantised.

The module's `validation_step` and `test_step` return {"prompt": list[str], "seed": list[int],
"full_precision": samples, "quantized": samples} and, if it made one, "round_to_nearest": samples;
samples are videos [batch, frames, 3, height, width] or pictures [batch, 3, height, width], in
[0, 1]. Pictures have no numbers of time.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from recon.callbacks.distribution import Comparison, Distribution, start
from recon.callbacks.evaluating import Evaluating
from recon.callbacks.evaluation_result import DEFINITIONS, MODELS, Row, pair, report, summarise
from recon.callbacks.gathering import gather_rows
from recon.callbacks.quality import (
    frame_similarity,
    lpips,
    lpips_unavailable,
    psnr,
    ssim,
    temporal_consistency,
    temporal_difference,
)
from recon.errors import ConfigError, NumericsError

Oracle = Callable[[Tensor, str], Mapping[str, bool]]
"""(video or picture, prompt) -> answers by name; empty where it cannot judge."""


def world_oracle(sample: Tensor, prompt: str) -> Mapping[str, bool]:
    """Answers of the embedded world's exact oracle; none for prompts of another world."""
    from recon.zoo.oracle import judge, judge_picture
    from recon.zoo.world import COLOURS, SHAPES, parse_prompt

    if sample.ndim == 4:
        return judge(sample, prompt) if parse_prompt(prompt) is not None else {}
    colour, _, shape = prompt.partition(" ")
    known = colour in COLOURS and shape in SHAPES
    return judge_picture(sample, colour, shape) if known else {}


class PairedMetrics(Evaluating):
    """Measures full-precision and quantised samples of the same prompts and seeds.

    Pictures are also compared with reference pictures: FID, KID, precision and recall. Writes
    `test.json` (or `validate.json`) into the run folder, logs the means and prints a table. What
    each number means is in the file, under `settings.definitions`.

    Args:
        oracle: Judges single samples, as a dotted path; null: none. `world_oracle` passes over
            prompts that are not of the embedded world.
        show: Print the table.
        distribution: Reference pictures and extractor of features; null: none of these numbers.
    """

    def __init__(
        self,
        oracle: Oracle | None = world_oracle,
        show: bool = True,
        distribution: Distribution | None = Distribution(),  # noqa: B008 - frozen: safe to share
    ) -> None:
        self.oracle = oracle
        self.show = show
        self.distribution = distribution
        self._rows: list[Row] = []
        self._lpips = lpips_unavailable()
        self._comparison: Comparison | str | None = None

    def begin(self, trainer: Trainer) -> None:
        """Reads or draws the reference pictures, while nothing has been sampled.

        Raises:
            ConfigError: They cannot be read, or are too few for the features.
        """
        self._rows = []
        if self.distribution is not None and not trainer.sanity_checking:
            source = getattr(trainer, "datamodule", None)
            requests: list[tuple[str, int]] = getattr(source, "evaluation_requests", list)()
            prompts = [prompt for prompt, _ in requests]
            self._comparison = start(self.distribution, prompts, trainer.strategy.root_device)

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """Measures the batch; the samples are not kept."""
        # Answers, a list, are another callback's.
        if isinstance(outputs, Mapping) and isinstance(outputs.get("quantized"), Tensor):
            self._rows += self.measure(outputs)
            if isinstance(self._comparison, Comparison):
                self._comparison.look({name: outputs[name] for name in MODELS if name in outputs})

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
                row[pair(name)] = self._paired(samples["full_precision"], samples[name])
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
            numbers["lpips"] = lpips(reference, sample)
        return numbers

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """Writes `validate.json` or `test.json`, logs and shows the means."""
        if trainer.sanity_checking:
            return
        rows = gather_rows(self._rows, module.device)
        if not rows:
            return
        result = summarise(rows)
        settings = {"lpips": self._lpips or "available", **self._compare(result)}
        report(trainer, module, verb, result, rows, settings, DEFINITIONS, show=self.show)

    def _compare(self, result: dict[str, Any]) -> dict[str, Any]:
        """Puts the numbers of the comparison into `result`; gives its settings."""
        if isinstance(self._comparison, Comparison):
            models = [name for name in MODELS if name in result]
            numbers, described = self._comparison.results(models)
            for name in models:
                result[name] |= numbers[name]
            return {"distribution": described}
        of_videos = "frame_similarity" in result["quantized"]
        return {} if self._comparison is None or of_videos else {"distribution": self._comparison}


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
