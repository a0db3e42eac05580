"""Which samples each step of a stage sees: a pure function of (seed, stage, step)."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from recon.errors import ConfigError


def dealt(batch: list[int], micro_batch: int) -> list[list[int]]:
    """This process's samples of one step as micro-batches.

    Strided, as slots are dealt over processes: each micro-batch then holds the same samples
    whatever the number of processes.
    """
    count = len(batch) // micro_batch
    return [batch[first::count] for first in range(count)]


def refuse_uneven(size: int, batch: int, world: int, micro_batch: int = 1) -> None:
    """Does nothing if batches of `batch` out of `size` samples divide among `world` processes.

    Raises:
        ConfigError: They do not.
    """
    if batch % world:
        raise ConfigError(
            f"batch_size {batch} does not divide among {world} processes. Set "
            f"model.batch_size to a multiple of {world}, or fewer trainer.devices."
        )
    if batch % (world * micro_batch):
        raise ConfigError(
            f"batch_size {batch} does not divide into micro-batches of {micro_batch} on {world} "
            f"processes. Set model.batch_size to a multiple of {world * micro_batch}, or another "
            "model.micro_batch."
        )
    if size < batch:
        raise ConfigError(
            f"{size} calibration samples cannot fill a batch of {batch}. Lower "
            "model.batch_size, or calibrate with more samples (videos: data.sds.top_k; images: "
            "data.samples_per_timestep)."
        )


class StageSampler(Sampler[list[int]]):
    """Indices of this process's samples, step by step.

    Slot j of a batch draws from the samples whose index is j modulo the batch size, epoch after
    epoch in fresh random order. A process that holds every sample of index r modulo the number of
    processes, which divides the batch, therefore holds all it is asked for, and the global batch
    is the same whatever the number of processes.

    Args:
        size: Number of calibration samples over all processes.
        batch: Samples per optimizer step over all processes.
        steps: Optimizer steps of the stage.
        seed: Of the run.
        stage: Index of the stage.
        rank: Index of this process.
        world: Number of processes.

    Raises:
        ConfigError: The batch does not divide among the processes, or exceeds the samples.
    """

    def __init__(
        self, *, size: int, batch: int, steps: int, seed: int, stage: int, rank: int, world: int
    ) -> None:
        refuse_uneven(size, batch, world)
        self._size, self._batch, self._steps = size, batch, steps
        self._seed, self._stage, self._rank, self._world = seed, stage, rank, world
        self.start = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        first, self.start = self.start, 0
        slots = range(self._rank, self._batch, self._world)
        for step in range(first, self._steps):
            yield [self._draw(slot, step) for slot in slots]

    def _draw(self, slot: int, step: int) -> int:
        count = len(range(slot, self._size, self._batch))
        epoch, position = divmod(step, count)
        text = f"{self._seed}/{self._stage}/{slot}/{epoch}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return slot + self._batch * int(order[position])


class StageLoader(DataLoader[int]):
    """Batches of sample indices; its two state methods make Lightning save its position.

    Args:
        sampler: Order of the stage.
        finished_steps: Asks the engine how many optimizer steps of the stage are done. Batches
            handed out would count one too many after a step that failed.
    """

    def __init__(self, sampler: StageSampler, finished_steps: Callable[[], int]) -> None:
        super().__init__(_Indices(), batch_sampler=sampler, collate_fn=list)
        self._sampler, self._finished_steps = sampler, finished_steps

    def state_dict(self) -> dict[str, int]:
        """Position inside the stage."""
        return {"done": self._finished_steps() % max(len(self._sampler), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a saved position."""
        self._sampler.start = state["done"]


class _Indices(Dataset[int]):
    """A dataset whose items are their own indices: activations are fetched by the engine."""

    def __getitem__(self, index: int) -> int:
        return index
