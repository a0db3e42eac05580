"""The error that is a layer's own: on what reaches it, beside the same layer rounded to nearest."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from recon.engine.layer_errors import LayerErrors
from recon.layers.quant_linear import QuantLinear
from recon.methods.gptq import GPTQ
from recon.methods.rtn import RoundToNearest
from recon.models.cogvideox import CogVideoX
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit

CPU = torch.device("cpu")
W3, A4 = QuantSpec(num_bits=3), QuantSpec(num_bits=4, strategy="token", dynamic=True)


def quantised(linear: nn.Linear, activation: QuantSpec | None) -> QuantLinear:
    layer = QuantLinear(linear, W3, activation)
    layer.bias = linear.bias
    return layer


@torch.no_grad()
def test_it_is_the_error_of_the_product_over_all_tokens_and_samples() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    linear.bias.fill_(100.0)  # in no product, so in no power
    layer, nearest = quantised(linear, None), quantised(linear, A4)
    errors = LayerErrors({"a": linear}, {"a": layer}, {"a": nearest})
    samples = [scale * torch.randn(2, 5, 16) for scale in (1.0, 30.0)]
    for index, sample in enumerate(samples):
        with errors.observed(index):
            layer(sample)
    layer(1000 * samples[0])  # seen by no one
    whole = torch.cat(samples)
    product = (whole @ linear.weight.T).double()
    expected = {
        name: float((q(whole).double() - 100 - product).square().sum() / product.square().sum())
        for name, q in (("error_before", nearest), ("error_after", layer))
    }
    found = errors.reduced(CPU)["a"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["error_before"] > found["error_after"] > 1e-3


@torch.no_grad()
def test_a_layer_that_puts_out_nothing_has_no_relative_error() -> None:
    linear = nn.Linear(4, 4)
    linear.weight.zero_()
    layer = quantised(linear, None)
    errors = LayerErrors({"a": linear}, {"a": layer}, {"a": quantised(linear, None)})
    with errors.observed(0):
        layer(torch.ones(1, 4))
    assert errors.reduced(CPU) == {}


def test_every_layer_of_a_run_has_its_error_in_the_manifest(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    found = {}
    for method in (RoundToNearest, GPTQ):
        root = tmp_path / method.__name__
        fit(root, method(adapter=CogVideoX(str(teacher)), threads=1, compile=False), samples)
        found[method] = json.loads((root / "quantized" / "manifest.json").read_text())["layers"]
    for facts in found[RoundToNearest].values():
        assert 0 < facts["error_before"] < 1
        assert facts["error_after"] == pytest.approx(facts["error_before"], rel=1e-3)
    better = [facts["error_after"] < facts["error_before"] for facts in found[GPTQ].values()]
    assert sum(better) > 0.75 * len(better)
    # In front of the first linear nothing is quantised yet: both runs measure the same.
    first = "transformer_blocks.0.norm1.linear"
    errors = [found[method][first]["error_before"] for method in found]
    assert errors[0] == errors[1]
