"""Sampling through the stock pipeline."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.models.cogvideox import CogVideoX
from recon.models.video_pipeline import VideoPipeline
from recon.models.weights import own_memory
from recon.types import Sample
from tests.models.tiny import write_tiny_cogvideox

PROMPTS = ["a red square moves left", "blue circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cogvideox(tmp_path_factory.mktemp("pipe"), rotary=True, pipeline=True)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> VideoPipeline:
    return CogVideoX(str(folder)).pipeline("cpu")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    from diffusers import CogVideoXPipeline

    stock = CogVideoXPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    for part in (stock.transformer, stock.text_encoder, stock.vae):
        own_memory(part)
    return stock


@pytest.mark.slow
def test_videos_are_those_of_the_stock_pipeline(pipeline: VideoPipeline, stock: Any) -> None:
    videos = pipeline.generate(PROMPTS, [3, 4], steps=2, guidance=6.0)
    assert videos.shape == (2, 9, 3, 32, 48)
    assert videos.dtype == torch.float32
    assert videos.min() >= 0
    assert videos.max() <= 1
    expected = stock(
        PROMPTS[1],
        num_inference_steps=2,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
        max_sequence_length=7,
    ).frames
    assert torch.equal(videos[1:], expected)


def test_a_latent_does_not_depend_on_what_else_is_sampled(pipeline: VideoPipeline) -> None:
    both = pipeline.latents(PROMPTS, [3, 4], steps=2, guidance=6.0)
    alone = pipeline.latents(PROMPTS[1:], [4], steps=2, guidance=6.0)
    assert torch.equal(both[1:], alone)
    batched = pipeline.latents(PROMPTS, [3, 4], steps=2, guidance=6.0, batch_size=2)
    torch.testing.assert_close(batched, both)


@torch.no_grad()
def test_encode_uses_the_configured_text_length(pipeline: VideoPipeline, stock: Any) -> None:
    embeddings = pipeline.encode(PROMPTS)
    assert embeddings.shape == (2, 7, 32)
    for row, prompt in zip(embeddings, PROMPTS, strict=True):
        expected, _ = stock.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=7
        )
        assert torch.equal(row, expected[0])


@pytest.mark.parametrize(("guidance", "batch"), [(6.0, 2), (1.0, 1)])
def test_a_trajectory_shows_what_enters_the_network(
    pipeline: VideoPipeline, folder: Path, guidance: float, batch: int
) -> None:
    seen: list[Sample] = []

    def visit(step: int, sample: Sample) -> None:
        assert step == len(seen)
        seen.append({key: value.clone() for key, value in sample.items()})

    final = pipeline.trajectory(PROMPTS[0], 3, 3, guidance, visit)
    assert torch.equal(final, pipeline.latents(PROMPTS[:1], [3], 3, guidance))
    assert len(seen) == 3
    assert {sample["hidden_states"].shape for sample in seen} == {(batch, 3, 4, 8, 12)}
    assert all(sample["timestep"].shape == (batch,) for sample in seen)
    noise = torch.randn(1, 3, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen[0]["hidden_states"][:1], noise)
    conditional = seen[0]["encoder_hidden_states"][-1:]
    assert torch.equal(conditional, pipeline.encode(PROMPTS[:1]))
    if batch == 2:
        assert torch.equal(seen[1]["hidden_states"][0], seen[1]["hidden_states"][1])
        assert torch.equal(seen[0]["encoder_hidden_states"][:1], pipeline.encode([""]))
    # what was seen is a sample of the adapter
    adapter = CogVideoX(str(folder))
    state = adapter.embed(seen[1], "cpu")
    assert state["hidden_states"].shape[0] == batch


def test_the_visitor_is_gone_afterwards_also_after_an_error(pipeline: VideoPipeline) -> None:
    def stop(step: int, sample: dict[str, Tensor]) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        pipeline.trajectory(PROMPTS[0], 3, 2, 1.0, stop)
    pipeline.latents(PROMPTS[:1], [3], 1, 1.0)


def test_another_network_is_sampled_when_given(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    network = adapter.network("cpu")
    with torch.no_grad():
        network.get_parameter("proj_out.bias").add_(1.0)
    changed = adapter.pipeline("cpu", network)
    assert changed.network is network
    latents = changed.latents(PROMPTS[:1], [3], 1, 1.0)
    assert not torch.equal(latents, adapter.pipeline("cpu").latents(PROMPTS[:1], [3], 1, 1.0))


def test_pipelines_in_use_share_all_but_network_and_scheduler(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    network = adapter.network("cpu")
    first = adapter.pipeline("cpu", network)
    second = adapter.pipeline("cpu", network)
    for part in ("text_encoder", "vae", "tokenizer"):
        assert getattr(first.pipe, part) is getattr(second.pipe, part)
    assert first.pipe.scheduler is not second.pipe.scheduler
    encoder = weakref.ref(first.pipe.text_encoder)
    del first, second
    gc.collect()
    assert encoder() is None  # the adapter does not keep it


def test_loading_and_sampling_show_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CogVideoX(str(folder)).pipeline("cpu").latents(PROMPTS[:1], [3], 1, 1.0)
    assert capfd.readouterr() == ("", "")


def test_seeds_must_match_prompts(pipeline: VideoPipeline) -> None:
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts; each prompt needs its own seed"):
        pipeline.generate(PROMPTS, [1], 2, 1.0)
    with pytest.raises(ConfigError, match="0 seeds for 0 prompts"):
        pipeline.latents([], [], 2, 1.0)


def test_an_unknown_scheduler_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_cogvideox(tmp_path, pipeline=True)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CogVideoXDDIMScheduler", "NoSuchScheduler"))
    with pytest.raises(
        ConfigError, match=r"names the scheduler \['diffusers', 'NoSuchScheduler'\]"
    ):
        CogVideoX(str(folder)).pipeline("cpu")
