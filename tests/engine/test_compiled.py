"""A compiled step: units of one shape share it, and it learns what the eager one does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from recon.engine import Reconstruction
from recon.methods.adaround import AdaRound
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit, write_samples
from tests.models.tiny import write_tiny_cogvideox

METHODS: dict[str, Callable[..., Reconstruction]] = {
    "s2q_vdit": partial(S2QVDiT, epochs=1),
    "adaround": partial(AdaRound, steps=4),
    "ptq4dit": partial(PTQ4DiT, steps=4),
    "ptq4dit, fixed ranges": partial(
        PTQ4DiT, steps=4, activation=QuantSpec(num_bits=6, strategy="tensor", symmetric=False)
    ),
}


class Graphs(Callback):
    """Counts what has been compiled whenever a stage has ended."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []
        self.after: list[int] = []

    def count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.made.append(graph)
        return graph.forward

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(len(self.made))


@pytest.mark.slow  # a fit of three units, twice
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
def test_a_step_is_compiled_once_for_all_units(
    method: str, rotary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_tiny_cogvideox(tmp_path / "teacher", rotary=rotary, layers=3)
    samples = write_samples(tmp_path / "samples", teacher)
    graphs, errors = Graphs(), []
    torch._dynamo.reset()
    compiler = partial(torch.compile, backend=graphs.count)
    monkeypatch.setattr("recon.engine.reconstruction.torch.compile", compiler)
    for choice in (True, False):
        module = METHODS[method](adapter=CogVideoX(str(teacher)), threads=1, compile=choice)
        fit(tmp_path / str(choice), module, samples, graphs)
        errors.append(module.final_error["reconstructed"])
    first, *later = graphs.after[:3]
    assert first > 0
    assert later == [first, first]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
