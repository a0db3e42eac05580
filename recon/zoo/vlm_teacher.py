"""The vision-language teacher's parts: a tiny LLaVA for the procedural world.

`transformers` and `tokenizers` own every class here; this module fixes their sizes. Geometry: a
picture of 48 x 48 pixels is cut by 12 x 12 patches into 16 image tokens.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from recon.zoo.pipeline_folder import write
from recon.zoo.vlm_facts import vocabulary
from recon.zoo.vlm_questions import LETTERS
from recon.zoo.vlm_scenes import SIDE

PATCH = 12
"""Side of a patch, pixels."""
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
CONTEXT = 128
"""Longest sequence; a question with choices and its picture has about 45 tokens."""

WIDTH = 64
"""Of the decoder."""
LAYERS = 8
VISION_WIDTH = 96
ANSWER_TOKENS = 2
"""Longest answer, a word, with the token that ends it."""

PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER", "ASSISTANT"
MEAN = STD = 0.5
"""Of the pixels, for normalisation."""

CHAT_TEMPLATE = """\
{{- '<s>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'USER ' }}{% else %}{{ 'ASSISTANT ' }}{% endif %}
{%- if message.content is string %}{{ message.content + ' ' }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<image> ' }}{% else %}{{ part.text + ' ' }}{% endif %}
{%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}{{ '</s>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT ' }}{% endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the questions' vocabulary; an unknown word becomes `<unk>`."""
    words = [PAD, BEGIN, END, UNKNOWN, IMAGE, USER, ASSISTANT, *LETTERS, *vocabulary()]
    words_only = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(words_only)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=CONTEXT,
    )


def build_processor() -> LlavaProcessor:
    """Processor of pictures and chats."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIDE, "width": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy leaves out
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS
) -> LlavaForConditionalGeneration:
    """Untrained network with a decoder of `layers` layers; a grown teacher has `LAYERS`."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=VISION_WIDTH,
                intermediate_size=4 * VISION_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                **special,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=ANSWER_TOKENS, **special
    )
    return model


def save(out: Path, model: LlavaForConditionalGeneration) -> None:
    """Write network and processor into one folder, weights in half precision.

    The network given stays as it is, and so do files of `out` that are not the teacher's, such as
    the model card.
    """
    write(copy.deepcopy(model).half().eval(), out)
    write(build_processor(), out)


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Network, in single precision, and processor of a teacher folder."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def ask_processor(
    processor: LlavaProcessor, prompts: Sequence[str], pictures: Sequence[Image.Image]
) -> BatchFeature:
    """Inputs of the network for one-turn chats, a picture each, up to where an answer begins."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        for prompt in prompts
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    return processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
