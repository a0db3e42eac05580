"""Where a run stands, and how another process takes it up."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

import recon
from recon.calibration.frontier import BlockForwards
from recon.engine import vision, walk
from recon.engine.assembly import adopted
from recon.engine.attention import adopted_attentions
from recon.engine.fingerprint import refuse_difference, settings
from recon.engine.unit import Unit
from recon.errors import CheckpointMismatch
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

PREFIX, TUNED = "quantizers.", "tuned."


def fingerprint(module: "Reconstruction", calibration: str) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued bit for bit: plain values by field."""
    kind = type(module)
    return {
        "method": f"{kind.__module__}.{kind.__qualname__}",
        **{f"model.{key}": value for key, value in settings(module).items()},
        "model.compile": module.compile_choice,
        **{f"teacher.{key}": value for key, value in module.adapter.identity().items()},
        "calibration": calibration,
        "versions.recon": recon.__version__,
        "versions.torch": str(torch.__version__),
    }


def digest(fingerprint: dict[str, Any]) -> str:
    """A short name of a fingerprint."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def progress(module: "Reconstruction") -> dict[str, Any]:
    """What a checkpoint says about the run; primitives only."""
    return {
        "index": module.index,
        "stage": module.stage_index,
        "first_step": module.first_step,
        "units": [[unit.name, list(unit.blocks)] for unit in module.units],
        "done": module.done,
        "steps": 0 if module.done else module.stage.steps,
        "fingerprint": module.fingerprint,
        "losses": {name: float(loss) for name, loss in module.opened.losses.items()}
        if module.opened
        else {},
        "results": module.opened.results if module.opened else {},
        "findings": module.findings,
        "history": module.history,
        "layer_errors": module.layer_errors,
        "seconds": module.seconds,
        "final_error": module.final_error,
        "forwards": module.forwards,
    }


def restore(module: "Reconstruction", checkpoint: dict[str, Any]) -> None:
    """Gives the module the structure and position of `checkpoint`.

    While fitting, the open unit is opened again on its restored streams; for sampling, its
    half-learned layers are left out of the checkpoint's state.

    Raises:
        CheckpointMismatch: The checkpoint is none of recon's, belongs to another configuration,
            or was written between a unit's last step and its closing.
    """
    saved = checkpoint.get("recon")
    if saved is None:
        raise CheckpointMismatch("The checkpoint was not written by recon. Choose another file.")
    units = [Unit(name, tuple(blocks)) for name, blocks in saved["units"]]
    if module.units and units != module.units:
        names = [[unit.name for unit in cut] for cut in (units, module.units)]
        raise CheckpointMismatch(
            f"The checkpoint was cut into units {names[0]}, this configuration into {names[1]}. "
            "Resume with the configuration saved beside it, or start a new run folder."
        )
    fitting = bool(module.fingerprint)
    if fitting:
        refuse_difference(saved["fingerprint"], module.fingerprint, "The checkpoint")
    refuse_unclosed(checkpoint)
    module.units, module.findings = units, saved["findings"]
    module.index, module.stage_index = saved["index"], saved["stage"]
    module.first_step = saved["first_step"]
    module.history, module.seconds = saved["history"], saved["seconds"]
    # Checkpoints of finished runs from before these were kept are still tested and exported.
    module.layer_errors = saved.get("layer_errors", {})
    module.final_error, module.forwards = saved["final_error"], saved["forwards"]
    state: dict[str, Tensor] = checkpoint["state_dict"]
    _adopt_closed(module, state)
    if not fitting:
        checkpoint["state_dict"] = {
            key: tensor for key, tensor in state.items() if key in module.state_dict()
        }
        if not module.done:
            rank_zero_info(f"{module.index} of {len(units)} units are quantised so far.")
        return
    if not module.done:
        walk.start_streams(module)
    # Replaying is no part of what the run costs uninterrupted.
    module.frontier.forwards = BlockForwards(**module.forwards)
    if module.done:
        module.trainer.should_stop = True
        return
    if units:
        module.opened = walk.open_unit(module)
        module.opened.losses = {name: torch.tensor(loss) for name, loss in saved["losses"].items()}
        module.opened.results = saved["results"]
    walk.open_stage(module)


def refuse_unclosed(checkpoint: dict[str, Any]) -> None:
    """Does nothing unless every step of the open stage was done when the file was written.

    Raises:
        CheckpointMismatch: Lightning would train the unit a second time.
    """
    saved = checkpoint["recon"]
    if not saved["done"] and checkpoint["global_step"] - saved["first_step"] >= saved["steps"]:
        raise CheckpointMismatch(
            f"The checkpoint was written after the last step of unit {saved['index']} and before "
            "it was closed; continuing would train the unit twice. Choose the next older file."
        )


def _adopt_closed(module: "Reconstruction", state: dict[str, Tensor]) -> None:
    tensors, tuned = (
        {
            k.removeprefix(start).replace("/", "."): t
            for k, t in state.items()
            if k.startswith(start)
        }
        for start in (PREFIX, TUNED)
    )
    adapter = module.adapter
    vision.adopt(module, tensors, tuned)
    if module.ends is not None:
        module.ends.adopt(tensors)
    for unit in module.units[: module.index]:
        for block in unit.blocks:
            shapes = adapter.linear_shapes(block)
            groups: list[list[str]] = []
            activation: dict[str, QuantSpec | None] = {}
            for group in adapter.input_groups(block):
                if group.role in module.skip_roles:
                    continue
                groups.append([f"{block}.{name}" for name in group.linears])
                spec = module.activation_spec(group.role)
                activation |= dict.fromkeys(groups[-1], spec)
            linears = {f"{block}.{name}": shape for name, shape in shapes.items()}
            weight = dict.fromkeys(linears, module.weight)
            layers = adopted(tensors, linears, groups, weight, activation)
            for name, layer in layers.items():
                module.quantizers[name.replace(".", "/")] = layer
        for name, products in adopted_attentions(module, unit.blocks, tensors).items():
            module.quantizers[name.replace(".", "/")] = products
