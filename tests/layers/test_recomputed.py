"""A compiled step keeps nothing of its quantisers, and learns what the eager one does."""

import torch
from torch import Tensor, nn

from recon.layers.quant_linear import QuantLinear
from recon.layers.recomputed import recomputed
from recon.layers.rounding import NearestRounding
from recon.layers.transform import InputTransform
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import KroneckerTransform

WEIGHT = QuantSpec(num_bits=4)
TOKEN = QuantSpec(num_bits=6, strategy="token", dynamic=True)
WIDTH, TOKENS, DEPTH = 96, 64, 2


def learning() -> nn.Sequential:
    layers = []
    for depth in range(DEPTH):
        generator = torch.Generator().manual_seed(depth)
        linear = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        linear.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        kronecker = KroneckerTransform(WIDTH, generator=generator)
        layers.append(
            QuantLinear(
                linear,
                WEIGHT,
                TOKEN,
                transform=InputTransform(torch.ones(WIDTH), kronecker),
                rounding=NearestRounding(WIDTH, WEIGHT, learn_clip=True),
                learn_activation_clip=True,
            )
        )
    return nn.Sequential(*layers)


def test_a_compiled_step_keeps_operands_and_no_masks() -> None:
    layers = learning()
    tokens = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))
    tokens.requires_grad_()
    # The compiler's partition into forward and backward, without its C++.
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compiled(tokens)
    # Left to itself, the compiler keeps both masks of every weight and input.
    assert sum(tensor.numel() for tensor in kept.values() if tensor.dtype == torch.bool) == 0
    assert sum(tensor.numel() for tensor in kept.values()) > DEPTH * WIDTH * WIDTH  # hooks saw all
    leaves = [tokens, *layers.parameters()]
    ours = torch.autograd.grad(output.square().sum(), leaves)
    theirs = torch.autograd.grad(layers(tokens).square().sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_eagerly_nothing_is_done_twice() -> None:
    calls = []

    def quantizer(inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return inputs.exp()

    recomputed(quantizer, torch.ones(3, requires_grad=True)).sum().backward()
    assert len(calls) == 1
