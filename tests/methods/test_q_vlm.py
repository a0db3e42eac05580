"""Q-VLM on a tiny network: what each part of the paper does, and that J_B never rises."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon.engine.prefixes import unit_error
from recon.engine.unit import Unit
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.methods.joint_search import JointSearch
from recon.methods.q_vlm import QVLM
from recon.methods.rounding_behind_search import LearnedRounding
from recon.models.cogvideox import CogVideoX
from recon.quantizers.affine import absmax_scale, codes, weight_range
from recon.quantizers.packing import unpack
from recon.quantizers.ranges import mse_clip_ratio
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import Interruption
from tests.methods.q_vlm_run import TOKEN, W4, fit, method
from tests.methods.test_ptq4dit import First
from tests.models.tiny_pictures import write_tiny_pictures
from tests.reference import q_vlm as reference

CHANNEL = QuantSpec(num_bits=4, strategy="channel", symmetric=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def fitted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> QVLM:
    module = method(pictures, steps=30)
    fit(tmp_path_factory.mktemp("fitted"), module)
    return module


# Dependency and partition


def test_the_dependency_is_that_of_the_loops_over_hidden_states(
    fitted: QVLM, pictures: Path
) -> None:
    network = fitted.adapter.network("cpu")
    hidden: list[list[float]] = [[] for _ in range(4)]
    for index in range(4):
        sample = fitted.frontier.sample(index)
        state = fitted.adapter.embed(sample, "cpu")
        for depth in range(4):
            block = network.get_submodule(f"layers.{depth}")
            with torch.no_grad():
                state = fitted.adapter.forward_block(block, state)
            hidden[depth] += state["hidden_states"].flatten().tolist()
    found = fitted.findings["dependency"]
    for pair in range(3):
        one, other = hidden[pair : pair + 2]
        points = (
            reference.rounding_points(one, 16, 0.5), reference.rounding_points(other, 16, 0.5)
        )  # fmt: skip
        table = reference.joint_table(one, other, points, 16)
        assert found["entropy"][pair] == pytest.approx(reference.dependency(table), rel=1e-9)
        for name in ("entropy", "entropy_image", "entropy_text"):
            assert 0 <= found[name][pair] <= math.log(16)
    assert found["entropy_image"] != found["entropy_text"]


def test_units_follow_from_the_dependency_by_the_papers_rule(fitted: QVLM) -> None:
    entropy = fitted.findings["dependency"]["entropy"]
    expected = reference.greedy(entropy, sum(entropy) / 3, 3)
    names = [tuple(f"layers.{layer}" for layer in block) for block in expected]
    assert [unit.blocks for unit in fitted.units] == names
    assert len(fitted.units) < 4  # something was joined


def test_the_audit_compares_the_proxy_with_the_true_dependency(fitted: QVLM) -> None:
    found = fitted.findings["dependency"]
    assert found["ded"][0] is not None
    assert found["ded"][1] is None  # not audited
    assert 0 <= found["ded"][2] < 1
    same = found["ded"][0] == found["ded"][2]  # then there are no ranks
    expected = (
        None
        if same
        else pytest.approx(
            math.copysign(
                1, (found["ded"][2] - found["ded"][0]) * (found["entropy"][2] - found["entropy"][0])
            )
        )
    )
    assert found["spearman"] == expected


@pytest.mark.parametrize(
    ("changed", "blocks"),
    [
        ({"partition_by": "fixed", "audited": 0}, [3, 1]),
        ({"partition_by": "layerwise", "audited": 0}, [1, 1, 1, 1]),
        ({"partition_by": "fixed", "largest": 2, "audited": 0}, [2, 2]),
        ({"threshold_quantile": 1.0}, [1, 1, 1, 1]),
        ({"partition_by": "dp", "threshold_quantile": 1.0}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_the_controls_cut_as_they_say(
    changed: dict[str, Any], blocks: list[int], pictures: Path, tmp_path: Path
) -> None:
    module = method(pictures, rounding="none", **changed)
    fit(tmp_path, module)
    assert [len(unit.blocks) for unit in module.units] == blocks
    assert ("dependency" in module.findings) == ("audited" not in changed)


def test_where_there_is_nothing_to_search_no_search_is_audited(
    pictures: Path, tmp_path: Path
) -> None:
    module = method(pictures, rounding="none", activation=None)
    fit(tmp_path, module)
    assert set(module.findings["dependency"]) == {"entropy", "entropy_image", "entropy_text"}


@pytest.mark.slow
def test_every_proxy_cuts_by_its_own_values(pictures: Path, tmp_path: Path) -> None:
    for proxy in ("quant_error", "ded"):
        module = method(pictures, rounding="none", proxy=proxy, partition_by="dp")
        fit(tmp_path / proxy, module)
        found = module.findings["dependency"]
        values = found[proxy]
        assert len(values) == 3
        assert None not in values
        best = max(
            reference.gain(cut, values, sum(values) / 3, 2, 0.0)
            for cut in reference.every_partition(4, 3)
        )
        cut = []
        for unit in module.units:
            first = int(unit.blocks[0].rpartition(".")[2])
            cut.append(range(first, first + len(unit.blocks)))
        assert reference.gain(cut, values, sum(values) / 3, 2, 0.0) == pytest.approx(best)
        assert found["spearman"] is None or -1 <= found["spearman"] <= 1


# Search


def test_the_block_objective_never_rises(fitted: QVLM) -> None:
    for row in fitted.history:
        chain = [row[f"block_error_{name}"] for name in ("final", "joint", "warm")]
        assert chain == sorted(chain)
        assert chain[0] > 0
    # With 30 steps learning pays somewhere, not only by being refused.
    assert any(row["rounding_accepted"] for row in fitted.history)
    assert fitted.final_error["reconstructed"] < fitted.final_error["round_to_nearest"]


@pytest.mark.parametrize(("layers", "forwards"), [(1, 5), (2, 30), (3, 155)])
def test_a_search_costs_5_30_or_155_forwards_and_the_cache_changes_no_bit(
    layers: int, forwards: int, pictures: Path, tmp_path: Path
) -> None:
    shrinks = (1.0, 0.9, 0.8, 0.7, 0.6)
    module = method(
        pictures, partition_by="fixed", largest=layers, audited=0, rounding="none",
        shrinks=shrinks,
    )  # fmt: skip

    def look(opened: Any) -> None:
        assert isinstance(opened.current, JointSearch)
        plan, cached = opened.current.plan, opened.current.prefixes
        none = torch.empty(0)
        errors = [cached.error(plan.settings(step, none)) for step in range(plan.steps)]
        assert cached.forwards == plan.steps == forwards
        cached.forget()
        again = []
        for step in range(0, plan.steps, 7):
            cached.forget()
            again.append(cached.error(plan.settings(step, none)))
        assert again == errors[::7]
        raise Interruption

    with pytest.raises(Interruption):
        fit(tmp_path, module, First(look))


@pytest.mark.slow
def test_without_a_cache_three_layers_cost_375_forwards(pictures: Path, tmp_path: Path) -> None:
    module = method(pictures, partition_by="fixed", audited=0, shrinks=(1.0, 0.9, 0.8, 0.7, 0.6))

    def look(opened: Any) -> None:
        assert isinstance(opened.current, JointSearch)
        plan, prefixes = opened.current.plan, opened.current.prefixes
        for step in range(plan.steps):
            settings = plan.settings(step, torch.empty(0))
            if len(settings) == 3:
                prefixes.forget()
                prefixes.error(settings)
        assert prefixes.forwards == 375
        raise Interruption

    with pytest.raises(Interruption):
        fit(tmp_path, module, First(look))


def test_the_carried_streams_still_cost_two_forwards_per_layer(fitted: QVLM) -> None:
    samples = 6
    assert fitted.forwards["teacher"] == fitted.forwards["student"] == 4 * samples
    for unit, row in zip(fitted.units, fitted.history, strict=True):
        assert row["search_forwards"] == sum(2**depth for depth in range(1, len(unit.blocks) + 1))


def test_the_noted_joint_error_is_that_of_the_unit_as_it_stands(
    pictures: Path, tmp_path: Path
) -> None:
    seen = []

    class Looks(QVLM):
        def close_unit(self, unit: Any) -> None:
            error = unit_error(self.frontier, unit.student_blocks, "student", self.token_weights)
            seen.append((error, unit.results["block_error_joint"]))
            super().close_unit(unit)

    module = method(pictures, rounding="none")
    module.__class__ = Looks
    fit(tmp_path, module)
    for error, noted in seen:
        assert error == pytest.approx(noted, rel=1e-6)
    assert len(seen) == len(module.units)


def test_rounding_none_leaves_the_nearest_codes(pictures: Path, tmp_path: Path) -> None:
    module = method(pictures, rounding="none")
    fit(tmp_path, module)
    network = module.adapter.network("cpu")
    for key, layer in module.quantizers.items():
        assert isinstance(layer, QuantLinear)
        assert layer.codes is not None
        weight = network.get_parameter(key.replace("/", ".") + ".weight")
        scale = absmax_scale(weight_range(weight, W4) * mse_clip_ratio(weight, W4), W4)
        assert torch.equal(unpack(layer.codes, 4, weight.shape[1]), codes(weight, scale, W4).int())
        assert layer.activation_clip is not None
        ratio = float(layer.activation_clip[0])
        assert ratio in (pytest.approx(1.0), pytest.approx(0.7))


# Learned rounding


def test_learned_codes_are_within_one_of_the_nearest(fitted: QVLM) -> None:
    network = fitted.adapter.network("cpu")
    moved = 0.0
    for key, layer in fitted.quantizers.items():
        assert isinstance(layer, QuantLinear)
        assert layer.codes is not None
        assert layer.scale is not None
        weight = network.get_parameter(key.replace("/", ".") + ".weight")
        found = unpack(layer.codes, 4, weight.shape[1])
        nearest = codes(weight, layer.scale, W4)
        assert float((found - nearest).abs().max()) <= 1
        moved += float((found != nearest).sum())
    assert moved > 0


def test_learning_that_hurts_is_refused_and_the_search_kept(pictures: Path, tmp_path: Path) -> None:
    # Signs of gradients at a rate that turns every weight the other way.
    wild = method(pictures, rounding="adaround", lr=100.0, range_lr=3.0, steps=3)
    none = method(pictures, rounding="none")
    fit(tmp_path / "wild", wild)
    fit(tmp_path / "none", none)
    refused = [row for row in wild.history if not row["rounding_accepted"]]
    assert refused
    for row in refused:
        assert row["block_error_learned"] > row["block_error_joint"] == row["block_error_final"]
    if len(refused) == len(wild.history):
        kept, expected = (m.quantizers.state_dict() for m in (wild, none))
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_gradients_reach_only_what_learns_in_the_open_unit(pictures: Path, tmp_path: Path) -> None:
    names: set[str] = set()

    class Looks(QVLM):
        def on_loss(self, loss: Tensor) -> None:
            names.update(self.quantizers.get_submodule("layers/0/q").state_dict())
            assert isinstance(self.current, LearnedRounding)
            learned = {id(p) for p in self.current.learned}
            assert learned == {id(p) for p in self.parameters()}
            super().on_loss(loss)

    module = method(pictures, largest=1)
    module.__class__ = Looks
    fit(tmp_path, module)
    assert {"rounding.offset", "rounding.log_factor", "activation_range.log_factor"} <= names


def test_the_best_of_all_batches_is_kept(pictures: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    before: list[Tensor] = []

    class Looks(QVLM):
        def on_loss(self, loss: Tensor) -> None:
            assert isinstance(self.current, LearnedRounding)
            losses.append(float(loss))
            before.append(self.current.learned[0].detach().clone())
            super().on_loss(loss)
            assert self.stage_state is not None
            best = losses.index(min(losses))
            assert torch.equal(self.stage_state["best_0"], before[best])
            if len(losses) == 20:
                raise Interruption

    module = method(pictures, partition_by="fixed", audited=0, steps=30)
    module.__class__ = Looks
    with pytest.raises(Interruption):
        fit(tmp_path, module)
    assert losses.index(min(losses)) > 0


# Switches

SWITCHES: list[dict[str, Any]] = [
    {"rounding": "adaround", "lr": 0.05},
    {"search": "coordinate"},
    {"image_weight": "mbq"},
    {"rounding": "gptq"},
    {"activation": CHANNEL, "grid": "percentile"},
    {"activation": None},
]
MORE_SWITCHES: list[dict[str, Any]] = [
    {"image_weight": 0.1},
    {"rounding": "gptq", "activation": None, "inputs": "full_precision"},
    {"rounding": "none"},
    {"eq5_literal": True, "partition_by": "dp"},
    {"activation": CHANNEL},
    {"activation": CHANNEL, "grid": "percentile", "rounding": "none"},
    {"activation": QuantSpec(num_bits=4, strategy="tensor"), "grid": "percentile"},
    {"activation": None, "rounding": "none"},
    {"weight": QuantSpec(num_bits=4, strategy="group", group_size=8)},
    {"inputs": "full_precision"},
]


@pytest.mark.parametrize(
    "changed",
    [*SWITCHES, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_SWITCHES)],
    ids=str,
)
def test_every_switch_runs_and_its_result_loads(
    changed: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    import recon
    from recon.engine.sampling import network

    module = method(pictures, **{"partition_by": "fixed", "largest": 2, "audited": 1, **changed})
    module.check()
    fit(tmp_path, module)
    for row in module.history:
        names = [n for n in ("final", "joint", "warm") if f"block_error_{n}" in row]
        chain = [row[f"block_error_{name}"] for name in names]
        assert chain == sorted(chain)
    sample = module.frontier.sample(0)
    with torch.no_grad():
        whole = network(module, "quantized", torch.device("cpu"))(**sample)[0]
        loaded = recon.load(tmp_path)(**sample)[0]
    assert torch.equal(whole, loaded)


@pytest.mark.slow
def test_pictures_that_count_nothing_change_the_result(pictures: Path, tmp_path: Path) -> None:
    errors = []
    for weight in (1.0, 0.0):
        module = method(pictures, image_weight=weight, rounding="none", partition_by="fixed")
        fit(tmp_path / str(weight), module)
        errors.append(module.history[0]["block_error_warm"])
    assert errors[0] != errors[1]


def test_pictures_count_by_the_gradient_that_reaches_them(pictures: Path, tmp_path: Path) -> None:
    module = method(pictures, image_weight="mbq", rounding="none", partition_by="fixed", largest=2)
    fit(tmp_path, module)
    network: Any = module.adapter.network("cpu")
    sums = torch.zeros(4, 2, 2)
    for index in (0, 1, 2):  # the last calibration sample is text alone
        sample = module.frontier.sample(index)
        hidden = [network.embed(sample, network.vision(sample["pixel_values"]))]
        hidden[0].requires_grad_(True)
        for layer in network.layers:
            hidden.append(layer(hidden[-1]))
        logits, labels = network.head(hidden[-1]), sample["labels"]
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        image = sample["input_ids"][0] == 31
        for row, gradient in zip(sums, torch.autograd.grad(loss, hidden[1:]), strict=True):
            for kind, tokens in enumerate((image, ~image)):
                part = gradient[0, tokens].abs()
                row[kind] += torch.tensor([part.sum(), part.numel()])
    means = sums[..., 0] / sums[..., 1]
    found = module.findings["image_weights"]
    assert found == {
        f"layers.{depth}": pytest.approx(float(image / text), rel=1e-5)
        for depth, (image, text) in enumerate(means)
    }
    module.opened = None
    for unit in module.units:
        weights = module.token_weights(0, unit)
        assert weights is not None
        assert weights.unique().tolist() == sorted({found[unit.blocks[-1]], 1.0})


def test_gptq_is_taken_where_it_lowers_the_block_objective(pictures: Path, tmp_path: Path) -> None:
    # On eight bits of activations it is the weights that count.
    spec = QuantSpec(num_bits=8, strategy="token", dynamic=True)
    module = method(pictures, rounding="gptq", partition_by="layerwise", audited=0, activation=spec)
    none = method(pictures, rounding="none", partition_by="layerwise", audited=0, activation=spec)
    fit(tmp_path / "gptq", module)
    fit(tmp_path / "none", none)
    taken = [row["rounding_accepted"] for row in module.history]
    assert any(taken)
    for row in module.history:
        lowest = min(row["block_error_learned"], row["block_error_joint"])
        assert row["block_error_final"] == lowest
    names = [unit.blocks[0].replace(".", "/") for unit in module.units]
    for name, accepted in zip(names, taken, strict=True):
        layers = [m.quantizers.get_submodule(f"{name}/up") for m in (module, none)]
        assert torch.equal(layers[0].scale, layers[1].scale)  # type: ignore[arg-type]
        assert torch.equal(layers[0].codes, layers[1].codes) != accepted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"largest": 4}, r"largest must be in \[1, 3\], got 4"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threshold_quantile": 1.5}, r"must lie in \[0, 1\], got 1\.5"),
        ({"shrinks": ()}, r"shrinks must be shares in \(0\.0, 1\], at least one, got \(\)"),
        ({"percentiles": (0.4,)}, r"percentiles must be shares in \(0\.5, 1\]"),
        ({"grid": "percentile"}, "ranges of tokens are taken at run time"),
        ({"proxy": "ded", "activation": None}, "there is nothing to search"),
        ({"proxy": "ded", "shrinks": (1.0,)}, r"candidates are \(1\.0,\)"),
        ({"weight": QuantSpec(strategy="channel", symmetric=False)}, "finds no zero-points"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], message: str, pictures: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        method(pictures, **changed).check()


def test_weighting_pictures_needs_an_adapter_that_sees_them(teacher: Path) -> None:
    module = QVLM(adapter=CogVideoX(str(teacher)), activation=TOKEN, image_weight=0.5)
    with pytest.raises(CapabilityMissing, match="Implement embed_features, image_tokens"):
        module.check()


def test_a_unit_without_inputs_to_quantise_has_no_search(pictures: Path) -> None:
    unit = Unit("layers.0", ("layers.0",))
    names = [stage.name for stage in method(pictures, activation=None).unit_stages(unit)]
    assert names == ["rounding"]
    plain = method(pictures, activation=None, rounding="none").unit_stages(unit)
    assert [(stage.name, stage.steps) for stage in plain] == [("nearest", 1)]


def test_prefixes_start_anew_where_an_earlier_layer_changed(pictures: Path, tmp_path: Path) -> None:
    module = method(pictures, partition_by="fixed", audited=0)

    def look(opened: Any) -> None:
        assert isinstance(opened.current, JointSearch)
        prefixes = opened.current.prefixes
        one, other = (0,) * 4, (1,) * 4
        mixed = [(one, one), (other, one), (one, other), (other, other, one), (one, other, one)]
        errors = [prefixes.error(settings) for settings in mixed]
        assert len(set(errors)) == len(errors)
        for settings, error in zip(mixed, errors, strict=True):
            prefixes.forget()
            assert prefixes.error(settings) == error
        raise Interruption

    with pytest.raises(Interruption):
        fit(tmp_path, module, First(look))
