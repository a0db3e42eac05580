"""Streams the teacher's sampling: two numbers per candidate are kept, the tensors go to disk."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from recon.calibration.artefact import require_finite
from recon.calibration.selection import (
    SalientSelection,
    gram_norm,
    latent_change,
    sketch,
)
from recon.errors import BudgetError, CalibrationError, CapabilityMissing, ConfigError
from recon.models.adapter import ModelAdapter
from recon.models.video_pipeline import Visit
from recon.types import Sample

Branches = Literal["conditional", "both"]


class Sampler(Protocol):
    """What is needed of a pipeline here; `VideoPipeline` has it."""

    def trajectory(
        self, prompt: str, seed: int, steps: int, guidance: float, visit: Visit
    ) -> Tensor:
        """Sample once and show every call of the network."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """One prompt to sample."""

    index: int
    """Place among all prompts of the run; names the files."""
    prompt: str
    seed: int
    keep: Collection[int]
    """Steps whose samples are written to disk."""


class Candidates:
    """Scores the steps of trajectories and spills their samples into a folder.

    One step's tensors are in memory at a time, and one more latent to measure the change. What
    does not change between the steps of a prompt (the text) is written once per prompt.

    Args:
        adapter: The teacher's adapter: patch size, and the embedders for `hidden_patch_embed`.
        rule: How candidates are scored.
        branches: Rows of a guided call that a sample keeps.
        folder: Where samples are spilled.
        steps: Sampling steps of each trajectory.
        expected: Samples that all ranks together will spill, for the disk check.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        rule: SalientSelection,
        branches: Branches,
        folder: Path,
        steps: int,
        expected: int,
    ) -> None:
        self.adapter = adapter
        self.rule = rule
        self.branches = branches
        self.folder = folder
        self.steps = steps
        self.expected = expected

    def run(
        self, sampler: Sampler, trajectory: Trajectory, guidance: float
    ) -> tuple[Tensor, Tensor | None]:
        """Sample one prompt.

        Returns:
            C_diff and C_quant of each step, float64 [steps, 2] (the change of step 0 is 0), and
            sketches [steps, features] if the rule asks for diversity.

        Raises:
            BudgetError: The disk has no room for the samples of all trajectories.
            CalibrationError: The pipeline made another number of network calls than steps.
            NumericsError: A tensor holds NaN or Inf; names prompt and step.
        """
        scores: list[Tensor] = []
        sketches: list[Tensor] = []
        base: Sample = {}
        previous: Tensor | None = None

        def visit(step: int, call: Sample) -> None:
            nonlocal previous
            sample = self._rows(call)
            require_finite(sample, trajectory.prompt, step)
            if step == 0:
                base.update({name: tensor.detach().clone() for name, tensor in sample.items()})
                _save(self._base_file(trajectory.index), base)
            # A copy: the pipeline may reuse the memory of its latent.
            tokens = self.tokens(sample).detach().clone()
            change = tokens.new_zeros(()) if previous is None else latent_change(tokens, previous)
            scores.append(torch.stack([change.double(), gram_norm(tokens, self.rule.norm)]).cpu())
            if self.rule.diversity != "none":
                sketches.append(sketch(tokens).cpu())
            if step in trajectory.keep:
                self._spill(trajectory.index, step, sample, base)
            previous = tokens

        sampler.trajectory(trajectory.prompt, trajectory.seed, self.steps, guidance, visit)
        if len(scores) != self.steps:
            raise CalibrationError(
                f"Sampling {trajectory.prompt!r} in {self.steps} steps called the network "
                f"{len(scores)} times. Choose a scheduler of one call per step, such as DDIM."
            )
        return torch.stack(scores), torch.stack(sketches) if sketches else None

    def tokens(self, sample: Sample) -> Tensor:
        """x_t of the conditional branch, [tokens, channels]."""
        if self.rule.source == "latent":
            patch, patch_frames = patch_size(self.adapter)
            return patch_tokens(sample["hidden_states"][-1], patch, patch_frames)
        conditional = {name: tensor[-1:] for name, tensor in sample.items()}
        state = self.adapter.embed(conditional, sample["hidden_states"].device)
        streams = self.adapter.token_streams(state)
        # Text tokens are the same at every step; they would only dilute the change.
        wanted = streams.get("video", streams.get("image", slice(None)))
        return self.adapter.tokens(state)[0, wanted]

    def sample(self, index: int, step: int) -> Sample:
        """A spilled sample, on the CPU."""
        from safetensors.torch import load_file

        own = load_file(self._step_file(index, step))
        return {**load_file(self._base_file(index)), **own}

    def _rows(self, call: Sample) -> Sample:
        rows = 1 if self.branches == "conditional" else 2
        if call["hidden_states"].shape[0] < rows:
            raise ConfigError(
                "branches is both, but the pipeline runs no unconditional branch. Set guidance "
                "above 1, or branches: conditional."
            )
        return {name: tensor[-rows:] for name, tensor in call.items()}

    def _spill(self, index: int, step: int, sample: Sample, base: Sample) -> None:
        own = {k: t for k, t in sample.items() if step == 0 or not torch.equal(t, base[k])}
        # Also where nothing changed, so that a missing file is never a valid sample.
        own = own or {"hidden_states": sample["hidden_states"]}
        bytes_each = sum(tensor.nbytes for tensor in own.values())
        free = shutil.disk_usage(self.folder).free
        left = self.expected - sum(1 for _ in self.folder.glob("*step*"))
        if bytes_each * left > free:
            raise BudgetError(
                f"{left} candidates of {bytes_each} bytes each are still to be written to "
                f"{self.folder}, where {free} bytes are free. Free space, set "
                "trainer.default_root_dir to another disk, or lower num_prompts or steps."
            )
        _save(self._step_file(index, step), own)

    def _base_file(self, index: int) -> Path:
        return self.folder / f"prompt{index:04d}.safetensors"

    def _step_file(self, index: int, step: int) -> Path:
        return self.folder / f"prompt{index:04d}_step{step:04d}.safetensors"


