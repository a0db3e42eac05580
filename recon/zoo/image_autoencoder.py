"""The image teacher's autoencoder: an encoder that pools, and a decoder that learns the inverse."""

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from recon.zoo.image_scenes import SIDE

LATENT_CHANNELS = 4
SPATIAL_FACTOR = 4
SCALING = 2.2
"""The autoencoder's scaling factor: its latents of this world have a standard deviation of
0.454."""

_WIDTH = 16
"""Channels everywhere: four values, their negatives, four constants, four to spare."""
_ANCHORS = slice(8, 12)
_ANCHOR = 32.0
"""Constant that fills four of the encoder's channels, so that group norm divides by it and by
nothing else."""
_DECODER_ANCHOR = 8.0
"""The same in the decoder, which is trained: a larger one makes its gradients too large."""
_LIFT = 12.0
"""Moves values to where SiLU is the identity to 1e-4."""
_COLOUR_GAIN = 2.0
_COLOUR_OFFSET = 0.5
"""Brings the mean backdrop to zero."""
_EDGE_GAIN = 2.0
_REDNESS = (1.0, -0.5, -0.5)
"""Weights of the colour channels; zero for the grey backdrop and at least 0.3 for all six colours
of the world."""


def build_vae() -> AutoencoderKL:
    """Autoencoder with an untrained decoder: [batch, 3, 64, 64] in [-1, 1] to [batch, 4, 16, 16].

    Its blocks have no attention and no 1 x 1 convolutions beside the latents, which the pooling
    does not need.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(_WIDTH,) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=SIDE,
        scaling_factor=SCALING,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    set_encoder(vae)
    start_decoder(vae)
    return vae


@torch.no_grad()
def set_encoder(vae: AutoencoderKL) -> None:
    """Set the encoder, exactly, to what `pool` computes; it is not trained.

    Latent channels 0 to 2 are the mean colours of cells of 4 x 4 pixels. Channel 3 tells where in
    its cell an outline runs: redness of the lower right quarter less that of the upper left one.

    The residual paths are zero and the identity paths carry the values, as in the video teacher's
    encoder: their negative copies and constants of both signs fix the statistics of the one norm
    on the way, and a lift makes the last SiLU linear.
    """
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    values = torch.cat([torch.eye(3), torch.tensor([_REDNESS])])  # [4, 3]
    encoder.conv_in.weight[:8, :, 1, 1] = torch.cat([values, -values])
    encoder.conv_in.bias[_ANCHORS] = _ANCHOR * torch.tensor([1.0, 1.0, -1.0, -1.0])
    first, second = (block.downsamplers[0].conv.weight for block in encoder.down_blocks[:2])
    for weight in (first, second):  # [16, 16, 3, 3]; padded to the right and below only
        weight[:, :, :2, :2] = torch.eye(_WIDTH)[:, :, None, None] / 4
    for channel in (3, 7):  # redness and its negative
        second[channel, channel, :2, :2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    # Four of the sixteen channels hold the anchor, which alone makes the standard deviation.
    encoder.conv_norm_out.weight.fill_(_ANCHOR / 2)
    encoder.conv_norm_out.bias.fill_(_LIFT)
    gains = torch.tensor([_COLOUR_GAIN] * 3 + [_EDGE_GAIN])
    offsets = torch.tensor([_COLOUR_OFFSET] * 3 + [0.0])
    encoder.conv_out.weight[:4, :4, 1, 1] = torch.diag(gains)
    encoder.conv_out.bias[:4] = gains * (offsets - _LIFT)
    encoder.conv_out.bias[4:] = -10.0  # log variance: the posterior is a point


@torch.no_grad()
def start_decoder(vae: AutoencoderKL) -> None:
    """Give the decoder a start from which it enlarges the latents' own colours.

    The identity paths carry the latents in channels 0 to 3, and constants in four more keep group
    norm from dividing by what a picture happens to show; the residual paths start at zero.
    """
    decoder = vae.decoder
    kept = [*range(4), *range(_ANCHORS.start, _ANCHORS.stop)]
    decoder.conv_in.weight[kept] = 0.0
    decoder.conv_in.bias[kept] = 0.0
    decoder.conv_in.weight[range(4), range(4), 1, 1] = 1.0
    decoder.conv_in.bias[_ANCHORS] = _DECODER_ANCHOR * torch.tensor([1.0, 1.0, -1.0, -1.0])
    for block in decoder.up_blocks:
        for upsampler in block.upsamplers or ():
            convolution = upsampler.conv
            convolution.weight[:, _ANCHORS] = 0.0
            convolution.weight[kept] = 0.0
            convolution.bias[kept] = 0.0
            convolution.weight[kept, kept, 1, 1] = 1.0
    identity = torch.full((_WIDTH,), _DECODER_ANCHOR / 2)  # undoes the division, see `set_encoder`
    identity[_ANCHORS] = 0.0  # hides the constants from the convolution behind the norm
    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1.weight.copy_(identity)
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    decoder.conv_norm_out.weight.copy_(identity)
    decoder.conv_norm_out.bias[:3] = _LIFT
    decoder.conv_out.weight.mul_(0.1)
    decoder.conv_out.weight[:, :3] = 0.0
    decoder.conv_out.weight[range(3), range(3), 1, 1] = 1 / _COLOUR_GAIN
    decoder.conv_out.bias.fill_(-_LIFT / _COLOUR_GAIN - _COLOUR_OFFSET)


def pool(picture: Tensor) -> Tensor:
    """What the encoder computes, without its convolutions.

    Args:
        picture: [batch, 3, height, width] in [-1, 1]; sides are multiples of 4.

    Returns:
        Unscaled latents, [batch, 4, height / 4, width / 4].
    """
    colours = nn.functional.avg_pool2d(picture, SPATIAL_FACTOR)
    redness = (picture * picture.new_tensor(_REDNESS)[:, None, None]).sum(dim=1, keepdim=True)
    quarters = nn.functional.avg_pool2d(redness, SPATIAL_FACTOR // 2)
    edge = quarters[..., 1::2, 1::2] - quarters[..., ::2, ::2]
    return torch.cat([_COLOUR_GAIN * (colours + _COLOUR_OFFSET), _EDGE_GAIN * edge], dim=1)
