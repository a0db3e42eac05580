"""CogVideoX as a chain of blocks against the stock transformer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing, ConfigError, WeightsError
from recon.models.adapter import ModelAdapter
from recon.models.capabilities import ExposesAttention, missing_attributes
from recon.models.cogvideox import CogVideoX
from recon.models.weights import own_memory
from tests.models.tiny import tiny_sample, write_tiny_cogvideox

VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"rotary": True},
    "1.5": {"rotary": True, "patch_size_t": 2, "frames": 13},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cogvideox(tmp_path_factory.mktemp("tiny"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cogvideox(tmp_path_factory.mktemp("tiny"), rotary=True)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    )
    return own_memory(network.eval())


def pipeline_rotary(network: Any, latents: Tensor) -> Any:
    """Rotary embedding from the pipeline's own method, its VAE factor being 8."""
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    pipeline = SimpleNamespace(transformer=network, vae_scale_factor_spatial=8)
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
    )


def chained(adapter: CogVideoX, sample: dict[str, Tensor]) -> Tensor:
    state = adapter.embed(sample, "cpu")
    for name in adapter.block_names:
        state = adapter.forward_block(adapter.block(name, "cpu"), state)
    return adapter.output(sample, state, "cpu")


def stock_output(network: Any, sample: dict[str, Tensor]) -> Tensor:
    rotary = None
    if network.config.use_rotary_positional_embeddings:
        rotary = pipeline_rotary(network, sample["hidden_states"])
    return network(**sample, image_rotary_emb=rotary, return_dict=False)[0]


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_chain_of_blocks_is_the_stock_forward_bit_for_bit(folder: Path, batch: int) -> None:
    adapter = CogVideoX(str(folder))
    sample = tiny_sample(adapter.config, batch)
    expected = stock_output(stock(folder), sample)
    assert torch.equal(chained(adapter, sample), expected)
    assert torch.equal(stock_output(adapter.network("cpu"), sample), expected)
    assert expected.shape == sample["hidden_states"].shape


@torch.no_grad()
def test_chain_of_blocks_in_bfloat16_is_the_stock_forward(folder: Path) -> None:
    adapter = CogVideoX(str(folder), dtype="bfloat16")
    sample = tiny_sample(adapter.config, 2)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in sample.items()}
    expected = stock_output(stock(folder, torch.bfloat16), half)
    assert torch.equal(chained(adapter, sample), expected)


