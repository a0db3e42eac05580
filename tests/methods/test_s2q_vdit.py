"""S²Q-VDiT: its weights of tokens, its switches, and what learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from recon.engine import Reconstruction
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.methods import s2q_vdit
from recon.methods.s2q_vdit import Rotation, S2QVDiT, SparseTokenDistillation
from recon.models.adapter import ModelAdapter
from recon.models.cogvideox import CogVideoX
from recon.quantizers.affine import codes as nearest_codes
from recon.quantizers.packing import unpack
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit, quantized_bytes
from tests.models.tiny import write_tiny_cogvideox
from tests.reference.distillation import column_sums_by_loop, weights_by_loop


def method(teacher: Path, **changed: Any) -> S2QVDiT:
    settings: dict[str, Any] = {"epochs": 1, "threads": 1, "compile": False, **changed}
    return S2QVDiT(adapter=CogVideoX(str(teacher)), **settings)


class AtUnit(Callback):
    """Calls a function with the module before the first step of every unit."""

    def __init__(self, look: Any) -> None:
        self._look = look

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._look(pl_module)


def attention_inputs(block: nn.Module, module: S2QVDiT, sample: int) -> tuple[Tensor, Tensor]:
    """q and k [heads, tokens, channels] of the teacher, as they reach the attention call."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        seen.append((query[0], key[0]))
        return original(query, key, value, **kwargs)

    nn.functional.scaled_dot_product_attention = spy  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module.adapter.forward_block(block, module.frontier.state("teacher", sample))
    finally:
        nn.functional.scaled_dot_product_attention = original
    return seen[0]


def test_token_weights_are_those_of_the_paper_from_the_teachers_attention(
    samples: Path, tmp_path: Path
) -> None:
    from tests.engine.tiny_run import write_samples

    teacher = write_tiny_cogvideox(tmp_path / "t", layers=1, height=4, width=4, frames=5)
    data = write_samples(tmp_path / "d" / "calibration", teacher, samples=2)
    checked: list[int] = []

    def look(module: S2QVDiT) -> None:
        assert module.opened is not None
        for sample in (0, 1):
            query, key = attention_inputs(module.opened.teacher_blocks[0], module, sample)
            expected = weights_by_loop(column_sums_by_loop(query, key), 0.5, 1.0)
            found = module.token_weights(module.opened, sample)
            torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-5, atol=1e-5)
            checked.append(sample)

    fit(tmp_path / "run", method(teacher), data, AtUnit(look))
    assert checked == [0, 1]


