"""Sampling images through the stock parts, against the stock pipeline and the papers' formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError, WeightsError
from recon.models.dit import DiT
from recon.models.image_pipeline import ImagePipeline
from recon.types import Sample
from tests.models.tiny import write_tiny_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dit(tmp_path_factory.mktemp("pipe"), pipeline=True)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> ImagePipeline:
    return DiT(str(folder)).pipeline("cpu")


@pytest.fixture(scope="module")
def ancestral(folder: Path) -> ImagePipeline:
    return DiT(str(folder), sampler="ddpm").pipeline("cpu")


def recorded(
    pipeline: ImagePipeline, label: int, seed: int, steps: int, guidance: float
) -> tuple[list[Sample], Tensor]:
    """What entered the network at every step, and the final latents."""
    seen: list[Sample] = []

    def visit(step: int, sample: Sample) -> None:
        assert step == len(seen)
        seen.append({key: value.clone() for key, value in sample.items()})

    return seen, pipeline.trajectory(label, seed, steps, guidance, visit)


# Against DiTPipeline, where it can be used


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # the stock pipeline knows 1000 as the null class only
    return write_tiny_dit(tmp_path_factory.mktemp("thousand"), classes=1000, pipeline=True)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("learned", [True, False])
def test_images_are_those_of_the_stock_pipeline(
    thousand: Path,
    tmp_path: Path,
    guidance: float,
    learned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    folder = thousand
    if not learned:
        folder = write_tiny_dit(tmp_path, classes=1000, pipeline=True, learned_variance=False)
    pipeline = DiT(str(folder)).pipeline("cpu")
    stock: Any = DiTPipeline(
        pipeline.network,
        pipeline.vae,
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        {
            int(k): v
            for k, v in json.loads((folder / "model_index.json").read_text())["id2label"].items()
        },
    )
    stock.set_progress_bar_config(disable=True)
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode

    def recording(latents: Tensor) -> Any:
        decoded.append(latents)
        return decode(latents)

    monkeypatch.setattr(pipeline.vae, "decode", recording)
    expected = stock(
        class_labels=stock.get_label_ids(["circle", "star"]),
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=5,
        output_type="pt",
    ).images
    images = pipeline.generate(["circle", "star"], [3, 4], 5, guidance, batch_size=2)
    assert torch.equal(decoded[1], decoded[0])
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    # A product over a transposed view inside the VAE rounds by the addresses of its tensors.
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


# Seeds, batches, visits


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_latent_does_not_depend_on_what_else_is_sampled(folder: Path, sampler: Any) -> None:
    pipeline = DiT(str(folder), sampler=sampler).pipeline("cpu")
    both = pipeline.latents([1, 2], [3, 4], steps=4, guidance=1.5)
    assert torch.equal(both[1:], pipeline.latents([2], [4], steps=4, guidance=1.5))
    assert not torch.equal(both[1:], pipeline.latents([2], [5], steps=4, guidance=1.5))
    together = pipeline.latents([1, 2], [3, 4], steps=4, guidance=1.5, batch_size=2)
    torch.testing.assert_close(together, both, rtol=1e-4, atol=1e-4)


def test_the_callers_random_state_is_left_alone(ancestral: ImagePipeline) -> None:
    before = torch.get_rng_state()
    ancestral.latents([1], [3], steps=3, guidance=1.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("guidance", "labels"), [(1.5, [10, 2]), (1.0, [2])])
def test_a_trajectory_shows_what_enters_the_network(
    pipeline: ImagePipeline, folder: Path, guidance: float, labels: list[int]
) -> None:
    seen, final = recorded(pipeline, 2, 3, 4, guidance)
    assert torch.equal(final, pipeline.latents([2], [3], 4, guidance))
    assert [sample["class_labels"].tolist() for sample in seen] == [labels] * 4
    assert [sample["timestep"].tolist() for sample in seen] == [
        [timestep] * len(labels) for timestep in (750, 500, 250, 0)
    ]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for sample in seen[:1]:
        assert all(torch.equal(row[None], noise) for row in sample["hidden_states"])
    # what was seen is a sample of the adapter
    state = DiT(str(folder)).embed(seen[1], "cpu")
    assert state["hidden_states"].shape[0] == len(labels)


def test_images_are_made_of_the_latents_and_visited_alike(pipeline: ImagePipeline) -> None:
    steps: list[int] = []
    images = pipeline.generate([0, 1, 2], [5, 6, 7], 2, 1.5, 2, lambda step, _: steps.append(step))
    assert images.shape == (3, 3, 16, 16)
    assert steps == [0, 1, 0, 1]  # two batches


def test_labels_are_not_dropped_in_training_mode_which_is_then_restored(folder: Path) -> None:
    adapter = DiT(str(folder))
    pipeline = adapter.pipeline("cpu")
    expected = pipeline.latents([1], [3], 2, 1.5)
    pipeline.network.train()
    pipeline.network.get_submodule("transformer_blocks.0.ff").eval()
    assert torch.equal(pipeline.latents([1], [3], 2, 1.5), expected)
    modes = {name: module.training for name, module in pipeline.network.named_modules()}
    assert modes["transformer_blocks.0.norm1.emb.class_embedder"]
    assert not modes["transformer_blocks.0.ff"]


# Guidance


@pytest.mark.parametrize("channels", [3, 4])
@torch.no_grad()
def test_guidance_moves_the_first_channels_only(folder: Path, channels: int) -> None:
    adapter = DiT(str(folder), guided_channels=channels)
    pipeline = adapter.pipeline("cpu")
    seen, _ = recorded(pipeline, 2, 3, 2, 1.5)
    null, conditional = (row[None, :4] for row in pipeline.network(**seen[0], return_dict=False)[0])
    noise = conditional.clone()
    noise[:, :channels] = null[:, :channels] + 1.5 * (conditional - null)[:, :channels]
    expected = pipeline.scheduler.step(noise, 500, seen[0]["hidden_states"][:1]).prev_sample
    torch.testing.assert_close(seen[1]["hidden_states"][:1], expected)
    stock = recorded(DiT(str(folder)).pipeline("cpu"), 2, 3, 2, 1.5)[0]
    same = torch.equal(stock[1]["hidden_states"], seen[1]["hidden_states"])
    assert same == (channels == 4)


@pytest.mark.parametrize("channels", [0, 5])
def test_more_or_fewer_guided_channels_than_there_are_are_refused(
    folder: Path, channels: int
) -> None:
    with pytest.raises(ConfigError, match=rf"guided_channels is {channels}; .* in \[1, 4\]"):
        DiT(str(folder), guided_channels=channels).pipeline("cpu")


# Ancestral sampling


def respaced(steps: int) -> list[int]:
    """Timesteps of DiT's respaced diffusion: one section, evenly from 0 to the last, rounded."""
    return [round(index * 999 / (steps - 1)) for index in range(steps)]


