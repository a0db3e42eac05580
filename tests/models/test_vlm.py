"""Vision-language models as chains of decoder layers, against the public classes."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing, ConfigError, WeightsError
from recon.models.capabilities import ExposesAttention, SeesPictures
from recon.models.llava import Llava
from recon.models.vlm import VisionLanguageAdapter
from recon.models.vlm_parts import canonical, find_parts, layer_groups
from recon.models.weights import own_memory
from recon.types import Sample
from tests.models.tiny_vlm import CONTEXT, FAMILIES, tiny_vlm_sample, write_tiny_vlm


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("llava"), "llava")


def adapter_of(family: str, folder: Path, **arguments: Any) -> VisionLanguageAdapter:
    return FAMILIES[family][0](str(folder), **arguments)


def stock(adapter: VisionLanguageAdapter, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    public = getattr(transformers, adapter.network_class)
    return own_memory(public.from_pretrained(adapter.folder, dtype=dtype).eval())


def weight_of(network: nn.Module, name: str) -> Tensor:
    return cast(Tensor, network.get_submodule(name).weight)


@torch.no_grad()
def logits(network: nn.Module, adapter: VisionLanguageAdapter, sample: Sample) -> Tensor:
    return network(**adapter.call_arguments(sample, "cpu")).logits


@torch.no_grad()
def chained(adapter: VisionLanguageAdapter, sample: Sample) -> Tensor:
    state = adapter.embed(sample, "cpu")
    for name in adapter.block_names:
        state = adapter.forward_block(adapter.block(name, "cpu"), state)
    return adapter.output(sample, state, "cpu")


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_blocks_give_the_logits_of_the_public_class_bit_for_bit(
    family: str, folder: Path, pictures: int
) -> None:
    adapter = adapter_of(family, folder)
    adapter.check()
    sample = tiny_vlm_sample(family, pictures)
    expected = logits(stock(adapter), adapter, sample)
    assert torch.equal(chained(adapter, sample), expected)
    assert torch.equal(logits(adapter.network("cpu"), adapter, sample), expected)


def test_half_precision_gives_the_same_bits_too(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder, dtype="bfloat16")
    sample = tiny_vlm_sample(family)
    expected = logits(stock(adapter, torch.bfloat16), adapter, sample)
    assert torch.equal(chained(adapter, sample), expected)


def test_filling_behind_a_conversation_changes_none_of_its_tokens(
    family: str, folder: Path
) -> None:
    adapter = adapter_of(family, folder)
    states = [
        adapter.embed(tiny_vlm_sample(family, pictures, words=words), "cpu")
        for pictures, words in ((1, 5), (2, 9))
    ]
    lengths = [adapter.tokens(state).shape[1] for state in states]
    filled = [adapter.filled(state, max(lengths)) for state in states]
    joined = {name: torch.cat([state[name] for state in filled]) for name in states[0]}
    with torch.no_grad():
        for name in adapter.block_names:
            block = adapter.block(name, "cpu")
            states = [adapter.forward_block(block, state) for state in states]
            joined = adapter.forward_block(block, joined)
    assert lengths[0] < lengths[1]
    for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
        together = adapter.tokens(joined)[row : row + 1, :length]
        torch.testing.assert_close(together, adapter.tokens(state), atol=1e-5, rtol=1e-5)


def test_a_state_with_a_mask_of_its_own_is_not_filled(llava: Path) -> None:
    adapter = adapter_of("llava", llava)
    state = adapter.embed(tiny_vlm_sample("llava", 1), "cpu")
    masked = state | {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}
    with pytest.raises(ConfigError, match=r"Set model\.micro_batch to 1"):
        adapter.filled(masked, 99)


def test_pictures_change_the_logits(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    one, other = tiny_vlm_sample(family), tiny_vlm_sample(family, seed=1)
    other = {**one, "pixel_values": other["pixel_values"]}
    assert not torch.equal(chained(adapter, one), chained(adapter, other))


def test_every_linear_of_a_layer_is_in_one_group(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    groups = adapter.input_groups(adapter.block_names[0])
    assert [(group.role, group.linears) for group in groups] == [
        ("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("attention_output", ("self_attn.o_proj",)),
        ("feed_forward_up", ("mlp.gate_proj", "mlp.up_proj")),
        ("feed_forward_down", ("mlp.down_proj",)),
    ]


def test_a_network_from_given_weights_leaves_out_linears(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    sample = tiny_vlm_sample(family)
    whole = adapter.network("cpu")
    linears = {
        f"{block}.{linear}.weight"
        for block in adapter.block_names
        for linear in adapter.linear_shapes(block)
    }
    kept = {
        n: t for n, t in adapter.weights.load("", torch.float32, "cpu").items() if n not in linears
    }
    network = adapter.network_from(kept, "cpu")
    for name in linears:
        layer = name.removesuffix(".weight")
        assert weight_of(network, layer).is_meta
        network.set_submodule(layer, whole.get_submodule(layer))
    assert not any(t.is_meta for t in network.state_dict().values())
    assert torch.equal(logits(network, adapter, sample), logits(whole, adapter, sample))


def test_shows_pictures_by_a_vision_network_of_its_own(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    sees: SeesPictures = adapter
    assert isinstance(adapter, SeesPictures)
    assert not isinstance(adapter, ExposesAttention)
    sample = tiny_vlm_sample(family, pictures=2)
    network = sees.vision_network("cpu")
    features = sees.vision_output(network, sample)
    assert features.shape == (int(sees.image_tokens(sample).sum()), 32) == (8, 32)
    state, expected = sees.embed_features(sample, features, "cpu"), adapter.embed(sample, "cpu")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    fresh = sees.vision_network("cpu")
    assert {id(p) for p in network.parameters()}.isdisjoint(id(p) for p in fresh.parameters())
    assert not any(p.requires_grad for p in network.parameters())
    # the language model stays behind
    assert not any("embed_tokens" in name or "language" in name for name in network.state_dict())


def test_gradients_reach_the_vision_network_through_the_stream(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    sample = tiny_vlm_sample(family)
    network = adapter.vision_network("cpu").requires_grad_(True)
    state = adapter.embed_features(sample, adapter.vision_output(network, sample), "cpu")
    adapter.forward_block(adapter.block(adapter.block_names[0], "cpu"), state)[
        "hidden_states"
    ].square().sum().backward()
    for group in adapter.vision_groups():
        for name in group.linears:
            gradient = weight_of(network, name).grad
            assert gradient is not None, name
            assert gradient.abs().sum() > 0, name


def test_vision_groups_name_each_linear_of_the_tower_that_reaches_the_features(
    family: str, folder: Path
) -> None:
    adapter = adapter_of(family, folder)
    network = adapter.vision_network("cpu")
    named = [name for group in adapter.vision_groups() for name in group.linears]
    assert len(named) == len(set(named))
    held = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    left = held - set(named)
    projector = ("multi_modal_projector", "connector", "visual.merger")
    unused = {name for name in left if not name.startswith(projector)}
    # LLaVA takes the output of the last layer but one.
    assert all(".layers.1." in name for name in unused)
    assert len(unused) == (6 if family == "llava" else 0)
    shared: dict[str, set[int]] = {group.linears[0]: set() for group in adapter.vision_groups()}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, first=group.linears[0]: shared[first].add(args[0].data_ptr())
        )
        for group in adapter.vision_groups()
        for name in group.linears
    ]
    adapter.vision_output(network, tiny_vlm_sample(family))
    for handle in handles:
        handle.remove()
    assert all(len(inputs) == 1 for inputs in shared.values())


def test_vision_norms_lie_between_the_linears_and_all_names_hold_in_the_whole_network(
    family: str, folder: Path
) -> None:
    adapter = adapter_of(family, folder)
    network, whole = adapter.vision_network("cpu"), adapter.empty_network()
    norms = adapter.vision_norms()
    layers = {name.rpartition(".")[0] for name in norms}
    assert len(norms) == len(set(norms)) == 2 * len(layers)
    linears = [name for group in adapter.vision_groups() for name in group.linears]
    assert all(any(name.startswith(f"{layer}.") for layer in layers) for name in linears)
    for name in (*norms, *linears):
        inside = network.get_submodule(name)
        assert weight_of(whole, f"{adapter.vision_name}.{name}").shape == inside.weight.shape


def test_a_network_from_given_weights_may_lack_those_of_the_vision_network(
    family: str, folder: Path
) -> None:
    adapter = adapter_of(family, folder)
    names = {
        f"{adapter.vision_name}.{n}.weight" for g in adapter.vision_groups() for n in g.linears
    }
    stored = adapter.weights.load("", torch.float32, "cpu").items()
    network = adapter.network_from({n: t for n, t in stored if n not in names}, "cpu")
    meta = {name for name, tensor in network.state_dict().items() if tensor.is_meta}
    assert meta == names


def test_a_tied_head_is_read_from_the_embeddings(tmp_path: Path) -> None:
    folder = write_tiny_vlm(tmp_path, "qwen2_5_vl")
    adapter = adapter_of("qwen2_5_vl", folder)
    assert "lm_head.weight" not in adapter.weights.keys()  # noqa: SIM118
    network = adapter.network("cpu")
    table = weight_of(network, "model.language_model.embed_tokens")
    assert weight_of(network, "lm_head").data_ptr() == table.data_ptr()


def test_names_of_older_releases_are_read(tmp_path: Path, llava: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava, tmp_path / "new")
    tensors = load_file(llava / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    adapter = Llava(str(tmp_path / "new"))
    renamed = {adapter._network_name(name): tensor for name, tensor in tensors.items()}
    assert set(renamed) == set(adapter.empty_network().state_dict())
    save_file(renamed, tmp_path / "new" / "model.safetensors")
    sample = tiny_vlm_sample("llava")
    fresh = Llava(str(tmp_path / "new"))
    fresh.check()
    assert torch.equal(chained(fresh, sample), chained(Llava(str(llava)), sample))
    save_file(
        tensors | {n: t.clone() for n, t in renamed.items()},
        tmp_path / "new" / "model.safetensors",
    )
    with pytest.raises(WeightsError, match="two releases of one checkpoint"):
        Llava(str(tmp_path / "new")).check()


def test_tensors_that_no_release_loads_are_left_out(tmp_path: Path, llava: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava, tmp_path / "more")
    tensors = load_file(llava / "model.safetensors")
    extra = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {extra: torch.ones(6)}, tmp_path / "more" / "model.safetensors")
    adapter = Llava(str(tmp_path / "more"))
    adapter.check()
    assert len(adapter.weights.keys()) == len(tensors)


def test_building_a_network_moves_no_random_state(llava: Path) -> None:
    before = torch.get_rng_state()
    adapter = Llava(str(llava))
    adapter.network("cpu")
    adapter.embed(tiny_vlm_sample("llava"), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


# Refusals


def changed(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of the folder with entries of config.json changed; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= values
    (target / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return target


def test_refuses_a_folder_without_a_vision_tower(tmp_path: Path, llava: Path) -> None:
    blind = changed(llava, tmp_path / "blind", vision_config=None)
    with pytest.raises(ConfigError, match="has no vision_config: a model without a vision tower"):
        Llava(str(blind)).check()
    text = changed(llava, tmp_path / "text", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match="'LlamaForCausalLM'; Llava reads Llava"):
        Llava(str(text)).check()


def test_refuses_a_folder_that_is_not_there_with_the_download() -> None:
    with pytest.raises(ConfigError, match=r"hf download llava-hf/llava-1\.5-7b-hf"):
        Llava("checkpoints/llava").check()


def test_refuses_layers_with_masks_of_their_own(tmp_path: Path) -> None:
    folder = write_tiny_vlm(tmp_path / "one", "qwen2_vl")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    mixed = changed(folder, tmp_path / "mixed", text_config=text | {"use_sliding_window": True})
    kinds = r"\['full_attention', 'sliding_attention'\], each with a mask of its own"
    with pytest.raises(CapabilityMissing, match=kinds):
        adapter_of("qwen2_vl", mixed).check()


def test_a_network_without_a_part_is_refused_by_what_was_looked_for(llava: Path) -> None:
    network = Llava(str(llava)).empty_network()
    network.get_submodule("model").eyes = network.get_submodule("model.vision_tower")
    del network.get_submodule("model").vision_tower
    looked = "no vision tower: looked for vision_tower, visual, vision_model; it holds .*eyes"
    with pytest.raises(CapabilityMissing, match=looked):
        find_parts(network)
    with pytest.raises(CapabilityMissing, match="no base model"):
        find_parts(nn.Linear(1, 1))
    bare = Llava(str(llava)).empty_network()
    bare.set_submodule("model.language_model", nn.Module())
    with pytest.raises(CapabilityMissing, match="no list of layers"):
        find_parts(bare)


def test_refuses_linears_of_unknown_role() -> None:
    known = ["a.q_proj", "a.o_proj", "m.up_proj", "m.down_proj"]
    assert [group.linears for group in layer_groups(known, "l.")] == [
        ("l.a.q_proj",),
        ("l.a.o_proj",),
        ("l.m.up_proj",),
        ("l.m.down_proj",),
    ]
    with pytest.raises(CapabilityMissing, match=r"Without a role: \['m.router'\]"):
        layer_groups([*known, "m.router"])
    with pytest.raises(CapabilityMissing, match=r"roles without a Linear: \['feed_forward_down'\]"):
        layer_groups(known[:3])
    with pytest.raises(CapabilityMissing, match="Experts and other layouts"):
        layer_groups([*known, "n.down_proj"])


def test_refuses_samples_that_are_too_long(llava: Path) -> None:
    with pytest.raises(ConfigError, match=rf"takes one conversation of at most {CONTEXT} tokens"):
        Llava(str(llava)).embed(tiny_vlm_sample("llava", words=CONTEXT + 1), "cpu")
    with pytest.raises(ConfigError, match=r"at most 12 tokens \(max_tokens 12, context 64\)"):
        Llava(str(llava), max_tokens=12).embed(tiny_vlm_sample("llava"), "cpu")
    two = tiny_vlm_sample("llava", pictures=0)
    with pytest.raises(ConfigError, match=r"input_ids are \[2, 9\]"):
        Llava(str(llava)).check_sample({"input_ids": two["input_ids"].expand(2, -1)})
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        Llava(str(llava), max_tokens=0)


def test_refuses_pictures_that_do_not_match_their_placeholders(family: str, folder: Path) -> None:
    adapter = adapter_of(family, folder)
    two, one = tiny_vlm_sample(family, pictures=2), tiny_vlm_sample(family)
    with pytest.raises(ConfigError, match="make 8 features and the text has 4 placeholders"):
        adapter.embed({**two, "input_ids": one["input_ids"]}, "cpu")
    text = tiny_vlm_sample(family, pictures=0)
    with pytest.raises(ConfigError, match="has 0 placeholders for pictures and pixel_values"):
        adapter.embed({**one, "input_ids": text["input_ids"]}, "cpu")
    with pytest.raises(ConfigError, match="has 4 placeholders for pictures and no pixel_values"):
        adapter.embed({"input_ids": one["input_ids"]}, "cpu")


def test_refuses_a_layer_that_returns_something_else(llava: Path) -> None:
    adapter = Llava(str(llava))
    state = adapter.embed(tiny_vlm_sample("llava"), "cpu")

    class Odd(nn.Module):
        def forward(self, stream: Tensor, **unused: Any) -> tuple[Tensor]:
            return (stream,)

    with pytest.raises(CapabilityMissing, match=r"Odd returned a tuple .*reads one tensor"):
        adapter.forward_block(Odd(), state)


def test_streams_are_budgeted_for_the_longest_sample(llava: Path) -> None:
    assert Llava(str(llava)).stream_bytes(1, "cpu") == CONTEXT * 32 * 4
    assert Llava(str(llava), "bfloat16", max_tokens=10).stream_bytes(2, "cpu") == 2 * 10 * 32 * 2


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
        ("vision_tower.vision_model.embeddings.x", "vision_tower.embeddings.x"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.text_model.norm.weight", "text_model.norm.weight"),
    ],
)
def test_names_agree_between_releases(stored: str, expected: str) -> None:
    assert canonical(stored) == expected
