"""Plans of networks of real size, of which there is nothing but a config.json; and of tiny ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.calibration.memory import MemoryBudget
from recon.calibration.statistics import UnitRecord
from recon.engine import Reconstruction, probe, stage_data, thin_opening
from recon.engine.artefacts import refuse_full
from recon.engine.assembly import assembled, layer_groups
from recon.engine.data import CalibrationData, Sampling
from recon.engine.footprint import kept_for_backward
from recon.engine.foresight import closed_layers, opened_layers
from recon.engine.plan import Plan, Setting, planned
from recon.engine.result import linear_bytes
from recon.engine.unit import OpenUnit
from recon.errors import BudgetError, ConfigError
from recon.methods.adaround import AdaRound
from recon.methods.gptq import GPTQ
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.q_vlm import QVLM
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.methods.smoothquant import SmoothQuant
from recon.models.adapter import ModelAdapter
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.quantizers.spec import QuantSpec
from tests.models.tiny import write_tiny_cogvideox, write_tiny_dit
from tests.models.tiny_vlm import FAMILIES, write_tiny_vlm

CPU = torch.device("cpu")
GEOMETRIES: dict[str, tuple[type[ModelAdapter], dict[str, Any]]] = {
    "dit_xl_2_256": (
        DiT,
        {
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
        },
    ),
    "cogvideox_2b": (CogVideoX, {"_class_name": "CogVideoXTransformer3DModel", "num_layers": 30}),
    "cogvideox_5b": (
        CogVideoX,
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "cogvideox_1_5_5b": (
        CogVideoX,
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "max_text_seq_length": 224,
            "sample_height": 300,
            "sample_width": 300,
            "sample_frames": 81,
        },
    ),
}
"""As published; what is left out is the default of the public class."""


class Counts(CalibrationData):
    """Numbers of samples, and nothing behind them."""

    def __init__(self, samples: int = 40, held_out: int = 16, rows: int = 1) -> None:
        super().__init__()
        self.sample_counts_ = samples, held_out, rows

    def check(self, adapter: ModelAdapter) -> None:
        """Every adapter will do."""

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        return self.sample_counts_

    @property
    def sampling(self) -> Sampling:
        return Sampling(calls=10, spilled=5)

    @property
    def calibration_set(self) -> Any:
        raise AssertionError("planning makes no calibration set")


def write_config(folder: Path, name: str, **arguments: Any) -> ModelAdapter:
    family, config = GEOMETRIES[name]
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return family(str(folder), **arguments)


def plan_of(
    module: Reconstruction, root: Path, data: CalibrationData | None = None, *, probe: bool = False
) -> Plan:
    setting = Setting(
        module=module,
        data=data or Counts(),
        device=CPU,
        root=root,
        processes=1,
        checks=[],
        libraries=0,
    )
    return planned(setting, probe=probe)[0]


# Real sizes, no weights


@pytest.mark.parametrize(
    ("name", "quantised", "outside"),
    [
        # Per block qkv 3.98 + projection 1.33 + feed-forward 10.62 + adaLN 7.96 M; outside: one
        # embedder and both output layers, 4.3 M. Together PTQ4DiT's 673.2 M.
        ("dit_xl_2_256", 28 * 18 * 1152**2, 256 * 1152 + 1152**2 + 1152 * 2304 + 1152 * 32),
        # Per block 4 w² of attention, 8 w² of feed-forward, 2 · 512 · 6 w of modulation.
        ("cogvideox_2b", 30 * (12 * 1920**2 + 2 * 512 * 6 * 1920), None),
        ("cogvideox_5b", 42 * (12 * 3072**2 + 2 * 512 * 6 * 3072), None),
    ],
)
def test_real_networks_are_counted_from_their_config_alone(
    tmp_path: Path, name: str, quantised: int, outside: int | None
) -> None:
    adapter = write_config(tmp_path / name, name)
    plan = plan_of(RoundToNearest(adapter=adapter), tmp_path, probe=True)
    assert not plan.weights_found
    assert plan.why_untimed == "not measured: the weights were not found"
    assert plan.quantised_parameters == quantised
    whole = sum(p.numel() for p in adapter.empty_network().parameters())
    assert plan.quantised_parameters + sum(row.parameters for row in plan.left) == whole
    assert plan.disk.artefacts.quantized == pytest.approx(
        quantised / 2 + 2 * (whole - quantised), rel=0.01
    )
    if outside is not None:
        assert (quantised + outside) / 1e6 == pytest.approx(673.2, abs=0.1)
        blocks = {row.part: row for row in plan.left}
        embedders = blocks["transformer_blocks.*.norm1.emb.timestep_embedder"]
        left = embedders.parameters // 28 + sum(blocks[f"proj_out_{n}"].parameters for n in (1, 2))
        assert left == outside


def test_with_stem_and_head_the_whole_of_dit_xl_is_counted_and_copies_once(tmp_path: Path) -> None:
    adapter = write_config(tmp_path / "xl", "dit_xl_2_256")
    module = PTQ4DiT(adapter=adapter, stem_and_head=QuantSpec(num_bits=8), reconstruct=False)
    plan = plan_of(module, tmp_path)
    # 7 linears of 28 blocks, the patch convolution, an embedder, two of the output layer.
    assert sum(row.linears for row in plan.quantised) == 7 * 28 + 5 == 201
    assert plan.quantised_parameters / 1e6 == pytest.approx(673.2, abs=0.1)
    grids = {row.role: row.weight for row in plan.quantised if row.linears < 28}
    assert grids == {
        "patch_embedding": "8 per channel",
        "timestep_embedding": "8 per channel",
        "modulation": "8 per channel",
        "output": "8 per channel",
    }
    whole = sum(p.numel() for p in adapter.empty_network().parameters())
    assert plan.quantised_parameters + sum(row.parameters for row in plan.left) == whole
    copies = 27 * (256 * 1152 + 1152**2)
    kept = [row for row in plan.left if "kept once" in row.why]
    assert sum(row.parameters for row in kept) == copies
    inside = 28 * 18 * 1152**2
    outside = plan.quantised_parameters - inside
    assert plan.disk.artefacts.quantized == pytest.approx(
        inside / 2 + outside + 2 * (whole - inside - outside - copies), rel=0.01
    )


def test_methods_that_learn_rounding_are_planned_at_the_size_of_dit_xl(tmp_path: Path) -> None:
    adapter = write_config(tmp_path / "xl", "dit_xl_2_256")
    module = PTQ4DiT(adapter=adapter, rounding_start="gptq", steps=10)
    plan = plan_of(module, tmp_path, Counts(rows=2))
    weights = 18 * 1152**2
    # Logits, moments and gradients of one block: nine 32-bit numbers for each.
    assert plan.memory.reconstruction.learned == 36 * weights
    assert plan.memory.reconstruction.unit_weights == pytest.approx(4 * weights, rel=0.01)
    assert plan.steps == 28 * 10
    # A stream of 256 tokens of 1152 channels, 2 rows, float32: four boundaries of all samples, and
    # two of those held out.
    assert plan.memory.streams["ram"] == 2 * 256 * 1152 * 4 * (4 * 56 + 2 * 16)


@pytest.mark.parametrize("kind", [S2QVDiT, SmoothQuant, GPTQ, AdaRound])
def test_the_widest_network_is_planned_for_every_method(
    kind: type[Reconstruction], tmp_path: Path
) -> None:
    adapter = write_config(tmp_path / "5b", "cogvideox_5b")
    plan = plan_of(kind(adapter=adapter), tmp_path)
    weights = 12 * 3072**2 + 2 * 512 * 6 * 3072
    learned = plan.memory.reconstruction.learned
    assert (learned >= 36 * weights) == (kind is AdaRound)
    # Attention of 17,776 tokens is a fused kernel's: no matrix of 48 heads is kept.
    assert plan.memory.reconstruction.activations < 17_776**2 * 48


def test_a_given_size_is_what_is_planned(tmp_path: Path) -> None:
    size: dict[str, Any] = {"frames": 81, "height": 768, "width": 1360}
    adapter = write_config(tmp_path / "1.5", "cogvideox_1_5_5b", **size)
    plan = plan_of(RoundToNearest(adapter=adapter), tmp_path)
    # 22 latent frames, two in a patch; text 224 tokens.
    stream = (224 + 11 * 48 * 85) * 3072 * 4
    assert plan.memory.streams["ram"] == stream * (4 * 56 + 2 * 16)


T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
T5_XXL_WEIGHTS = 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096) + 32128 * 4096 + 32 * 64 + 4096


def test_parts_that_are_sampled_with_are_counted_from_their_configs(tmp_path: Path) -> None:
    adapter = write_config(tmp_path / "2b", "cogvideox_2b")
    alone = plan_of(RoundToNearest(adapter=adapter), tmp_path).memory
    assert alone.uncounted == []  # no file says that there are others
    (tmp_path / "2b" / "text_encoder").mkdir()
    (tmp_path / "2b" / "text_encoder" / "config.json").write_text(json.dumps(T5_XXL))
    found = plan_of(RoundToNearest(adapter=adapter), tmp_path).memory
    assert found.sampling - alone.sampling == 4 * T5_XXL_WEIGHTS
    assert pytest.approx(17.7, abs=0.1) == T5_XXL_WEIGHTS * 4 / 2**30
    assert found.host - alone.host > 9 * 2**30
    parts = {
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "safety_checker": [None, None],
    }
    (tmp_path / "2b" / "model_index.json").write_text(json.dumps(parts))
    named = plan_of(RoundToNearest(adapter=adapter), tmp_path).memory
    assert (named.uncounted, named.sampling) == (["vae"], found.sampling)
    (tmp_path / "2b" / "vae").mkdir()
    (tmp_path / "2b" / "vae" / "config.json").write_text('{"block_out_channels": "of no class"}')
    assert plan_of(RoundToNearest(adapter=adapter), tmp_path).memory.uncounted == ["vae"]


def test_a_part_takes_the_same_by_its_config_as_by_its_weights(tmp_path: Path) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path, pipeline=True)))
    by_weights = plan_of(RoundToNearest(adapter=adapter), tmp_path).memory.sampling
    for part in ("vae", "text_encoder"):
        for file in (tmp_path / part).glob("*.safetensors"):
            file.unlink()
    assert plan_of(RoundToNearest(adapter=adapter), tmp_path).memory.sampling == by_weights


# Against what a fit does


def test_what_the_backward_pass_needs_is_what_it_keeps(tmp_path: Path) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path, rotary=True)))
    module = AdaRound(adapter=adapter, micro_batch=2, batch_size=2)
    unit = module.partition()[0]
    foreseen = kept_for_backward(module, unit, opened_layers(module, unit), 1, CPU)

    blocks: list[nn.Module] = [adapter.block(unit.name, CPU)]
    groups = layer_groups(adapter, unit, blocks, skip_roles=())
    layers = module.open_unit(OpenUnit(unit, groups, blocks, UnitRecord()))
    students = assembled(unit, blocks, layers)
    state = adapter.example_state(2, CPU, torch.float32)
    held = {t.untyped_storage().data_ptr() for t in state.values()}
    for block in (*students, *blocks):
        held |= {t.untyped_storage().data_ptr() for t in block.state_dict(keep_vars=True).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        after = stage_data.run_learning(adapter, students, [], state)
        adapter.tokens(after).square().sum()
    actual = sum(storage.nbytes() for place, storage in kept.items() if place not in held)
    assert foreseen == pytest.approx(actual, rel=0.1)


def test_nothing_learned_keeps_nothing(tmp_path: Path) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path)))
    plan = plan_of(RoundToNearest(adapter=adapter), tmp_path)
    assert plan.memory.reconstruction.activations == plan.memory.reconstruction.learned == 0


@pytest.mark.parametrize(
    ("write", "family"), [(write_tiny_cogvideox, CogVideoX), (write_tiny_dit, DiT)]
)
def test_an_example_sample_becomes_a_state_of_the_example_s_shapes(
    tmp_path: Path, write: Callable[[Path], Path], family: type[ModelAdapter]
) -> None:
    adapter = family(str(write(tmp_path)))
    sample = adapter.example_sample(2, CPU, torch.float32)
    embedded = adapter.embed(sample, CPU)
    example = adapter.example_state(2, "meta", torch.float32)
    assert {k: (t.shape, t.dtype) for k, t in example.items()} == {
        k: (t.shape, t.dtype) for k, t in embedded.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_q_vlm_is_planned_and_timed_on_every_family(name: str, tmp_path: Path) -> None:
    adapter = FAMILIES[name][0](str(write_tiny_vlm(tmp_path / "net", name)))
    module = QVLM(adapter=adapter, steps=3, shrinks=(1.0, 0.8), threads=1, image_weight="mbq")
    plan = plan_of(module, tmp_path, probe=True)
    assert not plan.units_known
    assert (plan.blocks, plan.units) == (2, 1)
    assert "language_model" not in {row.part for row in plan.left}
    weights = plan.quantised_parameters
    # Both layers are open: an offset for every weight, beside ranges and step sizes.
    assert 36 * weights < plan.memory.reconstruction.learned < 39 * weights
    assert plan.seconds is not None
    assert plan.seconds.reconstruction > 3 * plan.seconds.pace.step


def test_the_random_state_is_not_moved(tmp_path: Path) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path)))
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    closed_layers(PTQ4DiT(adapter=adapter), PTQ4DiT(adapter=adapter).foreseen_units())
    assert torch.equal(torch.randn(3), expected)


def test_left_roles_are_named_with_the_switch_that_leaves_them(tmp_path: Path) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path)))
    plan = plan_of(AdaRound(adapter=adapter, adaln="fp"), tmp_path)
    assert "modulation" not in {row.role for row in plan.quantised}
    left = {row.part: row.why for row in plan.left}
    assert left["transformer_blocks.*.norm1"] == "role modulation is left out (model.adaln: fp)"
    spared = plan_of(AdaRound(adapter=adapter, adaln="w4a16"), tmp_path)
    assert {row.role: row.activation for row in spared.quantised}["modulation"] == "16"


def test_groups_of_inputs_have_more_step_sizes(tmp_path: Path) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path)))
    module = RoundToNearest(adapter=adapter, weight=QuantSpec(4, "group", 16))
    layers = closed_layers(module, module.foreseen_units())
    weights = sum(q.in_features * q.out_features for q in layers.values())
    assert linear_bytes(layers.values())["quantized"] == weights // 2 + weights // 16 * 4
    assert {row.weight for row in plan_of(module, tmp_path).quantised} == {"4 per group of 16"}


# Processes


def test_processes_are_those_among_which_the_batch_divides(tmp_path: Path) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path)))
    module = AdaRound(adapter=adapter, batch_size=8, micro_batch=2)
    assert plan_of(module, tmp_path).processes_that_divide == [1, 2, 4]
    few = Counts(samples=6)
    assert plan_of(module, tmp_path, few).processes_that_divide == []


# Refusals


def test_refusals_are_listed_once_and_do_not_end_the_plan(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ConfigError("No.")

    adapter = DiT(str(write_tiny_dit(tmp_path / "net")))
    setting = Setting(
        module=RoundToNearest(adapter=adapter),
        data=Counts(),
        device=CPU,
        root=tmp_path,
        processes=1,
        checks=[refuse, lambda: None, refuse],
        libraries=0,
    )
    assert planned(setting, probe=False)[0].refusals == ["No."]


def test_a_fit_is_refused_where_the_disk_cannot_hold_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path / "net")))
    module = RoundToNearest(adapter=adapter)
    needed = plan_of(module, tmp_path).disk.peak
    free = needed
    monkeypatch.setattr("recon.engine.artefacts.free_bytes", lambda *unused: free)
    refuse_full(module, Counts(), tmp_path / "run", CPU)
    free -= 1
    with pytest.raises(BudgetError, match=f"up to {needed:,} bytes .* and {free:,} are free"):
        refuse_full(module, Counts(), tmp_path / "run", CPU)
    # What the folder of a run to be continued holds was paid for.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "part").write_bytes(b"x")
    refuse_full(module, Counts(), tmp_path / "run", CPU)


def test_streams_on_disk_count_towards_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path / "net")))
    module = RoundToNearest(adapter=adapter, memory=MemoryBudget(ram=0))
    plan = plan_of(module, tmp_path)
    assert plan.memory.streams_in == "disk"
    assert plan.disk.streams == plan.memory.streams["disk"] > 0
    monkeypatch.setattr(
        "recon.engine.artefacts.free_bytes", lambda *unused: plan.disk.artefacts.peak
    )
    with pytest.raises(BudgetError, match=f"streams {plan.disk.streams:,}"):
        refuse_full(module, Counts(), tmp_path / "run", CPU)


# The probe


@pytest.mark.parametrize("kind", [AdaRound, RoundToNearest, S2QVDiT])
def test_a_probe_times_a_unit_and_leaves_the_method_as_it_was(
    kind: type[Reconstruction], tmp_path: Path
) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path / "net")))
    module = kind(adapter=adapter, threads=1)
    threads = torch.get_num_threads()
    plan = plan_of(module, tmp_path, probe=True)
    assert plan.why_untimed == ""
    assert plan.seconds is not None
    pace = plan.seconds.pace
    assert min(pace.step, pace.teacher, pace.student) > 0
    # Steps alone take that long, and everything else adds to it.
    assert plan.seconds.reconstruction > plan.steps * pace.step * 0.99
    # Ten calls of the whole network of two blocks.
    assert plan.seconds.calibration == pytest.approx(10 * 2 * pace.teacher)
    assert torch.get_num_threads() == threads
    assert not module.quantizers
    assert module.opened is None
    assert list((tmp_path / "net").parent.iterdir()) == [tmp_path / "net"]


def test_a_probe_does_a_bounded_amount_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path / "net", layers=1)))
    module = AdaRound(adapter=adapter, threads=1, batch_size=8, micro_batch=4, compile=True)
    passed: list[int] = []
    opened: list[int] = []
    forward, open_unit = DiT.forward_block, AdaRound.open_unit

    def counted(self: DiT, block: nn.Module, state: Any) -> Any:
        passed.append(len(self.tokens(state)))
        return forward(self, block, state)

    def seen(self: AdaRound, unit: OpenUnit) -> Any:
        opened.extend(m.out_features for g in unit.groups for m in g.linears.values())
        return open_unit(self, unit)

    def compiled(*unused: Any, **also: Any) -> Any:
        raise AssertionError("a probe compiles nothing")

    monkeypatch.setattr(DiT, "forward_block", counted)
    monkeypatch.setattr(AdaRound, "open_unit", seen)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(thin_opening, "ROWS", 8)
    whole = probe.pace(module, Counts(), CPU)
    assert whole.compiled
    assert max(opened) == 2 * 8
    of_whole = sum(passed)
    passed.clear()
    monkeypatch.setitem(probe.OPERATIONS, "cpu", 2 * _operations(adapter))
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    probe.pace(module, Counts(), CPU)
    # Two samples and the held-out one are recorded, two steps of two samples are done, and two
    # more forwards are timed.
    assert sum(passed) <= 3 + 2 * 2 + 2 + 3
    assert of_whole > 5 * 8
    monkeypatch.setitem(probe.OPERATIONS, "cpu", _operations(adapter) / 10)
    with pytest.raises(BudgetError, match="Plan on the device of the fit"):
        probe.pace(module, Counts(), CPU)


def test_a_step_of_fewer_samples_is_scaled_without_what_each_micro_batch_does_once(
    tmp_path: Path,
) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path / "net", layers=1)))
    probed = AdaRound(adapter=adapter, batch_size=2, micro_batch=2)
    opening = thin_opening.ThinOpening(probed.open_unit, probed.foreseen_layers)
    stopwatch = probe._Stopwatch(opening, (32, 16), compiled=False)
    # Rounding 4 s, two samples 3 s each; two micro-batches of 16.
    assert stopwatch._whole(10.0, 1.0, probed) == 2 * (4 + 16 * 3)
    # Never less than the samples alone.
    assert stopwatch._whole(4.0, 1.0, probed) == 2 * 16 * 2


def test_a_probe_factors_no_correlations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def factored(*unused: Any) -> Any:
        raise AssertionError("GPTQ takes as long for few rows as for all")

    adapter = DiT(str(write_tiny_dit(tmp_path / "net", layers=1)))
    module = PTQ4DiT(adapter=adapter, threads=1, steps=2, rounding_start="gptq")
    monkeypatch.setattr("recon.methods.ptq4dit.gptq_codes", factored)
    assert plan_of(module, tmp_path, probe=True).seconds is not None


def _operations(adapter: ModelAdapter) -> float:
    """Of one sample's step."""
    state = adapter.example_state(1, "meta", torch.float32)
    weights = sum(out * in_ for out, in_ in adapter.linear_shapes(adapter.block_names[0]).values())
    return 6.0 * weights * adapter.tokens(state).shape[:2].numel()
