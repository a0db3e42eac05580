"""Bytes that a run takes in memory, from the configuration alone: for planning.

Every number is a sum over shapes that the code of a fit has itself: of the layers that are open, of
what their forward keeps for its backward, of the streams.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recon.calibration.memory import Place
from recon.engine import attention, stage_data
from recon.engine.assembly import assembled
from recon.engine.data import CalibrationData
from recon.engine.foresight import opened_layers, quantised_groups
from recon.engine.placement import needed_bytes
from recon.engine.unit import Unit
from recon.errors import BudgetError
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform
from recon.layers.tree import shared_copy
from recon.models.adapter import ModelAdapter
from recon.models.components import elements_beside

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

LEARNED = 9
"""32-bit numbers at hand for each that is learned, at the end of a step: itself, two moments of
Adam, its gradient; the sum over micro-batches in float64; a micro-batch's gradient in float32 and
float64. Source: `recon.engine.gradient`."""

HESSIANS = 3
"""Matrices in float64 that GPTQ has at a time: the Gram matrix, a copy that is damped and inverted,
its Cholesky factor. Source: `recon.quantizers.gptq`."""


HEAP = 90 * 2**20
"""What the host's allocator keeps of freed blocks. Source: peaks of fits on the embedded teachers
above the sum of all other parts, 58 MiB (configs/ptq4dit.yaml) and 127 MiB (s2q_vdit.yaml)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of reconstruction on the device where blocks run, by what takes them."""

    outside_blocks: int
    """Embedders and head, in the type of the run."""
    conditioning: int
    """What samples carry beside the streams."""
    unit_weights: int
    """Full-precision weights of the open unit."""
    learned: int
    """Parameters of the open unit with gradients and moments."""
    fixed: int
    """What its layers hold beside them."""
    activations: int
    """What the forward of a micro-batch keeps for its backward."""
    statistics: int
    """Gram matrices and kept tokens of its inputs."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return sum(asdict(self).values())


def sampling_bytes(adapter: ModelAdapter, device: torch.device) -> tuple[int, int, list[str]]:
    """Bytes of the weights that calibration samples with: of the network, and of all beside it.

    The network is read tensor by tensor to its device; other parts are loaded on the host first.

    Returns:
        Both, and the names of parts that cannot be counted.
    """
    itemsize = adapter.compute_dtype(device).itemsize
    network = sum(p.numel() for p in adapter.empty_network().parameters())
    inside = adapter.subfolder
    beside, unknown = elements_beside(adapter.folder, inside) if inside else (0, [])
    return network * itemsize, beside * itemsize, unknown


def stream_needs(
    module: "Reconstruction", data: CalibrationData, device: torch.device, world: int | None = None
) -> dict[Place, int]:
    """Bytes of one process's streams in each place; None: of the processes that are running."""
    samples, held_out, rows = data.sample_counts
    size = module.adapter.stream_bytes(rows, device)
    return needed_bytes(size, samples, held_out, module.further_streams, world)


def stream_place(
    module: "Reconstruction",
    needed: dict[Place, int],
    device: torch.device,
    root: Path,
    processes: int | None = None,
) -> Place | None:
    """Where the fit would put its streams; None: they fit nowhere, and it would be refused."""
    try:
        return module.memory.place(needed, device, root, processes)
    except BudgetError:
        return None


def footprint(
    module: "Reconstruction",
    units: list[Unit],
    data: CalibrationData,
    device: torch.device,
    world: int,
) -> Footprint:
    """Memory of the largest unit while it is open, without the streams."""
    adapter = module.adapter
    samples, held_out, rows = data.sample_counts
    unit = max(units, key=lambda one: len(one.blocks))
    dtype = adapter.compute_dtype(device)
    layers = opened_layers(module, unit)
    mine = -(-samples // world) + -(-held_out // world)
    inside = sum(
        p.numel() for name in adapter.block_names for p in adapter.empty_block(name).parameters()
    )
    everything = sum(p.numel() for p in adapter.empty_network().parameters())
    blocks = (adapter.empty_block(name) for name in unit.blocks)
    state = adapter.example_state(rows, "meta", dtype)
    apart = {*adapter.streamed, *adapter.shared}
    # Behind a quantised stem every stream has its own.
    conditioned = mine if module.outside_weight is None else 2 * mine + -(-held_out // world)
    return Footprint(
        outside_blocks=(everything - inside) * dtype.itemsize,
        conditioning=conditioned * sum(t.nbytes for name, t in state.items() if name not in apart),
        unit_weights=sum(p.numel() for b in blocks for p in b.parameters()) * dtype.itemsize,
        learned=LEARNED * 4 * _elements(layers.values(), learned=True),
        fixed=4 * _elements(layers.values(), learned=False),
        activations=kept_for_backward(module, unit, layers, rows, device),
        statistics=_statistics(module, unit, -(-samples // world)),
    )


def _elements(layers: Iterable[QuantLinear], *, learned: bool) -> int:
    """Numbers that layers hold, learned or not; what they share counts once."""
    whole = nn.ModuleList(layers)
    return sum(t.numel() for t in (whole.parameters() if learned else whole.buffers()))


def _statistics(module: "Reconstruction", unit: Unit, samples: int) -> int:
    widths = [
        next(iter(group.linears.values())).in_features for group in quantised_groups(module, unit)
    ]
    gram = sum(8 * width**2 for width in widths) if module.wants_gram else 0
    factored = (HESSIANS - 1) * 8 * max(widths, default=0) ** 2 if module.wants_gram else 0
    return gram + factored + 4 * samples * module.wants_tokens * sum(widths)


def kept_for_backward(
    module: "Reconstruction",
    unit: Unit,
    layers: dict[str, QuantLinear],
    rows: int,
    device: torch.device,
) -> int:
    """Bytes that a micro-batch's forward through the open unit keeps, run on tensors without data.

    Where nothing learns: 0.
    """
    if not _elements(layers.values(), learned=True):
        return 0
    adapter, dtype = module.adapter, module.adapter.compute_dtype(device)
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks: list[nn.Module] = [
            _placed(shared_copy(adapter.empty_block(name)), device, dtype).requires_grad_(False)
            for name in unit.blocks
        ]
        for layer in layers.values():
            _placed(layer, device)
            assert layer.teacher_weight is not None
            layer.teacher_weight = torch.empty_like(
                layer.teacher_weight, device=device, dtype=dtype
            )
        students = assembled(unit, blocks, layers)
        for name, block in zip(unit.blocks, students, strict=True):
            products = attention.nearest_attentions(module, unit.blocks)
            attention.put_in(adapter, block, products, within=f"{name}.")
        state = adapter.example_state(rows * module.micro_batch, device, dtype)
        found = (layer.transform for layer in layers.values())
        transforms: list[InputTransform] = list(dict.fromkeys(t for t in found if t is not None))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            after = stage_data.run_learning(adapter, students, transforms, state)
            adapter.tokens(after).square().sum()
        held = nn.ModuleList([*students, *blocks]).state_dict(keep_vars=True).values()
        counted = {t.untyped_storage()._cdata for t in (*held, *state.values())}
        return sum(s.nbytes() for key, s in seen.items() if key not in counted)


def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with other tensors of the same shapes, made in the mode that is on."""

    def made(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else None
        return torch.empty_like(tensor, device=device, dtype=kind)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(made(parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = made(buffer)
    return module
