"""The video teacher's first training stage: the autoencoder's decoder."""

import logging
import random
import time

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from recon.zoo import world
from recon.zoo.video_autoencoder import build_vae, clips
from recon.zoo.video_recipe import Recipe, cosine

logger = logging.getLogger(__name__)


def _crop(video: Tensor, scene: world.Scene, rng: random.Random, side: int = 32) -> Tensor:
    """A window of the clip [3, frames, height, width] near the shape's mid-clip position."""
    top = min(max(int(scene.y - side / 2 + rng.uniform(-9, 9)), 0), world.HEIGHT - side)
    left = min(max(int(scene.x - side / 2 + rng.uniform(-9, 9)), 0), world.WIDTH - side)
    return video[:, :, top : top + side, left : left + side]


def train_decoder(recipe: Recipe) -> AutoencoderKLCogVideoX:
    """Autoencoder with a trained decoder; its encoder is set, not trained."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    vae = build_vae()
    vae.encoder.requires_grad_(False)
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.decoder_rate, betas=(0.9, 0.98))
    steps = recipe.crop_steps + recipe.full_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, steps, min(50, steps))
    )
    combinations = world.every_attributes()
    begin = time.monotonic()
    for step in range(steps):
        drawn = [
            world.random_scene(rng.choice(combinations), rng) for _ in range(recipe.decoder_batch)
        ]
        video = clips(drawn)
        if step < recipe.crop_steps:
            video = torch.stack([_crop(v, s, rng) for v, s in zip(video, drawn, strict=True)])
        with torch.no_grad():
            latents = vae.encode(video).latent_dist.mode()
        # The denoiser's latents are not exact either.
        latents = latents + recipe.latent_noise * torch.randn_like(latents)
        error = vae.decode(latents).sample - video
        # Coloured pixels are few, and they are what the world is about.
        weight = 1 + 2 * (video.amax(dim=1, keepdim=True) - video.amin(dim=1, keepdim=True))
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
