"""Q-VLM's visual encoder on a tiny LLaVA: what is tuned, by what, and what is left of it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor, nn

import recon
from recon.engine import vision
from recon.engine.checkpoints import written
from recon.engine.sampling import Form, network
from recon.engine.unit import StageState
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.methods.q_vlm import QVLM
from recon.methods.visual_encoder import TunedEncoder
from recon.methods.visual_encoder_tuning import Part, VisualEncoderTuning
from recon.models.cogvideox import CogVideoX
from recon.models.llava import Llava
from recon.quantizers.spec import QuantSpec
from tests.engine.test_resume import Stop
from tests.engine.tiny_run import Interruption, Soft, assert_same
from tests.methods.visual_encoder_run import TUNED, Asked, asked, fit, method, result_bytes
from tests.models.tiny_vlm import write_tiny_vlm

CPU = torch.device("cpu")
TOWER = "model.vision_tower.encoder.layers.0"
EVERYTHING: tuple[Part, ...] = ("act_ranges", "norms", "weight_scales", "rounding", "weights")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("teacher"), "llava")


@pytest.fixture(scope="module")
def fitted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[QVLM, Path]:
    root, module = tmp_path_factory.mktemp("fitted"), method(teacher)
    fit(root, module)
    return module, root


def opened(root: Path, module: QVLM, look: Callable[[TunedEncoder, StageState], None]) -> None:
    """Calls `look` in front of the first step of the visual encoder's stage."""

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, running: Any, *args: Any) -> None:
            if isinstance(running.current, TunedEncoder):
                look(running.current, running.stage_state)
                raise Interruption

    with pytest.raises(Interruption):
        fit(root, module, Looks())


# What learns, by what


@pytest.mark.parametrize(
    ("quantized", "params", "expected"),
    [
        (True, ("act_ranges", "norms"), {"encoder": 4 + 2 * 2}),
        (True, ("rounding",), {"encoder rounding": 6}),
        (
            True,
            EVERYTHING,
            {"encoder": 4 + 2 * 2 + 6, "encoder rounding": 6, "encoder weights": 6},
        ),
        (False, EVERYTHING, {"encoder": 2 * 2, "encoder weights": 6 * 2}),
        (False, ("act_ranges", "norms"), {"encoder": 2 * 2}),
    ],
)
def test_gradients_reach_every_part_that_is_named_and_nothing_else(
    quantized: bool, params: Any, expected: dict[str, int], teacher: Path, tmp_path: Path
) -> None:
    def look(stage: TunedEncoder, state: StageState) -> None:
        groups = module.preparation_groups()
        assert {group["name"]: len(group["params"]) for group in groups} == expected
        learned = [p for group in groups for p in group["params"]]
        assert {id(p) for p in learned} == {id(p) for p in module.parameters()}
        rates = {group["name"]: group["lr"] for group in groups}
        (steps,) = (s.steps for s in module.preparation() if s.name == vision.STAGE)
        expected_rates = {"encoder": 1e-3, "encoder rounding": 1 / steps, "encoder weights": 1e-4}
        assert rates.items() <= expected_rates.items()
        for name, term in stage.terms(0, 0, state).items():
            for parameter in torch.autograd.grad(term, learned, retain_graph=True):
                assert parameter.abs().sum() > 0, name
        others = [p for block in stage.objective.blocks for p in block.parameters()]
        assert others
        assert not any(p.requires_grad for p in others)

    module = method(teacher, quantize_vision=quantized, veo=replace(TUNED, params=params))
    opened(tmp_path, module, look)


