"""What one step of the open unit reads, and how the unit is run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from recon.calibration.attention import AttentionColumnSums
from recon.engine.unit import OpenUnit
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.transform import InputTransform, begin_all
from recon.models.adapter import ModelAdapter
from recon.models.capabilities import ExposesAttention, RunsLeftToRight, missing_attributes
from recon.types import Sample, State

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def seeded(text: str) -> torch.Generator:
    """A CPU generator whose seed is a hash of `text`."""
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def timestep_rows(samples: Sequence[Sample]) -> list[int]:
    """Place of each sample's timestep among the distinct ones of all samples, ascending.

    Raises:
        CapabilityMissing: A sample has no timestep.
    """
    if any("timestep" not in sample for sample in samples):
        raise CapabilityMissing(
            "The method treats timesteps apart, and the calibration samples have none: the network "
            "is no diffusion model. Let it treat samples apart (ssc_over: sample), or use a method "
            "without timesteps."
        )
    timesteps = [int(sample["timestep"].flatten()[0]) for sample in samples]
    places = {timestep: place for place, timestep in enumerate(sorted(set(timesteps)))}
    return [places[timestep] for timestep in timesteps]


def run_blocks(adapter: ModelAdapter, blocks: Sequence[nn.Module], state: State) -> State:
    """The state that leaves `blocks`."""
    for block in blocks:
        state = adapter.forward_block(block, state)
    return state


def run_learning(
    adapter: ModelAdapter,
    blocks: Sequence[nn.Module],
    transforms: Sequence[InputTransform],
    state: State,
) -> State:
    """`run_blocks` while the unit learns; the function that is compiled.

    Each distinct input is transformed once, whatever the number of linears that share it.
    """
    begin_all(transforms)
    state = run_blocks(adapter, blocks, state)
    for transform in transforms:
        transform.end()
    return state


def input_state(module: "Reconstruction", sample: int, step: int) -> State:
    """What enters the open unit in training: teacher's stream, quantised prefix's, or a mix.

    Source: the mix is QDrop's (arXiv 2203.05740): each element from the teacher with
    probability 1/2, drawn from (seed, unit, step, sample).
    """
    streams = {"full_precision": "teacher", "quantised": "student"}
    if module.inputs != "mix":
        return module.frontier.state(streams[module.inputs], sample)
    generator = module.generator("mix", step, sample)
    teacher = module.frontier.state("teacher", sample)
    student = module.frontier.state("student", sample)
    for name in module.adapter.streamed:
        tensor = teacher[name]
        keep = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.5
        student[name] = torch.where(keep, tensor, student[name])
    return student


def joined(adapter: ModelAdapter, states: Sequence[State]) -> State:
    """The states of several samples as one, along the batch, short ones filled up behind.

    Raises:
        ConfigError: They differ in shape, and the adapter has no filling for that.
    """
    if len(states) == 1:
        return states[0]
    if isinstance(adapter, RunsLeftToRight):
        lengths = [adapter.tokens(state).shape[1] for state in states]
        longest = max(lengths)
        states = [
            state if length == longest else adapter.filled(state, longest)
            for state, length in zip(states, lengths, strict=True)
        ]
    first = {name: tensor.shape for name, tensor in states[0].items()}
    if any({n: t.shape for n, t in state.items()} != first for state in states):
        raise ConfigError(
            "Samples of different shapes cannot go through a unit together. Set model.micro_batch "
            "to 1, or calibrate with samples of one shape."
        )
    return {name: torch.cat([state[name] for state in states]) for name in first}


def exposed_attention(module: "Reconstruction") -> ExposesAttention:
    """The adapter, as one that exposes its attention.

    Raises:
        CapabilityMissing: It does not.
    """
    adapter = module.adapter
    if not isinstance(adapter, ExposesAttention):
        raise CapabilityMissing(
            f"{type(module).__name__} weights tokens by attention, which {type(adapter).__name__} "
            f"does not expose. Implement {', '.join(missing_attributes(adapter, ExposesAttention))}"
            " or set std.lambda_min to 1."
        )
    return adapter


@contextmanager
def recorded_salience(module: "Reconstruction", unit: OpenUnit, sample: int) -> Iterator[None]:
    """Keeps the attention column sums of the forward run inside, [batch, tokens], on the CPU."""
    adapter = exposed_attention(module)
    real = adapter.attention_tokens(module.frontier.state("teacher", sample))
    with AttentionColumnSums(real.shape[1], real) as sums:
        yield
    unit.record.salience[sample] = sums.sums()
