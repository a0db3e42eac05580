"""README.md of an export: how it is loaded, what was measured, what runs it."""

from typing import Any

from recon.export.finished import Finished


def card(report: dict[str, Any], finished: Finished, at_root: bool) -> str:
    """Markdown.

    Args:
        report: The content of export.json.
        finished: The run.
        at_root: Whether the network stands in the export's own folder.
    """
    weight, activation = (
        "/".join(str(bits) for bits in report["bits"][side]) for side in ("weight", "activation")
    )
    size, seen = report["bytes"], report["reload"]
    rows = [
        f"- against {'the file as written' if name == 'file' else 'the evaluated run'}: "
        f"{found['relative']:.2e} of the output's size, {found['largest']:.2e} at most "
        f"(allowed: {found['tolerance']:.2e})"
        for name, found in seen["difference"].items()
    ]
    lines = [
        f"# {report['class']}, W{weight}A{activation}, {report['format']}",
        "",
        f"Quantised with recon {report['versions']['recon']} ({report['method']}).",
        *report["notes"],
        "",
        "```python",
        _loading(report, finished, at_root),
        "```",
        "",
        f"Loaded in a fresh process by {seen['loaded_by']} in {seen['dtype']}, "
        f"{seen['quantized_layers']} quantised layers, {seen['calls']} held-out samples:",
        "",
        *rows,
        "",
        f"Quantised linears: {size['quantized_linears']:,} bytes, {size['ratio']:.3f} of bfloat16.",
        "",
        "Runs as:",
        "",
        *(f"- {line}" for line in report["runs_as"]),
    ]
    return "\n".join(lines) + "\n"


def _loading(report: dict[str, Any], finished: Finished, at_root: bool) -> str:
    library, network = report["library"], report["class"]
    if library == "recon":
        return 'import recon\n\nnetwork = recon.load("FOLDER")'
    pipelines = finished.native.adapter.pipeline_classes
    whole = report["whole_pipeline"] and pipelines
    inside = "" if at_root or whole else f', subfolder="{finished.native.adapter.subfolder}"'
    name, made = (pipelines[0], "pipeline") if whole else (network, "network")
    dtype = report["load_dtype"]
    imported = [*([] if dtype is None else ["import torch"]), f"from {library} import {name}"]
    given = inside if dtype is None else f"{inside}, torch_dtype=torch.{dtype}"
    return "\n".join([*imported, "", f'{made} = {name}.from_pretrained("FOLDER"{given})'])
