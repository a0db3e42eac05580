"""The template every method fills in: one `Trainer.fit`, one epoch per unit.

Read `on_train_epoch_end` first: a unit is closed and the next one opened there and nowhere else.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.frontier import Frontier
from recon.calibration.memory import MemoryBudget
from recon.calibration.statistics import UnitRecord, recorded_inputs
from recon.engine import resume, stage_data
from recon.engine.assembly import assembled, compile_pays, layer_groups, nearest_layers
from recon.engine.data import CalibrationData
from recon.engine.fingerprint import refuse_difference
from recon.engine.loader import StageLoader, StageSampler
from recon.engine.placement import needed_bytes, stream_store
from recon.engine.result import network_error
from recon.engine.settings import refuse_unsafe_trainer
from recon.engine.unit import LayerGroup, OpenUnit, Unit
from recon.errors import ConfigError, NumericsError
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter
from recon.quantizers.spec import QuantSpec

DEFAULT_WEIGHT = QuantSpec(num_bits=4, strategy="channel")
DEFAULT_ACTIVATION = QuantSpec(num_bits=6, strategy="token", dynamic=True)


class Reconstruction(LightningModule):
    """Optimises quantised layers unit by unit against the full-precision teacher.

    Only quantised layers are registered, under `quantizers`; the network stays in the adapter.

    Args:
        adapter: The network.
        weight: Grid of the weights.
        activation: Grid of the inputs; null leaves them unquantised.
        adaln: Linears that compute scales, shifts and gates from the timestep: `w4a` treats them
            as the others, `w4a16` leaves their inputs, `fp` leaves them alone.
        inputs: What the open unit is trained on: the teacher's stream, the quantised prefix's, or
            an element-wise random mix of both.
        batch_size: Samples per optimizer step over all processes.
        seed: Of everything random in the method.
        memory: Budgets of the carried streams.
        compile: Whether the unit's forward is compiled; auto: where the work pays for it.
    """

    quantizers: nn.ModuleDict

    def __init__(
        self,
        adapter: ModelAdapter,
        weight: QuantSpec = DEFAULT_WEIGHT,
        activation: QuantSpec | None = DEFAULT_ACTIVATION,
        adaln: Literal["w4a", "w4a16", "fp"] = "w4a",
        inputs: Literal["full_precision", "quantised", "mix"] = "quantised",
        batch_size: int = 1,
        seed: int = 0,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.adapter, self.weight, self.activation = adapter, weight, activation
        self.adaln, self.inputs = adaln, inputs
        self.batch_size, self.seed, self.memory = batch_size, seed, memory
        self.compile_choice = compile
        self.quantizers = nn.ModuleDict()
        self.units: list[Unit] = []
        self.sample_count = 0
        """Calibration samples over all processes."""
        self.index = 0
        """Index of the open unit; `len(units)` when none is left."""
        self.first_step = 0
        """Optimizer steps before the open unit."""
        self.opened: OpenUnit | None = None
        self.history: list[dict[str, float]] = []
        """Of each closed unit: error before and after, seconds."""
        self.seconds = {"calibration": 0.0, "reconstruction": 0.0}
        self.final_error: dict[str, float] = {}
        self.fingerprint: dict[str, Any] = {}
        self.pipelines: dict[str, Any] = {}
        """Pipelines around the forms of the network that were sampled, by form."""
        self._gradient: Tensor | None = None

    # The hooks a method overrides ---------------------------------------------------------

    wants_gram: bool = False
    """Whether `record.gram` is needed."""
    wants_attention: bool = False
    """Whether `record.salience` is needed; the adapter must then expose its attention."""

    def prepare(self) -> None:
        """Changes the network before it is cut into units; default: nothing."""

    def partition(self) -> list[Unit]:
        """The units, first to last; default: one per block."""
        return [Unit(name, (name,)) for name in self.adapter.block_names]

    def unit_steps(self, samples: int) -> int:
        """Optimizer steps of a unit, given the number of calibration samples; at least 1."""
        return 1

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """The quantised layers that stand for the unit's linears, by full name.

        Default: round-to-nearest.
        """
        return {
            name: QuantLinear(module, self.weight, self.activation_spec(group))
            for group in unit.groups
            for name, module in group.linears.items()
        }

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """Terms to be added up and minimised, from the unit's tokens [batch, tokens, channels]."""
        raise NotImplementedError

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Terms that depend on no sample; `progress` runs from 0 to 1 within the unit."""
        return {}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """What learns: optimizer groups with `name`, `params`, `lr` and `schedule` (progress →
        factor); empty for a method without gradients."""
        return []

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over `groups`."""
        return torch.optim.Adam(groups)

    def close_unit(self, unit: OpenUnit) -> None:
        """Turns every layer of the unit into codes; default: what its rounding says."""
        for layer in unit.layers.values():
            weight = layer.fold()
            assert layer.rounding is not None
            layer.close(*layer.rounding.close(weight))

    # What methods use -----------------------------------------------------------------------

    def activation_spec(self, group: LayerGroup) -> QuantSpec | None:
        """Grid of a group's input."""
        return self.activation_spec_of_role(group.role)

    def activation_spec_of_role(self, role: str) -> QuantSpec | None:
        """Grid of the input of linears of that role."""
        return None if role == "modulation" and self.adaln == "w4a16" else self.activation

    @property
    def skip_roles(self) -> tuple[str, ...]:
        """Roles of linears that stay in full precision."""
        return ("modulation",) if self.adaln == "fp" else ()

    def generator(self, *purpose: object) -> torch.Generator:
        """A fresh CPU generator that depends on the seed, the open unit and `purpose` only."""
        return stage_data.seeded("/".join(map(str, (self.seed, self.index, *purpose))))

    # Stages ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuses, within seconds and before anything is written, what cannot work.

        Raises:
            ReconError: Naming key, value, rule and remedy.
        """
        self.adapter.check()
        if self.weight.strategy == "token" or (
            self.activation is not None and self.activation.strategy != "token"
        ):
            raise ConfigError(
                f"Weights take strategy channel or group, got {self.weight.strategy}; activations "
                "take token with dynamic: true. Change model.weight or model.activation."
            )
        if self.batch_size < 1:
            raise ConfigError(f"model.batch_size must be at least 1, got {self.batch_size}.")

    def check_budget(
        self, samples: int, held_out: int, rows: int, root: Path, device: torch.device
    ) -> None:
        """Refuses memory budgets that the streams will not fit.

        Args:
            samples: Calibration samples over all processes.
            held_out: Held-out samples over all processes.
            rows: Batch size of one sample.
            root: The run folder.
            device: Where the network computes.

        Raises:
            BudgetError: Naming every budget.
        """
        size = self.adapter.stream_bytes(rows, device)
        self.memory.place(needed_bytes(size, samples, held_out), device, root)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another configuration or teacher, before calibration is read.

        Raises:
            CheckpointMismatch: Naming the fields that differ.
        """
        saved = checkpoint["recon"]["fingerprint"]
        present = resume.fingerprint(self, saved["calibration"])
        refuse_difference(saved, present, "The checkpoint")

    @property
    def root(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        """Lightning: ranks and data are known, no checkpoint is read yet."""
        self.prepare()
        self.units = self.partition()
        if stage != "fit" or self.fingerprint:
            return
        refuse_unsafe_trainer(self.trainer, type(self).__name__)
        data: CalibrationData = self.trainer.datamodule  # type: ignore[attr-defined]
        calibration = data.calibration_set
        self.seconds["calibration"] = data.seconds
        self.fingerprint = resume.fingerprint(self, calibration.fingerprint)
        device = self.trainer.strategy.root_device
        self.sample_count = len(calibration.samples)
        rows = calibration.samples[0]["timestep"].shape[0]
        needed = needed_bytes(
            self.adapter.stream_bytes(rows, device), self.sample_count, len(calibration.held_out)
        )
        mark = resume.digest(self.fingerprint)
        store = stream_store(self.memory, needed, device, self.root, mark)
        self.frontier = Frontier(
            self.adapter, calibration.samples, calibration.held_out, store, device
        )
        self.compiled = self.compile_choice is True or (
            self.compile_choice == "auto" and self._compile_pays(device)
        )
        run = stage_data.run_blocks
        self._run_student: Callable[..., Any] = (
            torch.compile(run, dynamic=False) if self.compiled else run
        )

    def _compile_pays(self, device: torch.device) -> bool:
        shapes = self.adapter.linear_shapes(self.units[0].blocks[0]).values()
        weights = sum(out * in_ for out, in_ in shapes) * len(self.units[0].blocks)
        tokens = self.frontier_tokens()
        steps = self.unit_steps(self.sample_count) * len(self.units)
        return compile_pays(device, weights, tokens, steps)

    def frontier_tokens(self) -> int:
        """Tokens of one sample."""
        state = self.adapter.embed(self.frontier.sample(0), self.trainer.strategy.root_device)
        return self.adapter.tokens(state).shape[:2].numel()

    @property
    def stage_steps(self) -> int:
        """Optimizer steps of every unit."""
        return self.unit_steps(self.sample_count)

    def start_streams(self) -> None:
        """Brings the streams to the boundary of the open unit, replaying closed units if needed."""
        if self.frontier.start(self.index):
            return
        rank_zero_info(f"Replaying {self.index} closed units to rebuild their activations.")
        for unit in self.units[: self.index]:
            blocks = [self.adapter.block(name, self._device_of_run) for name in unit.blocks]
            self.frontier.record(blocks)
            self.frontier.advance(assembled(unit, blocks, self.layers_of(unit)), self._nearest(unit, blocks))

    @property
    def _device_of_run(self) -> torch.device:
        return self.trainer.strategy.root_device

    def layers_of(self, unit: Unit) -> dict[str, QuantLinear]:
        """The registered layers inside a unit's blocks, by full dotted name."""
        prefixes = tuple(f"{name}." for name in unit.blocks)
        named = ((key.replace("/", "."), layer) for key, layer in self.quantizers.items())
        return {n: q for n, q in named if n.startswith(prefixes) and isinstance(q, QuantLinear)}

    def _nearest(self, unit: Unit, blocks: list[nn.Module]) -> list[nn.Module]:
        groups = layer_groups(self.adapter, unit, blocks, skip_roles=self.skip_roles)
        activation = {group.name: self.activation_spec(group) for group in groups}
        return assembled(unit, blocks, nearest_layers(groups, self.weight, activation))

    def open_next(self) -> None:
        """Opens unit `index`: records the teacher on it and registers its layers."""
        started = time.monotonic()
        unit = self.units[self.index]
        blocks = [self.adapter.block(name, self._device_of_run) for name in unit.blocks]
        groups = layer_groups(self.adapter, unit, blocks, skip_roles=self.skip_roles)
        opened = OpenUnit(unit, groups, blocks, UnitRecord(), {}, [])
        self.frontier.record(blocks, lambda sample: self._observed(opened, sample))
        opened.record.reduce()
        opened.layers = self.open_unit(opened)
        opened.student_blocks = assembled(unit, blocks, opened.layers)
        for name, layer in opened.layers.items():
            self.quantizers[name.replace(".", "/")] = layer
        self.quantizers.to(self._device_of_run)
        self.opened, self._opened_at = opened, started

    @contextmanager
    def _observed(self, unit: OpenUnit, sample: int):  # noqa: ANN202 (contextmanager)
        firsts = {group.name: next(iter(group.linears.values())) for group in unit.groups}
        with ExitStack() as stack:
            names: Iterable[str] = firsts if self.wants_gram else ()
            stack.enter_context(recorded_inputs(firsts, unit.record, with_gram=names))
            if self.wants_attention:
                stack.enter_context(stage_data.recorded_salience(self, unit, sample))
            yield

    # Lightning ------------------------------------------------------------------------------

    @property
    def finished_steps(self) -> int:
        """Optimizer steps done in the open unit."""
        return self.trainer.global_step - self.first_step

    def train_dataloader(self) -> Any:
        """Batches of sample indices for the open unit; empty when none is left."""
        if self.index == len(self.units):
            return []
        sampler = StageSampler(
            size=self.sample_count,
            batch=self.batch_size,
            steps=self.stage_steps,
            seed=self.seed,
            stage=self.index,
            rank=ranks.rank(),
            world=ranks.world(),
        )
        return StageLoader(sampler, lambda: self.finished_steps)

    def configure_optimizers(self) -> Any:
        """One optimizer over the open unit's groups, a schedule function per group."""
        if self.index == len(self.units):
            return None
        if self.opened is None:
            self.start_streams()
            self.open_next()
        assert self.opened is not None
        groups = self.parameter_groups(self.opened)
        self._trained = [p for group in groups for p in group["params"]]
        if not groups:
            return None
        steps = self.stage_steps
        schedules = [group.pop("schedule") for group in groups]
        factors = [lambda step, f=f: f(min(step / steps, 1.0)) for f in schedules]
        optimizer = self.optimizer(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Gradient of the mean loss over the global batch, kept for `backward`.

        Each sample is differentiated alone and the gradients are added in float64, which loses
        nothing: the step is the same bit for bit however samples are dealt over processes.
        """
        if not self._trained:
            return torch.zeros((), device=self.device, requires_grad=True)
        assert self.opened is not None
        progress = batch_idx / self.stage_steps
        total: Tensor | None = None
        for sample in batch:
            terms = self._sample_terms(sample, batch_idx)
            flat = self._flat_gradient(terms)
            total = flat if total is None else total.add_(flat)
        assert total is not None
        mean = ranks.total(total).div_(self.batch_size)
        extra = self.regularizer(self.opened, progress)
        if extra:
            mean[: mean.numel() - len(terms)] += self._flat_gradient(extra)[: -len(extra)]
        values = dict(zip(terms, mean[-len(terms) :].float(), strict=True)) | {
            name: term.detach() for name, term in extra.items()
        }
        loss = torch.stack(list(values.values())).sum()
        self._refuse_nan(mean, loss, batch_idx)
        self._gradient = mean
        named = {f"recon/{name}": value for name, value in values.items()}
        self.log_dict({"recon/loss": loss, **named}, batch_size=self.batch_size)
        return loss

    def _sample_terms(self, sample: int, step: int) -> dict[str, Tensor]:
        assert self.opened is not None
        state = stage_data.input_state(self, sample, step)
        student = self._run_student(self.adapter, self.opened.student_blocks, state)
        return self.unit_loss(self.adapter.tokens(student), self.frontier.target(sample), sample)

    def _flat_gradient(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the sum of `terms`, then the terms themselves, float64, one vector."""
        loss = torch.stack(list(terms.values())).sum()
        gradients = torch.autograd.grad(loss, self._trained, materialize_grads=True)
        values = [term.detach().reshape(1) for term in terms.values()]
        return torch.cat([*(g.flatten() for g in gradients), *values]).double()

    def _refuse_nan(self, mean: Tensor, loss: Tensor, step: int) -> None:
        # Asking costs a device synchronisation, so accelerators are asked only when they log.
        if self.device.type != "cpu" and step % self.trainer.log_every_n_steps:
            return
        if not (mean.isfinite().all() and loss.isfinite()):
            raise NumericsError(
                f"The loss or a gradient of unit {self.units[self.index].name} is NaN or Inf at "
                f"step {step}. The last checkpoint is good: lower the learning rates and start "
                "anew, or look at the unit's inputs."
            )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Hands the averaged gradients of `training_step` to the parameters."""
        if self._gradient is None:
            return
        offset = 0
        for parameter in self._trained:
            part = self._gradient[offset : offset + parameter.numel()]
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
            offset += parameter.numel()
        self._gradient = None

    def on_train_epoch_end(self) -> None:
        """Closes the unit, advances the streams, opens the next one."""
        unit, steps = self.units[self.index], self.stage_steps
        if self.finished_steps != steps:
            raise ConfigError(
                f"Unit {unit.name} ended after {self.finished_steps} of {steps} steps: a trainer "
                "setting or a callback stopped its epoch. Remove it; to stop a run, send SIGTERM."
            )
        assert self.opened is not None
        self.close_unit(self.opened)
        self.quantizers.to(self._device_of_run)
        nearest = self._nearest(unit, self.opened.teacher_blocks)
        errors = self.frontier.advance(self.opened.student_blocks, nearest)
        seconds = time.monotonic() - self._opened_at
        self.opened = None
        self.history.append(
            {"error_before": errors["nearest"], "error_after": errors["student"], "seconds": seconds}
        )
        self.seconds["reconstruction"] += seconds
        self.index += 1
        self.first_step = self.trainer.global_step
        if self.index == len(self.units):
            self.final_error = network_error(self)
            self.frontier.close()
            self.trainer.should_stop = True
            return
        self.open_next()
        self.trainer.strategy.setup_optimizers(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where the run stands; primitives only, so that nothing needs unpickling."""
        checkpoint["recon"] = resume.progress(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the structure the checkpoint was saved with; Lightning's load is then strict."""
        resume.restore(self, checkpoint)

    # Sampling -------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Videos of teacher, round-to-nearest and quantised network for the same seeds."""
        return self.test_step(batch, batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Videos of teacher, round-to-nearest and quantised network for the same seeds."""
        from recon.engine.sampling import sample  # it pulls in the pipelines

        return sample(self, batch, ("full_precision", "round_to_nearest", "quantized"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Videos of the quantised network."""
        from recon.engine.sampling import sample

        return sample(self, batch, ("quantized",))
