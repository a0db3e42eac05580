"""The visual encoder in Q-VLM (arXiv 2410.08119, section 3.3): quantised first, and tuned.

    objective     eqs 8-10   `recon.methods.visual_encoder_objective`
    ranges        ours       `recon.methods.visual_encoder_search`, a stage before this one
    what learns   ours       `recon.methods.visual_encoder_tuning`
    guard         ours       `TunedEncoder.before_step`, on held-out samples

What the stage leaves are the encoder's layers and tuned tensors; nothing of the language model that
it is tuned against.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from recon.calibration import ranks
from recon.engine import keep_best, schedules, vision
from recon.engine.staged import OpenStage
from recon.engine.unit import Stage, StageState
from recon.losses.answers import relative_distance
from recon.methods import visual_encoder_search
from recon.methods.rounding_behind_search import SIGN
from recon.methods.visual_encoder_layers import SEARCH_STAGE, encoder_layers, encoder_sites
from recon.methods.visual_encoder_objective import VisualEncoderObjective

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM


KINDS = {"teacher_weight": "encoder weights", "rounding.offset": "encoder rounding"}
"""Of a layer's parameters, those with a learning rate of their own."""


def stages(method: "QVLM") -> list[Stage]:
    """The search of its ranges, if it has any, then the encoder itself; none if it is left."""
    if not (method.quantize_vision or method.veo.enabled):
        return []
    steps = method.veo.epochs * _epoch(method) if method.veo.enabled else 1
    found = [Stage(vision.STAGE, steps)]
    if method.quantize_vision and method.activation is not None:
        found.insert(0, Stage(SEARCH_STAGE, 1 + visual_encoder_search.plan(method).steps))
    return found


def open_encoder(method: "QVLM") -> "QuantisedEncoder":
    """The encoder's stage, as `veo` says."""
    return TunedEncoder(method) if method.veo.enabled else QuantisedEncoder(method)


