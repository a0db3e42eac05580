"""Sampling videos through the stock diffusers pipeline of a folder."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import ConfigError
from recon.models.video_size import VideoSize
from recon.models.weights import WeightStore, own_memory
from recon.types import Sample

Visit = Callable[[int, Sample], None]
"""Called with the step, 0 first, and the arguments of the network's call in it."""


class VideoPipeline:
    """A diffusers video pipeline whose every random number is fixed by one seed per prompt.

    Noise is drawn on the CPU, one generator per prompt, so that a video depends neither on the
    device nor on what else is sampled with it.

    Args:
        folder: Pipeline folder; scheduler, tokenizer, text encoder and VAE are read from it.
        network: The network that denoises, on its device.
        dtype: Floating type of text encoder and VAE, and of the latents.
        device: Where to sample.
        size: What to sample.
        beside: A pipeline of the same folder, type and device whose text encoder, tokenizer and
            VAE are used instead of further copies: a text encoder may be larger than the network.

    Raises:
        ConfigError: model_index.json names a scheduler that diffusers does not have.
        WeightsError: Weights of the text encoder or the VAE are missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        size: VideoSize,
        beside: "VideoPipeline | None" = None,
    ) -> None:
        from diffusers import CogVideoXPipeline

        self.folder = Path(folder)
        self.network, self.size = network, size
        self.device = torch.device(device)
        with _no_progress_bars():
            scheduler = self._scheduler()
            self.parts: dict[str, Any] = (
                beside.parts if beside is not None else self._parts(dtype, self.device)
            )
        self.pipe: Any = CogVideoXPipeline(transformer=network, scheduler=scheduler, **self.parts)
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def text_length(self) -> int:
        """Text tokens of one call; the pipeline's own default of 226 suits one size only."""
        return int(self.pipe.transformer.config.max_text_seq_length)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [prompts, text tokens, channels], on the device.

        Each prompt is encoded alone, so that its numbers do not depend on the others.
        """
        return torch.cat([self._encode(prompt) for prompt in prompts])

    def trajectory(
        self, prompt: str, seed: int, steps: int, guidance: float, visit: Visit
    ) -> Tensor:
        """Sample one latent video and show every call of the network.

        Args:
            prompt: What to sample.
            seed: Of the noise.
            steps: Sampling steps.
            guidance: Scale of classifier-free guidance; above 1 each call has a batch of 2,
                unconditional first, else of 1.
            visit: Gets the step and the sample that enters the network. Its tensors are the
                pipeline's: copy what is kept, write to nothing.

        Returns:
            The final latents, as `latents` gives them.
        """
        step = 0

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal step
            keys = ("hidden_states", "encoder_hidden_states", "timestep")
            visit(step, {key: kwargs[key] for key in keys})
            step += 1

        hook = self.network.register_forward_pre_hook(before, with_kwargs=True)
        try:
            return self.latents([prompt], [seed], steps, guidance)
        finally:
            hook.remove()

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        guidance: float,
        batch_size: int = 1,
    ) -> Tensor:
        """Videos [prompts, frames, 3, height, width] in [0, 1], float32 on the CPU.

        Args:
            prompts: What to sample.
            seeds: One per prompt.
            steps: Sampling steps.
            guidance: Scale of classifier-free guidance; none at 1 and below.
            batch_size: Prompts at a time. The noise is the same for every size; kernels may round
                differently.

        Raises:
            ConfigError: There are not as many seeds as prompts, or no prompts.
        """
        return self._sample(prompts, seeds, steps, guidance, batch_size, "pt")

    def latents(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        guidance: float,
        batch_size: int = 1,
    ) -> Tensor:
        """Final latents [prompts, frames, channels, height, width], float32 on the CPU.

        As `generate`, without the VAE.

        Raises:
            ConfigError: There are not as many seeds as prompts, or no prompts.
        """
        return self._sample(prompts, seeds, steps, guidance, batch_size, "latent")

    def _sample(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        guidance: float,
        batch_size: int,
        output_type: str,
    ) -> Tensor:
        if not prompts or len(seeds) != len(prompts):
            raise ConfigError(
                f"{len(seeds)} seeds for {len(prompts)} prompts; each prompt needs its own seed, "
                "and there must be one prompt at least. Give two lists of one length."
            )
        done = []
        for rows in _batches(len(prompts), batch_size):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
            videos = self.pipe(
                prompts[rows],
                num_frames=self.size.frames,
                height=self.size.height,
                width=self.size.width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type=output_type,
                max_sequence_length=self.text_length,
            ).frames
            done.append(videos.float().cpu())
        return torch.cat(done)

    def _parts(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Tokenizer, text encoder and VAE, each by its own loader.

        Not through the pipeline's from_pretrained: that wants one variant for all folders, warns
        of a library it does not need, and its name for dtype differs between versions.
        """
        from diffusers import AutoencoderKLCogVideoX
        from transformers import AutoTokenizer, T5EncoderModel

        def arguments(part: str) -> dict[str, Any]:
            weights = WeightStore(self.folder / part)
            weights.check()
            return {"variant": weights.variant, "local_files_only": True}

        # The encoder keeps some layers in float32 where float16 would overflow: only its own
        # loader knows which, so it gets the type, and is moved without one.
        text_encoder = T5EncoderModel.from_pretrained(
            self.folder / "text_encoder", dtype=dtype, **arguments("text_encoder")
        )
        vae = AutoencoderKLCogVideoX.from_pretrained(
            self.folder / "vae", low_cpu_mem_usage=False, **arguments("vae")
        )
        # Not vae.to(dtype=...): diffusers warns there of layers kept in float32, naming none.
        nn.Module.to(vae, device, dtype)
        return {
            "tokenizer": AutoTokenizer.from_pretrained(
                self.folder / "tokenizer", local_files_only=True
            ),
            "text_encoder": own_memory(text_encoder.to(device)).requires_grad_(False).eval(),
            "vae": own_memory(vae).requires_grad_(False).eval(),
        }

    def _scheduler(self) -> Any:
        import diffusers

        index = self.folder / "model_index.json"
        named = json.loads(index.read_text()).get("scheduler")
        library, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
        scheduler = getattr(diffusers, str(name), None) if library == "diffusers" else None
        if scheduler is None:
            raise ConfigError(
                f"{index} names the scheduler {named!r}, which diffusers {diffusers.__version__} "
                'does not have. Use ["diffusers", "CogVideoXDDIMScheduler"] or another of its '
                "classes."
            )
        return scheduler.from_pretrained(self.folder / "scheduler", local_files_only=True)

    def _encode(self, prompt: str) -> Tensor:
        embedding: Tensor = self.pipe.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )[0]
        return embedding


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences the loaders' bars, which would break the caller's own; then as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
