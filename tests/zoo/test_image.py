import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from recon.zoo import (
    image_autoencoder,
    image_decoder,
    image_denoiser,
    image_measure,
    image_objective,
    image_recipe,
    image_salience,
    image_scenes,
    image_teacher,
    measure,
    train,
)

RECIPE = image_recipe.Recipe(scenes=24, batch=4)


@pytest.fixture(scope="module")
def lessons() -> image_denoiser.Lessons:
    return image_denoiser.prepare(RECIPE, 0)


@pytest.fixture
def transformer() -> DiTTransformer2DModel:
    return image_denoiser.start_transformer(seed=0)


def shaken(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The transformer moved off its start, at which blocks and output do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return transformer


# Scenes


def test_there_are_24_classes_and_each_label_is_that_of_its_scene() -> None:
    scenes = image_scenes.random_scenes(seed=0, count=24)
    labels = [image_scenes.label_of(scene) for scene in scenes]
    assert sorted(labels) == list(range(24))
    for label, scene in zip(labels, scenes, strict=True):
        assert image_scenes.attributes_of(label) == scene.attributes
    assert image_scenes.random_scenes(seed=0, count=24) == scenes
    assert image_scenes.random_scenes(seed=1, count=24) != scenes


@pytest.mark.parametrize("label", [-1, 24])
def test_an_unknown_label_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label is {label}.*classes 0 to 23.*get_label_ids"):
        image_scenes.attributes_of(label)


# Autoencoder


def test_the_encoder_is_pooling() -> None:
    images = image_scenes.pictures(image_scenes.random_scenes(seed=8, count=6))
    vae = image_autoencoder.build_vae().eval()
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, image_autoencoder.pool(images), atol=0.01, rtol=0)
    assert float(posterior.std.detach().max()) < 0.01


def test_latents_have_unit_variance_and_grey_has_no_edges() -> None:
    latents = image_denoiser.encode(image_scenes.random_scenes(seed=3, count=48))
    assert latents.shape == (48, 4, 16, 16)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    slope = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    torch.testing.assert_close(image_autoencoder.pool(slope)[:, 3], torch.zeros(1, 16, 16))


def test_the_decoder_starts_by_enlarging_the_colours() -> None:
    images = image_scenes.pictures(image_scenes.random_scenes(seed=8, count=6))
    cells = torch.nn.functional.avg_pool2d(images, 4)
    enlarged = torch.nn.functional.interpolate(cells, scale_factor=4)
    decoded = image_autoencoder.build_vae().eval().decode(image_autoencoder.pool(images)).sample
    assert float((decoded - enlarged).detach().square().mean().sqrt()) < 0.05


def test_a_crop_is_aligned_to_the_cells_and_holds_the_middle_of_the_shape() -> None:
    scenes = image_scenes.random_scenes(seed=2, count=24)
    images = image_scenes.pictures(scenes)
    cut = image_decoder.crops(images, scenes, random.Random(0))
    assert cut.shape == (24, 3, 32, 32)
    for image, crop in zip(images, cut, strict=True):
        windows = image.unfold(1, 32, 4).unfold(2, 32, 4).flatten(1, 2)  # 3, places, 32, 32
        assert (windows == crop[:, None]).all(dim=(0, 2, 3)).any()
    assert float((cut.amax(dim=1) - cut.amin(dim=1)).flatten(1).amax(dim=1).min()) > 0.9


# Objective


def test_the_predicted_variance_is_that_of_the_learned_range_sampler() -> None:
    scheduler = DDPMScheduler(
        beta_start=0.0001, beta_end=0.02, clip_sample=False, variance_type="learned_range"
    )
    chain = image_objective.chain_of(scheduler.betas)
    torch.testing.assert_close(
        scheduler.betas, image_teacher.build_scheduler().betas, atol=0, rtol=0
    )
    for timestep in (1, 10, 500, 999):
        for position in (-1.0, 0.3, 1.0):
            share = (position + 1) / 2
            ours = share * chain.high[timestep] + (1 - share) * chain.low[timestep]
            theirs = scheduler._get_variance(timestep, torch.tensor(position))
            assert float(ours) == pytest.approx(float(theirs), abs=2e-3)


