"""Which lines of libraries say nothing to who runs a command, and are not shown."""

import logging
import os
import warnings

_LOGGED = {
    # Hardware that is not there, products that are not used.
    "lightning.pytorch.utilities.rank_zero": ("💡", "GPU avail", "TPU avail", "HPU avail"),
    "lightning.fabric.utilities.seed": ("Seed set",),
    # Kernels for GPUs, which torchao tries to load wherever it is imported.
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("<enum",),
    # Its slower way gives the same pixels.
    "transformers.utils.import_utils": ("`CLIPImageProcessor` requires torchvision",),
}
"""Logger -> how its dropped lines begin."""

_WARNED = (
    "in eval mode",  # the teacher belongs there
    "does not have many workers",  # batches are indices only
    "treespec, LeafSpec",  # Lightning's own call
    "Total length of.*is zero",  # no unit is left
    "returned `None`, this fit will run with no optimizer",  # a stage that searches
    "smaller than the logging interval",  # a stage that searches may be short
)
"""Parts of dropped warnings."""


class _Beginnings(logging.Filter):
    """Drops lines that begin in one of some ways."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        return not record.getMessage().startswith(self._beginnings)


def quieten() -> None:
    """From here on, chatter is dropped; warnings and errors of substance are not."""
    for name, beginnings in _LOGGED.items():
        logging.getLogger(name).addFilter(_Beginnings(beginnings))
    # Weights of a block are loaded in milliseconds, hundreds of times.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for part in _WARNED:
        warnings.filterwarnings("ignore", message=f".*{part}.*")
