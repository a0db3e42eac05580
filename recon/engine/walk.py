"""Opening, closing and replaying units: the walk of both networks through the blocks."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from recon.calibration.operands import recorded_operands
from recon.calibration.statistics import UnitRecord, recorded_inputs
from recon.engine import attention, stage_data
from recon.engine.assembly import assembled, compile_pays, layer_groups, nearest_layers
from recon.engine.layer_errors import LayerErrors
from recon.engine.unit import OpenUnit, StageState, Unit
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.types import State

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def start_streams(module: "Reconstruction") -> None:
    """Brings the streams in front of unit `index`; closed units are replayed if they must be."""
    # Those of a checkpoint come from the host, and Lightning moves the module only later.
    module.quantizers.to(module.run_device)
    if module.ends is not None:
        module.ends.settle_stem()
    if module.frontier.start(module.index):
        return
    rank_zero_info(f"Replaying {module.index} closed units to rebuild their activations.")
    for unit in module.units[: module.index]:
        blocks = blocks_of(module, unit)
        module.frontier.record(blocks)
        students = assembled(unit, blocks, module.layers_of(unit))
        _attend(module, unit, students, module.attentions_of(unit))
        module.frontier.advance(students, nearest_blocks(module, unit, blocks))


def follow(module: "Reconstruction", boundary: int) -> None:
    """Brings the teacher's stream in front of the block of that number, leaving the others."""
    for name in module.adapter.block_names[module.frontier.boundary : boundary]:
        module.frontier.follow([module.adapter.block(name, module.run_device)])


def open_stage(module: "Reconstruction") -> None:
    """Opens the stage the module stands at, and its unit where it is closed."""
    if module.units and module.opened is None:
        module.opened = open_unit(module)
    module.stage_state = StageState(module.open_stage(module.stage)).to(module.run_device)
    # The method may have given the unit's layers new parts.
    module.quantizers.to(module.run_device)


def open_unit(module: "Reconstruction") -> OpenUnit:
    """Records the teacher on unit `index`, asks the method for its layers and registers them."""
    opened = trial_unit(module, module.units[module.index])
    for name, layer in (*opened.layers.items(), *opened.attentions.items()):
        module.quantizers[name.replace(".", "/")] = layer
    module.quantizers.to(module.run_device)
    return opened


def trial_unit(module: "Reconstruction", unit: Unit) -> OpenUnit:
    """The unit in front of which the streams stand, with its layers; registers nothing."""
    started = time.monotonic()
    blocks = blocks_of(module, unit)
    groups = layer_groups(module.adapter, unit, blocks, skip_roles=module.skip_roles)
    opened = OpenUnit(unit, groups, blocks, UnitRecord(), started=started)
    inner = module.further_streams > 0
    module.frontier.record(blocks, lambda sample: _observed(module, opened, sample), inner=inner)
    opened.record.reduce()
    opened.layers = module.open_unit(opened)
    opened.student_blocks = assembled(unit, blocks, opened.layers)
    opened.attentions = {
        name: module.open_attention(name, opened)
        for name in attention.quantized_names(module, unit.blocks)
    }
    _attend(module, unit, opened.student_blocks, opened.attentions)
    parts = (*opened.layers.values(), *opened.attentions.values())
    nn.ModuleList(parts).to(module.run_device)
    return opened


def close_unit(module: "Reconstruction", opened: OpenUnit) -> dict[str, float]:
    """Lets the method close the unit, then advances the streams past it; the unit's results."""
    module.close_unit(opened)
    for products in opened.attentions.values():
        products.fold()
    module.quantizers.to(module.run_device)
    nearest = nearest_blocks(module, opened.unit, opened.teacher_blocks)
    layers = _layer_errors(opened, nearest)
    errors = module.frontier.advance(opened.student_blocks, nearest, layers.observed)
    module.layer_errors |= layers.reduced(module.run_device)
    return {
        "error_before": errors["nearest"],
        "error_after": errors["student"],
        **{f"loss_{name}": float(value) for name, value in opened.losses.items()},
        **opened.results,
        "step": module.first_step,
        "seconds": time.monotonic() - opened.started,
    }