def ancestral_step(
    output: Tensor, latents: Tensor, timesteps: list[int], index: int, noise: Tensor
) -> Tensor:
    """x at the timestep before, in float64.

    Source: DDPM (arXiv 2006.11239), eq. 6 and 7; Improved DDPM (arXiv 2102.09672), eq. 15, on the
    betas of the respaced diffusion, section 4.
    """
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    now = kept[timesteps[index]]
    before = kept[timesteps[index - 1]] if index else torch.ones(())
    beta = 1 - now / before
    epsilon, fraction = output.double().chunk(2, dim=1)
    fraction = (fraction + 1) / 2
    start = (latents.double() - (1 - now).sqrt() * epsilon) / now.sqrt()
    mean = before.sqrt() * beta / (1 - now) * start
    mean = mean + (now / before).sqrt() * (1 - before) / (1 - now) * latents.double()
    if index == 0:
        return mean
    smallest = (1 - before) / (1 - now) * beta
    log_variance = fraction * beta.log() + (1 - fraction) * smallest.log()
    return mean + (0.5 * log_variance).exp() * noise.double()


@torch.no_grad()
def test_ancestral_sampling_is_that_of_the_papers(ancestral: ImagePipeline) -> None:
    steps = 7
    seen, final = recorded(ancestral, 2, 3, steps, 1.0)
    timesteps = respaced(steps)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for step, index in enumerate(reversed(range(steps))):
        assert seen[step]["timestep"].tolist() == [timesteps[index]]
        torch.testing.assert_close(seen[step]["hidden_states"], latents, rtol=1e-3, atol=1e-3)
        entered = seen[step]["hidden_states"]
        output = ancestral.network(**seen[step], return_dict=False)[0]
        noise = torch.randn(1, 4, 8, 8, generator=generator) if index else torch.zeros(())
        latents = ancestral_step(output, entered, timesteps, index, noise).float()
    assert timesteps[0] == 0
    torch.testing.assert_close(final, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [250, 100, 50, 30, 2])
def test_ancestral_timesteps_are_those_of_the_respaced_diffusion(
    ancestral: ImagePipeline, steps: int
) -> None:
    ancestral.scheduler.set_timesteps(steps)
    assert ancestral.scheduler.timesteps.tolist() == respaced(steps)[::-1]


def test_what_is_said_of_trailing_spacing_is_so(folder: Path) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        timestep_spacing="trailing", variance_type="learned_range", clip_sample=False
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[-1] == 19
    output, latents = torch.ones(1, 8, 2, 2), torch.ones(1, 4, 2, 2)
    last = scheduler.step(output, scheduler.timesteps[-1], latents)
    assert not torch.allclose(last.prev_sample, last.pred_original_sample, atol=1e-3)


