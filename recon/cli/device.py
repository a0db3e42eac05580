"""A device as a user names it."""

import torch

from recon.errors import ConfigError


def usable(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: There is none, or this torch cannot compute on it.
    """
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        # torch built without CUDA asserts that it has it.
        said = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"--device is {name!r}, which torch cannot use here ({said}). Give --device cpu, or "
            "install a torch that is built for this device."
        ) from error
