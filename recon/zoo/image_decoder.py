"""The image teacher's first training stage: the autoencoder's decoder."""

import logging
import random
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from recon.zoo.image_autoencoder import SPATIAL_FACTOR, build_vae, pool
from recon.zoo.image_recipe import Recipe
from recon.zoo.image_scenes import SIDE, pictures, random_scenes
from recon.zoo.video_recipe import cosine
from recon.zoo.world import Scene

logger = logging.getLogger(__name__)

_CROP = 32
"""Side of a crop, pixels."""


def crops(images: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
    """A window of each picture near its shape, [batch, 3, 32, 32], aligned to the latent cells."""
    cut = []
    for image, scene in zip(images, scenes, strict=True):
        corner = []
        for centre in (scene.y, scene.x):
            begin = round((centre + rng.uniform(-9, 9) - _CROP / 2) / SPATIAL_FACTOR)
            corner.append(min(max(begin * SPATIAL_FACTOR, 0), SIDE - _CROP))
        top, left = corner
        cut.append(image[:, top : top + _CROP, left : left + _CROP])
    return torch.stack(cut)


def train_decoder(recipe: Recipe) -> AutoencoderKL:
    """Autoencoder with a trained decoder; its encoder is set, not trained."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    vae = build_vae().train()
    vae.encoder.requires_grad_(False)
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.decoder_rate, betas=(0.9, 0.98))
    steps = recipe.crop_steps + recipe.full_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, steps, min(50, steps))
    )
    scenes = random_scenes(recipe.seed + 1, min(recipe.scenes, steps * recipe.decoder_batch))
    everything = pictures(scenes)
    begin = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(scenes), (recipe.decoder_batch,), generator=generator)
        images = everything[chosen]
        if step < recipe.crop_steps:
            images = crops(images, [scenes[i] for i in chosen.tolist()], rng)
        latents = pool(images)
        # The transformer's latents are not exact either.
        noise = torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents + recipe.latent_noise * noise).sample - images
        # Coloured pixels are few, and they are what the world is about.
        weight = 1 + 2 * (images.amax(dim=1, keepdim=True) - images.amin(dim=1, keepdim=True))
        loss = (weight * (error.abs() + 2 * error.square())).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            logger.info(
                "decoder %d/%d loss %.4f psnr %.2f dB, %.0f s",
                *(step + 1, steps, loss.item(), float(-10 * (error.square().mean() / 4).log10())),
                time.monotonic() - begin,
            )
    return vae.eval().requires_grad_(False)
