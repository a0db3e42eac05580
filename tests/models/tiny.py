"""Tiny random pipelines, written as ordinary folders."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from recon.types import Sample

LATENT_CHANNELS = 4
TEXT_WIDTH = 32
WORDS = ("a", "red", "blue", "square", "circle", "moves", "left", "right", "up", "down")


def write_tiny_cogvideox(
    folder: Path,
    *,
    rotary: bool = False,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    patch_size_t: int | None = None,
    height: int = 8,
    width: int = 12,
    frames: int = 9,
    text_tokens: int = 7,
    time_embed_dim: int = 16,
    pipeline: bool = False,
    seed: int = 0,
    max_shard_size: str = "10GB",
    variant: str | None = None,
) -> Path:
    """A CogVideoX folder with random weights; the default is 2B-like and not square.

    Args:
        folder: Where it is written.
        rotary: As 5B and 1.5.
        layers: Blocks.
        heads: Attention heads; the width is heads · head_dim.
        head_dim: Channels of a head, a multiple of 16 for rotary models.
        patch_size_t: 2: as 1.5.
        height: Of the latents; a frame has four times that.
        width: Of the latents; a frame has four times that.
        frames: Of the video; the latents have (frames - 1) / 4 + 1.
        text_tokens: Text tokens of a call.
        time_embed_dim: Width of the time embedding.
        pipeline: Also write VAE, text encoder, tokenizer and scheduler (half a second).
        seed: Of the weights.
        max_shard_size: Size at which the transformer is split into shards.
        variant: Variant in the names of the transformer's files.
    """
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=time_embed_dim,
            text_embed_dim=TEXT_WIDTH,
            num_layers=layers,
            sample_width=width,
            sample_height=height,
            sample_frames=frames,
            patch_size_t=patch_size_t,
            max_text_seq_length=text_tokens,
            use_rotary_positional_embeddings=rotary,
            # 1.5 has a Linear for its patches and no bias there
            patch_bias=patch_size_t is None,
        )
        # Fresh norms are 1 and 0: then a mistake in them would not be seen.
        for parameter in transformer.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        transformer.save_pretrained(
            folder / "transformer", max_shard_size=max_shard_size, variant=variant
        )
        if pipeline:
            _write_others(folder, seed)
    index = (
        '{"_class_name": "CogVideoXPipeline", "_diffusers_version": "0.42.1",'
        ' "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],'
        ' "text_encoder": ["transformers", "T5EncoderModel"],'
        ' "tokenizer": ["transformers", "T5Tokenizer"],'
        ' "transformer": ["diffusers", "CogVideoXTransformer3DModel"],'
        ' "vae": ["diffusers", "AutoencoderKLCogVideoX"]}'
    )
    (folder / "model_index.json").write_text(index)
    return folder


def tiny_sample(config: Any, batch: int = 1, seed: int = 0, timestep: int = 500) -> Sample:
    """A random sample of the shape that a transformer's config asks for."""
    generator = torch.Generator().manual_seed(seed)
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    frames += -frames % (config["patch_size_t"] or 1)
    latents = (batch, frames, config["in_channels"])
    size = (config["sample_height"], config["sample_width"])
    text = (batch, config["max_text_seq_length"], config["text_embed_dim"])
    return {
        "hidden_states": torch.randn(*latents, *size, generator=generator),
        "encoder_hidden_states": torch.randn(text, generator=generator),
        "timestep": torch.full((batch,), timestep),
    }


NAMES = (
    "square",
    "disc, circle",
    "triangle",
    "star",
    "crane",
    "ring",
    "bar",
    "dot",
    "crane, cross",
)
"""Entries of id2label, the first of them; crane names two classes, as in ImageNet."""


def write_tiny_dit(
    folder: Path,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    classes: int = 10,
    size: int = 8,
    learned_variance: bool = True,
    equal_embedders: bool = True,
    first_class: bool = False,
    pipeline: bool = False,
    seed: int = 0,
    max_shard_size: str = "10GB",
    **config: Any,
) -> Path:
    """A DiT folder with random weights in the layout of DiT-XL/2.

    Args:
        folder: Where it is written.
        layers: Blocks.
        heads: Attention heads; the width is heads · head_dim.
        head_dim: Channels of a head.
        classes: Classes; the embedding table has a null class more.
        size: Height and width of the latents; the image has twice that.
        learned_variance: The network also predicts a variance, in as many channels again.
        equal_embedders: Every block's embedder holds the same numbers, as in the published files.
        first_class: Description as in the published files, which are older than the class.
        pipeline: Also write VAE and scheduler.
        seed: Of the weights.
        max_shard_size: Size at which the transformer is split into shards.
        config: Further arguments of DiTTransformer2DModel.
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=LATENT_CHANNELS,
            out_channels=(2 if learned_variance else 1) * LATENT_CHANNELS,
            num_layers=layers,
            sample_size=size,
            num_embeds_ada_norm=classes,
            **config,
        )
        for parameter in transformer.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        embedders = [block.norm1.emb for block in transformer.transformer_blocks]
        if equal_embedders:
            for embedder in embedders[1:]:
                embedder.load_state_dict(embedders[0].state_dict())
        transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        if pipeline:
            _write_image_parts(folder)
    if first_class:
        _describe_as_first_published(folder / "transformer" / "config.json")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.42.1",
        "id2label": {str(n): name for n, name in enumerate(NAMES[:classes])},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_image_sample(
    config: Any, batch: int = 1, seed: int = 0, timestep: int | None = None
) -> Sample:
    """A random sample of the shape that a DiT's config asks for; its last label is the null class.

    Each row has a timestep of its own, unless one is given.
    """
    generator = torch.Generator().manual_seed(seed)
    classes, size = config["num_embeds_ada_norm"], config["sample_size"]
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[-1] = classes
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], size, size, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator)
        if timestep is None
        else torch.full((batch,), timestep),
        "class_labels": labels,
    }


def _describe_as_first_published(file: Path) -> None:
    """Class name and keys of facebook/DiT-XL-2-256, which has no norm_eps."""
    config = json.loads(file.read_text())
    config.pop("norm_eps")
    further = {
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    file.write_text(json.dumps({**config, **further}))


def _write_image_parts(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=16,
    )
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")


@functools.cache
def _vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return special + [(f"▁{word}", -3.0) for word in WORDS]


def _write_others(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    T5Tokenizer(vocab=_vocabulary(), extra_ids=0).save_pretrained(folder / "tokenizer")
    text_config = T5Config(
        vocab_size=len(_vocabulary()),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
    )
    T5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae.save_pretrained(folder / "vae")
    CogVideoXDDIMScheduler().save_pretrained(folder / "scheduler")
