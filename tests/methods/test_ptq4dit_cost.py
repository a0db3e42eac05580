"""What a run costs, beside the authors' algorithm at its own cost model, at DiT-XL/2's geometry.

Ours is counted on a tiny network, and computed from the meta device by the same functions. The
table is printed by

    python -m pytest -q -s tests/methods/test_ptq4dit_cost.py -k side_by_side
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recon.engine.placement import needed_bytes
from recon.engine.result import linear_bytes
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform
from recon.methods.ptq4dit import BALANCED, PTQ4DiT
from recon.models.dit import DiT
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit, write_samples
from tests.models.tiny import tiny_image_sample, write_tiny_dit
from tests.reference import ptq4dit_cost as authors

TOKEN = QuantSpec(num_bits=8, strategy="token", dynamic=True)
ROWS = {256: 1600, 512: 1280}
"""Calibration rows of the authors' two published command lines."""


def xl(folder: Path, pixels: int) -> DiT:
    """DiT-XL/2 without weights, in the half precision it is published and run in."""
    (folder / "transformer").mkdir(parents=True)
    layout = {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "out_channels": 8,
        "sample_size": pixels // 8,
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(layout))
    return DiT(str(folder), dtype="bfloat16")


def geometry(adapter: DiT, rows: int) -> authors.Geometry:
    """The authors' network: embedders of all blocks are one, linears and patch convolution."""
    whole = adapter.empty_network()
    config: Any = whole.config
    _, *others = adapter.block_names
    weights = sum(
        module.weight.numel()
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not name.startswith(tuple(f"{block}.norm1.emb." for block in others))
    )
    return authors.Geometry(
        blocks=config.num_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        tokens=(config.sample_size // config.patch_size) ** 2,
        latent=config.in_channels * config.sample_size**2,
        output=config.patch_size**2 * config.out_channels,
        classes=config.num_embeds_ada_norm,
        weights=weights,
        rows=rows,
    )


def closed_layers(adapter: DiT, weight: QuantSpec) -> list[QuantLinear]:
    """The quantised layers of a finished run as `recon.load` holds them, on the meta device."""
    layers = []
    with torch.device("meta"):
        for block in adapter.block_names:
            shapes = adapter.linear_shapes(block)
            for group in adapter.input_groups(block):
                _, in_ = shapes[group.linears[0]]
                scale = torch.empty(in_) if group.role in BALANCED else None
                transform = scale if scale is None else InputTransform.closed(scale, None, None)
                for name in group.linears:
                    out, _ = shapes[name]
                    words = -(-in_ * weight.num_bits // 32)
                    layer = QuantLinear(nn.Linear(in_, out), weight, TOKEN, transform=transform)
                    codes = torch.empty(out, words, dtype=torch.int32)
                    layer.adopt({"codes": codes, "scale": torch.empty(out, 1)}, transform)
                    layers.append(layer)
    return layers


def result_bytes(adapter: DiT, weight: QuantSpec) -> tuple[int, int]:
    """Bytes of the tensors in `quantized.safetensors` and in `network.safetensors`."""
    layers = closed_layers(adapter, weight)
    whole = adapter.empty_network()
    replaced = sum(layer.out_features * layer.in_features for layer in layers)
    rest = sum(parameter.numel() for parameter in whole.parameters()) - replaced
    return linear_bytes(layers)["quantized"], rest * adapter.compute_dtype("cpu").itemsize


@pytest.mark.parametrize("blocks", [2, 4, 8, 28])
def test_the_authors_forwards_grow_with_the_square_of_the_depth(blocks: int) -> None:
    """10, 28, 88 and 868 were counted in the authors' code."""
    assert authors.block_forwards(blocks) == {2: 10, 4: 28, 8: 88, 28: 868}[blocks]
    assert authors.block_forwards(blocks) == blocks * (blocks + 3)


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_run_counts_two_forwards_a_block_and_writes_what_is_computed(
    blocks: int, tmp_path: Path
) -> None:
    teacher = write_tiny_dit(tmp_path / "teacher", layers=blocks)
    draw = partial(tiny_image_sample, batch=2)
    samples = write_samples(tmp_path / "calibration", teacher, family=DiT, draw=draw)
    adapter = DiT(str(teacher))
    module = PTQ4DiT(adapter=adapter, activation=TOKEN, steps=2, threads=1, compile=False)
    fit(tmp_path / "run", module, samples)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["block_forwards_per_sample"] == 2 * blocks < authors.block_forwards(blocks)
    files = [
        load_file(tmp_path / "run" / "quantized" / f"{name}.safetensors")
        for name in ("quantized", "network")
    ]
    found = tuple(sum(tensor.nbytes for tensor in file.values()) for file in files)
    assert found == result_bytes(adapter, module.weight)


def test_the_cost_model_gives_the_authors_numbers(tmp_path: Path) -> None:
    net = geometry(xl(tmp_path, 256), ROWS[256])
    assert net.weights == pytest.approx(673.2e6, rel=1e-4)
    assert authors.activation_bytes(net) == pytest.approx(110e9, rel=0.01)
    assert authors.checkpoint_bytes(net) == pytest.approx(2.7e9, rel=0.01)
    larger = geometry(xl(tmp_path / "larger", 512), ROWS[512])
    assert authors.activation_bytes(larger) == pytest.approx(350e9, rel=0.01)


def test_side_by_side_at_the_geometry_of_dit_xl(tmp_path: Path) -> None:
    adapters = {pixels: xl(tmp_path / str(pixels), pixels) for pixels in ROWS}
    nets = {pixels: geometry(adapters[pixels], rows) for pixels, rows in ROWS.items()}
    streams = {pixels: adapters[pixels].stream_bytes(ROWS[pixels], "cpu") for pixels in ROWS}
    held = {pixels: needed_bytes(2 * streams[pixels] // ROWS[pixels], ROWS[pixels] // 2, 0)
            for pixels in ROWS}  # fmt: skip
    w4, rest = result_bytes(adapters[256], QuantSpec(num_bits=4))
    blocks = nets[256].blocks
    # On disk every boundary is written once for each of the two networks.
    written = {pixels: 2 * (blocks + 1) * streams[pixels] for pixels in ROWS}
    lines = ["", "| DiT-XL/2, W4A8 | authors' algorithm | recon |", "|---|---|---|"]
    forwards = f"{authors.block_forwards(blocks)} = L(L+3)"
    lines.append(f"| block forwards per calibration row | {forwards} | {2 * blocks} = 2L |")
    for pixels, net in nets.items():
        theirs = f"{authors.activation_bytes(net) / 1e9:.0f} GB"
        ours = (
            f"0, with {held[pixels]['ram'] / 1e9:.1f} GB of memory; without, "
            f"{written[pixels] / 1e9:.0f} GB, at most {held[pixels]['disk'] / 1e9:.1f} GB at a time"
        )
        lines.append(f"| activations written, {pixels}², {net.rows} rows | {theirs} | {ours} |")
    theirs = f"{authors.checkpoint_bytes(nets[256]) / 1e9:.2f} GB, and the original checkpoint"
    ours = f"{w4 / 1e9:.2f} GB of codes, {rest / 1e9:.2f} GB of all else, nothing beside"
    lines.append(f"| result | {theirs} | {ours} |")
    print("\n".join(lines))
    assert 2 * blocks * 15 < authors.block_forwards(blocks)
    for pixels, net in nets.items():
        assert 2 * written[pixels] < 1.01 * authors.activation_bytes(net)
        assert held[pixels]["ram"] < 0.04 * authors.activation_bytes(net)
    assert w4 == pytest.approx(673.2e6 / 2, rel=0.01)
    assert 5 * (w4 + rest) < authors.checkpoint_bytes(nets[256])
