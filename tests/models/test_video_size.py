"""The size of what CogVideoX samples, against the stock pipeline called with that size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.errors import ConfigError
from recon.models.cogvideox import CogVideoX
from recon.models.video_size import VideoSize
from recon.models.weights import own_memory
from tests.models.tiny import write_tiny_cogvideox

SIZE: dict[str, Any] = {"frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As 1.5: patches over frames, and a rotary table that reaches beyond what is sampled."""
    return write_tiny_cogvideox(
        tmp_path_factory.mktemp("size"),
        rotary=True,
        patch_size_t=2,
        height=20,
        width=20,
        frames=13,
        pipeline=True,
    )


def stock(folder: Path) -> Any:
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        own_memory(part)
    return pipeline


def flat(call: dict[str, Any]) -> list[Tensor]:
    """Tensors of a call of the network, those of tuples too, by name."""
    values = [call[name] for name in sorted(call)]
    parts = [p for v in values for p in (v if isinstance(v, tuple) else (v,))]
    return [part.clone() for part in parts if isinstance(part, Tensor)]


def calls_of(network: nn.Module, sample: Any) -> list[list[Tensor]]:
    """Tensors of every call of a network while `sample` runs."""
    calls: list[list[Tensor]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, given: calls.append(flat(given)), with_kwargs=True
    )
    sample()
    hook.remove()
    return calls


def write_config(folder: Path, **config: Any) -> Path:
    """A folder that holds nothing but the description of a transformer."""
    (folder / "transformer").mkdir(parents=True)
    described = {"_class_name": "CogVideoXTransformer3DModel", "num_layers": 1, **config}
    (folder / "transformer" / "config.json").write_text(json.dumps(described))
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    return folder


def test_what_is_sampled_is_the_stock_pipeline_s_at_the_given_size(folder: Path) -> None:
    expected_pipeline = stock(folder)
    expected: dict[str, Tensor] = {}

    def sample_stock() -> None:
        expected["video"] = expected_pipeline(
            "a red square",
            num_frames=SIZE["frames"],
            height=SIZE["height"],
            width=SIZE["width"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
            max_sequence_length=7,
        ).frames

    adapter = CogVideoX(str(folder), **SIZE)
    pipeline = adapter.pipeline("cpu")
    found: dict[str, Tensor] = {}

    def sample() -> None:
        found["video"] = pipeline.generate(["a red square"], [3], 2, 6.0)

    wanted = calls_of(expected_pipeline.transformer, sample_stock)
    calls = calls_of(pipeline.network, sample)
    assert len(calls) == len(wanted) == 2
    for call, reference in zip(calls, wanted, strict=True):
        assert len(call) == 5  # latents, text, timestep, cosines and sines
        assert all(torch.equal(a, b) for a, b in zip(call, reference, strict=True))
    assert torch.equal(found["video"], expected["video"])
    assert found["video"].shape == (1, 9, 3, 32, 48)


def test_examples_have_the_shapes_of_what_is_sampled(folder: Path) -> None:
    adapter = CogVideoX(str(folder), **SIZE)
    seen: list[dict[str, Tensor]] = []
    adapter.pipeline("cpu").trajectory("a", 0, 2, 6.0, lambda step, sample: seen.append(sample))
    example = adapter.example_sample(2, "meta", torch.float32)
    assert {k: t.shape for k, t in example.items()} == {k: t.shape for k, t in seen[0].items()}
    state = adapter.embed(seen[0], "cpu")
    foreseen = adapter.example_state(2, "meta", torch.float32)
    assert {k: t.shape for k, t in foreseen.items()} == {k: t.shape for k, t in state.items()}
    assert adapter.stream_bytes(2, "cpu") == sum(state[key].nbytes for key in adapter.streamed)


def test_what_is_not_given_is_that_of_the_config(folder: Path) -> None:
    assert CogVideoX(str(folder)).size == VideoSize(13, 80, 80)
    assert CogVideoX(str(folder), width=40).size == VideoSize(13, 80, 40)
    # Without a VAE to ask, its published factor of 8.
    alone = CogVideoX.of_network_folder(folder / "transformer")
    assert alone.size == VideoSize(13, 160, 160)


def test_a_size_is_part_of_the_identity_where_it_is_given(folder: Path) -> None:
    plain, sized = CogVideoX(str(folder)), CogVideoX(str(folder), **SIZE)
    assert plain.arguments() == {}
    assert sized.arguments() == SIZE
    assert plain.identity().keys() == {"class", "weights", "geometry"}
    assert sized.identity() == {**plain.identity(), "size": json.dumps(SIZE, sort_keys=True)}
    assert CogVideoX(str(folder), frames=9).identity() != sized.identity()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 10}, r"CogVideoX\.frames is 10; .* must be 4 n \+ 1\. The nearest is 9\."),
        ({"frames": 0}, r"frames is 0; .* The nearest is 1\."),
        ({"height": 34}, r"height is 34; .* a multiple of 8, and at most 80, .* nearest is 32\."),
        ({"width": 3}, r"width is 3; .* nearest is 8\."),
        ({"width": 88}, r"width is 88; .* at most 80, where the rotary table ends\. .* 80\."),
    ],
)
def test_sizes_that_do_not_divide_or_reach_too_far_are_refused(
    folder: Path, given: dict[str, Any], message: str
) -> None:
    adapter = CogVideoX(str(folder), **given)
    with pytest.raises(ConfigError, match=message):
        adapter.check()
    with pytest.raises(ConfigError, match=message):
        adapter.pipeline("cpu")


def test_a_position_table_or_stretched_rotary_takes_larger_sizes(tmp_path: Path) -> None:
    for rotary in (False, True):
        write_tiny_cogvideox(tmp_path / str(rotary), rotary=rotary, pipeline=True)
        adapter = CogVideoX(str(tmp_path / str(rotary)), frames=5, height=48, width=64)
        adapter.check()
        made = adapter.pipeline("cpu").latents(["a"], [0], 1, 1.0)
        assert made.shape == (1, 2, 4, 12, 16)


@pytest.mark.parametrize("given", [{"height": 496}, {"width": 736}, {"frames": 33}])
def test_learned_positions_take_their_own_size_only(tmp_path: Path, given: dict[str, Any]) -> None:
    learned = {
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    }
    folder = write_config(tmp_path, **learned)
    assert CogVideoX(str(folder), height=480, width=720).size == VideoSize(49, 480, 720)
    with pytest.raises(ConfigError, match="the network has learned a position for every token"):
        CogVideoX(str(folder), **given).check_description()


@pytest.mark.parametrize("given", [{}, {"frames": 81, "height": 768}])
def test_the_published_1_5_is_not_sampled_at_the_reach_of_its_table(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    folder = write_config(
        tmp_path,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        patch_bias=False,
        sample_height=300,
        sample_width=300,
        sample_frames=81,
    )
    message = r"holds 2400x2400 pixels.* Set frames: 81, height: 768 and width: 1360"
    adapter = CogVideoX(str(folder), **given)
    for ask in (adapter.check_description, lambda: adapter.stream_bytes(1, "cpu")):
        with pytest.raises(ConfigError, match=message):
            ask()
    sized = CogVideoX(str(folder), frames=81, height=768, width=1360)
    sized.check_description()
    assert sized.size == VideoSize(81, 768, 1360)