def test_the_bound_is_the_divergence_of_two_normal_distributions() -> None:
    betas = image_teacher.build_scheduler().betas
    chain = image_objective.chain_of(betas)
    generator = torch.Generator().manual_seed(0)
    clean, noise, guess = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    position = torch.rand(3, 2, 4, 4, generator=generator) * 2 - 1
    timesteps = torch.tensor([1, 300, 999])
    expected = []
    velocity = torch.empty_like(clean)
    for i, t in enumerate(timesteps.tolist()):
        beta = betas[t].double()
        here, before = (1 - betas.double()).cumprod(0)[[t, t - 1]]
        noisy = here.sqrt() * clean[i] + (1 - here).sqrt() * noise[i]
        velocity[i] = here.sqrt() * noise[i] - (1 - here).sqrt() * clean[i]
        means = []
        for given in (velocity[i], guess[i]):
            start = here.sqrt() * noisy - (1 - here).sqrt() * given
            # Equation 7 of https://arxiv.org/abs/2006.11239.
            weighted = before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * noisy
            means.append(weighted / (1 - here))
        posterior = beta * (1 - before) / (1 - here)
        share = (position[i].double() + 1) / 2
        variance = (share * beta.log() + (1 - share) * posterior.log()).exp()
        true = torch.distributions.Normal(means[0], posterior.sqrt().expand_as(noisy))
        ours = torch.distributions.Normal(means[1], variance.sqrt())
        expected.append(torch.distributions.kl_divergence(true, ours).mean() / math.log(2))
    squared_error = (guess - velocity).square()
    bound = image_objective.variational_bound(squared_error, position, timesteps, chain)
    torch.testing.assert_close(bound.double(), torch.stack(expected), rtol=2e-3, atol=1e-6)


def test_the_bound_moves_the_variance_and_not_the_velocity() -> None:
    chain = image_objective.chain_of(image_teacher.build_scheduler().betas)
    generator = torch.Generator().manual_seed(0)
    velocity = torch.randn(2, 4, 8, 8, generator=generator)
    predicted = torch.zeros(2, 8, 8, 8, requires_grad=True)
    timesteps = torch.tensor([0, 400])
    image_objective.hybrid_loss(predicted, velocity, timesteps, chain).backward()
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad[:, :4], -2 * velocity / velocity.numel())
    assert not predicted.grad[0, 4:].any()  # no bound at timestep 0
    assert predicted.grad[1, 4:].all()


# Transformer and its training


def test_all_blocks_train_one_embedder_and_start_as_the_identity(
    lessons: image_denoiser.Lessons, transformer: DiTTransformer2DModel
) -> None:
    blocks = transformer.transformer_blocks
    assert all(block.norm1.emb is blocks[0].norm1.emb for block in blocks)
    assert len(blocks) >= 8
    tokens = torch.randn(2, 64, 128)
    labels, timesteps = torch.tensor([0, 1000]), torch.tensor([5, 900])
    seen = blocks[3](tokens, timestep=timesteps, class_labels=labels)
    torch.testing.assert_close(seen, tokens, atol=0, rtol=0)
    # No velocity is predicted at first: the error is that of zero, and the bound is small.
    loss = lessons.loss(transformer, replace(RECIPE, batch=64))
    assert float(loss.detach()) == pytest.approx(1.05, abs=0.15)


def test_a_label_is_dropped_for_all_blocks_or_none(
    lessons: image_denoiser.Lessons, transformer: DiTTransformer2DModel
) -> None:
    seen: list[torch.Tensor] = []
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    table.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    recipe = replace(RECIPE, batch=64, empty_labels=0.5)
    with torch.no_grad():
        lessons.loss(transformer, recipe)
    assert len(seen) == 9  # eight blocks and the output
    assert all(torch.equal(each, seen[0]) for each in seen)
    dropped = seen[0] == image_teacher.NULL_LABEL
    assert 0.2 < float(dropped.float().mean()) < 0.8
    assert int(seen[0][~dropped].max()) < 24


def test_a_few_steps_lower_the_loss(lessons: image_denoiser.Lessons) -> None:
    transformer = image_denoiser.start_transformer(seed=0)
    optimizers = image_denoiser.build_optimizers(transformer, 2e-3)
    losses = []
    for _ in range(3):
        loss = lessons.loss(transformer, RECIPE)
        transformer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = image_recipe.Recipe(warmup=100, decay_steps=400)
    assert image_recipe.factor(0, 1000, recipe) == pytest.approx(0.01)
    assert image_recipe.factor(100, 1000, recipe) == 1
    assert image_recipe.factor(600, 1000, recipe) == 1
    assert image_recipe.factor(800, 1000, recipe) == pytest.approx(0.5)
    assert image_recipe.factor(1000, 1000, recipe) == pytest.approx(0, abs=1e-9)


# Folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo") / "teacher"
    _train(out, more_steps=1)
    return out


def _train(out: Path, *, more_steps: int, first_round: int = 0) -> None:
    decoder = "--crop-steps 1 --full-steps 1 --decoder-batch 2"
    transformer = f"--scenes 24 --steps 1 --more-steps {more_steps} --batch 2 --save-every 1"
    rounds = f"--first-round {first_round}"
    options = f"{decoder} {transformer} {rounds}".split()
    train.main(["image", "--out", str(out), *options])


