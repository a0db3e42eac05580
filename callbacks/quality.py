"""Numbers of one sample, or of one pair of samples: [frames, 3, height, width] in [0, 1]."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

MAX_PSNR = 100.0
"""dB; identical videos have no finite PSNR, and one of them must not swallow the mean."""
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, which LPIPS reads; the heads on it come with torchmetrics."""


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of a pair, dB, at most MAX_PSNR."""
    error = float((one.double() - other.double()).square().mean())  # over all axes
    return min(MAX_PSNR, -10 * math.log10(error)) if error > 0 else MAX_PSNR


def ssim(one: Tensor, other: Tensor) -> float:
    """Structural similarity of a pair, mean over frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(one, other, data_range=1.0))


def lpips(one: Tensor, other: Tensor) -> float:
    """Learned perceptual distance of a pair, mean over frames; see `lpips_unavailable`."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    distance = learned_perceptual_image_patch_similarity(
        other.clamp(0, 1), one.clamp(0, 1), net_type="alex", normalize=True
    )
    return float(distance)


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
