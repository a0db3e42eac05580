"""The video teacher's autoencoder: an encoder that pools, and a decoder that learns the inverse."""

import math
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor, nn

from recon.zoo.world import HEIGHT, WIDTH, Scene, draw

LATENT_CHANNELS = 4
SCALING = 2.07
"""The autoencoder's scaling factor: its latents of this world have a standard deviation of 0.48."""
SPATIAL_FACTOR = 4
TEMPORAL_FACTOR = 2
"""An even latent length decodes to the wrong number of frames in AutoencoderKLCogVideoX, which
works in chunks of two latent frames plus one odd one; 9 frames over 2 give 5."""

_ANCHOR = 32.0
"""Constant that fills four channels, so that group norm divides by it and by nothing else."""
_LIFT = 12.0
"""Moves values to where SiLU is the identity to 1e-4."""
_MOTION_GAIN = 10.0


def build_vae() -> AutoencoderKLCogVideoX:
    """Untrained causal autoencoder: [batch, 3, 9, 56, 64] in [-1, 1] to [batch, 4, 5, 14, 16]."""
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        temporal_compression_ratio=TEMPORAL_FACTOR,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=SCALING,
    )
    set_encoder(vae)
    start_decoder(vae)
    return vae


@torch.no_grad()
def set_encoder(vae: AutoencoderKLCogVideoX) -> None:
    """Set the encoder, exactly, to pooling; it is not trained.

    Latent channels 0 to 2 are the mean colours of cells of 4 x 4 pixels and 2 frames, channel 3 is
    the change of the mean brightness over the cell's frames. What a gradient has to find here, a
    way around the norms, costs hours on a CPU and is known beforehand. The identity paths carry the
    values; constant channels of opposite sign and negative copies fix the statistics of the one
    norm on the way, and a lift makes the last SiLU linear.
    """
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    first = encoder.conv_in.conv  # [8, 3, time, height, width]; the last time tap is the present
    first.weight[:3, :, 2, 1, 1] = torch.eye(3)
    first.weight[3, :, 2, 1, 1] = 1 / 3
    first.weight[3, :, 1, 1, 1] = -1 / 3
    first.bias[4:8] = torch.tensor([_ANCHOR, _ANCHOR, -_ANCHOR, -_ANCHOR])
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.in_channels != resnet.out_channels:
                width = resnet.in_channels
                resnet.conv_shortcut.weight[:width, :, 0, 0, 0] = torch.eye(width)
                if width == 8:  # negative copies, once
                    resnet.conv_shortcut.weight[8:12, :4, 0, 0, 0] = -torch.eye(4)
        for downsampler in block.downsamplers or ():
            width = downsampler.conv.weight.shape[0]
            downsampler.conv.weight[:, :, :2, :2] = torch.eye(width)[:, :, None, None] / 4
    width = encoder.norm_out.num_channels
    # Four of the channels hold the anchor, which alone makes the standard deviation.
    encoder.norm_out.weight.fill_(_ANCHOR * math.sqrt(4 / width))
    encoder.norm_out.bias.fill_(_LIFT)
    last = encoder.conv_out.conv  # [2 x 4, 32, time, height, width]
    for channel, (gain, offset) in enumerate([(2.0, 0.5)] * 3 + [(_MOTION_GAIN, 0.0)]):
        last.weight[channel, channel, 2, 1, 1] = gain
        last.bias[channel] = gain * (offset - _LIFT)
    last.bias[LATENT_CHANNELS:] = -10.0  # log variance: the posterior is a point


@torch.no_grad()
def start_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Give the decoder a start from which it enlarges the latents' own colours."""
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            # Starts as plain group norm: the default start multiplies every feature by noise.
            nn.init.zeros_(module.conv_y.conv.weight)
            nn.init.ones_(module.conv_y.conv.bias)
            nn.init.zeros_(module.conv_b.conv.weight)
            nn.init.zeros_(module.conv_b.conv.bias)
    norm, last = vae.decoder.norm_out, vae.decoder.conv_out.conv
    norm.conv_y.conv.bias.fill_(0.1)
    norm.conv_b.conv.weight[:3, :3, 0, 0, 0] = 0.5 * torch.eye(3)  # undoes the encoder's gain
    norm.conv_b.conv.bias[:3] = 4.0  # to where SiLU is nearly the identity
    last.weight.mul_(0.1)
    last.weight[:, :3, 2, 1, 1] += torch.eye(3)
    last.bias.fill_(-4.5)  # undoes the encoder's offset and the 4


def clips(scenes: Iterable[Scene]) -> Tensor:
    """Rendered scenes for the autoencoder, [batch, 3, frames, height, width] in [-1, 1]."""
    return torch.stack([draw(scene) for scene in scenes]).transpose(1, 2) * 2 - 1


def pool(video: Tensor) -> Tensor:
    """What the encoder computes, without its convolutions: a hundredth of the time.

    Args:
        video: [batch, 3, frames, height, width] in [-1, 1].

    Returns:
        Unscaled latents, [batch, 4, latent frames, height / 4, width / 4].
    """
    bright = video.mean(dim=1, keepdim=True)  # over colour channels
    change = bright.diff(dim=2, prepend=bright[:, :, :1])
    both = torch.cat([2 * (video + 0.5), _MOTION_GAIN * change], dim=1)
    cells = nn.functional.avg_pool3d(both, (1, SPATIAL_FACTOR, SPATIAL_FACTOR))
    pairs = nn.functional.avg_pool3d(cells[:, :, 1:], (TEMPORAL_FACTOR, 1, 1))
    return torch.cat([cells[:, :, :1], pairs], dim=2)  # the first frame stays alone
