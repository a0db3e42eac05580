"""Tiny random vision-language networks, written as ordinary folders, and samples for them."""

from pathlib import Path
from typing import Any

import torch

from recon.models.idefics3 import Idefics3, SmolVLM
from recon.models.internvl import InternVL
from recon.models.llava import Llava
from recon.models.qwen_vl import Qwen2VL, Qwen25VL
from recon.models.vlm import VisionLanguageAdapter
from recon.types import Sample

VOCABULARY = 64
IMAGE = 60
"""Id of the placeholder."""
CONTEXT = 64
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[type[VisionLanguageAdapter], str, dict[str, Any]]] = {
    "llava": (
        Llava,
        "LlavaConfig",
        {
            # heads x head channels are 48, not the width of 32
            "text_config": {"model_type": "llama", "head_dim": 12, **TEXT},
            "vision_config": {"model_type": "clip_vision_model", "image_size": 16}
            | {"patch_size": 8, "projection_dim": 16, **TOWER},
            "image_token_index": IMAGE,
        },
    ),
    "qwen2_vl": (
        Qwen2VL,
        "Qwen2VLConfig",
        {
            "text_config": {"rope_parameters": ROPE, **TEXT},
            "vision_config": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **QWEN_TOWER},
            **QWEN,
        },
    ),
    "qwen2_5_vl": (
        Qwen25VL,
        "Qwen2_5_VLConfig",
        {
            "text_config": {"rope_parameters": ROPE, **TEXT},
            "vision_config": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
            | {"window_size": 16, "fullatt_block_indexes": [1], **QWEN_TOWER},
            "tie_word_embeddings": True,
            **QWEN,
        },
    ),
    "internvl": (
        InternVL,
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {"image_size": [16, 16], "patch_size": [4, 4], **TOWER},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
    ),
    "idefics3": (
        Idefics3,
        "Idefics3Config",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"image_size": 16, "patch_size": 4, **TOWER},
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
    ),
    "smolvlm": (
        SmolVLM,
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"image_size": 16, "patch_size": 4, **TOWER},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "tie_word_embeddings": True,
        },
    ),
}
"""Adapter, configuration class and its arguments."""


def write_tiny_vlm(folder: Path, family: str, seed: int = 0, **changed: Any) -> Path:
    """A folder of the family with random weights, its norms and tables random too."""
    import transformers

    adapter, config_class, arguments = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**arguments, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = getattr(transformers, adapter.network_class)(config)
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        network.save_pretrained(folder)
    return folder


def tiny_vlm_sample(family: str, pictures: int = 1, words: int = 9, seed: int = 0) -> Sample:
    """Random pixels between random words, as the family's processor hands them over."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, IMAGE, (words,), generator=generator).tolist()
    sample: Sample = {}
    if pictures:
        # Four tokens a picture in every family: a square of 16 pixels, in patches of 4 or 8.
        pixels = torch.randn(pictures, 3, 16, 16, generator=generator)
        sample["pixel_values"] = pixels
        if family.startswith("qwen"):
            patches = torch.randn(pictures * 16, 3 * 2 * 4 * 4, generator=generator)
            sample["pixel_values"] = patches
            sample["image_grid_thw"] = torch.tensor([[1, 4, 4]]).expand(pictures, -1).contiguous()
        if family in ("idefics3", "smolvlm"):
            sample["pixel_values"] = pixels[None]
            mask = torch.ones(1, pictures, 16, 16, dtype=torch.bool)
            mask[:, :, :, 12:] = False  # the last column of patches is filling
            sample["pixel_attention_mask"] = mask
    ids = text[:2] + ([IMAGE] * 4 + text[:1]) * pictures + text[2:]
    sample["input_ids"] = torch.tensor([ids])
    sample["labels"] = torch.full_like(sample["input_ids"], -100)
    sample["labels"][:, -2:] = sample["input_ids"][:, -2:]
    return sample
