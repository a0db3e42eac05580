"""The vision-language teacher's training from nothing to its folder.

Three stages, each from the running average that the one before left: the vision tower learns to
speak the decoder's words, the decoder learns to answer in a word, and then by letters of choices
too.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recon.zoo import vlm_teacher
from recon.zoo.averaging import muon_and_adamw, train_averaged
from recon.zoo.video_recipe import constant, cosine
from recon.zoo.vlm_lessons import answer_logits, pack, questions
from recon.zoo.vlm_questions import Question
from recon.zoo.vlm_recipe import Recipe
from recon.zoo.vlm_scenes import Arrangement, pixels, random_arrangements
from recon.zoo.vlm_sight import Sight, annotate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lessons:
    """Pictures, and everything a batch about them is drawn with."""

    arrangements: list[Arrangement]
    pixels: Tensor
    """[pictures, 3, height, width], whole numbers in [0, 255]."""
    tokenizer: PreTrainedTokenizerFast
    rng: random.Random
    generator: torch.Generator

    def draw(self, batch: int) -> Tensor:
        """Places of random pictures, [batch]."""
        return torch.randint(len(self.arrangements), (batch,), generator=self.generator)

    def answer_loss(
        self,
        model: LlavaForConditionalGeneration,
        batch: int,
        ask: Callable[[Arrangement], list[Question]],
    ) -> Tensor:
        """Cross entropy of all answers' tokens, for what is asked about random pictures."""
        chosen = self.draw(batch)
        packed = pack(self.tokenizer, [ask(self.arrangements[i]) for i in chosen.tolist()])
        return functional.cross_entropy(*answer_logits(model, self.pixels[chosen], packed))


def prepare(recipe: Recipe) -> Lessons:
    """Rendered pictures of the training split, and what draws from them."""
    arrangements = random_arrangements(recipe.seed + 3, recipe.pictures, "train")
    return Lessons(
        arrangements=arrangements,
        pixels=torch.stack([pixels(each) for each in arrangements]),
        tokenizer=vlm_teacher.build_tokenizer(),
        rng=random.Random(recipe.seed + 4),
        generator=torch.Generator().manual_seed(recipe.seed + 4),
    )


def start_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Network at its starting weights: every layer of the decoder starts as the identity."""
    torch.manual_seed(seed)
    model = vlm_teacher.build_model(tokenizer)
    nn.init.normal_(model.get_input_embeddings().weight)  # words and image tokens weigh the same
    for layer in model.model.language_model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def _is_matrix(name: str) -> bool:
    """Whether a parameter of two axes is a matrix of a layer or of the projector."""
    return ".layers." in name or "projector" in name


def train_sight(
    recipe: Recipe, lessons: Lessons, model: LlavaForConditionalGeneration
) -> LlavaForConditionalGeneration:
    """The network after its vision tower, projector and word embeddings have learned."""
    words, centres = annotate(lessons.arrangements)
    sight = Sight(model, lessons.tokenizer)
    unseen = [model.model.language_model.layers, model.model.language_model.norm, model.lm_head]
    for part in unseen:
        part.requires_grad_(False)

    def loss_of(network: Sight) -> Tensor:
        chosen = lessons.draw(recipe.sight_batch)
        return network.loss(lessons.pixels[chosen], words[chosen], centres[chosen])

    steps = recipe.sight_steps
    sight = train_averaged(
        sight,
        loss_of,
        muon_and_adamw(sight, recipe.sight_rate, _is_matrix),
        name="sight",
        steps=steps,
        factor=partial(cosine, steps=steps, warmup=min(recipe.warmup, steps)),
        average=recipe.average,
    )
    return sight.model.requires_grad_(True)


def train_decoder(
    model: LlavaForConditionalGeneration,
    loss_of: Callable[[LlavaForConditionalGeneration], Tensor],
    recipe: Recipe,
    *,
    name: str,
    steps: int,
    factor: Callable[[int], float],
    save: Callable[[LlavaForConditionalGeneration], None] | None = None,
) -> LlavaForConditionalGeneration:
    """Running average of the network whose decoder learns.

    Vision tower and projector stand still: at the decoder's rate, its first gradients would undo
    what they learned before it could make use of it.
    """
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return train_averaged(
        model,
        loss_of,
        muon_and_adamw(model, recipe.rate, _is_matrix),
        name=name,
        steps=steps,
        factor=factor,
        average=recipe.average,
        save=save,
        save_every=recipe.save_every,
    ).requires_grad_(True)


def train_on_questions(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    lessons: Lessons,
    out: Path,
    *,
    steps: int,
    choices: float,
) -> LlavaForConditionalGeneration:
    """Running average of the network whose decoder learns from questions.

    With choices among them, the rate falls to zero and the folder is written on the way.
    """

    def asked(arrangement: Arrangement) -> list[Question]:
        return list(questions(arrangement, recipe.questions, lessons.rng, "train", choices=choices))

    schedule = partial(cosine, steps=steps) if choices else constant
    return train_decoder(
        model,
        lambda network: lessons.answer_loss(network, recipe.batch, asked),
        recipe,
        name="both forms" if choices else "short answers",
        steps=steps,
        factor=partial(schedule, warmup=min(recipe.warmup, steps)),
        save=partial(vlm_teacher.save, out) if choices else None,
    )


def train(recipe: Recipe, out: Path) -> None:
    """Train the vision-language teacher and write its folder, also on the way.

    Args:
        recipe: The numbers of the run; the defaults made the shipped folder.
        out: Folder to write; the teacher's files in it are replaced.
    """
    begin = time.monotonic()
    lessons = prepare(recipe)
    model = train_sight(recipe, lessons, start_model(lessons.tokenizer, recipe.seed + 2))
    taught = partial(train_on_questions, recipe=recipe, lessons=lessons, out=out)
    model = taught(model, steps=recipe.short_steps, choices=0.0)
    model = taught(model, steps=recipe.steps, choices=recipe.choices)
    vlm_teacher.save(out, model)
    logger.info("%s written after %.0f s", out, time.monotonic() - begin)