def record_student(module: "Reconstruction", opened: OpenUnit) -> UnitRecord:
    """Gram matrices of what reaches the open unit's layers behind the quantised prefix.

    One more forward per calibration sample, through the unit as it is at this moment.
    """
    record = UnitRecord()
    firsts = {group.name: opened.layers[group.name] for group in opened.groups}
    module.frontier.visit(
        opened.student_blocks,
        "student",
        lambda sample: recorded_inputs(firsts, record, with_gram=firsts),
    )
    record.reduce()
    return record


def factor(schedule: Callable[[float], float], steps: int) -> Callable[[int], float]:
    """A schedule over progress in [0, 1] as one over `steps` optimizer steps."""
    return lambda step: schedule(min(step / steps, 1.0))


def compiles(module: "Reconstruction") -> bool:
    """Whether the unit's forward will be compiled."""
    # Each length would be compiled anew; without units yet there are several.
    if module.compile_choice != "auto" or not module.units or not module.frontier.alike:
        return module.compile_choice is True
    state = module.adapter.embed(module.frontier.sample(0), module.run_device)
    return compiling_pays(module, state, module.run_device)


def compiling_pays(module: "Reconstruction", state: State, device: torch.device) -> bool:
    """What `compile: auto` decides for a module that is cut into units.

    Args:
        module: Its units and steps are known.
        state: What enters the first unit.
        device: Where it runs.
    """
    unit = module.units[0]
    shapes = [s for name in unit.blocks for s in module.adapter.linear_shapes(name).values()]
    tokens = module.adapter.tokens(state).shape[:2].numel() * module.batch_size
    steps = module.planned_steps
    weights = sum(out * in_ for out, in_ in shapes)
    return compile_pays(device, weights, tokens, steps)


def blocks_of(module: "Reconstruction", unit: Unit) -> list[nn.Module]:
    """The full-precision blocks of a unit."""
    return [module.adapter.block(name, module.run_device) for name in unit.blocks]


def nearest_blocks(
    module: "Reconstruction", unit: Unit, blocks: list[nn.Module]
) -> list[nn.Module]:
    """The blocks of a unit, rounded to nearest."""
    groups = layer_groups(module.adapter, unit, blocks, skip_roles=module.skip_roles)
    activation = {group.name: module.activation_spec(group.role) for group in groups}
    students = assembled(unit, blocks, nearest_layers(groups, module.weight, activation))
    _attend(module, unit, students, attention.nearest_attentions(module, unit.blocks))
    return students


def _layer_errors(opened: OpenUnit, nearest: list[nn.Module]) -> LayerErrors:
    rounded = {
        f"{block}.{name}": part
        for block, copy in zip(opened.unit.blocks, nearest, strict=True)
        for name, part in copy.named_modules()
        if isinstance(part, QuantLinear)
    }
    teachers = {name: linear for group in opened.groups for name, linear in group.linears.items()}
    return LayerErrors(teachers, opened.layers, rounded)


def _attend(
    module: "Reconstruction",
    unit: Unit,
    blocks: list[nn.Module],
    attentions: Mapping[str, QuantAttention],
) -> None:
    for name, block in zip(unit.blocks, blocks, strict=True):
        attention.put_in(module.adapter, block, attentions, within=f"{name}.")


@contextmanager
def _observed(module: "Reconstruction", opened: OpenUnit, sample: int) -> Iterator[None]:
    firsts = {group.name: next(iter(group.linears.values())) for group in opened.groups}
    with ExitStack() as stack:
        gram = firsts if module.wants_gram else ()
        stack.enter_context(
            recorded_inputs(
                firsts,
                opened.record,
                with_gram=gram,
                row=module.record_row(sample),
                tokens=module.wants_tokens,
            )
        )
        if module.wants_tokens and module.quantize_attention:
            adapter = attention.replaceable(module.adapter)
            for name, block in zip(opened.unit.blocks, opened.teacher_blocks, strict=True):
                watched = recorded_operands(
                    adapter, block, name, opened.record, module.wants_tokens
                )
                stack.enter_context(watched)
        if module.wants_attention:
            stack.enter_context(stage_data.recorded_salience(module, opened, sample))
        yield
