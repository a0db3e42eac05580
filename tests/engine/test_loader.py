"""Batches: a pure function of (seed, stage, step), the same for any number of processes."""

from itertools import chain, pairwise

import pytest

from recon.engine.loader import StageLoader, StageSampler, dealt, refuse_uneven
from recon.errors import ConfigError


def sampler(
    *, size: int = 10, batch: int = 4, steps: int = 12, seed: int = 0, stage: int = 0,
    rank: int = 0, world: int = 1,
) -> StageSampler:  # fmt: skip
    return StageSampler(
        size=size, batch=batch, steps=steps, seed=seed, stage=stage, rank=rank, world=world
    )


def test_batches_follow_from_seed_stage_and_step_alone() -> None:
    assert list(sampler()) == list(sampler())
    assert list(sampler(seed=1)) != list(sampler())
    assert list(sampler(stage=1)) != list(sampler())
    assert list(sampler(steps=7)) == list(sampler())[:7]


def test_starting_late_gives_the_rest_once() -> None:
    late = sampler()
    late.start = 5
    assert list(late) == list(sampler())[5:]
    assert list(late) == list(sampler())
    assert len(late) == 12


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_all_ranks_are_the_batch_of_one_process(world: int) -> None:
    alone = list(sampler())
    shares = [list(sampler(rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        dealt = [share[step] for share in shares]
        assert sorted(chain(*dealt)) == sorted(batch)
        for rank, indices in enumerate(dealt):
            # What a rank is asked for it holds: samples go round by index.
            assert all(index % world == rank for index in indices)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_micro_batch_holds_the_same_samples_for_any_number_of_processes(world: int) -> None:
    found = set()
    for rank in range(world):
        sampler = StageSampler(size=24, batch=12, steps=1, seed=0, stage=0, rank=rank, world=world)
        (batch,) = list(sampler)
        found |= {frozenset(samples) for samples in dealt(batch, 3)}
    assert len(found) == 4
    (whole,) = list(StageSampler(size=24, batch=12, steps=1, seed=0, stage=0, rank=0, world=1))
    assert found == {frozenset(samples) for samples in dealt(whole, 3)}


def test_every_sample_comes_equally_often() -> None:
    seen = list(chain(*sampler(size=12, batch=4, steps=9)))
    assert sorted(seen) == sorted(list(range(12)) * 3)
    epochs = [seen[i : i + 12] for i in range(0, 36, 12)]
    assert all(one != other for one, other in pairwise(epochs))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 3 does not divide among 2 processes"):
        sampler(batch=3, world=2)
    with pytest.raises(
        ConfigError, match=r"2 calibration samples cannot fill a batch of 4\. Lower"
    ):
        sampler(size=2)
    refuse_uneven(4, 4, 2)
    refuse_uneven(8, 8, 2, micro_batch=4)
    with pytest.raises(ConfigError, match=r"8 does not divide into micro-batches of 3 on 2"):
        refuse_uneven(8, 8, 2, micro_batch=3)


def test_the_loaders_position_is_the_number_of_finished_steps() -> None:
    finished = 0
    loader = StageLoader(sampler(steps=6), lambda: finished)
    assert list(loader) == list(sampler(steps=6))
    finished = 4  # batches were handed out beyond: they do not count
    state = loader.state_dict()
    other = StageLoader(sampler(steps=6), lambda: 0)
    other.load_state_dict(state)
    assert list(other) == list(sampler(steps=6))[4:]
    finished = 6
    assert loader.state_dict() == {"done": 0}
