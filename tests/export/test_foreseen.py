"""Exports of runs that are still to be made: what would be refused, and fits that ask for it."""

from pathlib import Path
from typing import Any

import pytest

from recon.engine.foresight import closed_layers
from recon.errors import ExportError
from recon.export import format as formats
from recon.export.foreseen import foreseen_exports, refuse_unexportable
from recon.methods.q_vlm import QVLM
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from recon.models.llava import Llava
from recon.quantizers.spec import QuantSpec
from tests.models.tiny import write_tiny_cogvideox
from tests.models.tiny_vlm import write_tiny_vlm

LOADABLE = QuantSpec(4, "token", dynamic=True, scale_denominator="half_range")


def q_vlm(folder: Path, **settings: Any) -> QVLM:
    adapter = Llava(str(write_tiny_vlm(folder, "llava")))
    return QVLM(adapter=adapter, activation=LOADABLE, threads=1, **settings)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, True),
        ({"rounding": "none"}, True),  # searched
        ({"rounding": "gptq", "shrinks": (1.0, 0.9)}, True),
        ({"shrinks": (1.0,)}, True),  # learned
        ({"rounding": "none", "shrinks": (1.0,)}, False),
    ],
)
def test_ranges_that_are_searched_or_learned_are_foreseen(
    settings: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    module = q_vlm(tmp_path, **settings)
    found = foreseen_exports(module, closed_layers(module, module.foreseen_units()))
    (reasons,) = (e.obstacles for e in found if e.format == "compressed-tensors")
    expected = "quantises tokens on a learned share of their range (and "
    assert [expected in reason for reason in reasons] == ([True] if refused else [])


def test_a_learned_share_has_no_number_before_it_is_learned(tmp_path: Path) -> None:
    activation = QuantSpec(8, "token", dynamic=True, scale_denominator="half_range")
    module = S2QVDiT(adapter=CogVideoX(str(write_tiny_cogvideox(tmp_path))), activation=activation)
    with pytest.raises(ExportError, match=r"on a learned share of their range \(and "):
        refuse_unexportable(module, ["torchao"])


def test_every_format_that_cannot_hold_a_fit_is_named_with_those_that_can(tmp_path: Path) -> None:
    module = RoundToNearest(CogVideoX(str(write_tiny_cogvideox(tmp_path))))
    with pytest.raises(ExportError) as refused:
        refuse_unexportable(module, ["bf16", "auto-round", "torchao"])
    said = str(refused.value)
    assert said.startswith("export.formats names torchao, auto-round, which cannot hold")
    assert "quantises its input to 6 bits" in said
    assert "Formats that can: native, bf16. Leave the others out of export.formats." in said
    refuse_unexportable(module, ["bf16", "native"])
    refuse_unexportable(module, [])


def test_missing_packages_are_named_before_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = RoundToNearest(CogVideoX(str(write_tiny_cogvideox(tmp_path))), activation=None)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="Format torchao needs torchao, accelerate"):
        refuse_unexportable(module, ["torchao"])
