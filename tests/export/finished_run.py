"""Finished runs, of tiny networks and embedded teachers, made by hand: what is exported, no fit."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from recon import zoo
from recon.calibration.artefact import CalibrationSet
from recon.datamodules.chat import Chat
from recon.datamodules.questions import world_examples
from recon.engine import resume
from recon.engine.attention import nearest_attentions
from recon.engine.native import write_native
from recon.engine.stem_and_head import ends_groups
from recon.layers.quant_linear import QuantLinear
from recon.layers.static_range import StaticRange
from recon.layers.transform import InputTransform
from recon.methods.rtn import RoundToNearest
from recon.models.adapter import ModelAdapter
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.models.llava import Llava
from recon.models.qwen_vl import Qwen2VL
from recon.quantizers.affine import codes
from recon.quantizers.ranges import mse_zero_points
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import KroneckerTransform, kronecker_split
from recon.types import Sample
from tests.engine.tiny_run import write_samples
from tests.models.tiny import (
    tiny_image_sample,
    tiny_sample,
    write_tiny_cogvideox,
    write_tiny_dit,
)
from tests.models.tiny_vlm import tiny_vlm_sample, write_tiny_vlm

W4 = QuantSpec(num_bits=4)
TOKEN8 = QuantSpec(num_bits=8, strategy="token", dynamic=True, scale_denominator="half_range")
STATIC8 = QuantSpec(num_bits=8, strategy="tensor")
ASYMMETRIC8 = QuantSpec(num_bits=8, strategy="tensor", symmetric=False)


def bits(num_bits: int, group_size: int | None = None) -> QuantSpec:
    """Grid of a weight."""
    if group_size is None:
        return QuantSpec(num_bits=num_bits)
    return QuantSpec(num_bits=num_bits, strategy="group", group_size=group_size)


def token(num_bits: int) -> QuantSpec:
    """Grid of tokens by the rule that loaders know."""
    return QuantSpec(
        num_bits=num_bits, strategy="token", dynamic=True, scale_denominator="half_range"
    )


@dataclass(frozen=True)
class Family:
    """How a teacher of a family and its samples are made."""

    adapter: type[ModelAdapter]
    write: Callable[..., Path]
    draw: Callable[..., Sample]


def _vlm(adapter: type[ModelAdapter], name: str) -> Family:
    def draw(config: object, seed: int, timestep: int) -> Sample:
        return tiny_vlm_sample(name, seed=seed)

    return Family(adapter, lambda folder: write_tiny_vlm(folder, name), draw)


def _asked(config: object, seed: int, timestep: int) -> Sample:
    """A question of the embedded world with its answer."""
    (example,) = world_examples("train", 1, seed)
    return Chat(Llava(str(zoo.folder("vlm")))).forced(example)


def _shipped(adapter: type[ModelAdapter], name: str, draw: Callable[..., Sample]) -> Family:
    """An embedded teacher, as it is."""
    return Family(adapter, lambda folder: zoo.folder(name), draw)


FAMILIES = {
    "dit": Family(DiT, write_tiny_dit, tiny_image_sample),
    "cogvideox": Family(CogVideoX, write_tiny_cogvideox, tiny_sample),
    "llava": _vlm(Llava, "llava"),
    "qwen2_vl": _vlm(Qwen2VL, "qwen2_vl"),
    "video": _shipped(CogVideoX, "video", tiny_sample),
    "image": _shipped(DiT, "image", tiny_image_sample),
    "vlm": _shipped(Llava, "vlm", _asked),
}


@dataclass(frozen=True)
class Recipe:
    """What a finished layer holds."""

    weight: QuantSpec = W4
    activation: QuantSpec | None = None
    scaled: tuple[str, ...] = ()
    """Roles of inputs with a channel scale."""
    rotated: bool = False
    clip_logit: float | None = None
    plain_roles: tuple[str, ...] = ()
    """Roles of linears that stay in full precision."""
    stem_and_head: QuantSpec | None = None
    """Grid of the linears outside the blocks."""
    quantize_attention: bool = False
    """Whether the products of attention are on ranges of each call."""
    adapter: dict[str, object] = field(default_factory=dict)
    """Further arguments of the adapter."""


class _WithoutTrainer(RoundToNearest):
    run_device = torch.device("cpu")


def finished_run(root: Path, teacher: Path, family: Family, recipe: Recipe) -> Path:
    """The folder that a fit would have left, with round-to-nearest codes."""
    adapter = family.adapter(str(teacher), **recipe.adapter)  # type: ignore[arg-type]
    write_samples(root / "calibration", teacher, 1, 2, family=family.adapter, draw=family.draw)
    module = _WithoutTrainer(
        adapter=adapter, weight=recipe.weight, activation=recipe.activation, seed=0,
        quantize_attention=recipe.quantize_attention,
    )  # fmt: skip
    for name, products in nearest_attentions(module, adapter.block_names).items():
        module.quantizers[name.replace(".", "/")] = products
    module.outside_weight = recipe.stem_and_head
    generator = torch.Generator().manual_seed(0)
    layers = _layers(adapter, recipe, generator)
    for group in ends_groups(module, adapter.network("cpu")):
        for name, linear in group.linears.items():
            assert recipe.stem_and_head is not None
            layers[name] = _closed(QuantLinear(linear, recipe.stem_and_head, recipe.activation))
    for name, layer in layers.items():
        module.quantizers[name.replace(".", "/")] = layer
    module.final_error = {"round_to_nearest": 1.0, "reconstructed": 1.0}
    chosen = CalibrationSet.load(root / "calibration").fingerprint
    module.fingerprint = resume.fingerprint(module, chosen)
    write_native(module, root / "quantized")
    (root / "summary.json").write_text(json.dumps({"teacher": str(teacher)}))
    return root


def _layers(
    adapter: ModelAdapter, recipe: Recipe, generator: torch.Generator
) -> dict[str, QuantLinear]:
    layers = {}
    for block_name in adapter.block_names:
        block = adapter.block(block_name, "cpu")
        for group in adapter.input_groups(block_name):
            if group.role in recipe.plain_roles:
                continue
            first = block.get_submodule(group.linears[0])
            assert isinstance(first, nn.Linear)
            transform = _transform(first.in_features, group.role, recipe, generator)
            for name in group.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                layer = QuantLinear(
                    linear,
                    recipe.weight,
                    recipe.activation,
                    transform=transform,
                    learn_activation_clip=recipe.clip_logit is not None,
                    clip_start=recipe.clip_logit or 0.0,
                )
                layers[f"{block_name}.{name}"] = _closed(layer)
    return layers


def _closed(layer: QuantLinear) -> QuantLinear:
    weight, spec = layer.fold(), layer.weight_spec
    assert layer.rounding is not None
    if spec.symmetric:
        layer.close(*layer.rounding.close(weight))
    else:
        step, zero_point = mse_zero_points(weight, spec)
        layer.close(codes(weight + step * zero_point, step, spec.signed), step, zero_point)
    return layer


def _transform(
    width: int, role: str, recipe: Recipe, generator: torch.Generator
) -> InputTransform | None:
    scale = None
    if role in recipe.scaled:
        scale = torch.exp(0.5 * torch.randn(width, generator=generator))
    kronecker = None
    if recipe.rotated:
        split = kronecker_split(width)
        kronecker = KroneckerTransform(width, split=split, start="haar", generator=generator)
    static = None
    if recipe.activation is not None and recipe.activation.strategy == "tensor":
        static = StaticRange(-2.5, 3.5, recipe.activation, None)
    if scale is None and kronecker is None and static is None:
        return None
    return InputTransform(scale, kronecker, learn_scale=False, static=static)
