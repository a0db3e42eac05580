"""The image teacher's second training stage: the transformer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from recon.zoo import image_teacher
from recon.zoo.averaging import muon_and_adamw, train_averaged
from recon.zoo.image_autoencoder import SCALING, pool
from recon.zoo.image_objective import Chain, chain_of, hybrid_loss
from recon.zoo.image_recipe import Recipe, factor
from recon.zoo.image_scenes import label_of, pictures, random_scenes
from recon.zoo.world import Scene


@dataclass(frozen=True)
class Lessons:
    """What the transformer learns from: latents, their labels, and what noises them."""

    latents: Tensor
    """Scaled, [scenes, channels, height, width]."""
    labels: Tensor
    """[scenes]."""
    scheduler: DDIMScheduler
    chain: Chain
    generator: torch.Generator

    def loss(self, transformer: DiTTransformer2DModel, recipe: Recipe) -> Tensor:
        """Hybrid loss of one fresh batch."""
        chosen = torch.randint(len(self.labels), (recipe.batch,), generator=self.generator)
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=self.generator)
        timesteps = self._draw_timesteps(recipe)
        predicted = transformer(
            self.scheduler.add_noise(clean, noise, timesteps),
            timestep=timesteps,
            class_labels=self._drop_labels(self.labels[chosen], recipe.empty_labels),
            return_dict=False,
        )[0]
        velocity = self.scheduler.get_velocity(clean, noise, timesteps)
        return hybrid_loss(predicted, velocity, timesteps, self.chain)

    def _drop_labels(self, labels: Tensor, share: float) -> Tensor:
        """Labels [batch], a share of them replaced by the null class."""
        dropped = torch.rand(labels.shape, generator=self.generator) < share
        return labels.masked_fill(dropped, image_teacher.NULL_LABEL)

    def _draw_timesteps(self, recipe: Recipe) -> Tensor:
        """Timesteps [batch]: a share of them uniform, the others logit-normal, each stratified."""
        uniform = round(recipe.batch * recipe.uniform_timesteps)
        parts = []
        for count in (uniform, recipe.batch - uniform):
            strata = torch.arange(count) + torch.rand(count, generator=self.generator)
            parts.append((strata / max(count, 1)).clamp(1e-4, 1 - 1e-4))
        middle = (torch.special.ndtri(parts[1]) + recipe.timestep_shift).sigmoid()
        share = torch.cat([parts[0], middle])
        return (share * self.scheduler.config.num_train_timesteps).long()


def prepare(recipe: Recipe, number: int) -> Lessons:
    """Rendered and encoded scenes, and everything a batch of a round is drawn with."""
    scenes = random_scenes(recipe.seed + 3, recipe.scenes)
    scheduler = image_teacher.build_scheduler()
    return Lessons(
        latents=encode(scenes),
        labels=torch.tensor([label_of(scene) for scene in scenes]),
        scheduler=scheduler,
        chain=chain_of(scheduler.betas),
        generator=torch.Generator().manual_seed(recipe.seed + 4 + number),
    )


def encode(scenes: list[Scene], batch: int = 256) -> Tensor:
    """Scaled latents of the scenes' pictures, [scenes, 4, 16, 16]."""
    parts = [pool(pictures(scenes[i : i + batch])) for i in range(0, len(scenes), batch)]
    return torch.cat(parts) * SCALING


def start_transformer(seed: int) -> DiTTransformer2DModel:
    """Transformer at DiT's starting weights, its embedders tied.

    Source: https://arxiv.org/abs/2212.09748, section 3.2, and its code: every block starts as the
    identity and the output as zero.

    It stays in evaluation mode, in training too. Nothing else depends on the mode, and in training
    mode each block drops labels on its own, so that hardly a pass would go without its label
    altogether, as guidance needs.
    """
    torch.manual_seed(seed)
    transformer = image_teacher.build_transformer()
    image_teacher.tie_embedders(transformer)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedder = transformer.transformer_blocks[0].norm1.emb
    nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(transformer.pos_embed.proj.bias)
    adaptive = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*adaptive, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
    return transformer.eval()


def build_optimizers(
    transformer: DiTTransformer2DModel, rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    return muon_and_adamw(
        transformer,
        rate,
        lambda name: name.startswith("transformer_blocks") and ".norm" not in name,
    )


def train_round(
    recipe: Recipe,
    number: int,
    transformer: DiTTransformer2DModel,
    save: Callable[[DiTTransformer2DModel], None],
) -> DiTTransformer2DModel:
    """Running average of the weights over one round of training.

    Args:
        recipe: The numbers of the run.
        number: Of the round.
        transformer: Is trained in place; its embedders are tied.
        save: Is given the average every `save_every` steps.
    """
    steps = recipe.rounds()[number]
    return train_averaged(
        transformer,
        partial(prepare(recipe, number).loss, recipe=recipe),
        build_optimizers(transformer, recipe.rate),
        name="transformer",
        steps=steps,
        factor=partial(factor, steps=steps, recipe=recipe),
        average=recipe.average,
        save=save,
        save_every=recipe.save_every,
    )
