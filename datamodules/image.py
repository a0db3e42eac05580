"""Class-conditional images: the calibration set of a run, and the classes it is evaluated on."""

import random
from dataclasses import replace
from typing import Any, Literal, cast

from recon.calibration.selection import SalientSelection, pool_size
from recon.datamodules.candidates import Branches
from recon.datamodules.prompts import noise_seed
from recon.datamodules.sampled import Request, SampledCalibration
from recon.errors import ConfigError
from recon.models.adapter import ModelAdapter
from recon.models.capabilities import SamplesClasses, missing_attributes

Select = Literal["stratified", "salient", "both"]


class ImageCalibration(SampledCalibration):
    """Calibration samples spread over classes and steps, or the most salient ones, or both.

    Args:
        select: `stratified` over classes and steps (PTQ4DiT); `salient`: the rule `sds`, over all
            steps of all trajectories (S²Q-VDiT); `both`: the most salient of each stretch of
            steps, none of which may give more than its share.
        timesteps: Distinct steps, or stretches of them, from the first to the last.
        samples_per_timestep: Samples at each. Source: 32 at 25 timesteps, PTQ4DiT.
        num_trajectories: Images sampled for candidates, each of another class as long as there are
            some, each from noise of its own; null: one per sample, as PTQ4DiT.
        classes: Names or numbers of the classes; null: all that the folder names.
        steps: Sampling steps, in calibration and evaluation. Source: 50 to 250, PTQ4DiT.
        guidance: Scale of classifier-free guidance. Source: 1.5, PTQ4DiT.
        seed: Draws classes, noise and held-out samples.
        sds: The rule of `salient` and `both`; its top_k and quotas follow from the arguments above.
        branches: What a sample keeps of a guided call: `both` rows, as PTQ4DiT, or the
            `conditional` one.
        held_out_trajectories: Further images, for samples that nothing is trained on.
        held_out_samples: Samples drawn from them, spread evenly over the steps.
        num_test_images: Images of validation, test and prediction; classes take turns.
        test_seed: Draws their noise.
        test_batch_size: Images per evaluation batch.
        folder: Where the set is kept; null: `calibration` in the run folder. Runs that share a
            folder share the set.
        stale: What to do with a set in that folder that was made for another configuration or
            teacher, or is damaged: refuse it, or build a new one in its place.
        baselines: Folder that keeps what the teacher and round-to-nearest sample in an evaluation,
            for other runs to compare with; null: sampled anew every time.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        select: Select = "stratified",
        timesteps: int = 25,
        samples_per_timestep: int = 32,
        num_trajectories: int | None = None,
        classes: list[int | str] | None = None,
        steps: int = 50,
        guidance: float = 1.5,
        seed: int = 0,
        sds: SalientSelection = SalientSelection(),  # noqa: B008 - frozen, so safe to share
        branches: Branches = "both",
        held_out_trajectories: int = 8,
        held_out_samples: int = 16,
        num_test_images: int = 96,
        test_seed: int = 0,
        test_batch_size: int = 24,
        folder: str | None = None,
        stale: Literal["refuse", "rebuild"] = "refuse",
        baselines: str | None = None,
    ) -> None:
        super().__init__()
        count = timesteps * samples_per_timestep
        self.select, self.timesteps = select, timesteps
        self.samples_per_timestep, self.classes = samples_per_timestep, classes
        self.num_trajectories = count if num_trajectories is None else num_trajectories
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.branches = branches
        self.held_out_trajectories = held_out_trajectories
        self.held_out_samples = held_out_samples
        self.num_test_images, self.test_seed = num_test_images, test_seed
        self.test_batch_size, self.folder, self.stale = test_batch_size, folder, stale
        self.baselines = baselines
        self._refuse_small(
            {
                "timesteps": 2,
                "samples_per_timestep": 1,
                "num_trajectories": 1,
                "held_out_trajectories": 0,
                "held_out_samples": 1,
                "num_test_images": 1,
            }
        )
        self.rule = _rule(select, sds, count, timesteps, samples_per_timestep)
        self._names: list[str] = []

    def check(self, adapter: ModelAdapter) -> None:
        """As the base; reads the names of the classes and the headers of the VAE.

        Raises:
            ConfigError: `classes` is empty or names a class that the folder does not have; the
                samples exceed the candidates; the sampler cannot take the steps.
            WeightsError: The VAE's weights are missing or damaged.
            CapabilityMissing: The adapter cannot give what `sds.source` scores.
        """
        self._names = self._classes(adapter)
        self._sampled(adapter).check_sampling(self.steps)
        pool = pool_size(self.rule, self.num_trajectories, self.steps)
        if self.rule.top_k > pool:
            raise ConfigError(
                f"data.timesteps {self.timesteps} times data.samples_per_timestep "
                f"{self.samples_per_timestep} are {self.rule.top_k} samples, but "
                f"data.num_trajectories {self.num_trajectories} of {self.steps} steps give only "
                f"{pool} candidates. Lower samples_per_timestep, or raise num_trajectories."
            )
        super().check(adapter)

    @staticmethod
    def _sampled(adapter: ModelAdapter) -> SamplesClasses:
        if not isinstance(adapter, SamplesClasses):
            raise ConfigError(
                f"ImageCalibration samples classes, which {type(adapter).__name__} does not have "
                f"(it lacks {', '.join(missing_attributes(adapter, SamplesClasses))}). Use DiT, or "
                "the data module of the adapter's family."
            )
        return adapter

    def _classes(self, adapter: ModelAdapter) -> list[str]:
        known = self._sampled(adapter).class_names()
        if self.classes is None:
            return list(known)
        if not self.classes:
            raise ConfigError("data.classes is empty. Name at least one class, or null for all.")
        unknown = [c for c in self.classes if str(c) not in {*known, *map(str, known.values())}]
        if unknown:
            raise ConfigError(
                f"data.classes holds {unknown[0]!r}, which is none of the {len(known)} classes of "
                f"{adapter.folder}, such as {next(iter(known))!r}. Give their names or numbers."
            )
        by_number = {str(number): name for name, number in known.items()}
        return [by_number.get(str(c), str(c)) for c in self.classes]

    @property
    def _known(self) -> list[str]:
        if not self._names:  # an evaluation in its own process
            assert self.trainer is not None
            self._names = self._classes(cast(ModelAdapter, self.trainer.lightning_module.adapter))
        return self._names

    def calibration_prompts(self) -> list[str]:
        """Names of classes, in shuffled rounds, so that all come equally often."""
        count = self.num_trajectories + self.held_out_trajectories
        rng = random.Random(self.seed)
        chosen: list[str] = []
        while len(chosen) < count:
            chosen += rng.sample(self._known, len(self._known))
        return chosen[:count]

    def evaluation_requests(self) -> list[Request]:
        """Classes in turn, each image from noise of its own that calibration never saw."""
        names = self._known
        return [
            (names[i % len(names)], noise_seed("evaluation", self.test_seed, i))
            for i in range(self.num_test_images)
        ]

    def sampling_settings(self) -> dict[str, Any]:
        """As the base; and how the adapter samples."""
        assert self.trainer is not None
        adapter = cast(ModelAdapter, self.trainer.lightning_module.adapter)
        return {**super().sampling_settings(), **self._sampled(adapter).sampling_settings()}

    def settings(self) -> dict[str, str | int | float | None]:
        """Numbers of trajectories, and how samples are spread."""
        return {
            "select": self.select,
            "num_trajectories": self.num_trajectories,
            "held_out_trajectories": self.held_out_trajectories,
        }


def _rule(
    select: Select, sds: SalientSelection, count: int, timesteps: int, each: int
) -> SalientSelection:
    """The switches of `sds` for one of the three ways to select."""
    if select == "stratified":
        return replace(
            sds, metric="stratified", top_k=count, timesteps=timesteps, quota="none",
            diversity="none", first_step="zero",
        )  # fmt: skip
    if select == "salient":
        return replace(sds, top_k=count)
    return replace(sds, top_k=count, quota="per_step_bin", quota_bins=timesteps, quota_max=each)
