"""Answers of a vision-language network: greedy ones, and how likely it finds a given one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.models.folder import read_json
from recon.types import Sample

CallArguments = Callable[[Sample, torch.device | str], dict[str, Tensor]]
"""What the public class is called with for a sample, on a device."""


class AnsweringPipeline:
    """Asks a network of a `...ForConditionalGeneration` class, one conversation at a time.

    Args:
        network: On its device, quantised or not.
        call_arguments: As `VisionLanguageAdapter.call_arguments`.
        folder: Of the checkpoint; its generation_config.json may name tokens that end an answer.
        device: Where to answer.
    """

    def __init__(
        self,
        network: nn.Module,
        call_arguments: CallArguments,
        folder: str | Path,
        device: torch.device | str,
    ) -> None:
        self.network, self.call_arguments = network, call_arguments
        self.folder, self.device = Path(folder), torch.device(device)

    @torch.no_grad()
    def answer(self, prompt: Sample, max_new_tokens: int, end_tokens: Sequence[int]) -> Tensor:
        """The greedy continuation of a prompt, [new tokens], on the CPU.

        Args:
            prompt: A sample that ends where the answer begins.
            max_new_tokens: Tokens after which an answer is cut.
            end_tokens: Ids that end it, beside those of generation_config.json.
        """
        from transformers import GenerationConfig

        ends = sorted({*end_tokens, *stored_ends(self.folder)})
        given = self.call_arguments(prompt, self.device)
        # A fresh configuration: that of the folder may ask for sampling.
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        made = cast(Any, self.network).generate(
            **given,
            attention_mask=torch.ones_like(given["input_ids"]),
            generation_config=greedy,
        )
        return cast(Tensor, made[0, given["input_ids"].shape[1] :]).cpu()

    @torch.no_grad()
    def log_probabilities(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """How likely each next token is where the answer stands.

        Args:
            sample: With `labels`.

        Returns:
            Logarithms of probabilities [answer tokens, vocabulary], float32, and the tokens of the
            answer [answer tokens], both on the CPU.
        """
        logits = self.network(**self.call_arguments(sample, self.device)).logits[0, :-1]
        labels = sample["labels"][0, 1:].to(self.device)  # the token after each position
        answer = labels >= 0
        return functional.log_softmax(logits[answer].float(), -1).cpu(), labels[answer].cpu()


def stored_ends(folder: Path) -> list[int]:
    """Ids that end an answer, by the folder's generation_config.json; none without that file."""
    file = folder / "generation_config.json"
    stored = read_json(file, "AnsweringPipeline") if file.is_file() else {}
    ends = stored.get("eos_token_id")
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
