import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, DiffusionPipeline

from recon import zoo
from recon.zoo import (
    train,
    video_autoencoder,
    video_denoiser,
    video_measure,
    video_teacher,
    world,
)

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> CogVideoXPipeline:
    return video_teacher.load(zoo.folder("video"))


def test_the_folder_loads_with_no_code_of_ours() -> None:
    loaded = DiffusionPipeline.from_pretrained(zoo.folder("video"))
    assert isinstance(loaded, CogVideoXPipeline)
    for part in (loaded.transformer, loaded.vae, loaded.text_encoder):
        weights = list(part.parameters())
        assert all(torch.isfinite(weight).all() for weight in weights)
        assert {weight.dtype for weight in weights} == {torch.float32}


def test_the_transformer_has_something_to_quantise(pipeline: CogVideoXPipeline) -> None:
    transformer = pipeline.transformer
    config = transformer.config
    assert isinstance(transformer, CogVideoXTransformer3DModel)
    assert len(transformer.transformer_blocks) >= 6
    assert config.num_attention_heads * config.attention_head_dim >= 128
    latent_frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    patches = (config.sample_height // 2) * (config.sample_width // 2)
    assert latent_frames * patches >= 256


def test_the_scheduler_is_the_one_of_cogvideox(pipeline: CogVideoXPipeline) -> None:
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


def test_the_tokenizer_knows_every_word_and_fits_every_prompt(
    pipeline: CogVideoXPipeline,
) -> None:
    tokenizer = pipeline.tokenizer
    everything = [p for split in ("train", "evaluation") for p in world.every_prompt(split)]
    rows = tokenizer(everything).input_ids
    assert max(map(len, rows)) <= video_teacher.TEXT_TOKENS
    assert not any(tokenizer.unk_token_id in row for row in rows)
    assert tokenizer.unk_token_id in tokenizer("a red elephant").input_ids
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == everything[0]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in zoo.folder("video").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_no_config_tells_where_the_folder_was_made() -> None:
    for file in zoo.folder("video").rglob("*config.json"):
        assert "_name_or_path" not in json.loads(file.read_text())


def test_the_encoder_is_pooling(pipeline: CogVideoXPipeline) -> None:
    video = video_autoencoder.clips(world.random_scenes(seed=8, count=6))
    posterior = pipeline.vae.encode(video).latent_dist
    pooled = video_autoencoder.pool(video)
    torch.testing.assert_close(posterior.mean, pooled, atol=0.02, rtol=0)
    assert float(posterior.std.detach().max()) < 0.01


def test_latents_have_unit_variance_and_the_autoencoder_keeps_the_scene(
    pipeline: CogVideoXPipeline,
) -> None:
    numbers = video_measure.reconstruction(pipeline, seed=3, count=24)
    assert numbers["vae_psnr"] >= 28
    assert numbers["vae_all"] >= 0.9
    latents = video_denoiser.encode(world.random_scenes(seed=3, count=24))
    assert latents.shape == (24, 5, 4, 14, 16)
    assert float(latents.std()) == pytest.approx(1, abs=0.15)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no embedded model 'audio'. Choose one of video"):
        zoo.folder("audio")


def test_a_missing_folder_names_the_command_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "__file__", "/nowhere/__init__.py")
    with pytest.raises(FileNotFoundError, match=r"python -m recon.zoo.train video"):
        zoo.folder("video")


def test_the_recipe_writes_a_folder_that_samples(tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    decoder = "--crop-steps 1 --full-steps 1 --decoder-batch 1"
    denoiser = "--scenes 4 --picture-steps 1 --near-steps 1 --steps 1 --batch 2"
    train.main(["video", "--out", str(out), *decoder.split(), *denoiser.split()])
    untrained = video_teacher.load(out)
    videos = video_measure.sample(untrained, ["a red circle moving left"], seed=0, steps=2)
    assert videos.shape == (1, world.FRAMES, 3, world.HEIGHT, world.WIDTH)
    assert torch.isfinite(videos).all()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]  # nothing left aside


def test_the_batch_size_changes_no_video(pipeline: CogVideoXPipeline) -> None:
    prompts = world.prompts(seed=2, count=2)
    alone = video_measure.sample(pipeline, prompts, seed=7, steps=2, batch=1)
    together = video_measure.sample(pipeline, prompts, seed=7, steps=2, batch=2)
    torch.testing.assert_close(alone, together, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def shares(pipeline: CogVideoXPipeline) -> dict[str, float]:
    prompts = world.prompts(seed=11, count=8)
    return video_measure.accuracy(video_measure.sample(pipeline, prompts, seed=11), prompts)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["colour", "shape", "motion"])
def test_sampled_videos_show_what_the_prompts_say(shares: dict[str, float], key: str) -> None:
    assert shares[key] >= 0.75
