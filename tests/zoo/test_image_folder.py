"""The shipped image teacher, as it lies in its folder."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline

from recon import zoo
from recon.zoo import image_measure, image_scenes, image_teacher

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    return image_teacher.load(zoo.folder("image"))


def test_the_folder_loads_with_no_code_of_ours() -> None:
    loaded = DiffusionPipeline.from_pretrained(zoo.folder("image"))
    assert isinstance(loaded, DiTPipeline)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert loaded.get_label_ids(["red circle", "blue ring"]) == [0, 17]
    for part in (loaded.transformer, loaded.vae):
        weights = list(part.parameters())
        assert all(torch.isfinite(weight).all() for weight in weights)
        assert {weight.dtype for weight in weights} == {torch.float32}


def test_the_transformer_has_something_to_quantise(pipeline: DiTPipeline) -> None:
    config = pipeline.transformer.config
    assert config.num_layers >= 8
    assert config.num_attention_heads * config.attention_head_dim >= 128
    assert (config.sample_size // config.patch_size) ** 2 >= 64
    assert config.out_channels == 2 * config.in_channels
    assert config.num_embeds_ada_norm == image_teacher.NULL_LABEL


def test_all_embedders_are_equal(pipeline: DiTPipeline) -> None:
    first, *others = (block.norm1.emb for block in pipeline.transformer.transformer_blocks)
    for other in others:
        for name, weight in first.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name])


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in zoo.folder("image").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_no_config_tells_where_the_folder_was_made() -> None:
    for file in zoo.folder("image").rglob("*config.json"):
        assert "_name_or_path" not in json.loads(file.read_text())


def test_the_autoencoder_keeps_the_scene(pipeline: DiTPipeline) -> None:
    numbers = image_measure.reconstruction(pipeline, seed=3, count=48)
    assert numbers["vae_psnr"] >= 30
    assert numbers["vae_both"] >= 0.95


def test_the_batch_size_changes_no_picture(pipeline: DiTPipeline) -> None:
    alone = image_measure.sample(pipeline, [0, 17], seed=7, steps=2, batch=1)
    together = image_measure.sample(pipeline, [0, 17], seed=7, steps=2, batch=2)
    torch.testing.assert_close(alone, together, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def shares(pipeline: DiTPipeline) -> dict[str, float]:
    labels = list(range(len(image_scenes.CLASSES)))
    return image_measure.accuracy(image_measure.sample(pipeline, labels, seed=11), labels)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["colour", "shape"])
def test_sampled_pictures_show_their_class(shares: dict[str, float], key: str) -> None:
    assert shares[key] >= 0.87  # of 24; the model card has 95 % of 192
