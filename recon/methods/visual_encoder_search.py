"""The search of the visual encoder's ranges in Q-VLM, before the encoder is tuned.

The paper quantises the encoder and leaves open how its ranges are found. Here each input takes the
share of its range that leaves the features closest to the teacher's, one input after the other, as
a block's inputs do in the coordinate search. The result is never worse than where ranges start, at
the smallest l_p distance of each input on its own.
"""

from typing import TYPE_CHECKING, Any

import torch

from recon.calibration import ranks
from recon.calibration.search import CoordinateSearch
from recon.engine import vision
from recon.engine.staged import OpenStage
from recon.engine.unit import StageState
from recon.losses.reconstruction import error_and_power
from recon.methods.visual_encoder_layers import SEARCH_STAGE, encoder_layers, encoder_sites

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM


class VisualEncoderSearch(OpenStage):
    """The visual encoder while its ranges are searched; leaves its choice, and no layer.

    Args:
        method: Whose streams stand in front of the first block.

    Raises:
        ConfigError: No sample has a picture to calibrate on.
    """

    def __init__(self, method: "QVLM") -> None:
        self._method, self._frontier = method, method.frontier
        self._sites = encoder_sites(method)
        self._adapter = vision.sees_pictures(
            method.adapter, "The visual encoder is to be quantised", "leave it as it is"
        )
        vision.refuse_texts(method, self._adapter, held_out=False)
        teacher = vision.VisionNetwork(self._adapter, method.run_device)
        groups = teacher.groups()
        layers = encoder_layers(method, groups, teacher.record(method, groups), self._sites)
        for layer in layers.values():
            assert layer.teacher_weight is not None
            layer.keep_resident(layer.teacher_weight.dtype)
        self._student = vision.VisionNetwork(self._adapter, method.run_device, layers)
        self._names = [group.name for group in groups]
        self._plan = plan(method)

    def state(self) -> dict[str, torch.Tensor]:
        """Errors of what was tried: of the ranges at their start, then step by step."""
        return {"errors": torch.full((1 + self._plan.steps,), torch.inf, dtype=torch.float64)}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """Error of the features with one range moved."""
        setting = self._sites.initial(self._names)
        if step:
            setting = self._plan.settings(step - 1, state["errors"][1:].cpu())[0]
        self._sites.select(self._names, setting)
        sums = torch.zeros(2, dtype=torch.float64, device=self._method.run_device)
        for index in self._frontier.calibration:
            sample = self._frontier.sample(index)
            if vision.has_pictures(self._adapter, sample):
                found = self._frontier.tokens(self._student.embed(sample))
                target = self._frontier.tokens(self._frontier.state("teacher", index))
                image = self._adapter.image_tokens(sample).to(found.device)
                sums += error_and_power(found, target, image.float())
        wrong, power = ranks.total(sums)
        state["errors"][step] = wrong / power
        return {"feature_error": float(wrong / power)}

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Candidate of each input, and the error before and after the search."""
        initial, *errors = state["errors"].tolist()
        outcome = self._plan.outcome(torch.tensor(errors, dtype=torch.float64))
        better = outcome.joint_error < initial
        chosen = outcome.joint[0] if better else self._sites.initial(self._names)
        found = {
            "error_initial": initial,
            "error_searched": min(outcome.joint_error, initial),
            "candidates": dict(zip(self._names, chosen, strict=True)),
        }
        return {SEARCH_STAGE: found}


def plan(method: "QVLM") -> CoordinateSearch:
    """One sweep over all inputs of the visual encoder."""
    adapter = vision.sees_pictures(method.adapter, "The encoder is quantised", "leave it as it is")
    return CoordinateSearch([len(adapter.vision_groups())], len(method.shrinks), sweeps=1)
