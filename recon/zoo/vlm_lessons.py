"""What the vision-language teacher's decoder learns from: several one-turn chats per picture."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recon.zoo.vlm_facts import KINDS
from recon.zoo.vlm_questions import Question, ask
from recon.zoo.vlm_scenes import Arrangement
from recon.zoo.vlm_sight import image_tokens
from recon.zoo.vlm_teacher import ASSISTANT, BEGIN, END, IMAGE, IMAGE_TOKENS, USER
from recon.zoo.world import Split

IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """Several one-turn chats about each picture in one sequence, none of which sees another.

    Every chat is computed as if it stood alone behind its picture, which is computed once.
    """

    ids: Tensor
    """[batch, tokens]; the picture comes first."""
    positions: Tensor
    """[batch, tokens], of each token in its own chat."""
    chats: Tensor
    """[batch, tokens]: 0 for what all chats share, else the chat's number; -1 for padding."""
    targets: Tensor
    """[batch, tokens]: the next token where it belongs to an answer, else -100."""

    def mask(self) -> Tensor:
        """Whether a token (third axis) sees another (fourth), [batch, 1, tokens, tokens]."""
        length = self.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        related = (self.chats[:, :, None] == self.chats[:, None, :]) | (self.chats == 0)[:, None]
        return (earlier & related)[:, None]


def pack(tokenizer: PreTrainedTokenizerFast, asked: Sequence[Sequence[Question]]) -> Packed:
    """All questions about each picture, with their answers."""
    texts = [f"{each.prompt} {ASSISTANT} {each.answer} {END}" for row in asked for each in row]
    encoded = iter(tokenizer(texts, add_special_tokens=False).input_ids)
    begin, end, image, user, assistant = tokenizer.convert_tokens_to_ids(
        [BEGIN, END, IMAGE, USER, ASSISTANT]
    )
    shared = [begin, user, *[image] * IMAGE_TOKENS]
    rows = []
    for row in asked:
        ids, positions = list(shared), list(range(len(shared)))
        chats, targets = [0] * len(shared), [IGNORED] * len(shared)
        for number in range(1, len(row) + 1):
            chat = next(encoded)
            before = chat.index(assistant)  # the token that foretells the answer's first
            ids += chat
            positions += range(len(shared), len(shared) + len(chat))
            chats += [number] * len(chat)
            targets += [IGNORED] * before + chat[before + 1 :] + [IGNORED]
        rows.append((ids, positions, chats, targets))
    length = max(len(ids) for ids, *_ in rows)
    padded = [
        torch.tensor([values + [filler] * (length - len(values)) for values in column])
        for column, filler in zip(zip(*rows, strict=True), (end, 0, -1, IGNORED), strict=True)
    ]
    return Packed(*padded)


def answer_logits(
    model: LlavaForConditionalGeneration, pixels: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """Logits [answer tokens, vocabulary] and the right tokens [answer tokens], over all chats.

    Args:
        model: The network.
        pixels: The pictures, [batch, 3, height, width], whole numbers in [0, 255].
        packed: The chats about them.
    """
    embedded = model.get_input_embeddings()(packed.ids)
    embedded[:, 2 : 2 + IMAGE_TOKENS] = image_tokens(model, pixels)
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask(),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    counted = packed.targets != IGNORED
    return model.lm_head(hidden[counted]), packed.targets[counted]


def questions(
    arrangement: Arrangement, count: int, rng: random.Random, split: Split, *, choices: float
) -> Iterator[Question]:
    """`count` questions about a picture, its kinds in turn.

    Args:
        arrangement: The picture.
        count: Questions.
        rng: Draws them.
        split: The split of their wordings.
        choices: Share of questions with choices.
    """
    turn, asked = rng.randrange(len(KINDS)), 0
    while asked < count:
        with_choices = rng.random() < choices
        question = ask(arrangement, KINDS[turn % len(KINDS)], rng, split, with_choices=with_choices)
        turn += 1
        if question is not None:
            asked += 1
            yield question
