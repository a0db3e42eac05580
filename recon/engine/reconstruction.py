"""The template every method fills in: one `Trainer.fit`, one epoch per stage of a unit.

Read `on_train_epoch_end` first: stages and units are closed and the next ones opened there and
nowhere else. Most methods have one stage per unit; a search is a stage in which nothing learns.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.frontier import Frontier
from recon.calibration.memory import MemoryBudget
from recon.engine import refusals, resume, stage_data, stem_and_head, stopping, walk
from recon.engine.data import CalibrationData
from recon.engine.fingerprint import refuse_difference
from recon.engine.gradient import (
    Step,
    added,
    averaged,
    flat_gradient,
    hand_out,
    refuse_nan,
    scaled_gradient,
)
from recon.engine.hooks import Hooks
from recon.engine.loader import StageLoader, StageSampler, dealt, refuse_uneven
from recon.engine.placement import needed_bytes, stream_store
from recon.engine.result import network_error
from recon.engine.settings import refuse_unsafe_trainer
from recon.engine.stem_and_head import StemAndHead
from recon.engine.unit import OpenUnit, Stage, StageState, Unit
from recon.engine.vision import VisionNetwork
from recon.errors import ConfigError
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter
from recon.quantizers.spec import QuantSpec
from recon.types import Sample, State

DEFAULT_WEIGHT = QuantSpec(num_bits=4, strategy="channel")
DEFAULT_ACTIVATION = QuantSpec(num_bits=6, strategy="token", dynamic=True)


class Reconstruction(Hooks):
    """Optimises quantised layers unit by unit against the full-precision teacher.

    Only quantised layers are registered, under `quantizers`, and what else of the network was
    changed, under `tuned`; the network stays in the adapter.
    Arguments are kept under their own names: the fingerprint of a run is read from them.

    Args:
        adapter: The network.
        weight: Grid of the weights.
        activation: Grid of the inputs; null leaves them unquantised.
        quantize_attention: Whether both products of each attention are quantised: query, key and
            value on the grid of the inputs, the softmax at `softmax_bits`. Forms the [tokens,
            tokens] matrix, which fused kernels do not.
        softmax_bits: Bits of the softmax, in [2, 8]. Source: 8, PTQ4DiT.
        adaln: Linears that compute scales, shifts and gates from the timestep: `w4a` treats them
            as the others, `w4a16` leaves their inputs, `fp` leaves them alone.
        inputs: What the open unit is trained on: the teacher's stream, the quantised prefix's, or
            an element-wise random mix of both.
        batch_size: Samples per optimizer step over all processes.
        micro_batch: Samples that go through the unit together: each pass quantises every weight of
            the unit anew, whatever its number of tokens. Conversations are filled up to the
            longest of them; filling enters no loss. Part of the arithmetic, as threads are.
        seed: Of everything random in the method.
        memory: Budgets of the carried streams.
        threads: CPU threads of each process; null leaves torch's choice. Sums are split by
            threads, so a run has the same bytes only with the same number.
        compile: Whether the unit's forward is compiled; auto: where samples are of one
            shape and the work pays for it.
    """

    quantizers: nn.ModuleDict
    frontier: Frontier

    def __init__(
        self,
        adapter: ModelAdapter,
        weight: QuantSpec = DEFAULT_WEIGHT,
        activation: QuantSpec | None = DEFAULT_ACTIVATION,
        quantize_attention: bool = False,
        softmax_bits: int = 8,
        adaln: Literal["w4a", "w4a16", "fp"] = "w4a",
        inputs: Literal["full_precision", "quantised", "mix"] = "quantised",
        batch_size: int = 1,
        micro_batch: int = 1,
        seed: int = 0,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
        threads: int | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.adapter, self.weight, self.activation = adapter, weight, activation
        self.quantize_attention, self.softmax_bits = quantize_attention, softmax_bits
        self.adaln, self.inputs = adaln, inputs
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.seed, self.memory = seed, memory
        self.threads, self.compile_choice = threads, compile
        self.quantizers = nn.ModuleDict()
        self.tuned = nn.ParameterDict()
        """Tensors of the network that a stage before there are units tunes, by full name with
        slashes for dots."""
        self.vision: VisionNetwork | None = None
        """What turns pictures into features from now on; None: the teacher's."""
        self.ends: StemAndHead | None = None
        """Stem and head of the quantised streams; None: the teacher's."""
        self.units: list[Unit] = []
        self.sample_count = 0
        """Calibration samples over all processes."""
        self.index = 0
        """Index of the open unit; `len(units)` when none is left."""
        self.stage_index = 0
        """Index of the open stage among `stages`."""
        self.first_step = 0
        """Steps before the open stage."""
        self.stage_state: StageState | None = None
        """What `open_stage` returned."""
        self.findings: dict[str, Any] = {}
        """What closed stages found, for later ones; plain values, part of every checkpoint."""
        self.opened: OpenUnit | None = None
        self.history: list[dict[str, float]] = []
        """Of each closed unit: error of the streams behind it (rounded to nearest, and ours),
        first and last loss, the results of its stages, steps of the run so far, seconds."""
        self.layer_errors: dict[str, dict[str, float]] = {}
        """Of each layer of a closed unit, its own error: `error_before` and `error_after`."""
        self.seconds = {"calibration": 0.0, "reconstruction": 0.0}
        self.final_error: dict[str, float] = {}
        self.forwards: dict[str, int] = {}
        """Block forwards of this process until the open unit was opened, by stream."""
        self.fingerprint: dict[str, Any] = {}
        self.compiled = False
        self.stop_asked = False
        """Whether this process, one of several, got SIGTERM."""
        self.pipelines: dict[str, Any] = {}
        """Pipelines around the forms of the network that were sampled, by form."""
        self.forms_apart: bool | None = None
        """Whether only the form in use stands on the device; None: none was sampled yet."""
        self._trained: list[Tensor] = []
        self._gradient: Tensor | None = None
        self._rows: list[int] = []
        self._run_learning: Callable[..., State] = stage_data.run_learning

    # What methods use ---------------------------------------------------------------------------

    @property
    def vision_activation(self) -> QuantSpec | None:
        """Grid of the inputs of linears in the vision network, where it is quantised."""
        return self.activation

    def embed(self, sample: Sample) -> State:
        """The state that enters the first block, in the teacher's stream as in the others."""
        if self.vision is None:
            return self.adapter.embed(sample, self.run_device)
        with torch.no_grad():
            return self.vision.embed(sample)

    def tuned_tensors(self) -> dict[str, Tensor]:
        """`tuned` by full dotted name."""
        return {name.replace("/", "."): tensor for name, tensor in self.tuned.items()}

    def record_row(self, sample: int) -> tuple[int, int] | None:
        """Row of `record.absmax_rows` that a calibration sample belongs to, and their number."""
        return (self._rows[sample], max(self._rows) + 1) if self._rows else None

    def generator(self, *purpose: object) -> torch.Generator:
        """A fresh CPU generator that depends on the seed, the open unit and `purpose` only."""
        return stage_data.seeded("/".join(map(str, (self.seed, self.index, *purpose))))

    # Refusals, before anything is written -------------------------------------------------------

    def check(self) -> None:
        """Refuses, within seconds, what cannot work.

        Raises:
            ReconError: Naming key, value, rule and remedy.
        """
        refusals.check_grids(self)
        refusals.check_numbers(self)
        refusals.check_attention(self)
        stem_and_head.check(self)
        if self.wants_attention:
            stage_data.exposed_attention(self)
        self.adapter.check()

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
        needed = needed_bytes(size, samples, held_out, self.further_streams)
        self.memory.place(needed, device, root)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another configuration or teacher, before calibration is read.

        Raises:
            CheckpointMismatch: Naming the fields that differ.
        """
        saved = checkpoint["recon"]["fingerprint"]
        refuse_difference(saved, resume.fingerprint(self, saved["calibration"]), "The checkpoint")

    # Lightning: the stages ------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    @property
    def run_device(self) -> torch.device:
        """Where blocks run; `self.device` follows only once the strategy is set up."""
        return self.trainer.strategy.root_device

    @property
    def done(self) -> bool:
        """Whether every unit is closed."""
        return bool(self.units) and self.index == len(self.units)

    @property
    def stages(self) -> list[Stage]:
        """Those of the open unit, or those before there are units; empty when all is done."""
        if self.done:
            return []
        return self.unit_stages(self.units[self.index]) if self.units else self.preparation()

    @property
    def stage(self) -> Stage:
        """The open one."""
        return self.stages[self.stage_index]

    @property
    def planned_steps(self) -> int:
        """Steps of the whole run, as far as it is known."""
        units = (stage for unit in self.units for stage in self.unit_stages(unit))
        return sum(stage.steps for stage in (*self.preparation(), *units))

    @property
    def finished_steps(self) -> int:
        """Steps done in the open stage."""
        return self.trainer.global_step - self.first_step

    def setup(self, stage: str) -> None:
        """Lightning: ranks and data are known, no checkpoint is read yet."""
        if self.outside_weight is not None and self.ends is None:
            self.ends = StemAndHead(self)
        if not self.units:
            self.prepare()
            if not self.preparation():
                self.units = self.partition()
        if stage != "fit" or self.fingerprint:
            return
        refuse_unsafe_trainer(self.trainer, type(self).__name__)
        data: CalibrationData = self.trainer.datamodule  # type: ignore[attr-defined]
        chosen = data.calibration_set
        self.seconds["calibration"] = data.seconds
        self.fingerprint = resume.fingerprint(self, chosen.fingerprint)
        self.sample_count = len(chosen.samples)
        if self.wants_rows == "timestep":
            self._rows = stage_data.timestep_rows(chosen.samples)
        elif self.wants_rows == "sample":
            self._rows = list(range(self.sample_count))
        rows = data.sample_counts[2]
        size = self.adapter.stream_bytes(rows, self.run_device)
        needed = needed_bytes(size, self.sample_count, len(chosen.held_out), self.further_streams)
        mark = resume.digest(self.fingerprint)
        store = stream_store(self.memory, needed, self.run_device, self.root, mark)
        self.frontier = Frontier(
            self.adapter,
            chosen.samples,
            chosen.held_out,
            store,
            self.run_device,
            self.embed,
            self.ends,
        )
        self.compiled = walk.compiles(self)
        if self.compiled:
            self._run_learning = torch.compile(stage_data.run_learning, dynamic=False)

    def train_dataloader(self) -> Any:
        """Batches of sample indices for the open stage; empty when none is left."""
        if self.done:
            return []
        refuse_uneven(self.sample_count, self.batch_size, ranks.world(), self.micro_batch)
        sampler = StageSampler(
            size=self.sample_count,
            batch=self.batch_size,
            steps=self.stage.steps,
            seed=self.seed,
            stage=self.index,
            rank=ranks.rank(),
            world=ranks.world(),
        )
        return StageLoader(sampler, lambda: self.finished_steps)

    def configure_optimizers(self) -> Any:
        """One optimizer over the open stage's groups, a schedule function per group."""
        if self.done:
            return None
        if self.stage_state is None:  # a fresh start; a resumed run has opened its stage already
            walk.start_streams(self)
            walk.open_stage(self)
        unit = self.opened
        groups = self.preparation_groups() if unit is None else self.parameter_groups(unit)
        self._trained = [p for group in groups for p in group["params"]]
        if not groups:
            return None
        steps = self.stage.steps
        factors = [walk.factor(group.pop("schedule"), steps) for group in groups]
        optimizer = self.optimizer(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Lightning: its signal handlers are in place."""
        stopping.listen(self)

    def on_train_epoch_end(self) -> None:
        """Closes the stage, and with its last one the unit; opens the next."""
        stage, stages = self.stage, self.stages
        if self.finished_steps != stage.steps:
            place = f"Unit {self.opened.unit.name}" if self.opened else f"Stage {stage.name}"
            raise ConfigError(
                f"{place} ended after {self.finished_steps} of {stage.steps} steps: a trainer "
                "setting or a callback stopped its epoch. Remove it; to stop a run, send SIGTERM."
            )
        self.close_stage(stage)
        self.stage_state = None
        self.first_step = self.trainer.global_step
        self.stage_index += 1
        if self.stage_index == len(stages):
            self.stage_index = 0
            self._next_unit()
        if self.done:
            self.final_error = network_error(self)
            self.frontier.close()
            self.trainer.should_stop = True
            return
        walk.open_stage(self)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def _next_unit(self) -> None:
        """Behind a unit's last stage, or behind what comes before there are units."""
        if self.opened is None:
            self.units = self.partition()
            self.frontier.restart()
            return
        self.history.append(walk.close_unit(self, self.opened))
        self.seconds["reconstruction"] += self.history[-1]["seconds"]
        self.forwards = vars(self.frontier.forwards).copy()
        self.opened = None
        self.index += 1
        if self.done and self.ends is not None:
            self.ends.settle_head()

    # Lightning: the steps -------------------------------------------------------------------------

    def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Mean loss of the global batch; its gradient is kept for `backward`.

        Where nothing learns it is a step of a search instead.

        Each micro-batch is differentiated alone and the gradients are added in float64, which
        loses nothing: the step is the same bit for bit however they are dealt over processes.
        """
        stopping.agree(self, batch_idx)
        if not self._trained:
            with torch.no_grad():
                found = self.search_step(self.stage, batch_idx)
            self.log_dict({f"recon/{name}": value for name, value in found.items()}, batch_size=1)
            return torch.zeros((), device=self.device, requires_grad=True)
        total: Step | None = None
        dtype = self.adapter.compute_dtype(self.run_device)
        for samples in dealt(batch, self.micro_batch):
            terms = partial(self._terms, samples, batch_idx)
            step = scaled_gradient(terms, self._trained, dtype)
            total = step if total is None else total.add(step)
        assert total is not None
        mean = averaged(total, self.batch_size)
        unit = self.opened
        extra = {} if unit is None else self.regularizer(unit, batch_idx / self.stage.steps)
        if extra:
            mean = mean.with_terms(flat_gradient(extra, self._trained))
        loss = mean.loss
        # Asking costs a device synchronisation, so accelerators are asked only when they log.
        if self.run_device.type == "cpu" or batch_idx % stopping.LOOK_EVERY == 0:
            place = f"stage {self.stage.name}" if unit is None else f"unit {unit.unit.name}"
            refuse_nan(mean, place, batch_idx)
        self._gradient = mean.gradient
        if unit is not None:
            unit.note_loss(loss)
        self.on_loss(loss.detach())
        named = {f"recon/{name}": value for name, value in mean.terms.items()}
        self.log_dict({"recon/loss": loss, **named}, batch_size=self.batch_size)
        return loss

    def _terms(self, samples: list[int], step: int) -> dict[str, Tensor]:
        """Terms of the loss of one micro-batch, added up over its samples."""
        if self.opened is None:
            return added(self.preparation_loss(sample, step) for sample in samples)
        states = [stage_data.input_state(self, sample, step) for sample in samples]
        state = stage_data.joined(self.adapter, states)
        student = self._run_learning(
            self.adapter, self.opened.student_blocks, self.opened.transforms, state
        )
        parts = self.adapter.tokens(student).chunk(len(samples))
        lengths = [self.adapter.tokens(each).shape[1] for each in states]
        return added(
            self.unit_loss(tokens[:, :length], self.frontier.target(sample), sample)
            for tokens, length, sample in zip(parts, lengths, samples, strict=True)
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Hands the averaged gradient of `training_step` to the parameters."""
        if self._gradient is not None:
            hand_out(self._gradient, self._trained)
            self._gradient = None

    # Lightning: checkpoints -----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where the run stands; primitives only, so that nothing needs unpickling."""
        checkpoint["recon"] = resume.progress(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the structure the checkpoint was saved with; Lightning's load is then strict."""
        resume.restore(self, checkpoint)

    # Lightning: sampling --------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """As `test_step`."""
        return self.test_step(batch, batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Samples of teacher, round-to-nearest and quantised network for the same seeds."""
        from recon.engine.sampling import sample  # it pulls in the pipelines

        return sample(self, batch, ("full_precision", "round_to_nearest", "quantized"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Samples of the quantised network."""
        from recon.engine.sampling import sample

        return sample(self, batch, ("quantized",))

    def layers_of(self, unit: Unit) -> dict[str, QuantLinear]:
        """The registered layers inside a unit's blocks, by full dotted name."""
        found = self._registered(unit)
        return {name: layer for name, layer in found.items() if isinstance(layer, QuantLinear)}

    def attentions_of(self, unit: Unit) -> dict[str, QuantAttention]:
        """The registered attention products inside a unit's blocks, by full dotted name."""
        found = self._registered(unit)
        return {name: part for name, part in found.items() if isinstance(part, QuantAttention)}

    def _registered(self, unit: Unit) -> dict[str, nn.Module]:
        prefixes = tuple(f"{name}." for name in unit.blocks)
        outside = frozenset() if self.ends is None else self.ends.names
        named = {key.replace("/", "."): part for key, part in self.quantizers.items()}
        return {n: p for n, p in named.items() if n.startswith(prefixes) and n not in outside}
