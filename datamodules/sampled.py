"""What every calibration set drawn from a pipeline's own sampling has in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from recon.calibration import ranks
from recon.calibration.artefact import Fingerprint
from recon.calibration.selection import UNSCORED, SalientSelection, check_selection
from recon.datamodules.candidates import Branches, patch_size
from recon.datamodules.kept import KeptCalibration
from recon.datamodules.prompts import text_hash
from recon.datamodules.salient import Plan, build
from recon.engine.data import Sampling
from recon.errors import ConfigError
from recon.models.adapter import ModelAdapter

Request = tuple[str, int]
"""What to sample, in words, and the seed of its noise."""


class SampledCalibration(KeptCalibration):
    """A set chosen from the full-precision pipeline's own sampling, kept on disk, used again.

    `setup("fit")` samples the pipeline, scores every (prompt, step), keeps what the rule chooses
    and writes it to `<run folder>/calibration`, where a later run with the same fingerprint finds
    it. Prompts are dealt over the ranks; the choice is the same for any number of them. The engine
    reads `calibration_set` and makes its own training batches; validation, test and prediction get
    batches of prompts and seeds. A prompt is whatever the pipeline samples by: a text, or the name
    of a class.

    Subclasses set the attributes below and say which prompts there are.
    """

    seed: int
    """Draws prompts, noise and held-out samples."""
    rule: SalientSelection
    """How samples are chosen."""
    branches: Branches
    """Rows of a guided call that a sample keeps."""
    num_trajectories: int
    """Prompts that candidates come from."""
    held_out_trajectories: int
    """Further prompts, for samples that nothing is trained on."""
    held_out_samples: int
    test_seed: int
    test_batch_size: int

    @abstractmethod
    def calibration_prompts(self) -> list[str]:
        """What is sampled for calibration: `num_trajectories`, then `held_out_trajectories`."""

    @abstractmethod
    def evaluation_requests(self) -> list[Request]:
        """Prompts and seeds of validation, test and prediction, in order."""

    @abstractmethod
    def settings(self) -> dict[str, str | int | float | None]:
        """What a set depends on beside the rule, the prompts and the teacher; for fingerprints."""

    # Before anything heavy

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse prompts and settings that the run would stumble over later.

        Raises:
            ConfigError: Prompts are missing or too few; the rule wants more samples than there
                are candidates.
            CapabilityMissing: The adapter cannot give what the rule scores.
        """
        check_selection(self.rule, self.num_trajectories, self.steps)
        if self.rule.source == "latent":
            patch_size(adapter)
        self.plan()
        self.evaluation_requests()

    def plan(self) -> Plan:
        """What calibration will sample, and where each number comes from."""
        chosen = self.calibration_prompts()
        return Plan(
            calibration=tuple(chosen[: self.num_trajectories]),
            held_out=tuple(chosen[self.num_trajectories :]),
            held_out_samples=self.held_out_samples,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            branches=self.branches,
            rule=self.rule,
        )

    def evaluation_settings(self) -> dict[str, Any]:
        """What an evaluation's numbers depend on, for its report."""
        texts = [prompt for prompt, _ in self.evaluation_requests()]
        return {
            **self.sampling_settings(),
            "test_seed": self.test_seed,
            "prompts": len(texts),
            "prompts_sha256": text_hash(texts),
        }

    # The calibration set

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        """Calibration samples, held-out samples, and the batch size of each."""
        return self.rule.top_k, self.held_out_samples, 2 if self.branches == "both" else 1

    @property
    def sampling(self) -> Sampling:
        """Every step of every prompt; steps are all spilled where scores choose among them."""
        pool = self.num_trajectories * self.steps
        scored = self.rule.metric not in UNSCORED or self.rule.diversity != "none"
        return Sampling(
            calls=pool + self.held_out_trajectories * self.steps,
            rows=2 if self.guidance > 1 else 1,
            spilled=(pool if scored else self.rule.top_k) + self.held_out_samples,
            scored=pool,
        )

    def build_set(
        self, folder: Path, adapter: ModelAdapter, fingerprint: Fingerprint, device: torch.device
    ) -> None:
        """See `KeptCalibration.build_set`.

        Raises:
            ConfigError: The run folder cannot be written.
            NumericsError: The teacher's sampling gave NaN or Inf.
        """
        build(folder, adapter, self.plan(), fingerprint, device)

    def fingerprint_of(
        self, adapter: ModelAdapter, device: torch.device
    ) -> dict[str, str | int | float | None]:
        """Settings, rule, prompts, teacher and its floating type."""
        plan, values = self.plan(), self.settings()
        values |= {name: getattr(self, name) for name in ("steps", "guidance", "seed", "branches")}
        values |= {f"sds.{name}": value for name, value in asdict(self.rule).items()}
        values |= {f"teacher.{name}": value for name, value in adapter.identity().items()}
        return values | {
            "held_out_samples": self.held_out_samples,
            "prompts": text_hash([*plan.calibration, *plan.held_out]),
            "dtype": str(adapter.compute_dtype(device)),
        }

    # Evaluation

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches {"prompt", "seed"}; none within fit, where sampling is not wanted."""
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

    def _refuse_small(self, least: Mapping[str, int]) -> None:
        """Refuse numbers below their least value, and held-out samples that cannot be drawn."""
        owner = type(self).__name__
        refuse = partial(f"{owner}.{{}} must be at least {{}}, got {{}}.".format)
        for name, low in {"seed": 0, "steps": 2, "test_seed": 0, "test_batch_size": 1}.items():
            if getattr(self, name) < low:
                raise ConfigError(refuse(name, low, getattr(self, name)))
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(refuse(name, low, value))
        if self.branches == "both" and self.guidance <= 1:
            raise ConfigError(
                f"{owner}.branches is both, but guidance {self.guidance} runs no "
                "unconditional branch. Set guidance above 1, or branches: conditional."
            )
        pool = self.held_out_trajectories * self.steps
        if self.held_out_samples > pool:
            raise ConfigError(
                f"{owner}.held_out_samples is {self.held_out_samples}, but "
                f"{self.held_out_trajectories} held-out prompts of {self.steps} steps give {pool}. "
                "Raise held_out_prompts or lower held_out_samples."
            )


def _collate(requests: list[Request]) -> dict[str, list[Any]]:
    return {"prompt": [prompt for prompt, _ in requests], "seed": [seed for _, seed in requests]}
