"""`recon plan`: what a fit will do and take, before anything heavy runs.

Takes the arguments of `recon fit`: --config, --run and every override. Works on the configuration
and a network without memory, so that no weights need be there; with them, a few steps of one unit
are timed on random inputs (--no-probe leaves that out).
"""

import argparse
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional

from recon.atomic import write_json
from recon.cli.arguments import run_folder, with_run_folder
from recon.cli.lightning import prepared
from recon.cli.plan_tables import show
from recon.engine.plan import Setting, planned
from recon.export.foreseen import foreseen_exports
from recon.models.adapter import ModelAdapter


def plan(arguments: Sequence[str]) -> None:
    """Prints the plan, and writes it with --json, or to `plan.json` of the run folder.

    Raises:
        ReconError: There is no network to plan for.
    """
    options, rest = _parser().parse_known_args(arguments)
    line = prepared([*with_run_folder(["fit", *rest]), "--wandb", "false"])
    module, data = line.parts()
    trainer = line.trainer
    setting = Setting(
        module=module,
        data=data,
        device=trainer.strategy.root_device,
        root=Path(trainer.default_root_dir),
        processes=trainer.num_devices * trainer.num_nodes,
        checks=line.checks(),
        libraries=library_bytes(module.adapter),
    )
    found, layers = planned(setting, probe=options.probe)
    exports = foreseen_exports(module, layers)
    run = run_folder(rest)
    file: Path | None = options.json or (run and run / "plan.json")
    if file is not None:
        content = {
            **asdict(found),
            "quantised_parameters": found.quantised_parameters,
            "disk_peak": found.disk.peak,
            "exports": [asdict(export) for export in exports],
        }
        write_json(file, content)
    show(found, exports)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "recon plan", description=__doc__, allow_abbrev=False, usage="%(prog)s [options of fit]"
    )
    parser.add_argument(
        "--no-probe", dest="probe", action="store_false", help="Time nothing; no weight is read."
    )
    parser.add_argument(
        "--json", type=Path, help="Also write the plan here; default with --run: RUN/plan.json."
    )
    return parser


def library_bytes(adapter: ModelAdapter) -> int:
    """Bytes that this process holds once it has imported what a fit does and run a step.

    The first products make each library set up threads and buffers, which stay.
    """
    # Nothing of these is used: what they take is what is asked for.
    import datasets  # noqa: F401

    if type(adapter.empty_network()).__module__.startswith("diffusers"):
        from diffusers import AutoencoderKL  # noqa: F401
        from transformers import AutoTokenizer, T5EncoderModel  # noqa: F401
    else:
        from transformers import AutoProcessor  # noqa: F401

    weight = torch.ones(64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], fused=True)
    image = functional.conv2d(torch.ones(1, 64, 8, 8), torch.ones(64, 64, 3, 3))
    (torch.ones(64, 64) @ weight + image.sum()).sum().backward()
    optimizer.step()
    if sys.platform != "linux":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
