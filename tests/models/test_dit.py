"""DiT as a chain of blocks against the stock transformer, and folding of scales into it."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.calibration.attention import AttentionColumnSums
from recon.errors import CapabilityMissing, ConfigError, NumericsError, WeightsError
from recon.layers.quant_attention import OPERANDS, QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, NearestRounding
from recon.layers.static_range import StaticRange
from recon.layers.tree import replace, shared_copy
from recon.models.capabilities import (
    ExposesAttention,
    ExposesEnds,
    FoldsScales,
    missing_attributes,
)
from recon.models.dit import DiT
from recon.models.dit_folding import MODULATED
from recon.models.folding import scale_rows
from recon.models.weights import own_memory
from recon.quantizers.spec import QuantSpec
from tests.models.tiny import tiny_image_sample, write_tiny_dit

TOKEN = QuantSpec(num_bits=8, strategy="token", dynamic=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "learned variance": {},
    "noise only": {"learned_variance": False},
    "embedders that differ": {"equal_embedders": False, "layers": 3},
    "first published": {"first_class": True},
    "affine, without attention bias": {"norm_elementwise_affine": True, "attention_bias": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dit(tmp_path_factory.mktemp("dit"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dit(tmp_path_factory.mktemp("dit"))


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    )
    return own_memory(network.eval())


def stock_output(network: Any, sample: dict[str, Tensor]) -> Tensor:
    return network(**sample, return_dict=False)[0]


def chained(adapter: DiT, sample: dict[str, Tensor]) -> Tensor:
    state = adapter.embed(sample, "cpu")
    for name in adapter.block_names:
        state = adapter.forward_block(adapter.block(name, "cpu"), state)
    return adapter.output(sample, state, "cpu")


# The chain of blocks


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_chain_of_blocks_is_the_stock_forward_bit_for_bit(folder: Path, batch: int) -> None:
    adapter = DiT(str(folder))
    sample = tiny_image_sample(adapter.config, batch)
    expected = stock_output(stock(folder), sample)
    assert torch.equal(chained(adapter, sample), expected)
    assert torch.equal(stock_output(adapter.network("cpu"), sample), expected)
    assert expected.shape[1] == adapter.config["out_channels"]


@torch.no_grad()
def test_chain_of_blocks_in_bfloat16_is_the_stock_forward(folder: Path) -> None:
    adapter = DiT(str(folder), dtype="bfloat16")
    sample = tiny_image_sample(adapter.config, 2)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in sample.items()}
    assert torch.equal(chained(adapter, sample), stock_output(stock(folder, torch.bfloat16), half))


@torch.no_grad()
def test_other_latent_sizes_than_the_configured_one(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    sample = tiny_image_sample({**adapter.config, "sample_size": 12})
    assert torch.equal(chained(adapter, sample), stock_output(stock(tiny), sample))


@pytest.mark.parametrize("size", [(4, 16), (9, 9)])
def test_latents_that_stock_would_scramble_or_cut_are_refused(
    tiny: Path, size: tuple[int, int]
) -> None:
    adapter = DiT(str(tiny))
    sample = {**tiny_image_sample(adapter.config), "hidden_states": torch.zeros(1, 4, *size)}
    with pytest.raises(ConfigError, match=rf"hidden_states are {size[0]} x {size[1]}; DiT"):
        adapter.embed(sample, "cpu")


@pytest.mark.parametrize(
    ("labels", "pattern"),
    [
        (torch.tensor([0, 11]), r"label is 11; labels lie in \[0, 10\], and 10 is the null class"),
        (torch.tensor([-1, 3]), r"label is -1; labels lie in \[0, 10\]"),
        (torch.tensor([0.0, 1.0]), r"class_labels are torch\.float32; they must be whole numbers"),
    ],
)
def test_a_class_out_of_range_is_refused(tiny: Path, labels: Tensor, pattern: str) -> None:
    adapter = DiT(str(tiny))
    sample = {**tiny_image_sample(adapter.config, 2), "class_labels": labels}
    with pytest.raises(ConfigError, match=pattern):
        adapter.embed(sample, "cpu")


def test_equal_embedders_run_once_and_blocks_hold_none(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    adapter = DiT(str(tiny))
    sample = tiny_image_sample(adapter.config, 2)
    assert adapter.shares_conditioning
    calls = []
    forward = CombinedTimestepLabelEmbeddings.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CombinedTimestepLabelEmbeddings, "forward", counted)
    chained(adapter, sample)
    assert len(calls) == 1
    assert adapter.embed(sample, "cpu")["conditioning"].shape == (2, 1, 32)
    block = adapter.block("transformer_blocks.1", "cpu")
    assert not [name for name in block.state_dict() if "emb" in name]
    assert all(not buffer.is_meta for buffer in block.buffers())


def test_one_changed_number_makes_every_block_use_its_own_embedder(tmp_path: Path) -> None:
    write_tiny_dit(tmp_path, layers=3)
    network = stock(tmp_path)
    with torch.no_grad():
        table = network.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight
        table[10, 7] += 1e-3
    network.save_pretrained(tmp_path / "transformer")
    adapter = DiT(str(tmp_path))
    sample = tiny_image_sample(adapter.config, 2)  # has a null class
    assert not adapter.shares_conditioning
    conditioning = adapter.embed(sample, "cpu")["conditioning"]
    assert conditioning.shape == (2, 3, 32)
    assert torch.equal(conditioning[:, 0], conditioning[:, 1])
    assert not torch.equal(conditioning[1, 0], conditioning[1, 2])
    with torch.no_grad():
        assert torch.equal(chained(adapter, sample), stock_output(stock(tmp_path), sample))


def test_state_has_the_batch_as_axis_0_and_one_stream(folder: Path) -> None:
    adapter = DiT(str(folder))
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    assert {tensor.shape[0] for tensor in state.values()} == {2}
    assert set(state) == {*adapter.streamed, "conditioning"}
    tokens = adapter.tokens(state)
    assert tokens.shape == (2, 16, 32)
    assert adapter.token_streams(state) == {"image": slice(0, 16)}
    assert adapter.attention_tokens(state).shape == (2, 16)
    assert adapter.attention_tokens(state).all()
    assert adapter.stream_bytes(2, "cpu") == state["hidden_states"].nbytes
    assert DiT(str(folder), "bfloat16").stream_bytes(2, "cpu") == tokens.nbytes // 2


@torch.no_grad()
def test_rows_of_several_states_may_be_joined(folder: Path) -> None:
    adapter = DiT(str(folder))
    states = [adapter.embed(tiny_image_sample(adapter.config, 2, seed), "cpu") for seed in (0, 1)]
    joined = {key: torch.cat([state[key][1:] for state in states]) for key in states[0]}
    block = adapter.block("transformer_blocks.1", "cpu")
    alone = [adapter.forward_block(block, state)["hidden_states"][1:] for state in states]
    together = adapter.forward_block(block, joined)["hidden_states"]
    torch.testing.assert_close(together, torch.cat(alone))


def test_forward_block_keeps_conditioning_and_the_given_state(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    state = adapter.embed(tiny_image_sample(adapter.config), "cpu")
    before = {key: value.clone() for key, value in state.items()}
    after = adapter.forward_block(adapter.block("transformer_blocks.0", "cpu"), state)
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert after["conditioning"] is state["conditioning"]


def test_attention_of_a_block_is_one_call_over_all_tokens(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    assert isinstance(adapter, ExposesAttention)
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    with AttentionColumnSums(16, adapter.attention_tokens(state)) as sums, torch.no_grad():
        adapter.forward_block(adapter.block("transformer_blocks.0", "cpu"), state)
    # every query of every head gives one in all: 16 queries, 2 heads
    torch.testing.assert_close(sums.sums().sum(dim=1), torch.full((2,), 32.0))


@torch.no_grad()
def test_a_replaced_product_gets_the_kernels_operands_and_none_brings_the_kernel_back(
    folder: Path,
) -> None:
    adapter = DiT(str(folder))
    name = adapter.block_names[0]
    block, seen = adapter.block(name, "cpu"), []
    assert adapter.attentions(name) == ("attn1",)
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    expected = adapter.forward_block(block, state)["hidden_states"]

    def product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query.shape, key.shape, value.shape))
        return nn.functional.scaled_dot_product_attention(query, key, value)

    adapter.replace_attention(block, "attn1", product)
    assert torch.equal(adapter.forward_block(block, state)["hidden_states"], expected)
    assert seen == [((2, 2, 16, 16),) * 3]  # batch, heads, tokens, channels
    adapter.replace_attention(block, "attn1", lambda query, key, value: 0 * value)
    assert not torch.equal(adapter.forward_block(block, state)["hidden_states"], expected)
    adapter.replace_attention(block, "attn1", None)
    assert torch.equal(adapter.forward_block(block, state)["hidden_states"], expected)
    assert len(seen) == 1


def test_an_attention_with_further_parts_is_refused(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    block = adapter.block(adapter.block_names[0], "cpu")
    block.get_submodule("attn1").norm_q = nn.LayerNorm(16)
    with pytest.raises(CapabilityMissing, match="attention with norm_q cannot be replaced here"):
        adapter.replace_attention(block, "attn1", QuantAttention(TOKEN, 8))


def test_a_quantised_value_cannot_take_the_scale_of_the_projection(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    block = adapter.block(adapter.block_names[0], "cpu")
    adapter.replace_attention(block, "attn1", QuantAttention(TOKEN, 8))
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    scales = {name: torch.full((32,), 2.0) for name in ("attn1.to_q", "attn1.to_out.0")}
    with pytest.raises(CapabilityMissing, match="the attention quantises what to_v puts out"):
        adapter.fold(block, scales)
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    adapter.fold(block, {"attn1.to_q": scales["attn1.to_q"]})


def test_input_groups_name_every_linear_once_and_share_their_input(folder: Path) -> None:
    adapter = DiT(str(folder))
    name = adapter.block_names[1]
    block = adapter.block(name, "cpu")
    groups = adapter.input_groups(name)
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    listed = [linear for group in groups for linear in group.linears]
    seen: dict[str, Tensor] = {}
    for linear, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, key=linear: seen.__setitem__(key, args[0]))
    adapter.forward_block(block, adapter.embed(tiny_image_sample(adapter.config), "cpu"))
    assert list(seen) == listed  # call order
    owner = {linear: index for index, group in enumerate(groups) for linear in group.linears}
    for a in listed:
        for b in listed:
            assert (seen[a] is seen[b]) == (owner[a] == owner[b]), (a, b)
    assert {group.role for group in groups} == {
        "modulation",
        "attention_input",
        "attention_output",
        "feed_forward_up",
        "feed_forward_down",
    }


def test_a_block_equals_the_block_of_from_pretrained(folder: Path) -> None:
    adapter = DiT(str(folder))
    network = stock(folder)
    for name in adapter.block_names:
        block = adapter.block(name, "cpu")
        expected = network.get_submodule(name).state_dict()
        expected = {k: v for k, v in expected.items() if not k.startswith("norm1.emb.")}
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in block.state_dict().items())
        assert not block.training
        assert not any(p.requires_grad for p in block.parameters())


def fixed_products() -> QuantAttention:
    spec = QuantSpec(num_bits=8, strategy="tensor", symmetric=False)
    made = QuantAttention(spec, 8)
    for operand in OPERANDS:
        low = 0.0 if operand == "probability" else -1.0
        made.ranges[operand] = StaticRange(low, 1.0, made.spec(operand), "log")
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "products",
    [lambda: None, lambda: QuantAttention(TOKEN, 8), fixed_products],
    ids=["kernel", "per token", "fixed"],
)
def test_a_block_may_be_compiled_once_for_all(products: Any, tmp_path: Path) -> None:
    folder = write_tiny_dit(tmp_path, equal_embedders=False, layers=3)
    adapter = DiT(str(folder))
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(adapter.forward_block, backend=count)
    with torch.no_grad():
        for name in adapter.block_names:
            block = adapter.block(name, "cpu")
            adapter.replace_attention(block, "attn1", products())
            expected = adapter.forward_block(block, state)["hidden_states"]
            torch.testing.assert_close(compiled(block, state)["hidden_states"], expected)
    assert len(graphs) == 1


# Whole networks


@torch.no_grad()
def test_a_network_from_given_weights_may_lack_those_of_linears(folder: Path) -> None:
    adapter = DiT(str(folder))
    weights = adapter.weights.load_names(adapter.weights.keys(), torch.float32, "cpu")
    lacking = dict(weights)
    name = "transformer_blocks.1.norm1.linear"
    del lacking[f"{name}.weight"]
    alone = DiT.of_network_folder(folder / "transformer", "float32")
    network = alone.network_from(lacking, "cpu")
    linear = network.get_submodule(name)
    assert linear.weight.is_meta
    given = {leaf: weights[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    linear.load_state_dict(given, assign=True)
    sample = tiny_image_sample(adapter.config, 2)
    assert torch.equal(stock_output(network, sample), stock_output(stock(folder), sample))
    ends = [n for group in (*adapter.stem_groups(), *adapter.head_groups()) for n in group.linears]
    for name in (*ends, *adapter.copies()):
        del lacking[f"{name}.weight"]
    assert alone.network_from(lacking, "cpu").get_submodule("pos_embed.proj").weight.is_meta
    del lacking["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"]
    with pytest.raises(WeightsError, match=r"missing \['transformer_blocks\.1\.norm1\.emb\.class"):
        alone.network_from(lacking, "cpu")


# Stem and head


@torch.no_grad()
def test_stem_and_head_are_those_of_the_network_and_can_be_replaced(folder: Path) -> None:
    adapter, network = DiT(str(folder)), stock(folder)
    assert isinstance(adapter, ExposesEnds)
    groups = (*adapter.stem_groups(), *adapter.head_groups())
    ends, sample = adapter.ends("cpu"), tiny_image_sample(adapter.config, 2)
    state = adapter.embed(sample, "cpu")
    for group in groups:
        for name in group.linears:
            weight = f"{name}.weight"
            assert torch.equal(ends.get_parameter(weight), network.get_parameter(weight))
    for name, first in adapter.copies().items():
        one, other = (network.get_parameter(f"{linear}.weight") for linear in (name, first))
        assert torch.equal(one, other)
    named = {name for group in groups for name in group.linears} | set(adapter.copies())
    inside = {f"{b}.{n}" for b in adapter.block_names for n in adapter.linear_shapes(b)}
    every = {n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert named | inside == every
    assert not named & inside
    # Every one of them is in use, and only in the tree that it is replaced in.
    for group in groups:
        for name in group.linears:
            halved = adapter.ends("cpu")
            halved.set_submodule(name, copy.deepcopy(halved.get_submodule(name)))
            halved.get_parameter(f"{name}.weight").mul_(0.5)
            changed = adapter.embed_with(halved, sample, "cpu")
            if group in adapter.stem_groups():
                assert any(not torch.equal(changed[key], state[key]) for key in state)
            else:
                outputs = [adapter.output_with(e, sample, state, "cpu") for e in (halved, ends)]
                assert not torch.equal(*outputs)
    again = adapter.embed(sample, "cpu")
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_without_weights_to_look_at_the_embedders_are_taken_to_be_equal(tmp_path: Path) -> None:
    whole = write_tiny_dit(tmp_path / "whole", equal_embedders=False, layers=3)
    assert DiT(str(whole)).copies() == {}
    assert len(DiT(str(whole)).stem_groups()) == 2 + 3
    (tmp_path / "alone" / "transformer").mkdir(parents=True)
    config = (whole / "transformer" / "config.json").read_text()
    (tmp_path / "alone" / "transformer" / "config.json").write_text(config)
    assert len(DiT(str(tmp_path / "alone")).copies()) == 2 * 2


def test_a_network_can_be_saved_and_is_the_public_class(tiny: Path, tmp_path: Path) -> None:
    network: Any = DiT(str(tiny)).network("cpu")
    assert type(network).__name__ == "DiTTransformer2DModel"
    network.save_pretrained(tmp_path / "transformer")
    again = stock(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in network.state_dict().items())


def test_the_adapter_leaves_the_random_state_alone(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    before = torch.get_rng_state()
    chained(adapter, tiny_image_sample(adapter.config))
    adapter.network("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_geometry_and_counts_of_the_true_dit_xl(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    layout = {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "out_channels": 8,
        "sample_size": 32,
    }
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(layout))
    adapter = DiT(str(tmp_path))
    shapes = adapter.linear_shapes("transformer_blocks.27")
    assert shapes == {
        "norm1.linear": (6912, 1152),
        "attn1.to_q": (1152, 1152),
        "attn1.to_k": (1152, 1152),
        "attn1.to_v": (1152, 1152),
        "attn1.to_out.0": (1152, 1152),
        "ff.net.0.proj": (4608, 1152),
        "ff.net.2": (1152, 4608),
    }
    network = adapter.empty_network()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(749.8e6, abs=5e4)
    embedders = [network.get_submodule(f"{name}.norm1.emb") for name in adapter.block_names]
    copies = sum(p.numel() for e in embedders for p in e.parameters())
    assert copies == pytest.approx(77.8e6, abs=5e4)
    inside = 28 * sum(out * in_ for out, in_ in shapes.values())
    assert inside / 28 == pytest.approx(23.89e6, abs=5e3)
    # PTQ4DiT wraps 201 modules (embedders tied) with 673.2 M weights: our 196 Linears inside the
    # blocks, and 5 outside, which a ModelAdapter does not hand out.
    kinds = (nn.Linear, nn.Conv2d)
    outside = {
        name: module.weight.numel()
        for name, module in network.named_modules()
        if isinstance(module, kinds)
        and not name.startswith(tuple(f"transformer_blocks.{i}." for i in range(1, 28)))
        and name.removeprefix("transformer_blocks.0.") not in shapes
    }
    assert sorted(outside) == [
        "pos_embed.proj",
        "proj_out_1",
        "proj_out_2",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    ]
    assert 28 * len(shapes) + len(outside) == 201
    assert inside + sum(outside.values()) == pytest.approx(673.2e6, abs=5e4)
    assert DiT(str(tmp_path), "bfloat16").stream_bytes(1, "cpu") == 256 * 1152 * 2


# Switches


def original_embedding(timestep: Tensor, denominator: float) -> Tensor:
    """The 256 cosines and sines of a timestep. Source: DiT (arXiv 2212.09748)."""
    index = torch.arange(128, dtype=torch.float64)
    angle = timestep.double()[:, None] * 1e4 ** (-index / denominator)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


@pytest.mark.parametrize(("shift", "denominator"), [(1, 127), (0, 128)])
@torch.no_grad()
def test_downscale_freq_shift_sets_the_frequencies_everywhere(
    tiny: Path, shift: Any, denominator: float
) -> None:
    adapter = DiT(str(tiny), downscale_freq_shift=shift)
    sample = tiny_image_sample(adapter.config, 2)
    embedder: Any = stock(tiny).transformer_blocks[0].norm1.emb
    angles = original_embedding(sample["timestep"], denominator)
    expected = embedder.timestep_embedder(angles) + embedder.class_embedder(sample["class_labels"])
    conditioning = adapter.embed(sample, "cpu")["conditioning"][:, 0]
    torch.testing.assert_close(conditioning, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(chained(adapter, sample), stock_output(adapter.network("cpu"), sample))
    same = torch.equal(chained(adapter, sample), stock_output(stock(tiny), sample))
    assert same == (shift == 1)


@torch.no_grad()
def test_norm3_eps_replaces_that_of_the_configuration(tiny: Path) -> None:
    adapter = DiT(str(tiny), norm3_eps=1e-2)
    sample = tiny_image_sample(adapter.config, 2)
    network: Any = stock(tiny)
    assert network.transformer_blocks[0].norm3.eps == 1e-5
    for block in network.transformer_blocks:
        block.norm3.eps = 1e-2
    expected = stock_output(network, sample)
    assert torch.equal(chained(adapter, sample), expected)
    assert torch.equal(stock_output(adapter.network("cpu"), sample), expected)
    block = adapter.block("transformer_blocks.0", "cpu")
    assert block.get_submodule("norm1.norm").eps == 1e-6


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"downscale_freq_shift": 2}, r"DiT\.downscale_freq_shift is 2; it must be 1"),
        ({"norm3_eps": 0.0}, r"DiT\.norm3_eps is 0\.0; it must lie between 0 and 1"),
        ({"dtype": "half"}, r"DiT\.dtype is 'half'"),
    ],
)
def test_switches_out_of_range_are_refused(given: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        DiT("anywhere", **given)


def test_identity_tells_teachers_and_switches_apart(tiny: Path, tmp_path: Path) -> None:
    adapter = DiT(str(tiny))
    assert adapter.identity() == DiT(str(tiny)).identity()
    assert adapter.identity()["class"] == "recon.models.dit.DiT"
    other = DiT(str(write_tiny_dit(tmp_path, seed=1))).identity()
    assert other["weights"] != adapter.identity()["weights"]
    switches: list[dict[str, Any]] = [
        {"downscale_freq_shift": 0},
        {"norm3_eps": 1e-6},
        {"sampler": "ddpm"},
        {"guided_channels": 3},
    ]
    for switch in switches:
        changed = DiT(str(tiny), **switch).identity()
        assert {k for k in changed if changed[k] != adapter.identity()[k]} == {"protocol"}


# Wrong input


def test_check_accepts_every_layout(folder: Path) -> None:
    DiT(str(folder)).check()


def test_check_refuses_a_folder_or_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf download facebook/DiT-XL-2-256"):
        DiT(str(tmp_path / "none")).check()
    folder = write_tiny_dit(tmp_path)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match="it was cut short or changed"):
        DiT(str(folder)).check()
    weights.unlink()
    with pytest.raises(WeightsError, match="holds no safetensors file"):
        DiT(str(folder)).check()
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        DiT(str(folder)).check()
    (folder / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=r"model_index\.json is missing"):
        DiT(str(folder)).check()


def test_sharded_weights_are_read_as_well(tmp_path: Path) -> None:
    folder = write_tiny_dit(tmp_path, max_shard_size="60KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    adapter = DiT(str(folder))
    adapter.check()
    assert adapter.shares_conditioning
    sample = tiny_image_sample(adapter.config)
    with torch.no_grad():
        assert torch.equal(chained(adapter, sample), stock_output(stock(folder), sample))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "reads DiTTransformer2DModel"),
        ({"norm_type": "ada_norm_single"}, r"norm_type is 'ada_norm_single' .* ada_norm_zero"),
        (
            {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
            r"norm_type is 'layer_norm'",
        ),
        ({"num_embeds_ada_norm": None}, r"num_embeds_ada_norm is None"),
        ({"num_layers": 0}, r"num_layers is 0"),
    ],
)
def test_another_class_norm_or_depth_is_refused(
    tmp_path: Path, change: dict[str, Any], pattern: str
) -> None:
    folder = write_tiny_dit(tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=pattern):
        DiT(str(folder)).check()


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_embeds_ada_norm": 11}])
def test_weights_of_another_geometry_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_tiny_dit(tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(WeightsError, match=r"lacks|has the shape"):
        DiT(str(folder)).check()


class _ReturnsTuple(nn.Module):
    def forward(self, hidden_states: Tensor, **unused: Any) -> Any:
        return (hidden_states,)


def test_an_unknown_block_structure_or_name_is_named(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    state = adapter.embed(tiny_image_sample(adapter.config), "cpu")
    with pytest.raises(CapabilityMissing, match="_ReturnsTuple returned a tuple"):
        adapter.forward_block(_ReturnsTuple(), state)
    with pytest.raises(ConfigError, match=r"'blocks\.0' is not a block of DiTTransformer2DModel"):
        adapter.block("blocks.0", "cpu")


# Folding

CONSUMERS = {
    "attn1.to_q": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.to_out.0": ("attn1.to_out.0",),
    "ff.net.0.proj": ("ff.net.0.proj",),
}


def random_scales(channels: int, seed: int, *, powers: bool = False) -> dict[str, Tensor]:
    """From 0.01 to 10 (evenly on a logarithmic axis), both ends present."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in CONSUMERS:
        exponent = torch.rand(channels, generator=generator) * 3 - 2
        exponent[:2] = torch.tensor([-2.0, 1.0])
        made[name] = torch.exp2(exponent.round()) if powers else 10**exponent
    return made