def test_a_training_goes_on_from_its_first_round_to_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "teacher"
    _train(out, more_steps=0)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() != (folder / weights).read_bytes()
    _train(out, more_steps=1, first_round=1)
    for file in folder.rglob("*.*"):
        assert (out / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_the_recipe_writes_a_folder_that_loads_and_samples(folder: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(folder)
    labels = pipeline.get_label_ids(["red circle", "magenta pillar"])
    assert labels == [0, 23]
    images = image_measure.sample(pipeline, labels, seed=0, steps=2)
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(images).all()
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]  # nothing left aside


def test_the_folder_is_small_and_holds_no_pickle(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 7_900_000  # leaves room for a model card
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    for file in files:
        if file.suffix == ".json":
            assert "_name_or_path" not in json.loads(file.read_text())


def test_the_folder_computes_what_was_trained(
    tmp_path: Path, transformer: DiTTransformer2DModel
) -> None:
    shaken(transformer)
    image_teacher.save(tmp_path, image_autoencoder.build_vae(), transformer)
    loaded = image_teacher.load(tmp_path).transformer
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    tables = [b.norm1.emb.class_embedder.embedding_table.weight for b in loaded.transformer_blocks]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert len({table.data_ptr() for table in tables}) == 8  # as in any DiT of diffusers
    given = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([10, 700]),
        "class_labels": torch.tensor([3, 1000]),
    }
    with torch.no_grad():
        expected = transformer(**given).sample
        torch.testing.assert_close(loaded(**given).sample, expected, atol=0.02, rtol=0)


def test_the_sampler_with_learned_variance_takes_the_output_whole(
    transformer: DiTTransformer2DModel,
) -> None:
    scheduler = DDPMScheduler.from_config(
        image_teacher.build_scheduler().config, variance_type="learned_range"
    )
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = shaken(transformer)(
                latents, timestep=timestep[None], class_labels=torch.tensor([0])
            ).sample
            assert output.shape == (1, 8, 16, 16)
            latents = scheduler.step(output, timestep, latents, generator=generator).prev_sample
    assert torch.isfinite(latents).all()


# Measurement


def test_rendered_pictures_are_right_and_others_are_failures_of_their_class() -> None:
    scenes = image_scenes.random_scenes(seed=4, count=24)
    images = image_scenes.pictures(scenes) / 2 + 0.5
    labels = [image_scenes.label_of(scene) for scene in scenes]
    assert image_measure.accuracy(images, labels) == {"colour": 1, "shape": 1, "both": 1}
    assert image_measure.failures(images, labels) == {}
    wrong = [label + 4 if label < 4 else label for label in labels]  # asks for yellow, sees red
    assert image_measure.accuracy(images, wrong)["colour"] == pytest.approx(20 / 24)
    assert image_measure.accuracy(images, wrong)["shape"] == 1
    assert set(image_measure.failures(images, wrong)) == {
        "yellow circle",
        "yellow ring",
        "yellow bar",
        "yellow pillar",
    }


def test_a_salient_channel_shows_in_activations_and_weights(
    transformer: DiTTransformer2DModel,
) -> None:
    shaken(transformer)
    with torch.no_grad():
        block = transformer.transformer_blocks[2]
        block.attn1.to_k.weight[:, 7] = 40.0  # salient weight, query_key_value
        block.norm1.linear.bias[3 * 128 + 5] = 60.0  # a shift: salient input of feed_forward_up
        with image_salience.recorded_maxima(transformer) as activations:
            transformer(
                torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
                timestep=torch.tensor([10, 700]),
                class_labels=torch.tensor([3, 1000]),
            )
    weights = image_salience.salience(image_salience.weight_maxima(transformer))
    seen = image_salience.salience(activations)
    assert weights["query_key_value"]["most_salient_block"] > 50
    assert weights["query_key_value"]["median_block"] < 2
    assert weights["feed_forward_up"]["most_salient_block"] < 2
    assert seen["feed_forward_up"]["most_salient_block"] > 10
    assert seen["query_key_value"]["most_salient_block"] < 5
    assert activations["feed_forward_up"][2].argmax() == 5
    assert not transformer.transformer_blocks[2].ff.net[0].proj._forward_pre_hooks


def test_the_measurement_reports_settings_and_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    options = f"--folder {folder} --steps 1 --rounds 1 --contact-sheet {sheet}"
    measure.main(["image", *options.split()])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["teacher"] == "image"
    assert numbers["steps"] == numbers["rounds"] == 1
    assert 0 <= numbers["both"] <= min(numbers["colour"], numbers["shape"]) <= 1
    assert sum(numbers["failures"].values()) == round(24 * (1 - numbers["both"]))
    assert math.isfinite(numbers["vae_psnr"])
    assert set(numbers["salience"]) == {"activations", "weights"}
    assert sheet.stat().st_size > 0


@pytest.mark.parametrize(
    ("main", "options"),
    [(train.main, ["--near-steps", "1"]), (measure.main, ["--prompts", "1"])],
    ids=["train", "measure"],
)
def test_a_teacher_refuses_the_options_of_the_other(
    main: Callable[[list[str]], None], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["image", *options])
    assert "unrecognized arguments" in capsys.readouterr().err
