from pathlib import Path

import torch
from diffusers import DiTPipeline

from recon.models.dit import DiT
from recon.zoo.random_dit import write_random_dit


def test_a_block_has_the_published_size_and_the_stock_pipeline_samples(tmp_path: Path) -> None:
    folder = write_random_dit(tmp_path / "random", latent=8, layers=1)
    adapter = DiT(str(folder))
    groups = adapter.input_groups("transformer_blocks.0")
    block = adapter.block("transformer_blocks.0", "cpu")
    names = [name for group in groups for name in group.linears]
    weights = [block.get_parameter(f"{name}.weight").numel() for name in names]
    assert sum(weights) == 23_887_872  # 23.89 M of DiT-XL/2
    pipeline = DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