def _epoch(method: "QVLM") -> int:
    """Steps of a pass over the calibration set."""
    return max(method.sample_count // method.batch_size, 1)


class QuantisedEncoder(OpenStage):
    """The visual encoder while its stage is open and nothing of it learns.

    Args:
        method: Whose streams stand in front of the first block.
        learning: Whether something of it does.

    Raises:
        ConfigError: No sample has a picture to calibrate on, or to judge the tuning by.
    """

    def __init__(self, method: "QVLM", *, learning: bool = False) -> None:
        self._method, self._frontier = method, method.frontier
        self._adapter = vision.sees_pictures(
            method.adapter, "The visual encoder is to be quantised or tuned", "leave it as it is"
        )
        vision.refuse_texts(method, self._adapter, held_out=learning)
        self._teacher = vision.VisionNetwork(self._adapter, method.run_device)
        groups = self._teacher.groups() if method.quantize_vision else []
        record = self._teacher.record(method, groups)
        sites = encoder_sites(method)
        self.layers = encoder_layers(method, groups, record, sites, learning=learning)
        for name, layer in self.layers.items():
            method.quantizers[name.replace(".", "/")] = layer
        for name, tensor in self._tuned_as_they_are().items():
            method.tuned[name.replace(".", "/")] = nn.Parameter(tensor.float().clone())
        self._student = vision.VisionNetwork(
            self._adapter, method.run_device, self.layers, method.tuned_tensors()
        )

    def _tuned_as_they_are(self) -> dict[str, Tensor]:
        """The teacher's tensors that learn without being quantised, by full name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What quantising it costs."""
        return {"feature_error": torch.zeros(())}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """Mean relative error of the features over the calibration set."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._method.run_device)
        for sample in map(self._frontier.sample, self._frontier.calibration):
            if vision.has_pictures(self._adapter, sample):
                found = self._student.features(sample)
                error = relative_distance(found, self._teacher.features(sample))
                sums += torch.stack([error, torch.ones_like(error)]).double()
        wrong, count = ranks.total(sums)
        state["feature_error"].copy_(wrong / count)
        return {"feature_error": float(state["feature_error"])}

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Lets all streams start behind it; its error."""
        self._settle({})
        return {vision.STAGE: {"feature_error": float(state["feature_error"])}}

    def _settle(self, tuned: dict[str, Tensor]) -> None:
        for layer in self.layers.values():
            layer.close_as_rounded()
        vision.settle(self._method, self.layers, tuned)
        self._frontier.restart()


class TunedEncoder(QuantisedEncoder):
    """The visual encoder while it is tuned, quantised or not.

    Args:
        method: Whose streams stand in front of the first block.

    Raises:
        ConfigError: No sample has a picture to calibrate on, or to judge the tuning by.
    """

    def __init__(self, method: "QVLM") -> None:
        self._tuning = method.veo
        super().__init__(method, learning=True)
        self.objective = VisualEncoderObjective(method, self._adapter, self._teacher, self._student)
        self.largest_gradient = self._tuning.clip
        self._over: bool | None = None

    # What learns ----------------------------------------------------------------------------------

    def _tuned_as_they_are(self) -> dict[str, Tensor]:
        wanted, found = self._tuning.params, dict[str, Tensor]()
        if "norms" in wanted:
            found |= self._teacher.parameters(self._adapter.vision_norms())
        if "weights" in wanted and not self.layers:
            groups = self._adapter.vision_groups()
            found |= self._teacher.parameters(tuple(n for g in groups for n in g.linears))
        return found

    @property
    def _parts(self) -> dict[str, list[Tensor]]:
        """What learns, by the name of its learning rate; what linears share stands there once."""
        found: dict[str, dict[Tensor, None]] = {
            "encoder": {}, "encoder rounding": {}, "encoder weights": {}
        }  # fmt: skip
        norms = tuple(f"{name}." for name in self._adapter.vision_norms())
        for name, tensor in self._method.tuned_tensors().items():
            inside = name.removeprefix(f"{self._adapter.vision_name}.")
            found["encoder" if inside.startswith(norms) else "encoder weights"][tensor] = None
        for layer in self.layers.values():
            for name, parameter in layer.named_parameters():
                found[KINDS.get(name, "encoder")][parameter] = None
        return {kind: list(parameters) for kind, parameters in found.items()}

    @property
    def learned(self) -> list[Tensor]:
        """All that learns."""
        return [parameter for parameters in self._parts.values() for parameter in parameters]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adam on a cosine to 0, weights at a rate of their own; offsets as SignRound has them."""
        tuning, cosine = self._tuning, schedules.cosine
        steps = tuning.epochs * _epoch(self._method)
        rules: dict[str, dict[str, Any]] = {
            "encoder": {"lr": tuning.lr, "schedule": cosine},
            "encoder rounding": {"lr": 1 / steps, "schedule": schedules.linear, **SIGN},
            "encoder weights": {"lr": tuning.weight_lr, "schedule": cosine},
        }
        return [
            {"name": name, "params": parameters, **rules[name]}
            for name, parameters in self._parts.items()
            if parameters
        ]

    def state(self) -> dict[str, Tensor]:
        """Weights of the entropy, held-out results, the best parameters so far."""
        pairs = len(self.objective.blocks) - 1
        results = torch.full((self._tuning.epochs + 1, 2), torch.inf)
        influence = torch.full((pairs,), 1 / max(pairs, 1))
        best = keep_best.best_so_far(self.learned)
        return {"influence": influence, "held_out": results, **best}

    def terms(self, sample: int, step: int, state: StageState) -> dict[str, Tensor]:
        """Eq. 10 of one sample; zero once tuning has stopped."""
        return self.objective.nothing() if self._over else self.objective.terms(sample, step, state)

    # Guard and early stop -------------------------------------------------------------------------

    def before_step(self, step: int, state: StageState) -> dict[str, float]:
        """Before each epoch: looks at the held-out samples, and weighs the entropy anew."""
        epoch, within = divmod(step, _epoch(self._method))
        if within and self._over is not None:
            return {}
        self._over = self._ended(state)  # read from the device once an epoch
        if within or self._over:
            return {}
        found = self._look(epoch, state)
        self._over = self._ended(state)
        if not self._over:
            self.objective.weigh(state)
        return found

    @torch.no_grad()
    def _look(self, epoch: int, state: StageState) -> dict[str, float]:
        # Stored finite: infinity stands for what was not looked at.
        state["held_out"][epoch] = self.objective.held_out().nan_to_num(nan=torch.inf).clamp(
            max=torch.finfo(torch.float32).max
        )  # fmt: skip
        value = torch.tensor(self._values(state)[epoch], device=self._method.run_device)
        keep_best.remember(state, self.learned, value)
        cross_entropy, error = state["held_out"][epoch].tolist()
        return {"held_out_cross_entropy": cross_entropy, "held_out_error": error}

    def _values(self, state: StageState) -> list[float]:
        """Cross-entropy and λ2 of the error before each epoch; inf where one that counts got worse.

        The entropy is left out: its weights differ from epoch to epoch.
        """
        weights = (self._tuning.answer_weight, self._tuning.error_weight)
        rows: list[list[float]] = state["held_out"].tolist()
        looked = [row for row in rows if not math.isinf(row[0])]
        start = looked[0] if looked else rows[0]
        worse = [
            any(w and new > old for w, new, old in zip(weights, row, start, strict=True))
            for row in looked
        ]
        values = [sum(w * value for w, value in zip(weights, row, strict=True)) for row in looked]
        return [math.inf if bad else value for bad, value in zip(worse, values, strict=True)]

    def _ended(self, state: StageState) -> bool:
        values = self._values(state)
        return bool(values) and len(values) - 1 - _best(values) >= self._tuning.patience

    # The end of the stage -------------------------------------------------------------------------

    @torch.no_grad()
    def conclude(self, state: StageState) -> dict[str, Any]:
        """Keeps the best of what was tuned, or nothing of it; all streams start behind it."""
        if not self._over:
            self._look(self._tuning.epochs, state)
        found = self._judge(state)
        keep_best.assign(self.learned, keep_best.remembered(state, len(self.learned)))
        self._settle(self._method.tuned_tensors() if found["accepted"] else {})
        return {vision.STAGE: found}

    def _judge(self, state: StageState) -> dict[str, Any]:
        values, rows = self._values(state), state["held_out"].tolist()
        best = _best(values)
        names = ("cross_entropy", "error")
        before, after = (dict(zip(names, rows[epoch], strict=True)) for epoch in (0, best))
        if best == 0:
            rank_zero_info(
                "Tuning the visual encoder lowered neither cross-entropy nor error on held-out "
                f"samples without raising the other ({before} before it); it is left as it was."
            )
        return {
            "accepted": best > 0,
            "epoch": best,
            "epochs": len(values) - 1,
            "before": before,
            "after": after,
            "influence": state["influence"].tolist(),
        }


def _best(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
