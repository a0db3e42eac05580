r"""A DiTPipeline folder of DiT-XL/2's size with random weights: for timing, not for pictures.

    python -m recon.zoo.random_dit FOLDER [--latent 32] [--layers 28]

How fast an export is on this machine, in about fifteen minutes and 6 GB of memory:

    python -m recon.zoo.random_dit dit_xl
    recon fit --config configs/rtn.yaml --config configs/models/image_teacher.yaml \
      --model.init_args.adapter.init_args.folder dit_xl --model.weight.num_bits 8 \
      --model.threads null --model.batch_size 1 --model.micro_batch 1 \
      --data.steps 4 --data.timesteps 2 --data.samples_per_timestep 1 --data.num_trajectories 2 \
      --data.held_out_trajectories 1 --data.held_out_samples 1 --data.num_test_images 1 \
      --media.after_fit 0 --trainer.default_root_dir runs/dit_xl
    recon export --run runs/dit_xl --format torchao
    recon bench --run runs/dit_xl --format torchao --runs 3 --steps 0

W4A8: `--model.weight.num_bits 4 --model.activation.num_bits 8`; a sample of 4 steps: `--steps 4`.

VAE and scheduler are those of the embedded image teacher. Source of the sizes: the config.json of
facebook/DiT-XL-2-256 (latents of 32 x 32) and -512 (64 x 64).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

EMBEDDED = Path(__file__).parent / "image"


def write_random_dit(folder: Path, *, latent: int = 32, layers: int = 28, seed: int = 0) -> Path:
    """Writes the folder, 1.4 GB in bfloat16 at full depth.

    Args:
        folder: Where to; must not be there yet.
        latent: Height and width of the latents.
        layers: Blocks.
        seed: Of the weights.
    """
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=latent,
        num_embeds_ada_norm=1000,
    ).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    network.save_pretrained(folder / "transformer")
    for part in ("vae", "scheduler"):
        shutil.copytree(EMBEDDED / part, folder / part)
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latent", type=int, default=32, help="32 at 256 x 256, 64 at 512 x 512.")
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    print(write_random_dit(options.folder, latent=options.latent, layers=options.layers))


if __name__ == "__main__":
    _main()
