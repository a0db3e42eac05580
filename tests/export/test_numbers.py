"""Writers that are wrong by little: a step size, a zero-point, one code, a factor of a channel."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recon.errors import ExportError
from recon.export import auto_round, bf16, compressed_tensors, layer, torchao
from recon.export.exporting import export
from recon.layers.quant_linear import QuantLinear
from recon.layers.static_range import StaticRange
from recon.quantizers.spec import QuantSpec
from tests.export.conftest import Made
from tests.export.finished_run import ASYMMETRIC8, STATIC8, TOKEN8, Recipe
from tests.export.test_export import leftovers

pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")
pytest.importorskip("auto_round")
pytestmark = [
    pytest.mark.usefixtures("shared_loader"),
    pytest.mark.slow,  # importing auto-round takes many seconds
]

ASYMMETRIC4 = QuantSpec(num_bits=4, strategy="tensor", symmetric=False)
FOLDABLE = ("attention_input", "attention_output", "feed_forward_up")
EVERY_INPUT = (*FOLDABLE, "feed_forward_down")


def larger_steps(quantized: QuantLinear) -> Tensor:
    return layer.step_sizes(quantized) * 1.01


def one_code_more(quantized: QuantLinear) -> Tensor:
    integers = layer.codes(quantized)
    integers[0, 0] += 1 if integers[0, 0] < 0 else -1
    return integers


def larger_factors(quantized: QuantLinear) -> Tensor | None:
    factors = layer.channel_scale(quantized)
    return None if factors is None else factors * 1.01


def moved(step: float, shift: int) -> Callable[[QuantLinear], StaticRange | None]:
    """`static_range` with a larger step size and another zero-point."""

    def changed(quantized: QuantLinear) -> StaticRange | None:
        fixed = layer.static_range(quantized)
        if fixed is None:
            return None
        return StaticRange.closed(fixed.step * step, fixed.zero_point + shift, fixed.spec)

    return changed


def merged_with_one_more(quantized: QuantLinear) -> Tensor:
    weight = layer.merged_weight(quantized)
    weight[0, 0] += layer.step_sizes(quantized)[0, 0]
    return weight


def larger_weights(quantized: QuantLinear) -> Tensor:
    return layer.merged_weight(quantized) * 1.01


A8, FIXED8 = Recipe(activation=TOKEN8), Recipe(activation=STATIC8)
Wrong = Callable[[QuantLinear], object]
CASES: tuple[tuple[str, str, str, Recipe, object, str, Wrong], ...] = (
    ("torchao", "dit", "W4A8", A8, torchao, "step_sizes", larger_steps),
    ("torchao", "video", "W4A8", A8, torchao, "step_sizes", larger_steps),
    ("torchao", "cogvideox", "W4", Recipe(), torchao, "step_sizes", larger_steps),
    ("torchao", "dit", "W4A8", A8, torchao, "codes", one_code_more),
    ("torchao", "dit", "W4", Recipe(), torchao, "codes", one_code_more),
    ("torchao", "dit", "W4A8 fixed", FIXED8, torchao, "static_range", moved(1.01, 0)),
    (
        "torchao", "dit", "W4A8 shifted", Recipe(activation=ASYMMETRIC8),
        torchao, "static_range", moved(1.0, 1),
    ),
    (
        "torchao", "dit", "W4A8 scaled", Recipe(activation=TOKEN8, scaled=EVERY_INPUT),
        torchao, "channel_scale", larger_factors,
    ),
    (
        "torchao", "dit", "W4 scaled", Recipe(scaled=EVERY_INPUT),
        torchao, "channel_scale", larger_factors,
    ),
    ("auto-round", "dit", "W4", Recipe(), auto_round, "step_sizes", larger_steps),
    ("auto-round", "dit", "W4", Recipe(), auto_round, "codes", one_code_more),
    (
        "auto-round", "dit", "W4 scaled", Recipe(scaled=FOLDABLE),
        auto_round, "channel_scale", larger_factors,
    ),
    *(
        ("compressed-tensors", "llava", kind, recipe, compressed_tensors, what, wrong)
        for kind, recipe, what, wrong in (
            ("W4A8", A8, "step_sizes", larger_steps),
            ("W4A8", A8, "codes", one_code_more),
            ("W4A8 fixed", FIXED8, "static_range", moved(1.01, 0)),
            ("W4A8 shifted", Recipe(activation=ASYMMETRIC8), "step_sizes", larger_steps),
            ("W4A8 shifted", Recipe(activation=ASYMMETRIC8), "static_range", moved(1.0, 1)),
            ("W4A4 shifted", Recipe(activation=ASYMMETRIC4), "static_range", moved(1.0, 1)),
            ("W4A4 shifted far", Recipe(activation=ASYMMETRIC4), "static_range", moved(1.3, 0)),
        )
    ),
    ("bf16", "dit", "W4A8", A8, bf16, "merged_weight", merged_with_one_more),
    ("bf16", "llava", "W4", Recipe(), bf16, "merged_weight", larger_weights),
)  # fmt: skip
"""Format, family, kind, recipe, the writer's module, what it takes from a layer, what it gets."""


@pytest.mark.parametrize(
    ("form", "family", "kind", "recipe", "module", "what", "wrong"),
    CASES,
    ids=[f"{case[0]}, {case[1]}, {case[2]}, {case[5]}" for case in CASES],
)
def test_a_wrong_writer_is_refused_and_its_export_removed(
    form: str,
    family: str,
    kind: str,
    recipe: Recipe,
    module: object,
    what: str,
    wrong: Wrong,
    run_of: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, what, wrong)
    with pytest.raises(ExportError, match=r"other numbers than the run|With the factors of"):
        export(run_of(family, recipe), form, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_digests_tell_every_value_and_no_sign_of_zero() -> None:
    from recon.export.fresh import _digest

    ones = torch.ones(2, 3)
    assert _digest(ones) == _digest(ones.half().T)
    assert _digest(torch.zeros(1)) == _digest(-torch.zeros(1))
    assert _digest(ones) != _digest(ones * (1 + 2**-23))
