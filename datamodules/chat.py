"""From conversations to what the network is called with, by the checkpoint's own processor."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon.datamodules.questions import Example, parts
from recon.errors import ConfigError
from recon.models.answering import stored_ends
from recon.models.vlm import VisionLanguageAdapter
from recon.types import Sample

IGNORED = -100
"""Label of a token that is not the answer's."""


class Chat:
    """The processor of a checkpoint, with its chat template.

    Every conversation is processed alone, so nothing is padded.

    Args:
        adapter: Names the folder, and what of a processor's output the network reads.
        asks: Conversations are only asked, not streamed: the adapter's `max_tokens` is no limit,
            and their length is the caller's to check against the context.

    Raises:
        ConfigError: The folder has no processor or no chat template, or the processor needs a
            package that is not installed.
    """

    def __init__(self, adapter: VisionLanguageAdapter, *, asks: bool = False) -> None:
        self.adapter = adapter
        self._check = adapter.check_pictures if asks else adapter.check_sample
        self.processor: Any = _processor(adapter.folder)

    def prompt(self, example: Example) -> Sample:
        """Inputs [1, tokens] that end where the answer begins.

        Raises:
            ConfigError: As `VisionLanguageAdapter.check_sample`; or pictures do not match markers;
                or there is a system turn, which the template does not write as one.
        """
        turns = self._turns(example)
        sample = self._inputs(turns, example, add_generation_prompt=True)
        self._check(sample)
        return sample

    def forced(self, example: Example) -> Sample:
        """Inputs with the answer behind the prompt, and `labels` of it, end of turn included.

        Both end with the first token that ends an answer; where the template writes none, the
        tokenizer's stands in place of the spaces behind the answer.

        Raises:
            ConfigError: As `prompt`; or the template writes other tokens before an answer than it
                does where one is asked for.
        """
        turns = self._turns(example)
        said = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
        whole = self._inputs([*turns, said], example, add_generation_prompt=False)
        asked = self._inputs(turns, example, add_generation_prompt=True)["input_ids"]
        ids, length = whole["input_ids"], asked.shape[1]
        if ids.shape[1] <= length or not torch.equal(ids[:, :length], asked):
            raise ConfigError(
                f"The chat template of {self.adapter.folder} writes other tokens before the answer "
                f"to {example.question!r} than where it asks for one, so that the answer's tokens "
                "cannot be told. Use the template saved with the checkpoint, or one whose "
                "generation prompt is what precedes an answer."
            )
        answer = self._ended(ids[0, length:])
        unread = torch.full_like(asked, IGNORED)
        sample = {
            **whole,
            "input_ids": torch.cat([asked, answer[None]], dim=1),
            "labels": torch.cat([unread, answer[None]], dim=1),
        }
        self._check(sample)
        return sample

    def text(self, tokens: Tensor) -> str:
        """Tokens [tokens] in words, without special ones."""
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer, by the tokenizer."""
        end = self.processor.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def _turns(self, example: Example) -> list[dict[str, Any]]:
        turns = [{"role": role, "content": content} for role, content in parts(example)]
        if turns[0]["role"] == "system" and not self._writes_system:
            raise ConfigError(
                f"The conversation of {example.question!r} begins with a system turn, which the "
                f"chat template of {self.adapter.folder} does not write as one. Take the system "
                "turns out of the dataset, or write them into the user's first text."
            )
        return turns

    @cached_property
    def _writes_system(self) -> bool:
        """Whether the template tells a first turn of the system's from the two speakers'."""
        said = "instruction"
        content = [{"type": "text", "text": said}]
        asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        written = {
            role: self._written([{"role": role, "content": content}, asked])
            for role in ("system", "user", "assistant")
        }
        # In front of it, because a template may end only what the assistant says.
        ahead = {role: text.partition(said)[0] for role, text in written.items()}
        differs = written["system"] != written["user"] and ahead["system"] != ahead["assistant"]
        return said in written["system"] and differs

    def _written(self, turns: list[dict[str, Any]]) -> str:
        """The template's text; empty where it refuses the turns."""
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(turns, tokenize=False))
        except TemplateError:
            return ""

    def _ended(self, answer: Tensor) -> Tensor:
        """The tokens of an answer [tokens] up to the first that ends one, added if there is none.

        Templates go on behind it (ChatML: a line break), or write a space in its place (LLaVA-1.5).
        """
        ends = [*self.end_tokens, *stored_ends(self.adapter.folder)]
        found = torch.isin(answer, answer.new_tensor(ends)).nonzero()
        if len(found):
            return answer[: int(found[0]) + 1]
        decode = self.processor.tokenizer.decode
        while len(answer) and not decode(answer[-1:], skip_special_tokens=False).strip():
            answer = answer[:-1]
        return torch.cat([answer, answer.new_tensor(ends[:1])])

    def _inputs(
        self, turns: list[dict[str, Any]], example: Example, *, add_generation_prompt: bool
    ) -> Sample:
        try:
            found: Mapping[str, Tensor] = self.processor.apply_chat_template(
                turns,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=add_generation_prompt,
            )
        except (ValueError, IndexError, StopIteration) as error:
            raise ConfigError(
                f"The processor of {self.adapter.folder} cannot read {example.question!r} with "
                f"{len(example.pictures)} pictures: {error}. Check the texts for words that the "
                "processor reads as pictures."
            ) from error
        # Of these only input_ids have a token axis: masks and types are the network's own to make.
        kept = {"input_ids", *self.adapter.picture_inputs}
        return {name: tensor for name, tensor in found.items() if name in kept}


def check_lengths(chat: Chat, examples: Iterable[Example], key: str) -> None:
    """Refuse questions that are, with their answers, longer than the model's context.

    Each is processed as it will be asked, which is little beside answering it.

    Args:
        chat: One that asks.
        examples: All that will be asked, in order.
        key: What they are called, for messages.

    Raises:
        ConfigError: One is too long, or as `Chat.forced`.
    """
    context = chat.adapter.context
    for number, example in enumerate(examples):
        tokens = chat.forced(example)["input_ids"].shape[1]
        if tokens > context:
            raise ConfigError(
                f"Question {number} of {key}, {example.question!r}, has {tokens} tokens with its "
                f"answer, and the model's context is {context}. Take it out of the dataset, or "
                "make its text or pictures smaller."
            )


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise ConfigError(
            f"The processor of {folder} needs a package that is not installed: "
            f"{' '.join(str(error).split())[:200]}. Processors that read videos too (Qwen2-VL, "
            "Qwen2.5-VL, InternVL, SmolVLM) need torchvision: pip install 'recon-ptq[vlm]'."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no processor that can be read: {error}. Copy its files (processor, "
            "tokenizer, chat template) from the checkpoint into the folder."
        ) from error
    if getattr(processor, "tokenizer", None) is None or not processor.chat_template:
        raise ConfigError(
            f"The processor in {folder} has no chat template, so conversations cannot be written "
            "as the model was trained on them. Add chat_template.jinja of the checkpoint."
        )
    return processor
