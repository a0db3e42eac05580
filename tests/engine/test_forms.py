"""The forms of a network in an evaluation, of which a crowded accelerator holds one at a time."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.engine import Reconstruction, forms, sampling
from recon.engine.sampling import Form, network, sample
from recon.engine.step_errors import squared_errors
from recon.layers.quant_linear import QuantLinear
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.q_vlm import QVLM
from recon.methods.rtn import RoundToNearest
from recon.models.adapter import ModelAdapter
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit, write_samples
from tests.models.tiny import write_tiny_cogvideox, write_tiny_dit
from tests.models.tiny_vlm import FAMILIES, write_tiny_vlm

CPU = torch.device("cpu")
ALL: tuple[Form, ...] = ("full_precision", "round_to_nearest", "quantized")
BATCHES = [{"prompt": ["a red square"], "seed": [seed]} for seed in (3, 4)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return write_tiny_cogvideox(folder, rotary=True, height=4, width=4, frames=5, pipeline=True)


@pytest.fixture
def fitted(teacher: Path, tmp_path: Path) -> Reconstruction:
    module = RoundToNearest(adapter=CogVideoX(str(teacher)), weight=QuantSpec(num_bits=4))
    fit(tmp_path / "run", module, write_samples(tmp_path / "set", teacher))
    return module


class Places:
    """Says where networks were carried; a call of one that waits is an error."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, str] = {}

    def carry(self, moved: nn.Module, device: Any) -> None:
        """In place of the true one: there is a single device here."""
        if moved not in self.of:
            moved.register_forward_pre_hook(lambda called, args: self.refuse(called))
        # The device that samples comes as torch.device, host memory by its name.
        self.of[moved] = "waits" if device == "cpu" and isinstance(device, str) else "stands"

    def refuse(self, called: nn.Module) -> None:
        assert self.of[called] == "stands"

    @property
    def waiting(self) -> int:
        return sum(place == "waits" for place in self.of.values())


def loose(whole: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a part of the network holds, registered or not."""
    for name, part in whole.named_modules():
        held = {**vars(part), **part._parameters, **part._buffers}
        yield from ((f"{name}.{k}", t) for k, t in held.items() if isinstance(t, Tensor))


def test_one_form_stands_on_a_crowded_device_and_makes_what_it_makes_anywhere(
    fitted: Reconstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = [sample(fitted, batch, ALL) for batch in BATCHES]
    errors = squared_errors(fitted, "a", 0)
    assert fitted.forms_apart is False
    assert len({id(made.network) for made in fitted.pipelines.values()}) == 3

    places = Places()
    monkeypatch.setattr(sampling, "carry", places.carry)
    monkeypatch.setattr(sampling, "crowded", lambda adapter, device: True)
    fitted.pipelines.clear()
    fitted.forms_apart = None
    for batch, expected in zip(BATCHES, together, strict=True):
        found = sample(fitted, batch, ALL)
        assert all(torch.equal(found[form], expected[form]) for form in ALL)
        assert places.waiting == 2
        assert places.of.get(fitted.pipelines["quantized"].network, "stands") == "stands"
    assert squared_errors(fitted, "a", 0) == errors
    assert places.of[fitted.pipelines["quantized"].network] == "stands"


def adapters(folder: Path) -> Iterator[ModelAdapter]:
    yield CogVideoX(str(write_tiny_cogvideox(folder / "cogvideox")))
    yield DiT(str(write_tiny_dit(folder / "dit")))
    for name, (family, *_) in FAMILIES.items():
        yield family(str(write_tiny_vlm(folder / name, name)))


def test_no_tensor_of_a_form_stays_behind(tmp_path: Path, fitted: Reconstruction) -> None:
    methods: list[Reconstruction] = [fitted]
    for adapter in adapters(tmp_path):
        if isinstance(adapter, DiT):
            methods.append(PTQ4DiT(adapter=adapter, stem_and_head=QuantSpec(num_bits=8)))
        elif isinstance(adapter, CogVideoX):
            methods.append(RoundToNearest(adapter=adapter))
        else:
            methods.append(QVLM(adapter=adapter))
    for module in methods:
        for form in ALL if module is fitted else ALL[:2]:
            whole = network(module, form, CPU)
            before = {name: (t.shape, t.dtype) for name, t in loose(whole)}
            forms.carry(whole, "meta")
            left = [name for name, tensor in loose(whole) if not tensor.is_meta]
            assert not left, (type(module.adapter).__name__, form, left)
            assert {name: (t.shape, t.dtype) for name, t in loose(whole)} == before


def test_a_layer_rounded_to_nearest_holds_one_weight(teacher: Path) -> None:
    module = RoundToNearest(adapter=CogVideoX(str(teacher)))
    whole = network(module, "round_to_nearest", CPU)
    layers = [part for part in whole.modules() if isinstance(part, QuantLinear)]
    assert layers
    assert all(layer.teacher_weight is None for layer in layers)
    assert all(layer.resident_weight is not None for layer in layers)


@pytest.mark.parametrize(("memory", "apart"), [(1.01, False), (0.99, True)])
def test_forms_stand_apart_where_three_of_them_crowd_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, apart: bool
) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path)), dtype="bfloat16")
    network = 2 * sum(p.numel() for p in adapter.empty_network().parameters())
    total = SimpleNamespace(total_memory=memory * 3 * network / forms.SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    assert forms.crowded(adapter, torch.device("cuda:0")) == apart
    assert not forms.crowded(adapter, CPU)