def test_equal_weights_are_the_plain_mean_square_and_need_no_attention(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    class Plain(S2QVDiT):
        def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
            return {"token_error": (student - teacher).square().mean(dim=-1).mean()}

    # Two names are two fingerprints, but codes are codes.
    equal = method(teacher, std=SparseTokenDistillation(lambda_min=1, lambda_max=1))
    assert not equal.wants_attention
    plain = Plain(
        adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False,
        std=SparseTokenDistillation(lambda_min=1, lambda_max=1),
    )  # fmt: skip
    fit(tmp_path / "equal", equal, samples)
    fit(tmp_path / "plain", plain, samples)
    assert equal.history[-1]["loss_last"] == pytest.approx(plain.history[-1]["loss_last"], rel=1e-4)
    assert equal.final_error["reconstructed"] == pytest.approx(
        plain.final_error["reconstructed"], rel=0.05
    )


def test_without_gptq_closing_is_folding_and_rounding_to_nearest(
    teacher: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    closed = QuantLinear.close

    def noted(layer: QuantLinear, codes: Tensor, scale: Tensor) -> None:
        assert layer.rounding is not None
        weight = layer.fold()
        own = layer.rounding.scale(weight)
        key = str(len(expected))
        expected[key] = (nearest_codes(weight, own, layer.weight_spec), own)
        closed(layer, codes, scale)

    monkeypatch.setattr(QuantLinear, "close", noted)
    module = method(teacher, gptq=False)
    assert not module.wants_gram
    fit(tmp_path, module, samples)
    layers = [q for q in module.quantizers.values() if isinstance(q, QuantLinear)]
    assert len(layers) == len(expected)
    for layer, (codes, scale) in zip(layers, expected.values(), strict=True):
        assert layer.codes is not None
        assert torch.equal(unpack(layer.codes, 4, layer.in_features).float(), codes.float())
        assert torch.equal(layer.scale, scale)  # type: ignore[arg-type]


def test_gptq_keeps_the_clipped_scale_and_changes_codes(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    modules = [method(teacher, gptq=gptq) for gptq in (True, False)]
    for number, module in enumerate(modules):
        fit(tmp_path / str(number), module, samples)
    # Training does not see GPTQ: the first unit's scales are equal, its codes are not.
    first = [module.layers_of(module.units[0]) for module in modules]
    different = 0
    for name, with_gptq in first[0].items():
        without = first[1][name]
        assert torch.equal(with_gptq.scale, without.scale)  # type: ignore[arg-type]
        assert with_gptq.codes is not None
        assert without.codes is not None
        different += int(not torch.equal(with_gptq.codes, without.codes))
    assert different > 4


SWITCHES: list[dict[str, Any]] = [
    {"rotation": Rotation(kind="kron_orth")},
    {"rotation": Rotation(kind="none")},
    {"rotation": Rotation(start="haar")},
    {"rotation": Rotation(start="identity")},
    {"rotation": Rotation(splits={32: (2, 16)})},
    {"learn_scale": False},
    {"scale_order": "after_rotation"},
    {"scale_order": "after_rotation", "gptq": False},
    {"learn_weight_clip": False},
    {"learn_activation_clip": False},
    {"std": SparseTokenDistillation(norm_over="per_stream")},
    {"std": SparseTokenDistillation(clip_percentile=0.9)},
    {"std": SparseTokenDistillation(loss_tokens="video")},
    {"clip_start": 6.0},
    {"loss_norm": "self"},
    {"gptq_inputs": "quantised"},
    {"adaln": "fp"},
    {"adaln": "w4a16"},
    {"activation": None},
    {"weight": QuantSpec(num_bits=4, strategy="group", group_size=16)},
    {"weight": QuantSpec(num_bits=3), "batch_size": 2},
    {"learn_scale": False, "learn_weight_clip": False, "learn_activation_clip": False,
     "rotation": Rotation(kind="none")},
]  # fmt: skip


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One block, two samples: as short as a fit can be."""
    from tests.engine.tiny_run import write_samples

    folder = write_tiny_cogvideox(tmp_path_factory.mktemp("shallow"), layers=1)
    data = write_samples(tmp_path_factory.mktemp("data") / "calibration", folder, samples=2)
    return folder, data


def named(switch: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in switch.items())[:60]


@pytest.mark.parametrize("switch", SWITCHES, ids=named)
def test_every_switch_runs_and_changes_the_result(
    switch: dict[str, Any], shallow: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = shallow
    module, default = method(folder, **switch), method(folder)
    fit(tmp_path / "switched", module, data)
    assert 0 < module.final_error["reconstructed"] < 1
    fit(tmp_path / "default", default, data)
    assert quantized_bytes(tmp_path / "switched") != quantized_bytes(tmp_path / "default")
    if module.adaln == "fp":
        assert not [name for name in module.quantizers if "norm" in name]
    # `recon.load` understands what the switch left behind.
    import recon

    recon.load(tmp_path / "switched")


class Gradients(Callback):
    """Names of parameters whose gradient was not zero at some step of a unit."""

    def __init__(self) -> None:
        self.moved: set[str] = set()
        self.all: set[str] = set()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            self.all.add(name)
            assert parameter.grad is not None, name
            if bool((parameter.grad != 0).any()):
                self.moved.add(name)


def test_every_learned_parameter_receives_gradient(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    watch = Gradients()
    fit(tmp_path, method(teacher), samples, watch)
    assert watch.moved == watch.all
    kinds = {name.rsplit(".", 1)[-1] for name in watch.all}
    assert kinds == {
        "channel_scale", "clip_logits", "activation_clip_logits",
        "left_skew", "right_skew", "left_log_sigma", "right_log_sigma",
    }  # fmt: skip


def test_rates_decay_and_groups_are_the_papers(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, tuple[float, float]]] = []

    def look(module: Reconstruction) -> None:
        (optimizer,) = module.trainer.optimizers
        assert isinstance(optimizer, torch.optim.AdamW)
        groups = optimizer.param_groups
        seen.append({g["name"]: (g["initial_lr"], g["weight_decay"]) for g in groups})

    fit(tmp_path, method(teacher), samples, AtUnit(look))
    assert seen == [{"scale": (5e-3, 0.0), "rotation": (5e-3, 0.01), "clip": (5e-2, 0.0)}] * 3
    module = method(teacher)
    assert module._cosine(0.0) == 1.0
    assert module._cosine(1.0) == pytest.approx(1e-3)
    assert module.unit_steps(40) == 40


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({32: (3, 5)}, r"\(3, 5\) has the product 15.*to_q, model\.rotation\.splits"),
        ({100: (10, 10)}, r"splits names the widths \[100\], but the linears are \[16, 32, 128\]"),
    ],
)
def test_a_width_without_a_split_is_refused_before_anything_is_done(
    teacher: Path, splits: dict[int, tuple[int, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        method(teacher, rotation=Rotation(splits=splits)).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"weight": QuantSpec(strategy="token", dynamic=True)}, "Weights take strategy"),
        ({"activation": QuantSpec(num_bits=4)}, "activations of S2QVDiT take token"),
    ],
)
def test_numbers_out_of_range_are_refused(
    teacher: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        method(teacher, **arguments).check()


def test_weights_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lambda_min is 1 and std\.lambda_max 0\.5; they must"):
        SparseTokenDistillation(lambda_min=1, lambda_max=0.5)


def test_a_family_without_attention_is_told_what_to_implement(teacher: Path) -> None:
    hidden = {"attention_tokens", "__dict__", "__weakref__", "_abc_impl", "__abstractmethods__"}
    # What calls super() is bound to its class and stays there.
    bound = {
        name
        for name, value in vars(CogVideoX).items()
        if "__class__" in getattr(getattr(value, "__code__", None), "co_freevars", ())
    }
    kept = {n: value for n, value in vars(CogVideoX).items() if n not in hidden | bound}
    size = dict.fromkeys(("frames", "height", "width"))
    blind = type("Blind", (ModelAdapter,), {**kept, **size})
    module = S2QVDiT(adapter=blind(str(teacher)))
    with pytest.raises(
        CapabilityMissing,
        match=r"S2QVDiT weights tokens by attention, which Blind .*Implement attention_tokens or",
    ):
        module.check()


def test_the_module_names_its_parts() -> None:
    text = s2q_vdit.__doc__ or ""
    for part in ("eqs 3-8", "eqs 9-11", "open_unit", "close_unit", "parameter_groups"):
        assert part in text