@torch.no_grad()
def test_other_latent_sizes_than_the_configured_one(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    config = {**adapter.config, "sample_height": 12, "sample_width": 6, "sample_frames": 5}
    if config["patch_size_t"]:  # its rotary table is cut out of the configured size
        config.update(sample_height=4, sample_frames=29)
    sample = tiny_sample(config)
    assert torch.equal(chained(adapter, sample), stock_output(stock(folder), sample))


@pytest.mark.parametrize("name", ["5b", "1.5"])
@pytest.mark.parametrize("size", [(4, 8, 12), (2, 12, 6), (6, 16, 16)])
def test_rotary_is_the_pipelines_own(name: str, size: tuple[int, int, int], tmp_path: Path) -> None:
    folder = write_tiny_cogvideox(tmp_path, **{**VARIANTS[name], "height": 16, "width": 20})
    adapter = CogVideoX(str(folder))
    latents = torch.zeros(1, size[0], 4, *size[1:])
    cos, sin = adapter.rotary(tuple(latents.shape), "cpu")
    expected = pipeline_rotary(adapter.empty_network(), latents)
    assert torch.equal(cos[0], expected[0])
    assert torch.equal(sin[0], expected[1])
    assert adapter.rotary(tuple(latents.shape), "cpu")[0] is cos


def test_state_has_the_batch_as_axis_0_and_knows_its_streams(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    sample = tiny_sample(adapter.config, 2)
    state = adapter.embed(sample, "cpu")
    assert {tensor.shape[0] for tensor in state.values()} == {2}
    assert set(adapter.streamed) | set(adapter.shared) | {"temb"} >= set(state)
    tokens = adapter.tokens(state)
    streams = adapter.token_streams(state)
    assert streams["text"] == slice(0, 7)
    assert torch.equal(tokens[:, streams["text"]], state["encoder_hidden_states"])
    assert torch.equal(tokens[:, streams["video"]], state["hidden_states"])
    assert streams["video"].stop == tokens.shape[1]
    assert adapter.attention_tokens(state).shape == tokens.shape[:2]
    assert adapter.attention_tokens(state).all()


def test_forward_block_keeps_conditioning_and_the_given_state(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    state = adapter.embed(tiny_sample(adapter.config), "cpu")
    before = {key: value.clone() for key, value in state.items()}
    after = adapter.forward_block(adapter.block("transformer_blocks.0", "cpu"), state)
    assert all(torch.equal(state[key], before[key]) for key in state)
    for key in state:
        assert (after[key] is state[key]) == (key not in adapter.streamed)


def test_input_groups_name_every_linear_once_and_share_their_input(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    name = adapter.block_names[1]
    block = adapter.block(name, "cpu")
    groups = adapter.input_groups(name)
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    listed = [linear for group in groups for linear in group.linears]
    assert sorted(listed) == sorted(linears)
    seen: dict[str, Tensor] = {}
    for linear, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, key=linear: seen.__setitem__(key, args[0]))
    adapter.forward_block(block, adapter.embed(tiny_sample(adapter.config), "cpu"))
    assert list(seen) == listed  # call order
    owner = {linear: index for index, group in enumerate(groups) for linear in group.linears}
    for a in listed:
        for b in listed:
            assert (seen[a] is seen[b]) == (owner[a] == owner[b]), (a, b)


def test_names_and_roles_are_those_of_the_method_specification(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    assert adapter.block_names == ("transformer_blocks.0", "transformer_blocks.1")
    roles = {group.linears: group.role for group in adapter.input_groups("transformer_blocks.0")}
    assert roles == {
        ("norm1.linear",): "modulation",
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"): "attention_input",
        ("attn1.to_out.0",): "attention_output",
        ("norm2.linear",): "modulation",
        ("ff.net.0.proj",): "feed_forward_up",
        ("ff.net.2",): "feed_forward_down",
    }


def test_a_block_equals_the_block_of_from_pretrained(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    network = stock(folder)
    for name in adapter.block_names:
        block = adapter.block(name, "cpu")
        expected = network.get_submodule(name).state_dict()
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in block.state_dict().items())
        assert not block.training
        assert not any(p.requires_grad for p in block.parameters())


def test_blocks_are_read_anew_unless_they_are_kept(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    first, second = (adapter.block("transformer_blocks.0", "cpu") for _ in range(2))
    pointer = first.get_parameter("ff.net.2.weight").data_ptr()
    assert second.get_parameter("ff.net.2.weight").data_ptr() != pointer
    adapter.keep_resident = True
    first, second = (adapter.block("transformer_blocks.0", "cpu") for _ in range(2))
    pointer = first.get_parameter("ff.net.2.weight").data_ptr()
    assert second.get_parameter("ff.net.2.weight").data_ptr() == pointer
    first.set_submodule("ff.net.2", nn.Identity())
    assert isinstance(second.get_submodule("ff.net.2"), nn.Linear)


def test_the_adapter_leaves_the_random_state_alone_and_no_block_in_its_shell(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    before = torch.get_rng_state()
    sample = tiny_sample(adapter.config)
    chained(adapter, sample)
    adapter.network("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def write_config(folder: Path, **layout: Any) -> Path:
    base = {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_layers": 30,
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "text_embed_dim": 4096,
        "time_embed_dim": 512,
        "use_rotary_positional_embeddings": False,
    }
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({**base, **layout}))
    return folder


def test_geometry_of_the_true_2b(tmp_path: Path) -> None:
    adapter = CogVideoX(str(write_config(tmp_path)))
    assert adapter.block_names == tuple(f"transformer_blocks.{i}" for i in range(30))
    assert adapter.linear_shapes("transformer_blocks.29") == {
        "norm1.linear": (11520, 512),
        "attn1.to_q": (1920, 1920),
        "attn1.to_k": (1920, 1920),
        "attn1.to_v": (1920, 1920),
        "attn1.to_out.0": (1920, 1920),
        "norm2.linear": (11520, 512),
        "ff.net.0.proj": (7680, 1920),
        "ff.net.2": (1920, 7680),
    }


def test_storage_of_the_true_5b_is_the_published_one(tmp_path: Path) -> None:
    layout = {"num_layers": 42, "num_attention_heads": 48}
    folder = write_config(tmp_path, **layout, use_rotary_positional_embeddings=True)
    adapter = CogVideoX(str(folder))
    network = adapter.empty_network()
    assert all(parameter.is_meta for parameter in network.parameters())
    total = sum(2 * p.numel() for p in network.parameters())
    assert total / 2**30 == pytest.approx(10.375, abs=5e-4)  # S²Q-VDiT, efficiency table
    assert len(adapter.block_names) == 42
    shapes = [s for name in adapter.block_names for s in adapter.linear_shapes(name).values()]
    # every Linear inside the blocks at 4 bits, one fp32 scale per output channel
    saved = sum(2 * out * in_ - (out * in_ // 2 + 4 * out) for out, in_ in shapes)
    assert (total - saved) / 2**30 == pytest.approx(2.634, abs=5e-4)
    assert shapes[1] == (3072, 3072)
    # [text 226; video 17,550] tokens, the paper's 109 MB a sample in bfloat16
    half = CogVideoX(str(folder), dtype="bfloat16")
    assert half.stream_bytes(1, "cpu") == 17776 * 3072 * 2


def test_check_accepts_a_whole_folder_and_identity_tells_teachers_apart(
    folder: Path, tmp_path: Path
) -> None:
    adapter = CogVideoX(str(folder))
    adapter.check()
    again = CogVideoX(str(folder)).identity()
    assert again == adapter.identity()
    assert again["class"] == "recon.models.cogvideox.CogVideoX"
    other = CogVideoX(str(write_tiny_cogvideox(tmp_path, seed=1))).identity()
    assert other["weights"] != again["weights"]
    assert set(again) == {"class", "weights", "geometry"}


def test_cogvideox_exposes_attention_and_others_are_told_what_they_lack(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    assert isinstance(adapter, ExposesAttention)
    assert missing_attributes(adapter, ExposesAttention) == ()
    assert missing_attributes(object(), ExposesAttention) == ("attention_tokens",)


def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoints_elsewhere(tmp_path: Path) -> None:
    folder = write_tiny_cogvideox(tmp_path)
    network = stock(folder, torch.float16)
    network.save_pretrained(folder / "transformer")
    assert CogVideoX(str(folder)).compute_dtype("cpu") == torch.float32
    assert CogVideoX(str(folder)).compute_dtype("cuda:1") == torch.float16
    assert CogVideoX(str(folder), "bfloat16").compute_dtype("cuda") == torch.bfloat16


@torch.no_grad()
def test_a_network_from_given_weights_may_lack_those_of_block_linears(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    names = adapter.weights.keys()
    weights = adapter.weights.load_names(names, torch.float32, "cpu")
    lacking = dict(weights)
    del lacking["transformer_blocks.1.ff.net.2.weight"]
    alone = CogVideoX.of_network_folder(folder / "transformer", "float32")
    network = alone.network_from(lacking, "cpu")
    linear = network.get_submodule("transformer_blocks.1.ff.net.2")
    assert linear.weight.is_meta
    linear.load_state_dict(
        {
            "weight": weights["transformer_blocks.1.ff.net.2.weight"],
            "bias": weights["transformer_blocks.1.ff.net.2.bias"],
        },
        assign=True,
    )
    sample = tiny_sample(adapter.config)
    expected = stock_output(stock(folder), sample)
    assert torch.equal(stock_output(network, sample), expected)
    del lacking["transformer_blocks.1.ff.net.2.bias"]
    with pytest.raises(
        WeightsError, match=r"missing \['transformer_blocks\.1\.ff\.net\.2\.bias'\]"
    ):
        alone.network_from(lacking, "cpu")
    with pytest.raises(WeightsError, match=r"missing \[\], unexpected \['foreign'\]"):
        alone.network_from({**weights, "foreign": torch.ones(1)}, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stream_bytes_are_those_of_an_embedded_sample(folder: Path, dtype: Any) -> None:
    adapter = CogVideoX(str(folder), dtype)
    state = adapter.embed(tiny_sample(adapter.config, 2), "cpu")
    assert adapter.stream_bytes(2, "cpu") == sum(state[key].nbytes for key in adapter.streamed)


class _ReturnsDict(nn.Module):
    def forward(self, **given: Any) -> Any:
        return {"sample": given["hidden_states"]}


class _ReturnsSwapped(nn.Module):
    def forward(self, **given: Any) -> Any:
        return given["encoder_hidden_states"], given["hidden_states"]


@pytest.mark.parametrize(
    ("block", "found"),
    [(_ReturnsDict(), r"a dict with keys \['sample'\]"), (_ReturnsSwapped(), "a tuple of")],
)
def test_an_unknown_block_structure_is_named(tiny: Path, block: nn.Module, found: str) -> None:
    adapter = CogVideoX(str(tiny))
    state = adapter.embed(tiny_sample(adapter.config), "cpu")
    with pytest.raises(CapabilityMissing, match=f"{type(block).__name__} returned {found}"):
        adapter.forward_block(block, state)


def test_an_unlisted_linear_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = CogVideoX(str(tiny))
    monkeypatch.setattr(adapter, "input_groups", lambda name: ())
    with pytest.raises(CapabilityMissing, match=r"names other Linears than transformer_blocks\.0"):
        adapter.check()


def test_an_unknown_block_name_is_refused(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    with pytest.raises(ConfigError, match=r"'blocks\.0' is not a block of CogVideoXTransformer3D"):
        adapter.block("blocks.0", "cpu")


@pytest.mark.parametrize("given", ["THUDM/CogVideoX-2b", "zai-org/CogVideoX-5b"])
def test_a_hub_id_is_answered_with_the_download(given: str) -> None:
    name = given.split("/")[1]
    pattern = rf"hf download {given} --local-dir checkpoints/{name}`, and set folder: checkpoints"
    with pytest.raises(ConfigError, match=pattern):
        CogVideoX(given).check()


def test_a_missing_local_folder_names_a_known_checkpoint() -> None:
    pattern = r"'checkpoints/CogVideoX-2b'.*hf download zai-org/CogVideoX-2b"
    with pytest.raises(ConfigError, match=pattern):
        CogVideoX("checkpoints/CogVideoX-2b").check()


def test_unknown_words_and_classes_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CogVideoX\.dtype is 'half', which is none of"):
        CogVideoX("anywhere", dtype="half")  # type: ignore[arg-type]
    folder = write_tiny_cogvideox(tmp_path)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CogVideoXPipeline", "WanPipeline"))
    with pytest.raises(ConfigError, match=r"model_index\.json names the class 'WanPipeline'"):
        CogVideoX(str(folder)).check()
    index.unlink()
    with pytest.raises(ConfigError, match=r"model_index\.json is missing.*download it completely"):
        CogVideoX(str(folder)).check()
    index.write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json is not JSON"):
        CogVideoX(str(folder)).check()


def test_a_family_without_a_pipeline_says_so(tiny: Path) -> None:
    adapter = CogVideoX(str(tiny))
    with pytest.raises(CapabilityMissing, match="CogVideoX makes no pipeline, so nothing can be"):
        ModelAdapter.pipeline(adapter, "cpu")


def test_a_config_of_another_class_or_depth_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_cogvideox(tmp_path)
    config = folder / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("CogVideoXTransformer3DModel", "WanTransformer3DModel"))
    with pytest.raises(ConfigError, match="reads CogVideoXTransformer3DModel"):
        CogVideoX(str(folder)).check()
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    pattern = r"lacks \d+ tensors of the network, the first 'transformer_blocks\.2"
    with pytest.raises(WeightsError, match=pattern):
        CogVideoX(str(folder)).check()
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 0'))
    with pytest.raises(ConfigError, match=r"num_layers is 0 in .*config\.json"):
        CogVideoX(str(folder)).check()
    config.write_text(text.replace('"time_embed_dim": 16', '"time_embed_dim": 32'))
    with pytest.raises(
        WeightsError, match=r"has the shape \[.*\] in .*, and \[.*\] in the network"
    ):
        CogVideoX(str(folder)).check()
    with pytest.raises(WeightsError, match=r"do not fit CogVideoXBlock of CogVideoX"):
        CogVideoX(str(folder)).block("transformer_blocks.0", "cpu")


@torch.no_grad()
def test_the_grid_of_tokens_is_that_of_the_latents(folder: Path) -> None:
    adapter = CogVideoX(str(folder))
    sample = tiny_sample(adapter.config)
    tokens, (frames, rows, columns) = adapter.token_grid(sample)
    before = adapter.embed(sample, "cpu")
    assert tokens == adapter.token_streams(before)["video"]
    # A change of one patch of the latents is seen by the token at its place alone.
    latents = sample["hidden_states"].clone()
    pace = latents.shape[1] // frames
    latents[:, pace * (frames - 1), :, 2, 2 * (columns - 1)] += 1.0
    after = adapter.embed({**sample, "hidden_states": latents}, "cpu")
    change = (adapter.tokens(after) - adapter.tokens(before)).abs().sum((0, 2))[tokens]
    changed = change.reshape(frames, rows, columns).nonzero().tolist()
    assert changed == [[frames - 1, 1, columns - 1]]
