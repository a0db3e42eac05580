"""Text-to-video: the calibration set of a run, and the prompts it is evaluated on."""

from typing import Any, Literal

from recon.calibration.selection import SalientSelection
from recon.datamodules.candidates import Branches
from recon.datamodules.prompts import draw, noise_seed, read_prompts, world_prompts
from recon.datamodules.sampled import Request, SampledCalibration
from recon.errors import ConfigError
from recon.models.adapter import ModelAdapter

__all__ = ["SalientSelection", "VideoCalibration"]


class VideoCalibration(SampledCalibration):
    """Calibration samples chosen from the teacher's own sampling, and evaluation prompts.

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
        baselines: Folder that keeps what the teacher and round-to-nearest sample in an evaluation,
            for other runs to compare with; null: sampled anew every time.

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
        baselines: str | None = None,
    ) -> None:
        super().__init__()
        self.prompts, self.prompt_column, self.num_prompts = prompts, prompt_column, num_prompts
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.rule = sds
        self.branches = branches
        self.held_out_prompts, self.held_out_samples = held_out_prompts, held_out_samples
        self.test_prompts, self.num_test_prompts = test_prompts, num_test_prompts
        self.test_seed, self.test_batch_size = test_seed, test_batch_size
        self.folder, self.stale, self.baselines = folder, stale, baselines
        self.num_trajectories, self.held_out_trajectories = num_prompts, held_out_prompts
        self._refuse_small(
            {
                "num_prompts": 1,
                "held_out_prompts": 0,
                "held_out_samples": 1,
            }
        )
        if num_test_prompts is not None and num_test_prompts < 1:
            raise ConfigError(
                "VideoCalibration.num_test_prompts must be at least 1, or null, got "
                f"{num_test_prompts}."
            )

    def check(self, adapter: ModelAdapter) -> None:
        """As the base; and calibration and evaluation must share no prompt.

        Raises:
            ConfigError: A prompt file is missing, empty or too short; calibration and evaluation
                share a prompt; top_k does not fit the pool.
            CapabilityMissing: The adapter cannot give what `sds.source` scores.
        """
        super().check(adapter)
        shared = {*self.calibration_prompts()} & {p for p, _ in self.evaluation_requests()}
        if shared:
            raise ConfigError(
                f"{len(shared)} prompts serve both calibration and evaluation, such as "
                f"{min(shared)!r}. Evaluate on prompts that were not calibrated on: change "
                "prompts or test_prompts."
            )

    def calibration_prompts(self) -> list[str]:
        """Prompts of the file, or of the embedded world, drawn by `seed`.

        Raises:
            ConfigError: The file is missing, empty or too short.
        """
        count = self.num_prompts + self.held_out_prompts
        if self.prompts is None:
            return world_prompts("train", count, self.seed)
        pool = read_prompts(self.prompts, self.prompt_column, "prompts")
        if count > len(pool):
            raise ConfigError(
                f"prompts is {self.prompts!r} with {len(pool)} prompts, but num_prompts "
                f"{self.num_prompts} and held_out_prompts {self.held_out_prompts} need "
                f"{count}. Lower them or add prompts."
            )
        return draw(pool, count, self.seed)

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
        """As the base, and where the prompts come from."""
        return {
            **super().evaluation_settings(),
            "test_prompts": self.test_prompts or "embedded world",
        }

    def settings(self) -> dict[str, str | int | float | None]:
        """Numbers of prompts."""
        return {"num_prompts": self.num_prompts, "held_out_prompts": self.held_out_prompts}
