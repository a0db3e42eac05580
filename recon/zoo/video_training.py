"""The video teacher's training from nothing to its folder."""

import logging
import time
from pathlib import Path

from recon.zoo import video_teacher
from recon.zoo.video_decoder import train_decoder
from recon.zoo.video_denoiser import Denoiser, train_denoiser
from recon.zoo.video_recipe import Recipe

logger = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path) -> None:
    """Train the video teacher and write its pipeline folder, also on the way.

    Args:
        recipe: The numbers of the run; the defaults made the shipped folder.
        out: Folder to write; the pipeline's files in it are replaced.
    """
    begin = time.monotonic()
    vae = train_decoder(recipe)

    def save(denoiser: Denoiser) -> None:
        video_teacher.save(out, vae, denoiser.transformer, denoiser.text_encoder)

    save(train_denoiser(recipe, save))
    logger.info("%s written after %.0f s", out, time.monotonic() - begin)
