"""The image teacher's training from nothing to its folder."""

import logging
import time
from pathlib import Path

from diffusers import DiTTransformer2DModel

from recon.zoo import image_teacher
from recon.zoo.image_autoencoder import build_vae
from recon.zoo.image_decoder import train_decoder
from recon.zoo.image_denoiser import start_transformer, train_round
from recon.zoo.image_recipe import Recipe

logger = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path) -> None:
    """Train the image teacher and write its pipeline folder, also on the way.

    A round starts from the folder that the round before it wrote, in half precision, so that a
    training that ended between two rounds can be taken up again to the same bytes.

    Args:
        recipe: The numbers of the run.
        out: Folder to write; the pipeline's files in it are replaced.
    """
    begin = time.monotonic()
    if recipe.first_round:
        vae = build_vae()  # its configuration, unlike the loaded one's, does not name the folder
        vae.load_state_dict(image_teacher.load(out).vae.state_dict())
    else:
        vae = train_decoder(recipe)

    def save(transformer: DiTTransformer2DModel) -> None:
        image_teacher.save(out, vae, transformer)

    for number in range(recipe.first_round, len(recipe.rounds())):
        if number == 0:
            transformer = start_transformer(recipe.seed + 2)
        else:
            transformer = image_teacher.load(out).transformer
            image_teacher.tie_embedders(transformer)
        save(train_round(recipe, number, transformer, save))
    logger.info("%s written after %.0f s", out, time.monotonic() - begin)