def patch_size(adapter: ModelAdapter) -> tuple[int, int]:
    """Side of a patch, latent pixels, and its frames.

    Raises:
        CapabilityMissing: The network's config names no patch size.
    """
    patch = adapter.config.get("patch_size")
    frames = adapter.config.get("patch_size_t") or 1
    if isinstance(patch, list | tuple) and len(patch) == 3:
        frames, patch = patch[0], patch[-1]
    if not isinstance(patch, int) or not isinstance(frames, int):
        raise CapabilityMissing(
            f"sds.source is latent, which cuts x_t into the network's patches, but patch_size is "
            f"{patch!r} in the config of {type(adapter).__name__}. Set sds.source: "
            "hidden_patch_embed."
        )
    return patch, frames


def patch_tokens(latent: Tensor, patch: int, patch_frames: int = 1) -> Tensor:
    """The latent as the tokens a diffusion transformer reads: [tokens, patch values].

    Args:
        latent: [frames, channels, height, width], or [channels, height, width] of a picture.
        patch: Side of a patch, latent pixels.
        patch_frames: Frames of a patch.

    Raises:
        ConfigError: The latent does not divide into patches.
    """
    video = latent if latent.ndim == 4 else latent[None]
    frames, channels, height, width = video.shape
    if height % patch or width % patch or frames % patch_frames:
        raise ConfigError(
            f"A latent of {frames} frames of {height} x {width} does not divide into patches of "
            f"{patch_frames} x {patch} x {patch}. Check patch_size in the network's config.json."
        )
    cut = video.reshape(
        frames // patch_frames,
        patch_frames,
        channels,
        height // patch,
        patch,
        width // patch,
        patch,
    )
    # [f', pf, c, h', p, w', p] -> [f', h', w', pf, c, p, p]: one row per patch
    return cut.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, patch_frames * channels * patch * patch)


def _save(path: Path, tensors: Sample) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