def test_without_weights_the_loss_is_the_cross_entropy_that_the_public_class_gives(
    teacher: Path, tmp_path: Path
) -> None:
    def look(stage: TunedEncoder, state: StageState) -> None:
        public: Any = module.adapter.network("cpu")
        for name, block in zip(module.adapter.block_names, stage.objective.blocks, strict=True):
            public.set_submodule(name, block)
        for name, layer in stage.layers.items():
            public.set_submodule(name, layer)
        for index in (0, 2):
            sample = module.frontier.sample(index)
            expected = public(**module.adapter.call_arguments(sample, "cpu")).logits[0, :-1]
            labels = sample["labels"][0, 1:]
            terms = stage.terms(index, 0, state)
            assert list(terms) == ["cross_entropy"]
            loss = nn.functional.cross_entropy(expected, labels, ignore_index=-100)
            assert torch.allclose(terms["cross_entropy"], loss, rtol=1e-6)
        # Text alone: nothing to learn from, the same terms.
        assert stage.terms(3, 0, state)["cross_entropy"] == 0

    module = method(teacher, veo=replace(TUNED, entropy_weight=0.0, error_weight=0.0))
    opened(tmp_path, module, look)


def test_features_alone_are_fitted_without_the_language_model(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(stage: TunedEncoder, state: StageState) -> None:
        adapter = module.adapter
        assert isinstance(adapter, Llava)
        monkeypatch.setattr(type(adapter), "forward_block", None)  # nobody may call it
        sample = module.frontier.sample(0)
        terms = stage.terms(0, 0, state)
        found = vision.VisionNetwork(adapter, CPU, stage.layers).features(sample)
        target = vision.VisionNetwork(adapter, CPU).features(sample)
        expected = (found - target).norm() / target.norm()
        assert list(terms) == ["error"]
        assert torch.allclose(terms["error"], expected, rtol=1e-5)
        assert list(stage.terms(3, 0, state)) == ["error"]

    tuning = replace(
        TUNED, params=("act_ranges", "rounding"), answer_weight=0.0, entropy_weight=0.0,
        output_share=0.0,
    )  # fmt: skip
    module = method(teacher, veo=tuning)
    opened(tmp_path, module, look)


@pytest.mark.parametrize("answers", [0.0, 1.0])
def test_what_has_no_weight_cannot_veto_a_tuning(
    answers: float, teacher: Path, tmp_path: Path
) -> None:
    """Held-out rows in which the error falls and the cross-entropy rises."""

    def look(stage: TunedEncoder, state: StageState) -> None:
        state["held_out"][:2] = torch.tensor([[1.0, 0.8], [1.5, 0.4]])
        accepted = stage._judge(state)["accepted"]
        assert accepted is (answers == 0.0)

    module = method(teacher, veo=replace(TUNED, answer_weight=answers))
    opened(tmp_path, module, look)


def test_the_error_is_that_of_the_encoder_and_of_the_last_layer(
    teacher: Path, tmp_path: Path
) -> None:
    def look(stage: TunedEncoder, state: StageState) -> None:
        adapter, sample = module.adapter, module.frontier.sample(0)
        assert isinstance(adapter, Llava)
        features = adapter.vision_output(adapter.vision_network("cpu"), sample)
        full = adapter.embed(sample, "cpu")
        for name in adapter.block_names:
            full = adapter.forward_block(adapter.block(name, "cpu"), full)
        seen = stage.objective.see(0)
        expected = [
            (found - target).norm() / target.norm()
            for found, target in (
                (seen.features, features), (seen.hidden[-1], full["hidden_states"]),
            )
        ]  # fmt: skip
        term = stage.terms(0, 0, state)["error"]
        assert torch.allclose(term, 3 * (expected[0] + 2 * expected[1]), rtol=1e-5)
        assert all(part.item() > 0.01 for part in expected)

    module = method(teacher, veo=replace(TUNED, error_weight=3.0, output_share=2.0))
    opened(tmp_path, module, look)


def test_a_step_down_the_entropy_term_lowers_the_entropy(teacher: Path, tmp_path: Path) -> None:
    def look(stage: TunedEncoder, state: StageState) -> None:
        before = stage.terms(0, 0, state)["entropy"]
        assert 0 < before.item() < 0.01 * math.log(64)
        gradients = torch.autograd.grad(before, stage.learned)
        size = sum(gradient.square().sum() for gradient in gradients).sqrt()  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter, gradient in zip(stage.learned, gradients, strict=True):
                parameter -= 1e-2 * gradient / size
        assert stage.terms(0, 0, state)["entropy"].item() < before.item()

    # On eight bits steps are small, so that the gradient says what happens.
    spec = QuantSpec(num_bits=8, strategy="token", dynamic=True)
    module = method(teacher, activation=spec)
    opened(tmp_path, module, look)


def test_layers_count_by_what_the_final_error_feels_of_them(tmp_path: Path) -> None:
    teacher = write_tiny_vlm(tmp_path / "teacher", "llava", text_config={
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64,
    })  # fmt: skip

    def look(stage: TunedEncoder, state: StageState) -> None:
        assert torch.equal(state["influence"], torch.full((3,), 1 / 3))
        stage.objective.weigh(state)
        norms = torch.zeros(3)
        for index in (0, 1, 2):
            entering = stage.objective.see(index).hidden
            for depth in range(3):
                start = entering[depth].detach().requires_grad_(True)
                left = {**module.embed(module.frontier.sample(index)), "hidden_states": start}
                for block in stage.objective.blocks[depth + 1 :]:
                    left = module.adapter.forward_block(block, left)
                target = module.frontier.state("teacher", index)["hidden_states"]
                (left["hidden_states"] - target).norm().backward()
                assert start.grad is not None
                norms[depth] += start.grad.norm()
        assert torch.allclose(state["influence"], norms / norms.sum(), rtol=1e-4)

    module = method(teacher)
    opened(tmp_path / "run", module, look)


def test_the_search_leaves_each_input_on_the_best_of_what_was_tried(
    teacher: Path, tmp_path: Path
) -> None:
    module = method(teacher, veo=VisualEncoderTuning())
    fit(tmp_path, module)
    found = module.findings["visual_encoder_search"]
    assert 0 < found["error_searched"] < found["error_initial"]
    adapter, loaded = module.adapter, recon.load(tmp_path)
    assert isinstance(adapter, Llava)
    shares = (1.0, 0.7)
    for name, candidate in found["candidates"].items():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.activation_clip is not None
        assert layer.activation_clip.tolist() == [pytest.approx(shares[candidate])] * 2
    full, encoder = adapter.vision_network("cpu"), loaded.get_submodule("model")
    wrong = power = 0.0
    for index in (0, 1, 2):
        sample = module.frontier.sample(index)
        target = adapter.vision_output(full, sample).double()
        wrong += float((adapter.vision_output(encoder, sample) - target).square().sum())
        power += float(target.square().sum())
    assert found["error_searched"] == pytest.approx(wrong / power, rel=1e-5)


# What is left of it


def test_the_result_loads_as_it_was_evaluated_and_streams_start_behind_it(
    fitted: tuple[QVLM, Path], teacher: Path
) -> None:
    module, root = fitted
    found = module.findings[vision.STAGE]
    assert found["accepted"]
    for name in ("cross_entropy", "error"):
        assert found["after"][name] <= found["before"][name]
    whole, loaded = network(module, "quantized", CPU), recon.load(root)
    layers = [name for name, part in loaded.named_modules() if isinstance(part, QuantLinear)]
    assert sum(name.startswith(TOWER) for name in layers) == 6
    given = module.adapter.call_arguments(asked(2, 9), "cpu")
    with torch.no_grad():
        assert torch.equal(whole(**given).logits, loaded(**given).logits)
        state, encoder = module.embed(asked(2, 9)), loaded.get_submodule("model")
        features = module.adapter.vision_output(encoder, asked(2, 9))  # type: ignore[attr-defined]
        expected = module.adapter.embed_features(asked(2, 9), features, "cpu")  # type: ignore[attr-defined]
    assert torch.equal(state["hidden_states"], expected["hidden_states"])
    teachers = module.adapter.embed(asked(2, 9), "cpu")["hidden_states"]
    assert not torch.equal(state["hidden_states"], teachers)


@pytest.mark.parametrize("changed", [{}, {"quantize_vision": False, "activation": None}])
def test_the_error_is_of_whole_networks_each_behind_its_own_encoder(
    teacher: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    tuned = replace(TUNED, params=("norms",))
    module = method(teacher, veo=tuned, **changed)
    fit(tmp_path, module)
    forms: tuple[Form, ...] = ("full_precision", "round_to_nearest", "quantized")
    networks = {form: network(module, form, torch.device("cpu")) for form in forms}
    error, power = dict.fromkeys(forms, 0.0), 0.0
    for sample in Asked().held_out:
        given = module.adapter.call_arguments(sample, "cpu")
        with torch.no_grad():
            logits = {form: whole(**given).logits.double() for form, whole in networks.items()}
        expected = logits["full_precision"]
        power += float(expected.square().sum())
        for form, found in logits.items():
            error[form] += float((found - expected).square().sum())
    assert module.final_error["round_to_nearest"] == pytest.approx(
        error["round_to_nearest"] / power, rel=1e-4
    )
    assert module.final_error["reconstructed"] == pytest.approx(
        error["quantized"] / power, rel=1e-4
    )


def test_tuned_norms_are_the_only_plain_tensors_that_change(
    fitted: tuple[QVLM, Path], teacher: Path
) -> None:
    module, root = fitted
    stored = load_file(root / "quantized" / "network.safetensors")
    whole = module.adapter.network("cpu").state_dict()
    changed = {name for name in stored if not torch.equal(stored[name], whole[name])}
    norms = [
        f"{TOWER}.layer_norm{number}.{leaf}" for number in (1, 2) for leaf in ("weight", "bias")
    ]
    assert changed == set(norms)
    assert all(torch.equal(module.tuned_tensors()[name], stored[name]) for name in norms)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_tuning_that_makes_it_worse_leaves_nothing(
    quantized: bool, teacher: Path, tmp_path: Path
) -> None:
    wild = replace(TUNED, lr=30.0, clip=1e9, params=("norms",))
    module = method(teacher, quantize_vision=quantized, veo=wild)
    fit(tmp_path / "wild", module)
    found = module.findings[vision.STAGE]
    assert not found["accepted"]
    assert found["after"] == found["before"]
    plain = method(teacher, quantize_vision=quantized, veo=VisualEncoderTuning())
    fit(tmp_path / "plain", plain)
    assert result_bytes(tmp_path / "wild") == result_bytes(tmp_path / "plain")
    assert module.history[0]["block_error_joint"] == plain.history[0]["block_error_joint"]


def test_tuning_stops_where_it_no_longer_helps(teacher: Path, tmp_path: Path) -> None:
    losses: list[float] = []

    class Looks(QVLM):
        def on_loss(self, loss: Tensor) -> None:
            if isinstance(self.current, TunedEncoder):
                losses.append(float(loss))
            super().on_loss(loss)

    module = method(teacher, veo=replace(TUNED, epochs=6, lr=30.0, clip=1e9, patience=2))
    module.__class__ = Looks
    fit(tmp_path, module)
    assert module.findings[vision.STAGE]["epochs"] == 2
    assert all(loss > 0 for loss in losses[:4])
    assert losses[4:] == [0.0] * 8


@pytest.mark.parametrize(
    "changed",
    [
        {"veo": VisualEncoderTuning()},
        {"veo": replace(TUNED, params=EVERYTHING)},
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                {"quantize_vision": False, "veo": replace(TUNED, params=EVERYTHING)},
                {"activation": QuantSpec(num_bits=4, strategy="channel", symmetric=False)},
                {"activation": None},
            )
        ),
    ],
    ids=str,
)
def test_every_combination_loads_what_it_evaluates(
    changed: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    module = method(teacher, **changed)
    module.check()
    fit(tmp_path, module)
    loaded, given = recon.load(tmp_path), module.adapter.call_arguments(asked(1, 9), "cpu")
    with torch.no_grad():
        whole = network(module, "quantized", CPU)(**given).logits
        assert torch.equal(whole, loaded(**given).logits)
    inside = isinstance(loaded.get_submodule(f"{TOWER}.mlp.fc1"), QuantLinear)
    assert inside is module.quantize_vision
    if "veo" in changed and not module.veo.enabled:
        assert 0 < module.findings[vision.STAGE]["feature_error"] < 1
    nearest = network(module, "round_to_nearest", CPU).get_submodule(f"{TOWER}.mlp.fc1")
    assert isinstance(nearest, QuantLinear) is module.quantize_vision


# Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"quantize_vision": False, "veo": replace(TUNED, params=("act_ranges",))},
            r"is to tune act_ranges, and .* has none: model\.quantize_vision is false",
        ),
        (
            {"quantize_vision": False, "veo": replace(TUNED, params=("rounding",))},
            "is to tune rounding",
        ),
        (
            {"activation": None, "veo": replace(TUNED, params=("act_ranges",))},
            "is to tune act_ranges",
        ),
        ({"weight": QuantSpec(strategy="group", group_size=24)}, "24"),
    ],
)
def test_what_would_change_nothing_is_refused(
    changed: dict[str, Any], message: str, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        method(teacher, **changed).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": ()}, "veo.params is empty"),
        ({"epochs": 0}, r"veo\.epochs must be at least 1, got 0"),
        ({"answer_weight": 0.0, "error_weight": 0.0}, "are both 0: held-out answers and errors"),
        ({"error_weight": -1.0}, r"veo\.error_weight must be at least 0\.0, got -1\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisualEncoderTuning(**settings)


def test_texts_alone_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 calibration and 1 held-out samples have pictures"):
        fit(tmp_path / "calibration", method(teacher), pictures=(0, 0, 0, 0, 1, 0))
    with pytest.raises(ConfigError, match="1 calibration and 0 held-out samples have pictures"):
        fit(tmp_path / "held_out", method(teacher), pictures=(0, 1, 0, 0, 0, 0))


def test_a_network_without_pictures_has_no_visual_encoder(video_teacher: Path) -> None:
    module = QVLM(adapter=CogVideoX(str(video_teacher)), quantize_vision=True)
    with pytest.raises(CapabilityMissing, match="quantize_vision is true, but CogVideoX does not"):
        module.check()


@pytest.fixture
def video_teacher(tmp_path: Path) -> Path:
    from tests.models.tiny import write_tiny_cogvideox

    return write_tiny_cogvideox(tmp_path / "video")


# Stopped and continued, in one process and in two


@pytest.fixture(scope="module")
def whole(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, dict[str, Tensor]], list[bytes], QVLM]:
    root, soft, module = tmp_path_factory.mktemp("whole"), Soft(), method(teacher, audited=1)
    fit(root, module, soft)
    return soft.after, result_bytes(root), module


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        pytest.param("on_train_batch_end", 5, id="searching"),
        pytest.param("on_train_batch_end", 12, id="tuning", marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", 15, id="tuning, later"),
        pytest.param("on_train_batch_start", 17, id="tuned"),
        pytest.param("on_train_batch_end", 19, id="behind", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_inside_the_stage_or_behind_it_continues_bit_for_bit(
    hook: str, step: int, teacher: Path, tmp_path: Path, whole: Any
) -> None:
    # Eleven steps of the encoder's search, six of tuning, a pair of neighbours, six candidates.
    stop = Stop(hook, step)
    with pytest.raises(Interruption):
        fit(tmp_path, method(teacher, audited=1), stop, every=100)
    soft, module = Soft(), method(teacher, audited=1)
    fit(tmp_path, module, soft, ckpt_path=str(written(tmp_path)[0]))
    assert len(soft.after) == 11 + 6 + 1 + 6 - step
    for number, state in soft.after.items():
        assert_same(state, whole[0][number])
    assert result_bytes(tmp_path) == whole[1]
    assert module.findings == whole[2].findings
    assert module.final_error == whole[2].final_error


def run(teacher: Path, root: Path, devices: int) -> list[bytes]:
    command = [sys.executable, "-m", "tests.methods.visual_encoder_run", str(teacher), str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(devices)], check=True, timeout=240, env=environment, capture_output=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return result_bytes(root)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_one_without_pictures_leave_the_bytes_of_one(
    teacher: Path, tmp_path: Path
) -> None:
    one = run(teacher, tmp_path / "one", 1)
    assert run(teacher, tmp_path / "two", 2) == one
