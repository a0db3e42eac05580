"""Sampling class-conditional images through the stock parts of a diffusers folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from recon.errors import ConfigError
from recon.models.folder import read_json, require_class, require_folder
from recon.models.video_pipeline import Visit
from recon.models.weights import WeightStore, own_memory
from recon.types import Sample

Sampler = Literal["ddim", "ddpm"]
"""How noise is taken away: deterministically, or with fresh noise of the learned variance."""

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
"""Classes whose configuration describes the diffusion that either sampler reverses."""


class ImagePipeline:
    """A DiT, a VAE and a scheduler; every random number is fixed by one seed per image.

    Noise is drawn on the CPU, one generator per image for its start and all its steps, so that an
    image depends neither on the device nor on what else is sampled with it. Height and width are
    those of the network's config.

    Samplers, both with the schedule of the folder's `scheduler`:

    - `ddim`: as diffusers' DiTPipeline does it, whose latents these are bit for bit. A learned
      variance is not used.
    - `ddpm`: ancestral sampling with the learned variance, on timesteps evenly spaced from the
      last one to 0 (`timestep_spacing="linspace"`), which are those of DiT's respaced diffusion.
      Source: DiT (arXiv 2212.09748) as PTQ4DiT samples. `trailing` spacing is not offered:
      diffusers 0.42 ends it above timestep 0 (19 of 50 steps) and then adds noise to the result.

    DiTPipeline itself is not called, although its parts are: it has 1000 written into it as the
    null class, so that guidance fails for any other number of classes; it guides all channels; it
    drops the learned variance; and it gives the scheduler no generator.

    Args:
        folder: Pipeline folder; scheduler, VAE and names of classes are read from it.
        network: The DiTTransformer2DModel that denoises, on its device.
        dtype: Floating type of the VAE and the latents.
        device: Where to sample.
        sampler: See above.
        guided_channels: How many of the latent's channels guidance is applied to, the first ones;
            None: all, as DiTPipeline does. Source: 3 in the code of DiT, and so in PTQ4DiT's.
        vae: Folder of the AutoencoderKL; None: `vae` in the pipeline folder.
        beside: A pipeline of the same arguments whose VAE is used instead of a further copy.

    Raises:
        ConfigError: sampler is none of the two, or ddpm without a learned variance; more guided
            channels than the latent has; a description file is missing or of another class.
        WeightsError: The VAE's weights are missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        sampler: Sampler = "ddim",
        guided_channels: int | None = None,
        vae: str | Path | None = None,
        beside: "ImagePipeline | None" = None,
    ) -> None:
        self.folder = Path(folder)
        self.network = network
        self.dtype, self.device = dtype, torch.device(device)
        self.sampler = sampler
        self._check_sampler()
        channels = self.config.in_channels
        self.guided_channels = channels if guided_channels is None else guided_channels
        if not 1 <= self.guided_channels <= channels:
            raise ConfigError(
                f"guided_channels is {guided_channels}; the latents have {channels} channels, so "
                f"it must lie in [1, {channels}]. Use null for all of them, 3 as the original DiT."
            )
        self.scheduler = self._scheduler()
        self.names = _names_of_classes(self.folder / "model_index.json")
        """Number of each class by its name, and None for names of several classes."""
        self.vae: Any = beside.vae if beside is not None else self._vae(vae)

    @property
    def config(self) -> Any:
        """Configuration of the network."""
        return self.network.config

    def classes(self, labels: Sequence[int | str]) -> list[int]:
        """Numbers of classes given by name or by number.

        Names are those of `id2label` in model_index.json: a whole entry, or one of the synonyms
        that commas separate in it; or a number in digits.

        Raises:
            ConfigError: An unknown name, a name of several classes, or a number out of range.
        """
        numbers = [self._number(label) if isinstance(label, str) else label for label in labels]
        check_classes(torch.tensor(numbers, dtype=torch.long), self.config.num_embeds_ada_norm)
        return numbers

    def generate(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        batch_size: int = 1,
        visit: Visit | None = None,
    ) -> Tensor:
        """Images [labels, 3, height, width] in [0, 1], float32 on the CPU.

        Args:
            labels: What to sample, by name or by number.
            seeds: One per label.
            steps: Sampling steps.
            guidance: Scale of classifier-free guidance; none at 1 and below.
            batch_size: Labels at a time. The noise is the same for every size; kernels may round
                differently.
            visit: Gets the step and the sample that enters the network, for every call of it, batch
                after batch. With guidance its rows are those of the labels, then the same latents
                with the null class. Its tensors are the pipeline's: copy what is kept.

        Raises:
            ConfigError: There are not as many seeds as labels, or no labels; a label is unknown;
                the sampler cannot take that many steps.
        """
        batches = self._batches(labels, seeds, steps, guidance, batch_size, visit)
        return torch.cat([self._decoded(latents).float().cpu() for latents in batches])

    def latents(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        batch_size: int = 1,
        visit: Visit | None = None,
    ) -> Tensor:
        """Final latents [labels, channels, height, width], float32 on the CPU.

        As `generate`, without the VAE.

        Raises:
            ConfigError: As `generate`.
        """
        batches = self._batches(labels, seeds, steps, guidance, batch_size, visit)
        return torch.cat([latents.float().cpu() for latents in batches])

    def trajectory(
        self, label: int | str, seed: int, steps: int, guidance: float, visit: Visit
    ) -> Tensor:
        """Sample one latent image and show every call of the network.

        Args:
            label: What to sample.
            seed: Of the noise.
            steps: Sampling steps.
            guidance: Scale of classifier-free guidance; above 1 each call has a batch of 2,
                else of 1.
            visit: As for `generate`, but the conditional row comes last, as in VideoPipeline.

        Returns:
            The final latents, as `latents` gives them.
        """

        def turned(step: int, sample: Sample) -> None:
            visit(step, {name: tensor.flip(0) for name, tensor in sample.items()})

        return self.latents([label], [seed], steps, guidance, visit=turned)

    def _batches(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        batch_size: int,
        visit: Visit | None,
    ) -> Iterator[Tensor]:
        if not labels or len(seeds) != len(labels):
            raise ConfigError(
                f"{len(seeds)} seeds for {len(labels)} labels; each label needs its own seed, and "
                "there must be one label at least. Give two lists of one length."
            )
        check_steps(steps, self.sampler, self.scheduler.config.num_train_timesteps)
        numbers = self.classes(labels)
        for start in range(0, len(numbers), batch_size):
            rows = slice(start, start + batch_size)
            with _evaluating(self.network):
                latents = self._denoised(numbers[rows], seeds[rows], steps, guidance, visit)
            yield latents

    @torch.no_grad()
    def _denoised(
        self,
        numbers: list[int],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        visit: Visit | None,
    ) -> Tensor:
        config, count = self.config, len(numbers)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = [torch.randn(shape, generator=g, dtype=self.dtype) for g in generators]
        latents = torch.cat(noise).to(self.device)
        classes = torch.tensor(numbers, device=self.device)
        guided = guidance > 1
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, config.num_embeds_ada_norm)])
        self.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            sample = {
                "hidden_states": torch.cat([latents, latents]) if guided else latents,
                "timestep": timestep.to(self.device).expand(len(classes)),
                "class_labels": classes,
            }
            if visit is not None:
                visit(step, sample)
            predicted = self.network(**sample, return_dict=False)[0]
            if guided:
                predicted = self._guided(predicted[:count], predicted[count:], guidance)
            if self.sampler == "ddim":
                predicted = predicted[:, : config.in_channels]  # without the variance
            stepped = self.scheduler.step(predicted, timestep, latents, generator=generators)
            latents = stepped.prev_sample
        return latents

    def _guided(self, conditional: Tensor, null: Tensor, guidance: float) -> Tensor:
        """The null prediction moved towards the conditional one and beyond, in guided channels.

        All other channels, a learned variance among them, are those of the conditional one.
        """
        guided = slice(0, self.guided_channels)
        moved = null[:, guided] + guidance * (conditional[:, guided] - null[:, guided])
        return torch.cat([moved, conditional[:, self.guided_channels :]], dim=1)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(1 / self.vae.config.scaling_factor * latents).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def _check_sampler(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise ConfigError(
                f"sampler is {self.sampler!r}, which is none of {list(get_args(Sampler))}. Use "
                "ddim for what diffusers does, ddpm for DiT's own ancestral sampling."
            )
        channels = self.config.in_channels
        predicted = self.config.out_channels or channels
        if self.sampler == "ddpm" and predicted != 2 * channels:
            raise ConfigError(
                f"sampler ddpm needs a learned variance, that is {2 * channels} channels out of "
                f"the network for {channels} into it; this network puts out {predicted}. Use "
                "sampler ddim."
            )

    def _scheduler(self) -> Any:
        from diffusers import DDIMScheduler, DDPMScheduler

        file = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(file, type(self).__name__)
        require_class(file, config, SCHEDULERS, type(self).__name__)
        if self.sampler == "ddim":
            return DDIMScheduler.from_config(config)
        return DDPMScheduler.from_config(
            config, variance_type="learned_range", timestep_spacing="linspace"
        )

    def _vae(self, given: str | Path | None) -> Any:
        from diffusers import AutoencoderKL

        weights = checked_vae(self.folder, given)
        vae = AutoencoderKL.from_pretrained(
            weights.folder, variant=weights.variant, local_files_only=True, low_cpu_mem_usage=False
        )
        # Not vae.to(...): diffusers warns there of layers kept in float32, naming none.
        nn.Module.to(vae, self.device, self.dtype)
        return own_memory(vae).requires_grad_(False).eval()

    def _number(self, name: str) -> int:
        if name not in self.names and name.isdecimal():
            return int(name)
        if name not in self.names:
            raise ConfigError(
                f"{name!r} is none of the {len(self.names)} names in id2label of "
                f"{self.folder / 'model_index.json'}. Use one of them, or the number of the class."
            )
        number = self.names[name]
        if number is None:
            raise ConfigError(
                f"{name!r} names several classes in id2label of "
                f"{self.folder / 'model_index.json'}. Give the number of the one you mean."
            )
        return number


def checked_vae(pipeline: Path, given: str | Path | None) -> WeightStore:
    """The weights of the AutoencoderKL, whose headers alone are read.

    Args:
        pipeline: Pipeline folder.
        given: The VAE's own folder; None: `vae` in the pipeline folder.

    Raises:
        ConfigError: The folder or its description is missing or of another class.
        WeightsError: The weights are missing, cut short or damaged.
    """
    folder = pipeline / "vae" if given is None else Path(given).expanduser()
    if given is not None:
        require_folder(folder, "vae", "stabilityai/sd-vae-ft-mse")
    file = folder / "config.json"
    require_class(file, read_json(file, "ImagePipeline"), ("AutoencoderKL",), "ImagePipeline")
    weights = WeightStore(folder)
    weights.check()
    return weights


def check_steps(steps: int, sampler: Sampler, known: int) -> None:
    """Refuse counts that diffusers takes and samples wrongly.

    Args:
        steps: Sampling steps.
        sampler: See `ImagePipeline`.
        known: Timesteps the network was trained on.

    Raises:
        ConfigError: The sampler cannot take that many steps.
    """
    least = 2 if sampler == "ddpm" else 1
    if not least <= steps <= known:
        raise ConfigError(
            f"steps is {steps}; sampler {sampler} takes {least} to {known}, the timesteps "
            "the network was trained on. Choose such a number, 50 for instance."
        )
    if sampler == "ddim" and known % steps:
        nearest = sorted(
            (count for count in range(1, known + 1) if known % count == 0),
            key=lambda count: abs(count - steps),
        )[:3]
        raise ConfigError(
            f"steps is {steps}, which does not divide {known}: diffusers' DDIM goes "
            f"{known // steps} timesteps at a time and would leave out "
            f"{known - steps * (known // steps)} of them. Use one of {sorted(nearest)}, or "
            "sampler ddpm, which takes any number."
        )


def check_classes(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no row of the embedding table.

    Args:
        labels: Whole numbers, any shape.
        classes: How many there are; the null class is the number after them.

    Raises:
        ConfigError: A label is not a whole number, or out of range.
    """
    if labels.is_floating_point():
        raise ConfigError(
            f"class_labels are {labels.dtype}; they must be whole numbers. Convert them with "
            ".long()."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > classes:
        raise ConfigError(
            f"A class label is {low if low < 0 else high}; labels lie in [0, {classes}], and "
            f"{classes} is the null class of guidance. Give the number of a class."
        )


def _names_of_classes(index: Path) -> dict[str, int | None]:
    entries = read_json(index, "ImagePipeline").get("id2label") or {}
    names: dict[str, int | None] = {}
    for number, entry in entries.items():
        for name in {entry, *(synonym.strip() for synonym in entry.split(","))}:
            known = names.get(name, int(number))
            names[name] = int(number) if known == int(number) else None
    return names


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, then as it was: in training the network would drop a tenth of the labels."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
