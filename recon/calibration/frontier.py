"""The carried streams: what enters the open unit, per calibration sample.

Three streams walk through the network together, one unit at a time:

    teacher   activations of the full-precision network
    student   activations of the network whose closed units are quantised
    nearest   the same with every unit rounded to nearest, held-out samples only

Each unit costs one full-precision and one quantised forward per sample, 2L for the network.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.streams import StreamStore
from recon.errors import NumericsError
from recon.models.adapter import ModelAdapter
from recon.types import Sample, State

STREAMS = ("teacher", "student", "nearest")

Embed = Callable[[Sample], State]
"""What enters the first block, of a sample."""
Observe = Callable[[int], AbstractContextManager[None]]
"""Gives the context around a forward of a sample."""


class Ends(Protocol):
    """What streams other than the teacher's have in front of the first block and behind the last.

    Its forwards are no block forwards, and are not counted.
    """

    def embed(self, stream: str, sample: Sample) -> State:
        """What enters the first block in that stream."""
        ...

    def output(self, stream: str, sample: Sample, state: State) -> Tensor:
        """The network's output in that stream, from the state that leaves the last block."""
        ...


@dataclass
class BlockForwards:
    """Forwards of a single block for a single sample, over a run and what it had to repeat."""

    teacher: int = 0
    student: int = 0
    nearest: int = 0


