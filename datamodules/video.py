"""Text-to-video: the calibration set of a run, and the prompts it is evaluated on."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from recon.calibration import ranks
from recon.calibration.artefact import CalibrationSet
from recon.calibration.selection import SalientSelection, check_selection
from recon.datamodules.candidates import Branches, patch_size
from recon.datamodules.prompts import (
    draw,
    noise_seed,
    read_prompts,
    text_hash,
    world_prompts,
)
from recon.datamodules.salient import Plan, build
from recon.engine.data import CalibrationData
from recon.errors import CalibrationError, ConfigError
from recon.models.adapter import ModelAdapter

__all__ = ["SalientSelection", "VideoCalibration"]

Request = tuple[str, int]
"""A prompt and the seed of its noise."""


class VideoCalibration(CalibrationData):
    """Calibration samples chosen from the teacher's own sampling, and evaluation prompts.

    `setup("fit")` samples the full-precision pipeline on the calibration prompts, scores every
    (prompt, step), keeps the most salient and writes them to `<run folder>/calibration`, where a
    later run with the same fingerprint finds them. Prompts are dealt over the ranks; the choice
    is the same for any number of them. The engine reads `calibration_set` and makes its own
    training batches; validation, test and prediction get batches of prompts and seeds.

    Args:
        prompts: Text file with one prompt per line, or a `datasets` folder; null: the embedded
            world's calibration prompts. `seed` draws from them.
        prompt_column: Text column, where prompts or test_prompts is a `datasets` folder.
        num_prompts: Prompts that candidates come from. Source: the paper, 10 random prompts.
        steps: Sampling steps, in calibration and evaluation. Source: 50, inferred.
        guidance: Scale of classifier-free guidance; above 1 the network sees a batch of 2.
        seed: Draws prompts, noise and held-out samples.
        sds: How samples are chosen.
        branches: What a sample keeps of a guided call: the `conditional` row, or `both`
            (unconditional, conditional). The score reads the conditional row either way.
        held_out_prompts: Further prompts, for samples that nothing is trained on.
        held_out_samples: Samples drawn from them, spread evenly over the steps.
        test_prompts: As prompts, for validation, test and prediction; null: the embedded world's
            evaluation prompts, which are worded otherwise than the calibration ones.
        num_test_prompts: How many of them, from the first on; null: all of test_prompts (20 of
            the embedded world).
        test_seed: Draws the noise of evaluation videos, and the embedded world's prompts.
        test_batch_size: Prompts per evaluation batch.
        folder: Where the set is kept; null: `calibration` in the run folder. Runs that share a
            folder share the set: methods are compared on the same samples, sampled once.
        stale: What to do with a set in that folder that was made for another configuration or
            teacher, or is damaged: refuse it, or build a new one in its place.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        prompts: str | None = None,
        prompt_column: str = "prompt",
        num_prompts: int = 10,
        steps: int = 50,
        guidance: float = 6.0,
        seed: int = 0,
        sds: SalientSelection = SalientSelection(),  # noqa: B008 - frozen, so safe to share
        branches: Branches = "conditional",
        held_out_prompts: int = 2,
        held_out_samples: int = 16,
        test_prompts: str | None = None,
        num_test_prompts: int | None = 20,
        test_seed: int = 0,
        test_batch_size: int = 4,
        folder: str | None = None,
        stale: Literal["refuse", "rebuild"] = "refuse",
    ) -> None:
        super().__init__()
        self.prompts, self.prompt_column, self.num_prompts = prompts, prompt_column, num_prompts
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.sds: SalientSelection = sds
        self.branches: Branches = branches
        self.held_out_prompts, self.held_out_samples = held_out_prompts, held_out_samples
        self.test_prompts, self.num_test_prompts = test_prompts, num_test_prompts
        self.test_seed, self.test_batch_size = test_seed, test_batch_size
        self.folder, self.stale = folder, stale
        self._set: CalibrationSet | None = None
        self._check_numbers()

    # Before anything heavy

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse prompts and settings that the run would stumble over later.

        Raises:
            ConfigError: A prompt file is missing, empty or too short; calibration and evaluation
                share a prompt; top_k does not fit the pool.
            CapabilityMissing: The adapter cannot give what `sds.source` scores.
        """
        check_selection(self.sds, self.num_prompts, self.steps)
        if self.sds.source == "latent":
            patch_size(adapter)
        plan = self.plan()
        shared = {*plan.calibration, *plan.held_out} & {p for p, _ in self.evaluation_requests()}
        if shared:
            raise ConfigError(
                f"{len(shared)} prompts serve both calibration and evaluation, such as "
                f"{min(shared)!r}. Evaluate on prompts that were not calibrated on: change "
                "prompts or test_prompts."
            )

    def plan(self) -> Plan:
        """What calibration will sample, and where each number comes from."""
        count = self.num_prompts + self.held_out_prompts
        if self.prompts is None:
            chosen = world_prompts("train", count, self.seed)
        else:
            pool = read_prompts(self.prompts, self.prompt_column, "prompts")
            if count > len(pool):
                raise ConfigError(
                    f"prompts is {self.prompts!r} with {len(pool)} prompts, but num_prompts "
                    f"{self.num_prompts} and held_out_prompts {self.held_out_prompts} need "
                    f"{count}. Lower them or add prompts."
                )
            chosen = draw(pool, count, self.seed)
        return Plan(
            calibration=tuple(chosen[: self.num_prompts]),
            held_out=tuple(chosen[self.num_prompts :]),
            held_out_samples=self.held_out_samples,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            branches=self.branches,
            rule=self.sds,
        )

    def evaluation_requests(self) -> list[Request]:
        """Prompts and seeds of validation, test and prediction, in order.

        Raises:
            ConfigError: test_prompts is missing, empty or shorter than num_test_prompts.
        """
        if self.test_prompts is None:
            texts = world_prompts("evaluation", self.num_test_prompts or 20, self.test_seed)
        else:
            texts = read_prompts(self.test_prompts, self.prompt_column, "test_prompts")
            wanted = self.num_test_prompts or len(texts)
            if wanted > len(texts):
                raise ConfigError(
                    f"num_test_prompts is {wanted}, but test_prompts {self.test_prompts!r} holds "
                    f"{len(texts)}. Lower it, set it to null for all, or add prompts."
                )
            texts = texts[:wanted]
        return [(t, noise_seed("evaluation", self.test_seed, i)) for i, t in enumerate(texts)]

    def evaluation_settings(self) -> dict[str, Any]:
        """What an evaluation's numbers depend on, for its report."""
        texts = [prompt for prompt, _ in self.evaluation_requests()]
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "test_seed": self.test_seed,
            "test_prompts": self.test_prompts or "embedded world",
            "prompts": len(texts),
            "prompts_sha256": text_hash(texts),
        }

    # The calibration set

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        """Calibration samples, held-out samples, and the batch size of each."""
        return self.sds.top_k, self.held_out_samples, 2 if self.branches == "both" else 1

    @property
    def calibration_set(self) -> CalibrationSet:
        """The set that `setup("fit")` found or made.

        Raises:
            CalibrationError: `setup("fit")` has not run.
        """
        if self._set is None:
            raise CalibrationError(
                "The calibration set is not there before setup('fit'). Call setup first, or open "
                "a finished one with CalibrationSet.load(<run folder>/calibration)."
            )
        return self._set

    def setup(self, stage: str) -> None:
        """Find or make the calibration set in the run folder; nothing to do outside fit."""
        super().setup(stage)
        assert self.trainer is not None
        if stage == "fit" and self._set is None:
            adapter = cast(ModelAdapter, self.trainer.lightning_module.adapter)
            root = Path(self.trainer.default_root_dir)
            started = time.monotonic()
            self._set = self.calibrate(adapter, root, self.trainer.strategy.root_device)
            self.seconds = time.monotonic() - started

    def calibrate(self, adapter: ModelAdapter, root: Path, device: torch.device) -> CalibrationSet:
        """The set in `folder`, or `<root>/calibration`, made if not there. All ranks call this.

        Raises:
            ConfigError: As `check`; or the run folder cannot be written.
            CalibrationError: A set of another configuration or teacher is there, or a damaged
                one, and `stale` is refuse.
            NumericsError: The teacher's sampling gave NaN or Inf.
        """
        self.check(adapter)
        folder = root / "calibration" if self.folder is None else Path(self.folder)
        present = folder.exists()
        ranks.barrier()  # rank 0 must not finish a set before another has looked for it
        plan = self.plan()
        fingerprint = self._fingerprint(adapter, plan, device)
        if present:
            try:
                return CalibrationSet.load(folder, fingerprint)
            except CalibrationError:
                if self.stale == "refuse":
                    raise
        adapter.check()
        build(folder, adapter, plan, fingerprint, device)
        return CalibrationSet.load(folder, fingerprint)

    def _fingerprint(
        self, adapter: ModelAdapter, plan: Plan, device: torch.device
    ) -> dict[str, str | int | float | None]:
        values: dict[str, str | int | float | None] = {
            name: getattr(self, name)
            for name in ("num_prompts", "steps", "guidance", "seed", "branches")
        }
        values |= {f"sds.{name}": value for name, value in asdict(self.sds).items()}
        values |= {f"teacher.{name}": value for name, value in adapter.identity().items()}
        return values | {
            "held_out_prompts": self.held_out_prompts,
            "held_out_samples": self.held_out_samples,
            "prompts": text_hash([*plan.calibration, *plan.held_out]),
            "dtype": str(adapter.compute_dtype(device)),
        }

    # Evaluation

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches {"prompt", "seed"}; none within fit, where sampling videos is not wanted."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return self._requests_loader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches {"prompt", "seed"}, this rank's share."""
        return self._requests_loader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches {"prompt", "seed"}, this rank's share."""
        return self._requests_loader()

    def evaluation_batches(self) -> Iterator[dict[str, list[Any]]]:
        """What the evaluation loaders give, for use outside a loop of the trainer."""
        return iter(self._requests_loader())

    def _requests_loader(self) -> DataLoader[Any]:
        # The engine runs without Lightning's distributed sampler, so the shares are dealt here.
        share = self.evaluation_requests()[ranks.rank() :: ranks.world()]
        return DataLoader(
            share,  # type: ignore[arg-type] # a list is a dataset: it has length and items
            batch_size=self.test_batch_size,
            shuffle=False,
            collate_fn=_collate,
        )

    def _check_numbers(self) -> None:
        least: Mapping[str, int] = {
            "num_prompts": 1,
            "steps": 2,
            "seed": 0,
            "held_out_prompts": 0,
            "held_out_samples": 0,
            "test_seed": 0,
            "test_batch_size": 1,
        }
        refuse = partial("VideoCalibration.{} must be at least {}, got {}.".format)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(refuse(name, low, getattr(self, name)))
        if self.num_test_prompts is not None and self.num_test_prompts < 1:
            raise ConfigError(refuse("num_test_prompts", "1, or null", self.num_test_prompts))
        if self.branches == "both" and self.guidance <= 1:
            raise ConfigError(
                f"VideoCalibration.branches is both, but guidance {self.guidance} runs no "
                "unconditional branch. Set guidance above 1, or branches: conditional."
            )
        pool = self.held_out_prompts * self.steps
        if self.held_out_samples > pool:
            raise ConfigError(
                f"VideoCalibration.held_out_samples is {self.held_out_samples}, but "
                f"{self.held_out_prompts} held-out prompts of {self.steps} steps give {pool}. "
                "Raise held_out_prompts or lower held_out_samples."
            )


def _collate(requests: list[Request]) -> dict[str, list[Any]]:
    return {"prompt": [prompt for prompt, _ in requests], "seed": [seed for _, seed in requests]}
