"""Generated pictures against reference pictures, as distributions of a network's features."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.callbacks.gathering import gather_tensor
from recon.callbacks.inception import Inception, inception_unavailable
from recon.callbacks.manifold import NEIGHBOURS, precision_and_recall
from recon.callbacks.reference import drawn_pictures, of_the_world, picture_files, read_pictures
from recon.errors import ConfigError, NumericsError


@dataclass(frozen=True)
class Distribution:
    """With what generated pictures are compared, and how.

    Raises:
        ConfigError: A number is out of range.
    """

    reference: str | None = None
    """Folder of pictures of the generated ones' size, searched with its subfolders. null: freshly
    drawn scenes, where all evaluated classes are the embedded world's."""
    extractor: Callable[[], nn.Module] | None = None
    """Makes the network whose features are compared: pictures [batch, 3, height, width] in [0, 1]
    to [batch, features]. null: Inception for a folder, the world's classifier for its scenes."""
    drawn: int = 960
    """Scenes drawn where `reference` is null; of a folder, all pictures count."""
    kid_subsets: int = 100
    """Subsets that KID is the mean of. Source: Bińkowski et al. (arXiv 1801.01401)."""
    kid_subset_size: int = 48
    """Pictures in each, for evaluations as small as the default one; 1000 is usual with Inception
    and 10,000 pictures or more."""
    neighbours: int = NEIGHBOURS
    """Neighbours that precision and recall look at."""
    seed: int = 424242
    """Draws the scenes, which nothing was trained on, and the subsets."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        least = {"drawn": 2, "kid_subsets": 1, "kid_subset_size": 2, "neighbours": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"metrics.distribution.{name} must be at least {low}, got "
                    f"{getattr(self, name)}."
                )


def start(
    settings: Distribution, prompts: Sequence[str], device: torch.device
) -> "Comparison | str":
    """A comparison that waits for the pictures of `prompts`, or why there can be none.

    Raises:
        ConfigError: The reference cannot be read, or is too small for the features.
    """
    if settings.reference is not None:
        missing = inception_unavailable() if settings.extractor is None else None
        if missing is not None:
            return (
                f"not computed: {missing}. Get it, or name another metrics.distribution.extractor"
            )
        network = (settings.extractor or Inception)()
        pictures = read_pictures(picture_files(Path(settings.reference)))
    elif of_the_world(prompts):
        from recon.zoo.classifier_network import load

        network = (settings.extractor or load)()
        pictures = drawn_pictures(prompts, settings.drawn, settings.seed)
    else:
        return "not computed: metrics.distribution.reference names no folder of reference pictures"
    return Comparison(settings, network, pictures, device)


class Comparison:
    """Features of reference pictures, and of the pictures of one evaluation as they come.

    Each generated picture goes through the network alone, so that no number depends on the batch
    size or on the number of processes.

    Args:
        settings: How to compare.
        network: The extractor.
        pictures: Batches of the reference, [batch, 3, height, width] in [0, 1].
        device: Where the extractor runs, and where processes can send from.

    Raises:
        ConfigError: No more reference pictures than features; or the extractor's are no matrix.
        NumericsError: A feature is NaN or Inf.
    """

    def __init__(
        self,
        settings: Distribution,
        network: nn.Module,
        pictures: Iterable[Tensor],
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.network = network.to(device).eval()
        self._generated: dict[str, list[Tensor]] = {}
        self._shape = torch.Size()
        found = []
        for batch in pictures:
            self._shape = batch.shape[1:]
            found.append(self._features(batch))
        self.reference = torch.cat(found)
        """Features of the reference, float64 [pictures, features] on the CPU."""
        count, features = self.reference.shape
        if count <= features:
            raise ConfigError(
                f"The reference has {count} pictures, but the extractor {self._name} gives "
                f"{features} features, whose covariance needs more pictures than that. Give more "
                "pictures (metrics.distribution.reference, or drawn) or an extractor of fewer "
                "features."
            )

    @property
    def _name(self) -> str:
        return f"{type(self.network).__module__}.{type(self.network).__qualname__}"

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        features = self.network(pictures.float().to(self.device)).double().cpu()
        if features.ndim != 2 or len(features) != len(pictures):
            raise ConfigError(
                f"The extractor {self._name} made {list(features.shape)} of pictures "
                f"{list(pictures.shape)}; it must give [batch, features]. Flatten or pool them."
            )
        if not bool(features.isfinite().all()):
            raise NumericsError(
                f"The extractor {self._name} gave NaN or Inf. Check its weights, and that it takes "
                "pictures in [0, 1]."
            )
        return features

    def look(self, models: Mapping[str, Tensor]) -> None:
        """Take in a batch of generated pictures [batch, 3, height, width] of each model.

        Raises:
            ConfigError: They are videos, or not of the reference's size.
        """
        for name, pictures in models.items():
            if pictures.shape[1:] != self._shape:
                raise ConfigError(
                    f"The samples have the shape {list(pictures.shape[1:])}, the reference "
                    f"pictures {list(self._shape)}. Crop and resize the reference to the size of "
                    "the samples, or set metrics.distribution to null."
                )
            kept = self._generated.setdefault(name, [])
            kept += [self._features(picture[None])[0] for picture in pictures]

    def results(self, models: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Numbers of each model, None where one is left out; and what they depend on.

        All ranks call this.
        """
        features = self.reference.shape[1]
        none = self.reference.new_empty(0, features)
        generated = {}
        for name in models:
            kept = self._generated.get(name)
            generated[name] = gather_tensor(torch.stack(kept) if kept else none, self.device)
        count = min(map(len, generated.values()))
        left_out = self._left_out(count)
        settings = self.settings
        described = {
            "extractor": self._name,
            "features": features,
            "reference": settings.reference or "drawn scenes of the embedded world",
            "reference_count": len(self.reference),
            "generated_count": count,
            "kid_subsets": settings.kid_subsets,
            "kid_subset_size": settings.kid_subset_size,
            "neighbours": settings.neighbours,
            "seed": settings.seed,
            "left_out": left_out,
        }
        return {name: self._numbers(rows, left_out) for name, rows in generated.items()}, described

    def _left_out(self, count: int) -> dict[str, str]:
        """Why a number cannot be had from `count` generated pictures, by name."""
        features = self.reference.shape[1]
        fewer = min(count, len(self.reference))
        reasons = {}
        if count <= features:
            reasons["fid"] = (
                f"{count} generated pictures; a covariance of {features} features needs more than "
                f"{features}. Raise data.num_test_images"
            )
        if fewer < self.settings.kid_subset_size:
            reasons["kid"] = (
                f"{fewer} pictures; subsets have {self.settings.kid_subset_size}. Lower "
                "metrics.distribution.kid_subset_size or raise data.num_test_images"
            )
        if fewer <= self.settings.neighbours:
            reasons["precision"] = reasons["recall"] = (
                f"{fewer} pictures; {self.settings.neighbours} neighbours need more. Raise "
                "data.num_test_images"
            )
        return reasons

    def _numbers(self, generated: Tensor, left_out: Mapping[str, str]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        settings = self.settings
        if "fid" not in left_out:
            numbers["fid"] = frechet_distance(generated, self.reference)
        if "kid" not in left_out:
            numbers["kid"], numbers["kid_std"] = kernel_distance(
                generated,
                self.reference,
                subsets=settings.kid_subsets,
                subset_size=settings.kid_subset_size,
                seed=settings.seed,
            )
        if "precision" not in left_out:
            count = min(len(generated), len(self.reference))
            generator = torch.Generator().manual_seed(settings.seed)
            ours, theirs = (
                points[torch.randperm(len(points), generator=generator)[:count]]
                for points in (generated, self.reference)
            )
            both = precision_and_recall(ours, theirs, settings.neighbours)
            numbers["precision"], numbers["recall"] = both
        return numbers | dict.fromkeys(left_out)


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features, float64 [pictures, features], as torchmetrics has.

    Source: Heusel et al. (arXiv 1706.08500), eq. 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    with torch.random.fork_rng(devices=[]):  # it counts the features of a random input
        metric = FrechetInceptionDistance(
            feature=nn.Identity(),
            normalize=True,
            input_img_size=reference.shape[1:],
            sync_on_compute=False,  # every rank has all features
        )
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def kernel_distance(
    generated: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Kernel distance of two sets of features [pictures, features], as torchmetrics has it.

    Returns:
        Mean and standard deviation over subsets drawn from `seed`.

    Source: Bińkowski et al. (arXiv 1801.01401), section 3.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
        metric.update(reference, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)