def test_ancestral_sampling_needs_a_learned_variance(tmp_path: Path) -> None:
    folder = write_tiny_dit(tmp_path, pipeline=True, learned_variance=False)
    with pytest.raises(ConfigError, match="needs a learned variance, that is 8 channels"):
        DiT(str(folder), sampler="ddpm").pipeline("cpu")


@pytest.mark.parametrize(
    ("sampler", "steps", "pattern"),
    [
        ("ddim", 0, r"steps is 0; sampler ddim takes 1 to 1000"),
        ("ddim", 1001, r"steps is 1001; sampler ddim takes 1 to 1000"),
        ("ddim", 30, r"steps is 30, .* would leave out 10 of them\. Use one of \[20, 25, 40\]"),
        ("ddim", 600, r"steps is 600, .* would leave out 400 of them"),
        ("ddpm", 0, r"steps is 0; sampler ddpm takes 2 to 1000"),
        ("ddpm", 1, r"steps is 1; sampler ddpm takes 2 to 1000"),
    ],
)
def test_counts_of_steps_that_diffusers_samples_wrongly_are_refused(
    folder: Path, sampler: Any, steps: int, pattern: str
) -> None:
    pipeline = DiT(str(folder), sampler=sampler).pipeline("cpu")
    with pytest.raises(ConfigError, match=pattern):
        pipeline.latents([1], [3], steps, 1.0)


# Classes


def test_classes_by_name_or_by_number(pipeline: ImagePipeline) -> None:
    labels: list[int | str] = ["square", "disc", "circle", "disc, circle", 3, 10]
    assert pipeline.classes(labels) == [0, 1, 1, 1, 3, 10]


@pytest.mark.parametrize(
    ("label", "pattern"),
    [
        ("hexagon", r"'hexagon' is none of the \d+ names in id2label of .*model_index\.json"),
        ("crane", r"'crane' names several classes in id2label .* the number"),
        (11, r"A class label is 11; labels lie in \[0, 10\]"),
        (-1, r"A class label is -1"),
    ],
)
def test_an_unknown_class_is_refused(pipeline: ImagePipeline, label: Any, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        pipeline.generate([label], [3], 2, 1.0)


def test_seeds_must_match_labels(pipeline: ImagePipeline) -> None:
    with pytest.raises(ConfigError, match="1 seeds for 2 labels; each label needs its own seed"):
        pipeline.generate([1, 2], [1], 2, 1.0)
    with pytest.raises(ConfigError, match="0 seeds for 0 labels"):
        pipeline.latents([], [], 2, 1.0)


# Parts


def test_pipelines_in_use_share_the_vae(folder: Path) -> None:
    adapter = DiT(str(folder))
    network = adapter.network("cpu")
    first, second = (adapter.pipeline("cpu", network) for _ in range(2))
    assert first.network is network
    assert first.vae is second.vae
    assert first.scheduler is not second.scheduler


def test_another_vae_is_just_a_path(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_dit(tmp_path, pipeline=True, seed=9) / "vae"
    ours = DiT(str(folder), vae=str(other)).pipeline("cpu")
    stock = DiT(str(folder)).pipeline("cpu")
    assert torch.equal(ours.latents([1], [3], 2, 1.5), stock.latents([1], [3], 2, 1.5))
    difference = ours.generate([1], [3], 2, 1.5) - stock.generate([1], [3], 2, 1.5)
    assert difference.abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"vae\.folder is .*hf download stabilityai/sd-vae-ft-ms"):
        DiT(str(folder), vae=str(tmp_path / "none")).pipeline("cpu")
    with pytest.raises(ConfigError, match=r"reads AutoencoderKL"):
        DiT(str(folder), vae=str(folder / "transformer")).pipeline("cpu")


def test_loading_and_sampling_show_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    DiT(str(folder)).pipeline("cpu").generate([1], [3], 1, 1.0)
    assert capfd.readouterr() == ("", "")


def test_damaged_or_foreign_parts_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_dit(tmp_path, pipeline=True)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="it was cut short or changed"):
        DiT(str(folder)).pipeline("cpu")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(ConfigError, match="reads DDIMScheduler or DDPMScheduler"):
        DiT(str(folder)).pipeline("cpu")
    file.unlink()
    with pytest.raises(ConfigError, match=r"scheduler_config\.json is missing"):
        DiT(str(folder)).pipeline("cpu")
    with pytest.raises(ConfigError, match=r"sampler is 'euler', which is none of"):
        DiT(str(folder), sampler="euler").pipeline("cpu")  # type: ignore[arg-type]