class Frontier:
    """Both networks' activations at the boundary in front of the open unit.

    Samples are known by their index over all processes: calibration samples first, then held-out
    ones. This process holds those whose index modulo the number of processes is its rank.

    Args:
        adapter: Runs embedders and blocks.
        samples: All calibration samples.
        held_out: All held-out samples; they are carried along but never trained on.
        store: Keeps the activations.
        device: Where blocks run.
        embed: Makes what enters the first block; None: the adapter.
        ends: The same for streams other than the teacher's, and their outputs; None: all streams
            enter and leave the chain of blocks as the teacher's does.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        store: StreamStore,
        device: torch.device,
        embed: Embed | None = None,
        ends: Ends | None = None,
    ) -> None:
        self._adapter, self._store, self.device = adapter, store, device
        self._embed = embed or (lambda sample: adapter.embed(sample, device))
        self._ends = ends
        self._samples, self._held_out = samples, held_out
        count = len(samples)
        self.calibration = [i for i in range(count) if self._mine(i)]
        self.held_out = [count + i for i in range(len(held_out)) if self._mine(i)]
        self.boundary = 0
        self.forwards = BlockForwards()
        self._conditioning: dict[tuple[str, int], State] = {}
        self._inner = range(0)

    @staticmethod
    def _mine(index: int) -> bool:
        return index % ranks.world() == ranks.rank()

    def _everywhere(self, mine: bool) -> bool:
        # Streams lost by one process alone are replayed by all: replaying reduces errors.
        lost = torch.tensor(0 if mine else 1, device=self.device)
        return int(ranks.maximum(lost)) == 0

    def sample(self, index: int) -> Sample:
        """The network's arguments of a sample."""
        count = len(self._samples)
        return self._samples[index] if index < count else self._held_out[index - count]

    @property
    def alike(self) -> bool:
        """Whether all calibration samples, of every process, have the same shapes."""
        shapes = (
            tuple((name, tensor.shape) for name, tensor in sorted(self._samples[index].items()))
            for index in range(len(self._samples))
        )
        first = next(shapes)
        return all(other == first for other in shapes)

    @torch.no_grad()
    def start(self, boundary: int = 0) -> bool:
        """Fills the streams at `boundary`; False where they must be replayed from the start."""
        restored = boundary > 0 and self._everywhere(self._store.restorable(boundary, STREAMS))
        self.boundary = boundary if restored else 0
        for index in self.calibration + self.held_out:
            sample = self.sample(index)
            teacher = self._embed(sample)
            for stream in STREAMS if index in self.held_out else STREAMS[:-1]:
                ends = None if stream == "teacher" else self._ends
                state = teacher if ends is None else ends.embed(stream, sample)
                streamed = {name: state[name] for name in self._adapter.streamed}
                if state is not teacher or stream == "teacher":
                    rest = {k: v for k, v in state.items() if k not in streamed}
                    self._conditioning[stream, index] = rest
                if not restored:
                    self._put(0, stream, index, streamed)
        if not restored:
            for stream in STREAMS:
                self._store.finish(0, stream)
        return restored or boundary == 0

    def state(self, stream: str, index: int) -> State:
        """What enters the open unit, conditioning included."""
        held = self._store.get(self.boundary, stream, index, self.device)
        return {**self._beside(stream, index), **held}

    def _beside(self, stream: str, index: int) -> State:
        """The conditioning of a stream: the teacher's, where it has none of its own."""
        teacher = self._conditioning["teacher", index]
        return self._conditioning.get((stream, index), teacher)

    def target(self, index: int, depth: int | None = None) -> Tensor:
        """Tokens that leave the open unit in the teacher, [batch, tokens, channels].

        Args:
            index: Of the sample.
            depth: After how many of the unit's blocks; those inside the unit must be recorded.
        """
        inside = depth in self._inner
        boundary, stream = self.boundary + (not inside), f"inner={depth}" if inside else "teacher"
        held = self._store.get(boundary, stream, index, self.device)
        return self._adapter.tokens({**self._beside("teacher", index), **held})

    def keep(self, name: str, index: int, state: State) -> None:
        """Keeps a further state of a sample, for `state`, until the unit is closed."""
        self._put(self.boundary, name, index, state)

    def tokens(self, state: State) -> Tensor:
        """The streamed tokens of a state, [batch, tokens, channels]."""
        return self._adapter.tokens(state)

    def final(self, stream: str, index: int) -> Tensor:
        """Output of the whole network for a sample, once every unit was passed."""
        sample, state = self.sample(index), self.state(stream, index)
        if self._ends is None or stream == "teacher":
            return self._adapter.output(sample, state, self.device)
        return self._ends.output(stream, sample, state)

    @torch.no_grad()
    def record(
        self, blocks: Sequence[nn.Module], observe: Observe | None = None, *, inner: bool = False
    ) -> None:
        """Runs the teacher's unit over its own stream; its outputs are the targets.

        Args:
            blocks: The unit's full-precision blocks.
            observe: Context entered around the forward of a calibration sample.
            inner: Keep what leaves each block inside the unit too.
        """
        self._inner = range(1, len(blocks)) if inner else range(0)
        for index in self.calibration + self.held_out:
            held_out = index in self.held_out
            with nullcontext() if observe is None or held_out else observe(index):
                state = self.state("teacher", index)
                for depth, block in enumerate(blocks, 1):
                    state = self.run([block], state)
                    if depth in self._inner:
                        self.keep(f"inner={depth}", index, state)
            self.forwards.teacher += len(blocks)
            self._put(self.boundary + 1, "teacher", index, state)
        self._store.finish(self.boundary + 1, "teacher")

    @torch.no_grad()
    def follow(self, blocks: Sequence[nn.Module]) -> None:
        """Takes the teacher alone past `blocks`; the other streams are left behind."""
        for index in self.calibration + self.held_out:
            state = self.run(blocks, self.state("teacher", index))
            self._put(self.boundary + 1, "teacher", index, state)
        self.boundary += 1
        self._store.drop_before(self.boundary)

    def restart(self) -> None:
        """Back in front of the first unit, with all streams; nothing counts as run so far."""
        self._store.close()
        self.forwards = BlockForwards()
        self.start()

    @torch.no_grad()
    def visit(self, blocks: Sequence[nn.Module], stream: str, observe: Observe) -> None:
        """Runs `blocks` once more over a stream's calibration samples, for what they see."""
        for index in self.calibration:
            with observe(index):
                self.run(blocks, self.state(stream, index))
            if stream == "student":
                self.forwards.student += len(blocks)

    @torch.no_grad()
    def advance(
        self,
        blocks: Sequence[nn.Module],
        nearest: Sequence[nn.Module],
        observe: Observe | None = None,
    ) -> dict[str, float]:
        """Runs the closed unit over the student's stream and steps to the next boundary.

        Args:
            blocks: The unit's quantised blocks.
            nearest: The unit's blocks rounded to nearest.
            observe: Context entered around the student's forward of a held-out sample.

        Returns:
            Relative squared error of the held-out tokens at the new boundary against the
            teacher's, for `student` and `nearest`.
        """
        error = torch.zeros(3, dtype=torch.float64, device=self.device)
        for index in self.calibration + self.held_out:
            held_out = index in self.held_out
            with observe(index) if observe is not None and held_out else nullcontext():
                student = self.run(blocks, self.state("student", index))
            self.forwards.student += len(blocks)
            self._put(self.boundary + 1, "student", index, student)
            if held_out:
                rounded = self.run(nearest, self.state("nearest", index))
                self.forwards.nearest += len(nearest)
                self._put(self.boundary + 1, "nearest", index, rounded)
                error += self._errors(self.target(index), student, rounded)
        for stream in ("student", "nearest"):
            self._store.finish(self.boundary + 1, stream)
        self.boundary += 1
        self._store.drop_before(self.boundary)
        ranks.total(error)
        student_error, nearest_error, power = error.tolist()
        return {"student": student_error / power, "nearest": nearest_error / power}

    def close(self) -> None:
        """Forgets the streams."""
        self._store.close()

    def _errors(self, target: Tensor, student: State, nearest: State) -> Tensor:
        target = target.double()
        terms = [
            (self._adapter.tokens(s).double() - target).square().sum() for s in (student, nearest)
        ]
        return torch.stack([*terms, target.square().sum()])

    def run(self, blocks: Sequence[nn.Module], state: State) -> State:
        """The state that leaves `blocks`."""
        for block in blocks:
            state = self._adapter.forward_block(block, state)
        return state

    def _put(self, boundary: int, stream: str, index: int, state: State) -> None:
        streamed = {name: state[name] for name in self._adapter.streamed}
        for name, tensor in streamed.items():
            if not tensor.isfinite().all():
                raise NumericsError(
                    f"{name} of the {stream} stream holds NaN or Inf at boundary {boundary}, "
                    f"sample {index}. The last checkpoint is good: look at the sample and at the "
                    "unit before this boundary, or lower its learning rates."
                )
        self._store.put(boundary, stream, index, streamed)
