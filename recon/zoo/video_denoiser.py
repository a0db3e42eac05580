"""The video teacher's second training stage: transformer and text encoder, jointly.

It runs in rounds, from single latent frames to whole clips. Each round has its own optimizers and
learning rate schedule and starts from the running average that the round before it left.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from recon.zoo import video_teacher, world
from recon.zoo.averaging import muon_and_adamw, train_averaged
from recon.zoo.video_autoencoder import SCALING, SPATIAL_FACTOR, clips, pool
from recon.zoo.video_recipe import Recipe, Round, constant, cosine

_Save = Callable[["Denoiser"], None]


class Denoiser(nn.Module):
    """Transformer and text encoder as one network."""

    def __init__(
        self, transformer: CogVideoXTransformer3DModel, text_encoder: T5EncoderModel
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        """Predicted velocity, shaped as `noisy` [batch, frames, channels, height, width].

        Args:
            noisy: Scaled latents under noise.
            ids: Token ids, [batch, text tokens]; padding is attended to, as in the pipeline.
            timesteps: Of the scheduler, [batch].
        """
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=self.text_encoder(ids)[0],
            timestep=timesteps,
            return_dict=False,
        )[0]
        return velocity


@dataclass(frozen=True)
class Lessons:
    """What the denoiser learns from: scenes, their latents, and what words and noises them."""

    scenes: list[world.Scene]
    latents: Tensor
    """Scaled, [scenes, frames, channels, height, width]."""
    tokenizer: T5Tokenizer
    scheduler: CogVideoXDDIMScheduler
    rng: random.Random
    generator: torch.Generator

    def loss(self, denoiser: Denoiser, recipe: Recipe, part: Round) -> Tensor:
        """Mean squared velocity error of one fresh batch of a round."""
        chosen = torch.randint(len(self.scenes), (part.batch,), generator=self.generator)
        scenes = [self.scenes[i] for i in chosen.tolist()]
        clean = self.latents[chosen]
        if part.side is not None:
            clean = windows(clean, scenes, self.rng, part.side)
        if part.picture:
            frame = torch.randint(clean.shape[1], (part.batch,), generator=self.generator)
            clean = clean[torch.arange(part.batch), frame][:, None]
        noise = torch.randn(clean.shape, generator=self.generator)
        timesteps = self._draw_timesteps(recipe, part.batch)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        predicted = denoiser(noisy, self._word(scenes, recipe.empty_prompts), timesteps)
        target = self.scheduler.get_velocity(clean, noise, timesteps)
        return nn.functional.mse_loss(predicted, target)

    def _draw_timesteps(self, recipe: Recipe, batch: int) -> Tensor:
        """Timesteps [batch]: a share of them uniform, the others logit-normal, each stratified.

        The logit-normal prefers the middle, where a shape takes form; colour and motion, decided
        earlier, need less.
        """
        uniform = round(batch * recipe.uniform_timesteps)
        parts = []
        for count in (uniform, batch - uniform):
            strata = torch.arange(count) + torch.rand(count, generator=self.generator)
            parts.append((strata / max(count, 1)).clamp(1e-4, 1 - 1e-4))
        middle = (torch.special.ndtri(parts[1]) + recipe.timestep_shift).sigmoid()
        share = torch.cat([parts[0], middle])
        return (share * self.scheduler.config.num_train_timesteps).long()

    def _word(self, scenes: list[world.Scene], empty: float) -> Tensor:
        """Token ids [scenes, text tokens] of fresh wordings, some of them empty."""
        texts = [
            "" if self.rng.random() < empty else world.write_prompt(scene.attributes, self.rng)
            for scene in scenes
        ]
        tokens = video_teacher.TEXT_TOKENS
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=tokens, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids


def prepare(recipe: Recipe) -> Lessons:
    """Rendered and encoded scenes, and everything a batch is drawn with."""
    scenes = world.random_scenes(recipe.seed + 3, recipe.scenes)
    return Lessons(
        scenes=scenes,
        latents=encode(scenes),
        tokenizer=video_teacher.build_tokenizer(),
        scheduler=video_teacher.build_scheduler(),
        rng=random.Random(recipe.seed + 4),
        generator=torch.Generator().manual_seed(recipe.seed + 4),
    )


def encode(scenes: list[world.Scene], batch: int = 64) -> Tensor:
    """Scaled latents of the scenes' clips, [scenes, frames, channels, height, width]."""
    parts = [
        pool(clips(scenes[i : i + batch])).transpose(1, 2) for i in range(0, len(scenes), batch)
    ]
    return torch.cat(parts) * SCALING


def windows(latents: Tensor, scenes: list[world.Scene], rng: random.Random, side: int) -> Tensor:
    """A square of latent cells around each scene's path, [batch, frames, channels, side, side]."""
    height, width = latents.shape[-2:]
    cut = []
    for latent, scene in zip(latents, scenes, strict=True):
        top, left = (
            min(
                max(round(centre / SPATIAL_FACTOR - side / 2) + offset, 0),
                size - side,
            )
            for centre, size, offset in (
                (scene.y, height, rng.randint(-1, 1)),
                (scene.x, width, rng.randint(-1, 1)),
            )
        )
        cut.append(latent[:, :, top : top + side, left : left + side])
    return torch.stack(cut)


def build_denoiser(recipe: Recipe, tokens: int) -> Denoiser:
    """Transformer and text encoder at their starting weights."""
    torch.manual_seed(recipe.seed + 2)
    transformer = video_teacher.build_transformer()
    for block in transformer.transformer_blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                # As DiT: every block starts as the identity, which a short training needs.
                if name.startswith("norm"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return Denoiser(transformer, video_teacher.build_text_encoder(tokens))


def build_optimizers(denoiser: Denoiser, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    return muon_and_adamw(
        denoiser,
        rate,
        lambda name: name.startswith("transformer.transformer_blocks") and ".norm" not in name,
    )


def train_denoiser(recipe: Recipe, save: _Save) -> Denoiser:
    """Running average of the trained networks.

    Args:
        recipe: The numbers of the run.
        save: Is given the average every `save_every` steps.
    """
    lessons = prepare(recipe)
    denoiser = build_denoiser(recipe, len(lessons.tokenizer))
    for part in recipe.rounds():
        loss_of = partial(lessons.loss, recipe=recipe, part=part)
        denoiser = train_round(recipe, loss_of, denoiser, part=part, save=save)
    return denoiser


def train_round(
    recipe: Recipe,
    loss_of: Callable[[Denoiser], Tensor],
    denoiser: Denoiser,
    *,
    part: Round,
    save: _Save,
) -> Denoiser:
    """Running average of the weights over one round of training.

    Args:
        recipe: Learning rate, decay of the average and interval of saving count.
        loss_of: Loss of one fresh batch.
        denoiser: Is trained in place.
        part: Steps and course of the learning rate count.
        save: Is given the average every `save_every` steps.
    """
    course = partial(cosine, steps=part.steps) if part.decay else constant
    average = train_averaged(
        denoiser,
        loss_of,
        build_optimizers(denoiser, recipe.rate),
        name="denoiser",
        steps=part.steps,
        factor=partial(course, warmup=min(recipe.warmup, part.steps)),
        average=recipe.average,
        save=save,
        save_every=recipe.save_every,
    )
    return average.requires_grad_(True)
