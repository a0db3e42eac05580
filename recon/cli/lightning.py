"""LightningCLI with the settings the engine needs, and refusals before anything is written."""

import netrc
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from recon.callbacks.answers import AnswerMetrics
from recon.callbacks.checkpoints import StepCheckpoint, UnitCheckpoint
from recon.callbacks.class_grid import ClassGrid
from recon.callbacks.evaluation import PairedMetrics
from recon.callbacks.exports import ExportAtEnd
from recon.callbacks.progress import UnitProgress
from recon.callbacks.salience import TokenSalience
from recon.callbacks.samples import MediaLogger, SampleWriter
from recon.callbacks.step_errors import StepErrors
from recon.callbacks.summary import RunSummary
from recon.callbacks.tracking import RunCSVLogger, UnitTracking
from recon.cli.arguments import run_folder, run_name
from recon.engine.checkpoint_io import AtomicCheckpointIO
from recon.engine.checkpoints import clear_unfinished, examined, written
from recon.engine.checks import checks
from recon.engine.data import CalibrationData
from recon.engine.reconstruction import Reconstruction
from recon.engine.strategy import ReconStrategy
from recon.errors import CheckpointMismatch, ConfigError
from recon.export.foreseen import refuse_unexportable

DESCRIPTION = """Post-training quantisation, unit by unit. `--run FOLDER` takes configuration and
newest checkpoint from a run folder."""


class SavedConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder and sends it to W&B; command.txt beside it.

    Args:
        typed: Arguments of the command line as the user gave them.
        *args: As for every SaveConfigCallback.
        **kwargs: The same.
    """

    def __init__(self, *args: Any, typed: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._typed = typed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning: only a fit decides what a run is; evaluating it must not change its file."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning: rank zero, once."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"config": text}, allow_val_change=True)
        root = Path(trainer.default_root_dir)
        # The line that started the run, not those that continue it.
        if not written(root) and run_folder(self._typed) is None:
            root.mkdir(parents=True, exist_ok=True)
            line = shlex.join(["recon", *self._typed])
            (root / "command.txt").write_text(f"{line}\n", encoding="utf-8")


class ReconCLI(LightningCLI):
    """See `recon --help`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks every run has, and W&B."""
        parser.add_lightning_class_args(UnitCheckpoint, "unit_checkpoint")
        parser.add_lightning_class_args(StepCheckpoint, "step_checkpoint")
        parser.add_lightning_class_args(UnitProgress, "progress")
        parser.add_lightning_class_args(PairedMetrics, "metrics")
        parser.add_lightning_class_args(AnswerMetrics, "answers")
        parser.add_lightning_class_args(StepErrors, "step_errors")
        parser.add_lightning_class_args(MediaLogger, "media")
        parser.add_lightning_class_args(ClassGrid, "class_grid")
        parser.add_lightning_class_args(SampleWriter, "writer")
        parser.add_lightning_class_args(ExportAtEnd, "export")
        parser.add_argument("--wandb", type=bool, default=True, help="Track the run in W&B.")
        parser.add_argument("--wandb_project", type=str, default="recon", help="W&B project.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Fills in what depends on the run folder and the number of processes."""
        given = self._get(self.config_init, "trainer", default={})
        root = Path(given["default_root_dir"])
        if self.subcommand == "fit":
            self._refuse_folder(root)
        strategy = given["strategy"]
        if strategy == "auto" and given["devices"] not in (1, "1", "auto"):
            strategy = ReconStrategy()
        if self.subcommand == "fit":
            kwargs["limit_val_batches"] = 0  # videos are not sampled between units
        if given["logger"] is None:
            kwargs["logger"] = self._loggers(root) or False
        trainer = super().instantiate_trainer(
            **kwargs, strategy=strategy, plugins=[*(given["plugins"] or []), AtomicCheckpointIO()]
        )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        # Before samples are made, which may fail, what a fit found is on the disk.
        sampling = next(i for i, one in enumerate(callbacks) if isinstance(one, MediaLogger))
        callbacks[sampling:sampling] = [UnitTracking(), TokenSalience(), RunSummary()]
        return trainer

    def _refuse_folder(self, root: Path) -> None:
        existing = root
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            raise ConfigError(
                f"The run folder {root} cannot be written ({existing} is read-only or no folder). "
                "Set trainer.default_root_dir to a folder you may write to."
            )

    def _loggers(self, root: Path) -> list[Any]:
        # metrics.csv is the fit's; an evaluation writes its own json file.
        loggers: list[Any] = (
            [RunCSVLogger(root / "metrics.csv")] if self.subcommand == "fit" else []
        )
        if self._get(self.config_init, "wandb"):
            loggers.append(self._wandb(root))
        return loggers

    def _wandb(self, root: Path) -> WandbLogger:
        noted = root / "wandb" / "run_id"
        identity = noted.read_text().strip() if noted.exists() else secrets.token_hex(4)
        self._wandb_note = (noted, identity)
        online = os.environ.get("WANDB_MODE", "online") == "online" and _has_key()
        return WandbLogger(
            name=root.name,
            project=self._get(self.config_init, "wandb_project"),
            save_dir=str(root),
            id=identity,
            offline=not online,
        )

    # Before anything runs ---------------------------------------------------------------------

    def before_fit(self) -> None:
        """Refuses what cannot work, while nothing has been written."""
        module, _ = self.parts()
        for check in self.checks():
            check()
        self._checkpoint = self._resolved(required=False)
        if self._checkpoint is None:
            self._refuse_taken()
        else:
            module.check_checkpoint(examined(self._checkpoint))
        if self.trainer.is_global_zero:
            clear_unfinished(Path(self.trainer.default_root_dir))
        if hasattr(self, "_wandb_note") and self.trainer.is_global_zero:
            noted, identity = self._wandb_note
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text(identity)

    def _parse_ckpt_path(self) -> None:
        """Lightning: no hyper-parameters are read from a checkpoint, ours hold none.

        Its own would read the whole file, damaged or not, and let it win over the command line.
        """

    def parts(self) -> tuple[Reconstruction, CalibrationData]:
        """Method and data module."""
        assert isinstance(self.model, Reconstruction)
        assert isinstance(self.datamodule, CalibrationData)
        return self.model, self.datamodule

    def checks(self) -> Iterator[Callable[[], None]]:
        """What a fit is asked before it starts, as `recon.engine.checks`, and of its exports."""
        module, data = self.parts()
        yield from checks(self.trainer, module, data)
        formats: Sequence[str] = self._get(self.config_init, "export").formats
        yield lambda: refuse_unexportable(module, formats)

    def _refuse_taken(self) -> None:
        root = Path(self.trainer.default_root_dir)
        if written(root) or (root / "summary.json").exists():
            raise ConfigError(
                f"{root} already holds a run. Continue it with --ckpt_path last, or start another "
                "with --trainer.default_root_dir FOLDER; nothing is overwritten."
            )

    def _resolved(self, *, required: bool) -> Path | None:
        given = self._get(self.config, "ckpt_path")
        root = Path(self.trainer.default_root_dir)
        if given not in (None, "last", "best"):
            return Path(given)
        found = written(root)
        if found and (given == "last" or required):
            return found[0]
        if required:
            raise CheckpointMismatch(
                f"{root} holds no checkpoint. Run `recon fit` first, or pass --run FOLDER."
            )
        if given == "last":
            rank_zero_info(f"No checkpoint in {root}: starting anew.")
        return None

    def fit(self, **kwargs: Any) -> None:
        """Lightning's fit, from the checkpoint that was examined."""
        kwargs["ckpt_path"] = None if self._checkpoint is None else str(self._checkpoint)
        try:
            self.trainer.fit(**kwargs)
        except SIGTERMException:
            # Lightning would end with status 0, and a script would go on as if all were done.
            rank_zero_info("Stopped by SIGTERM. Continue with --ckpt_path last.")
            sys.exit(128 + signal.SIGTERM)

    def validate(self, **kwargs: Any) -> None:
        """Lightning's validate, on the newest checkpoint unless one is named."""
        self._evaluate(self.trainer.validate, {**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Lightning's test, on the newest checkpoint unless one is named."""
        self._evaluate(self.trainer.test, {**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Lightning's predict, on the newest checkpoint unless one is named."""
        self._evaluate(self.trainer.predict, {**kwargs, "return_predictions": False})

    def _evaluate(self, run: Any, kwargs: dict[str, Any]) -> None:
        module, _ = self.parts()
        module.check()
        checkpoint = self._resolved(required=True)
        assert checkpoint is not None
        examined(checkpoint)
        run(**{**kwargs, "ckpt_path": str(checkpoint)})


def _has_key() -> bool:
    """Whether the user has given W&B a key; asking wandb itself would open a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class PreparedCLI(ReconCLI):
    """A fit that is parsed and instantiated, and does not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning: nothing."""


def run(arguments: list[str], typed: list[str]) -> None:
    """Parses `arguments`, which `typed` stands for, and runs the command they name."""
    _command_line(ReconCLI, arguments, typed)


def prepared(arguments: list[str]) -> ReconCLI:
    """Parses `arguments` of a fit; its trainer, module and data module, of which nothing ran."""
    return _command_line(PreparedCLI, arguments, arguments)


def _command_line(kind: type[ReconCLI], arguments: list[str], typed: list[str]) -> ReconCLI:
    sys.argv[1:] = arguments  # DDP starts the other processes with the same line
    return kind(
        Reconstruction,
        CalibrationData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        # recon.cli.main prints what went wrong.
        parser_kwargs={"exit_on_error": False, "description": DESCRIPTION},
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True, "typed": typed},
        trainer_defaults={
            "default_root_dir": f"runs/{run_name(arguments)}",
            "max_epochs": -1,
            "devices": 1,
            "reload_dataloaders_every_n_epochs": 1,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
        },
    )
