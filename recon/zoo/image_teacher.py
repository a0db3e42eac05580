"""The image teacher's parts: tiny DiT components for the procedural world.

`diffusers` owns every class here; this module fixes their sizes. Geometry: a picture of 64 x 64
pixels becomes 16 x 16 latents of 4 channels, cut by 2 x 2 patches into 64 tokens.
"""

import copy
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from recon.zoo.image_autoencoder import LATENT_CHANNELS, SPATIAL_FACTOR
from recon.zoo.image_scenes import CLASSES, SIDE
from recon.zoo.pipeline_folder import write

DEFAULT_STEPS = 25
"""Sampling steps at which the model card's numbers hold."""
DEFAULT_GUIDANCE = 2.0
"""Classifier-free guidance scale at which the model card's numbers hold."""

NULL_LABEL = 1000
"""Label of no class, the last row of the embedding. `DiTPipeline` has this number written in its
code, so that the table needs ImageNet's 1000 rows before it, of which 24 are in use."""


def sampling_arguments(
    *, steps: int = DEFAULT_STEPS, guidance: float = DEFAULT_GUIDANCE
) -> dict[str, int | float]:
    """Keyword arguments for the stock pipeline's call, except labels, generator and output type."""
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def build_transformer() -> DiTTransformer2DModel:
    """Untrained denoiser: 8 blocks of width 128 (4 heads of 32) over 64 tokens.

    As DiT-XL/2 but for its size: it predicts velocity and variance, hence twice the channels.
    """
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=8,
        sample_size=SIDE // SPATIAL_FACTOR,
        patch_size=2,
        num_embeds_ada_norm=NULL_LABEL,
    )


def tie_embedders(transformer: DiTTransformer2DModel) -> None:
    """Make all blocks use the first one's embedder of timestep and label, as in DiT itself.

    diffusers gives each block its own, which a training would drive apart, at eight times the cost.
    """
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb = first.norm1.emb


def build_scheduler() -> DDIMScheduler:
    """DiT-XL/2's own noise schedule, 1000 steps, linear, but with velocity prediction.

    At the first sampling steps hardly any signal is left, and an error of the predicted noise
    counts 150 times in the picture: a short training leaves more than that.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def save(out: Path, vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> None:
    """Write the pipeline folder in half precision, one copy of the embedder for each block.

    The networks given stay as they are, and so do files of `out` that are not the pipeline's, such
    as the model card.
    """
    untied = build_transformer()
    untied.load_state_dict(transformer.state_dict())
    labels = dict(enumerate(CLASSES))
    pipeline = DiTPipeline(
        transformer=untied.half().eval(),
        vae=copy.deepcopy(vae).half().eval(),
        scheduler=build_scheduler(),
        id2label=labels,
    )
    pipeline.register_to_config(id2label=labels)  # the pipeline reads it, but does not keep it
    write(pipeline, out)


def load(folder: Path) -> DiTPipeline:
    """The stock pipeline of a teacher folder, in single precision, without a progress bar."""
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
