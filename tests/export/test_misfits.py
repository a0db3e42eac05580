"""What auto-round's layout cannot hold, and folding; without the library."""

from pathlib import Path

import pytest
import torch

from recon.errors import ExportError
from recon.export import fresh
from recon.export.auto_round import _fold
from recon.export.exporting import export
from recon.export.finished import Finished
from recon.export.public import public_network
from tests.export.conftest import Made
from tests.export.finished_run import TOKEN8, Recipe
from tests.export.test_export import leftovers

FOLDABLE = ("attention_input", "attention_output", "feed_forward_up")
MISFITS = {
    "A8": ("dit", Recipe(activation=TOKEN8), "to 8 bits, which auto-round leaves alone"),
    "rotated": ("dit", Recipe(rotated=True), "by a learned rotation"),
    "behind GELU": ("dit", Recipe(scaled=("feed_forward_down",)), r"ff\.net\.2 multiplies"),
    "CogVideoX scaled": ("cogvideox", Recipe(scaled=FOLDABLE), "no layer before it can take"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_auto_round_cannot_hold_is_refused_with_what_can(
    name: str, run_of: Made, tmp_path: Path
) -> None:
    family, recipe, reason = MISFITS[name]
    with pytest.raises(ExportError, match=reason) as refused:
        export(run_of(family, recipe), "auto-round", tmp_path / "out")
    assert "hold it: native, " in str(refused.value)
    assert ("torchao" in str(refused.value)) == (name != "rotated")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("plain_roles", [(), ("modulation", "attention_input")])
def test_a_folded_network_computes_the_same_without_scales(
    plain_roles: tuple[str, ...], run_of: Made
) -> None:
    finished = Finished.open(run_of("dit", Recipe(scaled=FOLDABLE, plain_roles=plain_roles)))
    call = finished.native.adapter.call_arguments(finished.samples[0], "cpu")
    expected = fresh.outputs(finished.native.network(), [call])[0]
    layers = finished.layers
    network = public_network(finished, layers)
    names = set(network.state_dict())
    _fold(finished, network, layers)
    assert all(layer.transform is None for layer in layers.values())
    assert set(network.state_dict()) <= names
    assert torch.allclose(fresh.outputs(network, [call])[0], expected, atol=1e-4, rtol=1e-4)
