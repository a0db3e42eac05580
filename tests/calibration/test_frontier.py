"""The carried streams: what they hold, what they cost, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.frontier import Frontier
from recon.calibration.statistics import UnitRecord, recorded_inputs
from recon.calibration.streams import MemoryStreams
from recon.errors import NumericsError
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from recon.types import Sample, State
from tests.engine.tiny_run import HELD_OUT, SAMPLES, fit
from tests.models.tiny import tiny_sample

CPU = torch.device("cpu")


@pytest.fixture
def adapter(teacher: Path) -> CogVideoX:
    return CogVideoX(str(teacher))


def frontier(adapter: CogVideoX, samples: int = 2, held_out: int = 1) -> Frontier:
    config = adapter.empty_network().config
    made = [tiny_sample(config, seed=seed) for seed in range(samples + held_out)]
    return Frontier(adapter, made[:samples], made[samples:], MemoryStreams(CPU), CPU)


def blocks(adapter: CogVideoX) -> list[nn.Module]:
    return [adapter.block(name, CPU) for name in adapter.block_names]


class Counter:
    """Forwards of the public block class, whoever calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

        self.calls = 0
        original = CogVideoXBlock.forward

        def counted(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += not torch.is_grad_enabled()  # training steps are not the streams' cost
            return original(block, *args, **kwargs)

        monkeypatch.setattr(CogVideoXBlock, "forward", counted)


@pytest.mark.parametrize("method", [RoundToNearest, S2QVDiT])
def test_a_whole_fit_costs_two_block_forwards_per_block_and_sample(
    method: type[RoundToNearest] | type[S2QVDiT],
    teacher: Path,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = Counter(monkeypatch)
    more: dict[str, Any] = {"epochs": 1} if method is S2QVDiT else {}
    module = method(adapter=CogVideoX(str(teacher)), threads=1, compile=False, **more)
    fit(tmp_path, module, samples)
    count, depth = SAMPLES + HELD_OUT, 3
    forwards = module.frontier.forwards
    assert (forwards.teacher, forwards.student) == (depth * count, depth * count)
    assert forwards.nearest == depth * HELD_OUT  # the yardstick, beside the two streams
    assert counter.calls == 2 * depth * count + depth * HELD_OUT


def test_passing_every_unit_gives_the_outputs_of_the_whole_network(adapter: CogVideoX) -> None:
    front = frontier(adapter)
    assert front.start()
    for block in blocks(adapter):
        front.record([block])
        errors = front.advance([block], [block])
        assert errors == {"student": 0.0, "nearest": 0.0}
    whole = adapter.network(CPU)
    for index in (0, 2):
        with torch.no_grad():
            (expected,) = whole(**front.sample(index), return_dict=False)
        for stream in ("teacher", "student"):
            assert torch.equal(front.final(stream, index), expected)


def test_targets_are_the_teachers_and_inputs_each_streams_own(adapter: CogVideoX) -> None:
    front = frontier(adapter)
    front.start()
    first, second, _ = blocks(adapter)
    front.record([first])
    with torch.no_grad():
        expected = adapter.forward_block(first, front.state("teacher", 0))
    assert torch.equal(front.target(0), adapter.tokens(expected))
    front.advance([second], [first])  # a student that differs from its teacher
    assert torch.equal(front.state("teacher", 0)["hidden_states"], expected["hidden_states"])
    assert not torch.equal(front.state("student", 0)["hidden_states"], expected["hidden_states"])
    assert front.boundary == 1


def test_the_error_is_relative_over_all_held_out_tokens(adapter: CogVideoX) -> None:
    front = frontier(adapter, samples=1, held_out=2)
    front.start()
    first, second, _ = blocks(adapter)
    front.record([first])
    targets = [front.target(index).double() for index in front.held_out]
    with torch.no_grad():
        outputs = [
            adapter.tokens(adapter.forward_block(second, front.state("student", index))).double()
            for index in front.held_out
        ]
    errors = front.advance([second], [first])
    pairs = zip(outputs, targets, strict=True)
    wrong = sum(float((out - target).square().sum()) for out, target in pairs)
    power = sum(float(target.square().sum()) for target in targets)
    assert errors["student"] == pytest.approx(wrong / power, rel=1e-9)
    assert errors["nearest"] == 0.0


def test_held_out_samples_are_not_observed(adapter: CogVideoX) -> None:
    from contextlib import nullcontext

    front, seen = frontier(adapter), []

    def observe(index: int) -> Any:
        seen.append(index)
        return nullcontext()

    front.start()
    front.record(blocks(adapter)[:1], observe)
    assert seen == front.calibration == [0, 1]
    assert front.held_out == [2]


def spoiled(sample: Sample) -> Sample:
    latent = sample["hidden_states"].clone()
    latent[0, 0, 0, 0, 0] = torch.nan
    return {**sample, "hidden_states": latent}


def test_nan_in_a_latent_names_boundary_and_sample(adapter: CogVideoX) -> None:
    config = adapter.empty_network().config
    made = [tiny_sample(config, seed=seed) for seed in range(3)]
    made[1] = spoiled(made[1])
    front = Frontier(adapter, made[:2], made[2:], MemoryStreams(CPU), CPU)
    with pytest.raises(
        NumericsError, match="teacher stream holds NaN or Inf at boundary 0, sample 1"
    ):
        front.start()


def test_nan_out_of_a_unit_names_the_boundary_behind_it(adapter: CogVideoX) -> None:
    front = frontier(adapter)
    front.start()
    first, second, _ = blocks(adapter)
    front.record([first])
    second.get_submodule("ff.net.2").bias = nn.Parameter(torch.full((32,), torch.inf))
    with pytest.raises(NumericsError, match="student stream holds NaN or Inf at boundary 1"):
        front.advance([second], [first])


class Half(MemoryStreams):
    """A store that can be reopened on one rank alone."""

    def restorable(self, boundary: int, streams: tuple[str, ...]) -> bool:
        return True


def test_streams_lost_by_another_process_are_replayed_by_all(
    adapter: CogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = tiny_sample(adapter.empty_network().config)
    front = Frontier(adapter, [sample], [], Half(CPU), CPU)
    assert front.start(2)
    assert front.boundary == 2
    monkeypatch.setattr(ranks, "maximum", lambda tensor: tensor.fill_(1))  # the other lost its own
    assert not front.start(2)
    assert front.boundary == 0


# What is recorded about a unit's inputs


@pytest.fixture
def linears() -> dict[str, nn.Linear]:
    return {"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)}


def test_maxima_and_gram_run_over_all_samples(linears: dict[str, nn.Linear]) -> None:
    record = UnitRecord()
    batches = [torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    for batch in batches:
        with recorded_inputs(linears, record, with_gram=["a"]):
            for linear in linears.values():
                linear(batch)
    record.reduce()
    rows = torch.cat(batches).reshape(-1, 4)
    assert torch.equal(record.absmax["b"], rows.abs().amax(0))
    assert set(record.gram) == {"a"}
    assert record.gram["a"].dtype == torch.float64
    torch.testing.assert_close(
        record.gram["a"], rows.double().T @ rows.double(), rtol=1e-5, atol=1e-5
    )
    assert not linears["a"]._forward_pre_hooks


def test_the_order_of_samples_changes_no_bit_of_the_gram(linears: dict[str, nn.Linear]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(7, 4, generator=generator) for _ in range(9)]

    def gram(order: list[Tensor]) -> Tensor:
        record = UnitRecord()
        for batch in order:
            with recorded_inputs(linears, record, with_gram=["a"]):
                linears["a"](batch)
        return record.gram["a"]

    assert torch.equal(gram(batches), gram(batches[::-1]))


def test_inputs_that_are_not_finite_name_the_linear(linears: dict[str, nn.Linear]) -> None:
    record = UnitRecord()
    with recorded_inputs(linears, record, with_gram=[]):
        linears["b"](torch.tensor([[1.0, torch.inf, 0.0, 0.0]]))
    with pytest.raises(NumericsError, match="The input of b holds NaN or Inf"):
        record.reduce()


def test_the_state_carries_conditioning_of_its_own_sample(adapter: CogVideoX) -> None:
    config = adapter.empty_network().config
    early, late = tiny_sample(config, timestep=10), tiny_sample(config, timestep=900)
    front = Frontier(adapter, [early, late], [], MemoryStreams(CPU), CPU)
    front.start()
    states: list[State] = [front.state("teacher", index) for index in (0, 1)]
    assert not torch.equal(states[0]["temb"], states[1]["temb"])
    assert torch.equal(states[0]["temb"], adapter.embed(early, CPU)["temb"])


def test_samples_are_alike_if_their_shapes_are(adapter: CogVideoX) -> None:
    streams = frontier(adapter)
    assert streams.alike
    config = adapter.empty_network().config
    one, other = tiny_sample(config, seed=0), tiny_sample(config, seed=1)
    other["encoder_hidden_states"] = other["encoder_hidden_states"][:, 1:]
    assert not Frontier(adapter, [one, other], [one], MemoryStreams(CPU), CPU).alike
