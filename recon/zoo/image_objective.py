"""The hybrid objective of Nichol & Dhariwal: velocity and variance of the reverse process at once.

Source: https://arxiv.org/abs/2102.09672, section 3.1, as DiT trains with it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """The diffusion chain's constants, each [timesteps], of all timesteps at once."""

    squared_gap: Tensor
    """Squared distance of two reverse means per squared difference of their velocities."""
    low: Tensor
    """Log of the posterior variance, of the smallest variance that the network can predict."""
    high: Tensor
    """Log of beta, of the largest one."""


def chain_of(betas: Tensor) -> Chain:
    """Constants of the chain with the variances `betas` [timesteps] in (0, 1).

    At timestep 0 the posterior variance is zero and its log is infinite; there, and nowhere else,
    that of timestep 1 stands in, as in the paper's code.
    """
    beta = betas.double()
    alpha = 1 - beta
    product = alpha.cumprod(dim=0)
    before = torch.cat([product.new_ones(1), product[:-1]])
    posterior = beta * (1 - before) / (1 - product)
    posterior[0] = posterior[1]
    squared_gap = product * beta.square() / (alpha * (1 - product))
    return Chain(squared_gap.float(), posterior.log().float(), beta.log().float())


def hybrid_loss(predicted: Tensor, velocity: Tensor, timesteps: Tensor, chain: Chain) -> Tensor:
    """Mean squared error of the velocity plus the variational bound of the variance, a scalar.

    Equation 16 with its weight, 0.001, times the 1000 timesteps over which the bound is a sum.
    Deviates from the paper: the network predicts the velocity (Salimans & Ho, arXiv 2202.00512,
    appendix D), whose error is that of the noise over the square root of the signal's share, so
    that the noisy timesteps, where a picture's shape is decided, count; and whatever timesteps are
    given weigh both terms alike, without the correction that would turn a draw that is not uniform
    into the bound itself.

    Args:
        predicted: Output of the network, [batch, 2 x channels, height, width]: velocity, then the
            variance as a position between its limits, nominally in [-1, 1].
        velocity: [batch, channels, height, width].
        timesteps: [batch], whole numbers.
        chain: Constants of the same number of timesteps as the scheduler's.
    """
    guess, position = predicted.chunk(2, dim=1)
    bound = variational_bound((guess.detach() - velocity).square(), position, timesteps, chain)
    return (guess - velocity).square().mean() + bound.mean()


def variational_bound(
    squared_error: Tensor, position: Tensor, timesteps: Tensor, chain: Chain
) -> Tensor:
    """Divergence of the predicted reverse step from the true one, bits per number, [batch].

    Equations 6 and 15. Deviates from equation 5: zero at timestep 0, whose likelihood of whole
    pixel values has no meaning for latents, and where samplers add no noise.

    Args:
        squared_error: Of the predicted velocity, [batch, channels, height, width].
        position: Of the log variance between its limits, shaped alike; -1 is the posterior
            variance, 1 is beta, as in diffusers' `variance_type="learned_range"`.
        timesteps: [batch], whole numbers.
        chain: The chain's constants.
    """
    squared_gap, low, high = (
        table[timesteps][:, None, None, None]
        for table in (chain.squared_gap, chain.low, chain.high)
    )
    share = (position + 1) / 2
    log_variance = share * high + (1 - share) * low
    nats = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + squared_gap * squared_error * (-log_variance).exp()
    )
    return torch.where(timesteps > 0, nats.mean(dim=(1, 2, 3)) / math.log(2), 0.0)
