"""The vision-language teacher's first training stage: image tokens speak the decoder's words.

As CLIP's own training does for a real LLaVA, it aligns what the tower sees with words: the image
token of the patch that holds an object's centre becomes similar to the embeddings of the words for
the object's colour, shape, size and quarter of the picture.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recon.zoo.vlm_scenes import QUADRANTS, SIDE, SIZES, Arrangement, Object
from recon.zoo.vlm_teacher import GRID, IMAGE_TOKENS, MEAN, PATCH, STD
from recon.zoo.world import COLOURS, SHAPES

_WORDS: tuple[tuple[str, ...], ...] = (
    tuple(COLOURS),
    SHAPES,
    tuple(SIZES),
    QUADRANTS,
)
"""The words of each attribute that an image token is aligned with."""


def normalised(pixels: Tensor) -> Tensor:
    """Pixels [batch, 3, height, width] in [0, 255] as the image processor gives them."""
    return (pixels.float() / 255 - MEAN) / STD


def image_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The projector's output, [batch, image tokens, width], for whole-number pixels."""
    seen = model.model.get_image_features(
        normalised(pixels),
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
    return torch.stack(list(seen.pooler_output))


def words_of(each: Object) -> tuple[str, ...]:
    """The word of each attribute that is true of an object."""
    return each.colour, each.shape, each.size, each.quadrant


def annotate(arrangements: Sequence[Arrangement]) -> tuple[Tensor, Tensor]:
    """What each patch is to tell.

    Returns:
        Whether each word of `_WORDS` is true of an object whose centre lies in the patch,
        [pictures, image tokens, words]; and that centre, horizontal and vertical, in [-1, 1],
        [pictures, image tokens, 2].
    """
    every = [word for words in _WORDS for word in words]
    words = torch.zeros(len(arrangements), IMAGE_TOKENS, len(every), dtype=torch.bool)
    centres = torch.zeros(len(arrangements), IMAGE_TOKENS, 2)
    for index, arrangement in enumerate(arrangements):
        for each in arrangement.objects:
            patch = int(each.y // PATCH) * GRID + int(each.x // PATCH)
            words[index, patch, [every.index(word) for word in words_of(each)]] = True
            centres[index, patch] = torch.tensor([each.x, each.y]) / (SIDE / 2) - 1
    return words, centres


class Sight(nn.Module):
    """Vision tower, projector and word embeddings, and a read-out of places."""

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        super().__init__()
        self.model = model
        words = [word for attribute in _WORDS for word in attribute]
        self.ids = tokenizer.convert_tokens_to_ids(words)
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.centre = nn.Linear(model.config.text_config.hidden_size, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of words [batch, image tokens, words] and centres [batch, image tokens, 2]."""
        tokens = image_tokens(self.model, pixels)
        tokens = functional.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)  # as the decoder does
        words = self.model.get_input_embeddings().weight[self.ids]
        return tokens @ words.T / tokens.shape[-1] ** 0.5 + self.bias, self.centre(tokens)

    def loss(self, pixels: Tensor, words: Tensor, centres: Tensor) -> Tensor:
        """Sigmoid loss of words, as in SigLIP (https://arxiv.org/abs/2303.15343), and of centres.

        Args:
            pixels: [batch, 3, height, width] in [0, 255].
            words: Whether each word is true of what the patch holds, as `annotate` gives it.
            centres: As `annotate` gives them.
        """
        logits, places = self(pixels)
        there = words.any(dim=-1)
        error = functional.binary_cross_entropy_with_logits(logits, words.float(), reduction="sum")
        return error / there.sum() + 10 * functional.mse_loss(places[there], centres[there])
