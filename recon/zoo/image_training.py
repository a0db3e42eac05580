"""The image teacher's training from nothing to its folder."""

import logging
import time
from pathlib import Path

from diffusers import DiTTransformer2DModel

from recon.zoo import image_teacher
from recon.zoo.image_decoder import train_decoder
from recon.zoo.image_denoiser import train_transformer
from recon.zoo.image_recipe import Recipe

logger = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path) -> None:
    """Train the image teacher and write its pipeline folder, also on the way.

    Args:
        recipe: The numbers of the run.
        out: Folder to write; the pipeline's files in it are replaced.
    """
    begin = time.monotonic()
    vae = train_decoder(recipe)

    def save(transformer: DiTTransformer2DModel) -> None:
        image_teacher.save(out, vae, transformer)

    save(train_transformer(recipe, save))
    logger.info("%s written after %.0f s", out, time.monotonic() - begin)
