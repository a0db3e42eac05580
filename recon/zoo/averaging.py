"""Training with a running average of the weights, which is what every teacher keeps."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from recon.zoo.muon import Muon

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)

_REPORT_EVERY = 50


def muon_and_adamw(
    network: nn.Module, rate: float, is_matrix: Callable[[str], bool]
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which needs fewer samples; AdamW for everything else.

    Args:
        network: Its parameters that need gradients are shared out.
        rate: AdamW's learning rate; Muon takes twice as much.
        is_matrix: Whether a parameter of two axes and this name belongs to Muon.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and is_matrix(name) else others).append(parameter)
    return [
        Muon(matrices, 2 * rate),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_averaged(
    network: Network,
    loss_of: Callable[[Network], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    name: str,
    steps: int,
    factor: Callable[[int], float],
    average: float,
    save: Callable[[Network], None] | None = None,
    save_every: int = 1,
) -> Network:
    """Running average of the weights over a training.

    Args:
        network: Is trained in place.
        loss_of: Loss of one fresh batch.
        optimizers: Share the network's parameters out among them.
        name: What the log calls it.
        steps: Optimizer steps.
        factor: Learning rate factor of a step.
        average: Decay per step of the running average, in [0, 1).
        save: Is given the average every `save_every` steps.
        save_every: Steps.
    """
    kept = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    averages: list[Tensor] = list(kept.parameters())
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimizers]
    begin, sums = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(network)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        decay = min(average, step / (step + 9))  # a young average forgets its start fast
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        sums += loss.item()
        if step % _REPORT_EVERY == 0:
            logger.info(
                *("%s %d/%d loss %.4f, %.0f s", name, step, steps, sums / _REPORT_EVERY),
                time.monotonic() - begin,
            )
            sums = 0.0
        if save is not None and step % save_every == 0:
            save(kept)
    return kept
