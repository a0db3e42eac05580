"""A processor for the tiny LLaVA: a tokenizer of words, a chat template, pictures of 16 pixels."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from recon.datamodules.questions import Example
from tests.models.tiny_vlm import IMAGE, write_tiny_vlm

COLOURS = ("red", "green", "blue", "white")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:")
ASKED = ("what", "colour", "is", "it", "?", "which", "word", "follows", "A.", "B.", "A", "B")
WORDS = (*SPECIAL, *ASKED, "hint", *COLOURS)
TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{{ '</s> ' if m['role'] == 'assistant' }}{% endfor %}"
    "{{ 'ASSISTANT: ' if add_generation_prompt }}"
)


def write_tiny_chat(folder: Path, template: str = TEMPLATE, seed: int = 0) -> Path:
    """A whole LLaVA folder: random network, processor, tokenizer, chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)} | {"<image>": IMAGE}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    write_tiny_vlm(folder, "llava", seed)
    processor.save_pretrained(folder)
    return folder


def picture(colour: Sequence[int]) -> Image.Image:
    """A plain picture."""
    return Image.new("RGB", (20, 18), tuple(colour))


def examples(count: int, seed: int = 0) -> list[Example]:
    """Questions about plain pictures in turn with questions without one, all different."""
    made = []
    for index in range(count):
        shown = picture(((40 * index) % 256, index, (seed * 97) % 256))
        colour = COLOURS[index % len(COLOURS)]
        if index % 3 == 2:
            text = f"which word follows {colour} {' '.join(COLOURS[: seed % 4])} {'hint ' * index}?"
            made.append(Example((("user", text),), "A", kind="word", choices=("red", "blue")))
            continue
        text = "what colour is it ?"
        made.append(Example((("user", text),), colour, (shown,), kind="colour"))
    return made
