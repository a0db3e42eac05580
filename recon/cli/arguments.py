"""Arguments that stand for several of Lightning's."""

from collections.abc import Sequence
from pathlib import Path

from recon.errors import ConfigError


def with_run_folder(arguments: list[str]) -> list[str]:
    """`--run FOLDER` or `--run=FOLDER` replaced by its configuration, newest checkpoint and itself.

    Raises:
        ConfigError: The folder is no run folder.

    >>> with_run_folder(["fit", "--config", "a.yaml"])
    ['fit', '--config', 'a.yaml']
    """
    root = run_folder(arguments)
    if root is None:
        return arguments
    arguments = _separated(arguments)
    at = arguments.index("--run")
    config = root / "config.yaml"
    if not config.is_file():
        raise ConfigError(
            f"{root} is no run folder: {config} is missing. Give the trainer.default_root_dir of a "
            "run that `recon fit` has started."
        )
    head, rest = arguments[:1], [*arguments[1:at], *arguments[at + 2 :]]
    # The folder may have been moved or copied since: where it is now counts.
    return [
        *head,
        *("--config", str(config)),
        *("--trainer.default_root_dir", str(root)),
        *([] if "--ckpt_path" in rest else ["--ckpt_path", "last"]),
        *rest,
    ]


def run_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that `--run` names; None without it.

    Raises:
        ConfigError: No folder follows.

    >>> run_folder(["plan", "--no-probe"]) is None
    True
    >>> str(run_folder(["plan", "--run=runs/rtn"]))
    'runs/rtn'
    """
    separated = _separated(arguments)
    if "--run" not in separated:
        return None
    _, *behind = separated[separated.index("--run") :]
    if not behind or not behind[0]:
        raise ConfigError("--run needs a run folder, such as runs/s2q_vdit.")
    return Path(behind[0])


def _separated(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--run=FOLDER` as two of them."""
    found: list[str] = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        found += [name, folder] if name == "--run" and equals else [argument]
    return found


def run_name(arguments: list[str]) -> str:
    """Name of the run folder where none is given: that of the first configuration file.

    >>> run_name(["fit", "--config=configs/s2q_vdit.yaml", "--config", "b.yaml"])
    's2q_vdit'
    """
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config=")).stem
        if argument in ("--config", "-c") and position + 1 < len(arguments):
            return Path(arguments[position + 1]).stem
    return "unnamed"
