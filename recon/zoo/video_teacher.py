"""The video teacher's parts: tiny CogVideoX components for the procedural world.

`diffusers` and `transformers` own every class here; this module fixes their sizes.
Geometry: a clip of 9 frames of 56 x 64 pixels becomes 5 x 14 x 16 latents of 4 channels, cut by
2 x 2 patches into 5 x 7 x 8 = 280 video tokens, which the transformer sees behind 16 text tokens.
"""

import copy
from pathlib import Path

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from recon.zoo.pipeline_folder import write
from recon.zoo.video_autoencoder import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR
from recon.zoo.world import FRAMES, HEIGHT, WIDTH, vocabulary

DEFAULT_STEPS = 25
"""Sampling steps at which the model card's numbers hold."""
DEFAULT_GUIDANCE = 3.0
"""Classifier-free guidance scale at which the model card's numbers hold."""

TEXT_TOKENS = 16
"""Padded prompt length; the longest prompt has ten tokens. The pipeline's own default, 226, is
CogVideoX's, hence `sampling_arguments`."""
TEXT_WIDTH = 64


def sampling_arguments(
    *, steps: int = DEFAULT_STEPS, guidance: float = DEFAULT_GUIDANCE
) -> dict[str, int | float]:
    """Keyword arguments for the stock pipeline's call, except prompt, generator and output type."""
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": TEXT_TOKENS,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
    }


def build_transformer() -> CogVideoXTransformer3DModel:
    """Untrained denoiser: 6 blocks of width 128 (4 heads of 32) over 16 + 280 tokens."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=128,
        text_embed_dim=TEXT_WIDTH,
        num_layers=6,
        sample_width=WIDTH // SPATIAL_FACTOR,
        sample_height=HEIGHT // SPATIAL_FACTOR,
        sample_frames=FRAMES,
        patch_size=2,
        temporal_compression_ratio=TEMPORAL_FACTOR,
        max_text_seq_length=TEXT_TOKENS,
        spatial_interpolation_scale=1.0,
    )


def build_tokenizer() -> T5Tokenizer:
    """Word-level T5 tokenizer of the world's vocabulary; an unknown word becomes `<unk>`."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_text_encoder(tokens: int) -> T5EncoderModel:
    """Untrained two-layer T5 encoder for a vocabulary of `tokens` entries."""
    config = T5Config(
        vocab_size=tokens,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=TEXT_TOKENS,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX's own noise schedule: v-prediction, shifted SNR, zero at the last step."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0,
    )


def save(
    out: Path,
    vae: AutoencoderKLCogVideoX,
    transformer: CogVideoXTransformer3DModel,
    text_encoder: T5EncoderModel,
) -> None:
    """Write the pipeline folder, the two large networks in half precision.

    The networks given stay as they are, and so do files of `out` that are not the pipeline's, such
    as the model card. The text encoder stays in single precision, because transformers loads a
    network in its stored precision where diffusers does not, and the two would disagree.
    """
    pipeline = CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=copy.deepcopy(text_encoder).float().eval(),
        vae=copy.deepcopy(vae).half().eval(),
        transformer=copy.deepcopy(transformer).half().eval(),
        scheduler=build_scheduler(),
    )
    write(pipeline, out)


def load(folder: Path) -> CogVideoXPipeline:
    """The stock pipeline of a teacher folder, in single precision, without a progress bar."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