def divided(block: nn.Module, scales: Mapping[str, Tensor]) -> None:
    for name, scale in scales.items():
        for consumer in CONSUMERS[name]:
            linear: Any = block.get_submodule(consumer)
            linear.weight = nn.Parameter(
                (linear.weight.double() / scale.double()).to(linear.weight)
            )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_folding_everything_leaves_the_network_as_it_was(tmp_path: Path, affine: bool) -> None:
    folder = write_tiny_dit(tmp_path, layers=3, norm_elementwise_affine=affine)
    adapter = DiT(str(folder))
    assert isinstance(adapter, FoldsScales)
    assert missing_attributes(adapter, FoldsScales) == ()
    network = adapter.network("cpu")
    sample = tiny_image_sample(adapter.config, 2)
    expected = stock_output(network, sample)
    for index, name in enumerate(adapter.block_names):
        scales = random_scales(32, index)
        assert tuple(scales) == adapter.foldable(name)
        block = network.get_submodule(name)
        adapter.fold(block, scales)
        divided(block, scales)
    assert relative(stock_output(network, sample), expected) < 1e-6


def inputs_of(adapter: DiT, block: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What reaches each foldable linear, when the ones before it are as they should be."""
    seen: dict[str, Tensor] = {}
    for name in CONSUMERS:
        module = block.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, key=name: seen.__setitem__(key, args[0]))
    adapter.forward_block(block, state)
    return seen


@torch.no_grad()
def test_inputs_come_out_scaled(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    plain = adapter.block("transformer_blocks.0", "cpu")
    expected = inputs_of(adapter, plain, state)
    folded = adapter.block("transformer_blocks.0", "cpu")
    scales = random_scales(32, 0)
    adapter.fold(folded, scales)
    divided(folded, scales)
    for name, found in inputs_of(adapter, folded, state).items():
        assert relative(found, expected[name] * scales[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("attn1.to_q", {"norm1.norm.weight", "norm1.linear.weight", "norm1.linear.bias"}),
        ("attn1.to_out.0", {"attn1.to_v.weight", "attn1.to_v.bias"}),
        ("ff.net.0.proj", {"norm3.weight", "norm1.linear.weight", "norm1.linear.bias"}),
    ],
)
@torch.no_grad()
def test_only_the_producer_changes_and_nothing_is_written_to(
    tiny: Path, name: str, changed: set[str]
) -> None:
    adapter = DiT(str(tiny))
    plain = adapter.block("transformer_blocks.0", "cpu")
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    folded = shared_copy(plain)  # its tensors are the teacher's
    adapter.fold(folded, {name: random_scales(32, 0)[name]})
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    after = folded.state_dict()
    assert {k for k in after if k not in before or not torch.equal(after[k], before[k])} == changed
    if name in MODULATED:
        was, now = (tensors["norm1.linear.weight"].chunk(6) for tensors in (before, after))
        rows = [index for index in range(6) if not torch.equal(was[index], now[index])]
        assert rows == [MODULATED[name][1]]  # the shift


def folded_with_minus_one(block: Any, scales: Mapping[str, Tensor]) -> None:
    """The form that keeps `1 +` in the module by other rows of norm1.linear: b (1 + γ) - 1."""
    linear = block.norm1.linear
    width = linear.out_features // 6
    weight, bias = linear.weight.double(), linear.bias.double()
    for name, scale in scales.items():
        shift = MODULATED[name][1] * width
        rows, gain = slice(shift, shift + 2 * width), slice(shift + width, shift + 2 * width)
        weight[rows] *= scale.double().repeat(2)[:, None]
        bias[rows] *= scale.double().repeat(2)
        bias[gain] += scale.double() - 1
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype))
    linear.bias = nn.Parameter(bias.to(linear.bias.dtype))


@pytest.mark.parametrize("name", list(MODULATED))
@torch.no_grad()
def test_small_scales_cost_no_accuracy_in_bfloat16(tiny: Path, name: str) -> None:
    adapter = DiT(str(tiny), "bfloat16")
    state = adapter.embed(tiny_image_sample(adapter.config, 4), "cpu")
    scale = torch.full((32,), 0.01).bfloat16()
    plain = adapter.block("transformer_blocks.0", "cpu")
    exact = copy.deepcopy(plain).float()
    wide = {key: value.float() for key, value in state.items()}
    expected = inputs_of(adapter, exact, wide)[name] * scale
    ours, other = copy.deepcopy(plain), copy.deepcopy(plain)
    adapter.fold(ours, {name: scale})
    folded_with_minus_one(other, {name: scale})
    if name == "attn1.to_q":  # nor may it reach the linear behind it unscaled
        divided(ours, {name: scale})
        divided(other, {name: scale})
    assert relative(inputs_of(adapter, ours, state)[name], expected) < 5e-3
    assert relative(inputs_of(adapter, other, state)[name], expected) > 5e-2


WEIGHTS = {
    "channel": QuantSpec(4, "channel"),
    "group": QuantSpec(4, "group", group_size=8),
    "tensor": QuantSpec(4, "tensor"),
}


def quantised(
    block: nn.Module, spec: QuantSpec, *, closed: bool, adaptive: bool = False
) -> dict[str, QuantLinear]:
    """Layers for the producers among the block's linears, put into it."""
    layers = {}
    for name in ("norm1.linear", "attn1.to_v"):
        linear: Any = block.get_submodule(name)
        weight = linear.weight.detach()
        nearest = NearestRounding(linear.out_features, spec, learn_clip=False)
        rounding = AdaptiveRounding(weight, nearest.scale(weight), spec) if adaptive else nearest
        layers[name] = QuantLinear(linear, spec, None, rounding=rounding)
        if closed:
            layers[name].close(*rounding.close(weight))
    replace(block, layers)
    return layers


def output_with_scaled_inputs(
    adapter: DiT, block: nn.Module, state: dict[str, Tensor], scales: Mapping[str, Tensor]
) -> Tensor:
    """What folding must give while no consumer is divided: inputs multiplied on their way in."""
    hooks = [
        block.get_submodule(consumer).register_forward_pre_hook(
            lambda _, args, scale=scale: (args[0] * scale,)
        )
        for name, scale in scales.items()
        for consumer in CONSUMERS[name]
    ]
    output = adapter.forward_block(block, state)["hidden_states"]
    for hook in hooks:
        hook.remove()
    return output


@pytest.mark.parametrize("strategy", list(WEIGHTS))
@pytest.mark.parametrize("resident", [False, True])
@torch.no_grad()
def test_closed_layers_keep_their_codes_and_scale_their_steps(
    tiny: Path, strategy: str, resident: bool
) -> None:
    adapter = DiT(str(tiny))
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    block = adapter.block("transformer_blocks.0", "cpu")
    layers = quantised(block, WEIGHTS[strategy], closed=True)
    if resident:
        for layer in layers.values():
            layer.keep_resident(torch.float32)
    scales = random_scales(32, 0)
    expected = output_with_scaled_inputs(adapter, block, state, scales)
    codes = {name: layer.codes.clone() for name, layer in layers.items() if layer.codes is not None}
    adapter.fold(block, scales)
    assert len(codes) == 2
    for name, layer in layers.items():
        assert layer.codes is not None
        assert torch.equal(layer.codes, codes[name])
    found = adapter.forward_block(block, state)["hidden_states"]
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("strategy", ["channel", "group"])
@torch.no_grad()
def test_folding_by_powers_of_two_before_or_after_quantising_is_the_same_to_the_bit(
    tiny: Path, strategy: str
) -> None:
    adapter = DiT(str(tiny))
    scales = random_scales(32, 0, powers=True)
    before, after = (adapter.block("transformer_blocks.0", "cpu") for _ in range(2))
    adapter.fold(before, scales)
    first = quantised(before, WEIGHTS[strategy], closed=True)
    second = quantised(after, WEIGHTS[strategy], closed=True)
    adapter.fold(after, scales)
    for name in first:
        for part in ("codes", "scale", "bias"):
            assert torch.equal(getattr(first[name], part), getattr(second[name], part)), (
                name,
                part,
            )


@pytest.mark.parametrize("strategy", ["channel", "group"])
@pytest.mark.parametrize("adaptive", [False, True])
@torch.no_grad()
def test_open_layers_are_folded_as_well(tiny: Path, strategy: str, adaptive: bool) -> None:
    adapter = DiT(str(tiny))
    state = adapter.embed(tiny_image_sample(adapter.config, 2), "cpu")
    block = adapter.block("transformer_blocks.0", "cpu")
    layers = quantised(block, WEIGHTS[strategy], closed=False, adaptive=adaptive)
    scales = random_scales(32, 0, powers=True)  # others may move a weight across a border
    expected = output_with_scaled_inputs(adapter, block, state, scales)
    teacher = layers["attn1.to_v"].teacher_weight
    assert teacher is not None
    kept = teacher.clone()
    adapter.fold(block, scales)
    assert torch.equal(teacher, kept)
    assert relative(adapter.forward_block(block, state)["hidden_states"], expected) < 1e-6


def test_what_cannot_be_folded_is_refused_before_anything_changes(tiny: Path) -> None:
    adapter = DiT(str(tiny))
    block = adapter.block("transformer_blocks.0", "cpu")
    before = {key: value.clone() for key, value in block.state_dict().items()}
    good = {"attn1.to_q": torch.full((32,), 2.0)}
    for name, scale, error, pattern in (
        ("ff.net.2", torch.ones(128), CapabilityMissing, r"'ff\.net\.2' cannot be folded in DiT"),
        ("attn1.to_k", torch.ones(32), CapabilityMissing, "attn1.to_q, attn1.to_out.0, ff.net.0"),
        ("ff.net.0.proj", torch.ones(31), ConfigError, r"has the shape \[31\].*has 32 channels"),
        ("ff.net.0.proj", torch.zeros(32), NumericsError, "must be positive and finite"),
        ("ff.net.0.proj", torch.full((32,), torch.nan), NumericsError, "positive and finite"),
    ):
        with pytest.raises(error, match=pattern):
            adapter.fold(block, {**good, name: scale})
    assert block.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    with pytest.raises(CapabilityMissing, match="cannot be folded into a Identity"):
        scale_rows(nn.Identity(), torch.ones(3))
    whole = QuantLinear(nn.Linear(4, 4), WEIGHTS["tensor"], None)
    with pytest.raises(CapabilityMissing, match="open QuantLinear of strategy tensor"):
        scale_rows(whole, torch.ones(4))
