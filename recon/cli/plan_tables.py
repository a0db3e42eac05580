"""A plan as tables of 80 columns."""

from rich.console import Console
from rich.table import Table

from recon.engine.plan import Plan
from recon.export.foreseen import Foreseen

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes in the unit that fits.

    >>> size(1536), size(3 * 2**30), size(0)
    ('1.5 KiB', '3.0 GiB', '0 B')
    """
    step = 0
    while count >= 1024 and step < len(UNITS) - 1:
        count, step = count / 1024, step + 1
    return f"{count:.1f} {UNITS[step]}" if step else f"{int(count)} B"


def span(seconds: float) -> str:
    """Seconds in the unit that fits.

    >>> span(42), span(90 * 60), span(0.0123)
    ('42 s', '1.5 h', '12.3 ms')
    """
    for factor, unit, limit in ((1e3, "ms", 1), (1, "s", 120), (1 / 60, "min", 3600)):
        if seconds < limit:
            return f"{seconds * factor:.1f} {unit}" if unit != "s" else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h"


def millions(count: int) -> str:
    """Parameters in millions.

    >>> millions(668_860_416)
    '668.86 M'
    """
    return f"{count / 1e6:.2f} M"


def show(plan: Plan, exports: list[Foreseen]) -> None:
    """Prints the plan; every number of bytes or seconds is an estimate."""
    console = Console()
    _head(console, plan)
    for table in (_quantised(plan), _left(plan), _memory(plan)):
        console.print(table)
    _uncounted(console, plan)
    for table in (_disk(plan), _exports(exports)):
        console.print(table)
    _obstacles(console, exports)
    _time(console, plan)
    _tail(console, plan)


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False)


def _head(console: Console, plan: Plan) -> None:
    many = "processes" if plan.processes > 1 else "process"
    cut = "" if plan.units_known else " at most (the method cuts them by what it finds)"
    _print(console, f"{plan.method} on {plan.network} in {plan.folder}")
    _print(
        console,
        f"{plan.processes} {many} on {plan.device}; {plan.blocks} blocks in {plan.units} "
        f"units{cut}; {plan.steps:,} steps",
    )
    if not plan.weights_found:
        _print(console, f"The weights were not found: {plan.stored_as} is assumed on disk.")


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns and last-but-nothing are text, the others numbers."""
    table = Table(title=title, title_justify="left", width=80)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", overflow="fold")
    return table


def _quantised(plan: Plan) -> Table:
    table = _table("Quantised", "role", "weight bits", "input bits", "linears", "weights", words=3)
    for row in plan.quantised:
        table.add_row(
            row.role, row.weight, row.activation, str(row.linears), millions(row.parameters)
        )
    linears = sum(row.linears for row in plan.quantised)
    table.add_section()
    table.add_row("all", "", "", str(linears), millions(plan.quantised_parameters))
    if plan.attentions:
        table.add_row("attention products", "", "", str(plan.attentions), "")
    return table


def _left(plan: Plan) -> Table:
    table = _table("Left in full precision", "part", "why", "linears", "parameters", words=2)
    for row in plan.left:
        table.add_row(row.part, row.why, str(row.linears or "–"), millions(row.parameters))
    return table


def _memory(plan: Plan) -> Table:
    memory, open_unit = plan.memory, plan.memory.reconstruction
    table = _table("Peak memory of a process (estimates)", "", "host", "device")
    on_cpu = memory.device == 0

    def row(name: str, value: int, *, host: bool = on_cpu) -> None:
        table.add_row(name, size(value) if host else "", "" if host else size(value))

    row("interpreter and libraries (measured)", memory.libraries, host=True)
    row("freed blocks that the allocator keeps", memory.heap, host=True)
    row("calibration: weights that are sampled from", memory.sampling)
    row("or reconstruction: embedders and head", open_unit.outside_blocks)
    row("  weights of the open unit", open_unit.unit_weights)
    row("  what learns, gradients, moments", open_unit.learned)
    row("  what its layers hold beside", open_unit.fixed)
    row("  kept for the backward pass", open_unit.activations)
    row("  statistics and conditioning", open_unit.statistics + open_unit.conditioning)
    if memory.streams_in in ("device", "ram"):
        place = memory.streams_in
        row(f"  streams, in {place}", memory.streams[place], host=on_cpu or place == "ram")
    table.add_section()
    table.add_row("peak", size(memory.host), "" if on_cpu else size(memory.device))
    return table


def _uncounted(console: Console, plan: Plan) -> None:
    if plan.memory.uncounted:
        names = ", ".join(plan.memory.uncounted)
        _print(
            console,
            f"Not counted: {names}, which calibration samples with too. Each needs a config.json "
            "in its folder that its class can be built from.",
        )


def _disk(plan: Plan) -> Table:
    disk, files = plan.disk, plan.disk.artefacts
    table = _table("Disk (estimates)", "", "bytes")
    table.add_row("streams" + ("" if disk.streams else " (not on disk)"), size(disk.streams))
    table.add_row("calibration/", size(files.calibration))
    table.add_row("candidates, until the set is chosen", size(files.candidates))
    table.add_row("checkpoints/, at most", size(files.checkpoints))
    table.add_row("quantized/", size(files.quantized))
    table.add_section()
    table.add_row(f"peak ({size(disk.free)} free)", size(disk.peak))
    return table


def _exports(exports: list[Foreseen]) -> Table:
    table = _table("Exports (estimates, the network alone)", "format", "", "bytes", words=2)
    for export in exports:
        verdict = "would be refused" if export.obstacles else "holds it"
        table.add_row(export.format, verdict, "–" if export.obstacles else size(export.bytes))
    return table


def _obstacles(console: Console, exports: list[Foreseen]) -> None:
    for export in exports:
        for reason in export.obstacles:
            _print(console, f"{export.format}: {reason}.")


def _time(console: Console, plan: Plan) -> None:
    if plan.seconds is None:
        _print(console, f"Time: {plan.why_untimed}.")
        return
    found, pace = plan.seconds, plan.seconds.pace
    _print(
        console,
        f"Time (estimate): calibration {span(found.calibration)}, reconstruction "
        f"{span(found.reconstruction)}; a step takes {span(pace.step)} (the first "
        f"{span(pace.first_step)}), a unit's forward {span(pace.teacher)} a sample.",
    )
    if pace.compiled:
        _print(console, "Steps were timed uncompiled; the fit compiles them, and may take less.")


def _tail(console: Console, plan: Plan) -> None:
    numbers = ", ".join(map(str, plan.processes_that_divide)) or "none"
    smaller = f"a smaller model.micro_batch (it is {plan.micro_batch}) or "
    _print(
        console,
        f"Processes (one a GPU) that the batch divides among: {numbers}. Each keeps the streams of "
        f"its share; more of them need {smaller if plan.micro_batch > 1 else ''}a larger "
        "model.batch_size.",
    )
    if plan.refusals:
        _print(console, "recon fit would refuse this:")
    for reason in plan.refusals:
        _print(console, f"- {reason}")
