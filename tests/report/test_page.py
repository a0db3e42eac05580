"""The page says what the files of the run say, and needs nothing else."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.errors import CalibrationError, CheckpointMismatch, ConfigError
from recon.report.page import page
from recon.report.run import ClosedUnit, Run, open_runs
from recon.report.sections import units
from recon.report.sections.samples import Samples, build
from tests.report.made_run import COMMAND, LOSSES, SCRIPT, change, copied, made_run, write
from tests.report.reading import Page


def text_of(*roots: Path) -> str:
    return page(open_runs(roots))


@pytest.fixture(scope="module")
def text(whole_run: Path) -> str:
    return text_of(whole_run)


@pytest.fixture(scope="module")
def read(text: str) -> Page:
    return Page(text)


def stored(root: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((root / name).read_text()))


# Numbers ------------------------------------------------------------------------------------------


def test_headline_numbers_are_those_of_the_summary(whole_run: Path, read: Page) -> None:
    summary = stored(whole_run, "summary.json")
    error, size = summary["error"], summary["size_bytes"]
    assert {*error.values(), *size.values()} <= set(read.values)
    assert error["reconstructed"] / error["round_to_nearest"] in read.values


def test_metrics_are_those_of_the_evaluation_with_their_intervals(
    whole_run: Path, read: Page
) -> None:
    found = stored(whole_run, "test.json")
    pairs = [found["paired_round_to_nearest"], found["paired"]]
    rows = read.table("against full precision")
    assert rows["PSNR, dB"] == [[part["psnr"], *part["psnr_interval"]] for part in pairs]
    assert rows["SSIM"] == [[part["ssim"]] for part in pairs]
    assert set(rows) == {"PSNR, dB", "SSIM"}  # what was not computed is no row
    models = ("full_precision", "round_to_nearest", "quantized")
    assert read.table("each model alone")["all"] == [[found[name]["all"]] for name in models]


def test_units_have_the_errors_of_the_manifest(whole_run: Path, read: Page) -> None:
    history = stored(whole_run, "quantized/manifest.json")["unit_errors"]
    (table,) = [t for t in read.tables if t[0][:2] == ["unit", "name"]]
    assert [row[2:4] for row in table[1:]] == [
        [[unit["error_before"]], [unit["error_after"]]] for unit in history
    ]
    assert [row[1] for row in table[1:]] == list(
        stored(whole_run, "quantized/manifest.json")["units"]
    )


def test_layers_have_the_errors_of_the_manifest(whole_run: Path, text: str, read: Page) -> None:
    layers = stored(whole_run, "quantized/manifest.json")["layers"]
    rows = read.table("layer alone")
    assert {name: row[:2] for name, row in rows.items()} == {
        name: [[facts["error_before"]], [facts["error_after"]]] for name, facts in layers.items()
    }
    better = sum(facts["error_after"] < facts["error_before"] for facts in layers.values())
    assert 0 < better < len(layers)
    assert f"{better} of {len(layers)} layers have a smaller error" in read.words
    (drawing,) = re.findall(r'aria-label="Error of attn1.to_q in.*?</svg>', text, re.DOTALL)
    blocks = sum(name.endswith("attn1.to_q") for name in layers)
    assert drawing.count('<circle class="dot') == 2 * blocks


def test_a_result_without_errors_of_layers_has_no_section_of_them(
    whole_run: Path, text: str, tmp_path: Path
) -> None:
    root = copied(whole_run, tmp_path / "run")
    layers = stored(root, "quantized/manifest.json")["layers"]
    for facts in layers.values():
        del facts["error_before"], facts["error_after"]
    change(root / "quantized" / "manifest.json", layers=layers)
    assert 'id="layer_errors"' in text
    assert 'id="layer_errors"' not in text_of(root)


def test_scales_and_clips_are_those_of_the_tensors(whole_run: Path, read: Page) -> None:
    tensors = load_file(whole_run / "quantized" / "quantized.safetensors")
    rows = read.table("layer")
    assert set(rows) == {k.removesuffix(".codes") for k in tensors if k.endswith(".codes")}
    name = "transformer_blocks.1.attn1.to_q"
    step = tensors[f"{name}.scale"]
    scale = tensors[f"{name}.transform.channel_scale"]
    assert rows[name] == [
        [float(step.min()), float(step.median()), float(step.max())],
        tensors[f"{name}.activation_clip"].tolist(),
        [float(scale.min()), float(scale.median()), float(scale.max())],
    ]
    assert rows["transformer_blocks.1.ff.net.2"][2] == "–"  # has no channel scale


def test_layers_are_counted_and_those_left_out_have_their_reason(
    whole_run: Path, read: Page
) -> None:
    manifest = stored(whole_run, "quantized/manifest.json")
    rows = read.table("linear, inside its block")
    assert sum(row[1][0] for row in rows.values()) == len(manifest["layers"])  # type: ignore[misc]
    assert rows["attn1.to_q"][0] == "attention input"
    assert rows["attn1.to_q"][3:5] == ["4 bits per channel", "8 bits per token"]
    assert str(rows["attn1.to_q"][5]).startswith("channel scale, rotation")
    left = read.table("linear")
    assert left["proj_out_1"][-1] == "outside the blocks: only linears of blocks are quantised"
    assert "none of the linears that its adapter offers" in str(
        left["transformer_blocks.∗.norm1.emb.timestep_embedder.linear_1"][-1]
    )


def test_exports_are_those_of_export_json(whole_run: Path, read: Page) -> None:
    export = stored(whole_run, "exports/native/export.json")
    size, found = export["bytes"], export["reload"]["difference"]["run"]
    row = read.table("format")["native"]
    assert row[1:5] == [
        [size["quantized_linears"]], [size["ratio"]], [size["folder"]],
        [found["relative"], found["tolerance"]],
    ]  # fmt: skip
    assert row[5] == export["runs_as"][0]


def test_errors_of_sampling_steps_are_those_of_the_evaluation(whole_run: Path, read: Page) -> None:
    found = stored(whole_run, "test_steps.json")["errors"]
    rows = read.table("step")
    assert len(rows) == len(found)
    for step, row in enumerate(found):
        nearest, quantized = row["round_to_nearest"], row["quantized"]
        assert rows[str(step)] == [
            [row["timestep"]], [nearest], [quantized], [pytest.approx(quantized / nearest)]
        ]  # fmt: skip


def test_speeds_are_those_of_the_benchmark(whole_run: Path, read: Page) -> None:
    found = stored(whole_run, "bench.json")
    rows = read.table("network")
    assert len(rows) == len(found["networks"])
    for network in found["networks"]:
        assert rows[f"{network['network']}, {network['dtype']}"] == [
            *([1000 * seconds] for seconds in network["seconds"].values()),
            [network["disk_bytes"]], [network["peak_bytes"]],
        ]  # fmt: skip
    ratios = found["times_faster"]["float32"]
    assert read.table("times faster than") == {
        "full precision, float32": [[ratio] for ratio in ratios.values()]
    }
    assert "no integer dot products" in read.words


def test_a_plan_stands_beside_what_was_taken(whole_run: Path, read: Page) -> None:
    found, taken = stored(whole_run, "plan.json"), stored(whole_run, "summary.json")
    rows = read.table("estimate")
    assert rows["peak memory, host"] == [
        [found["memory"]["host"]], [taken["peak_memory_bytes"]["host"]]
    ]  # fmt: skip
    assert "peak memory, device" not in rows  # the run was planned for a CPU
    files = (whole_run / "quantized").iterdir()
    assert rows["quantized/"] == [
        [found["disk"]["artefacts"]["quantized"]], [sum(f.stat().st_size for f in files)]
    ]  # fmt: skip
    for part in ("calibration", "reconstruction"):
        assert rows[part] == [[found["seconds"][part]], [taken["seconds"][part]]]
    assert rows["disk at its fullest"] == [[found["disk_peak"]], "–"]
    assert read.table("as foreseen") == {
        "native": [[4319511.0], "–"], "torchao": ["–", "rotations; 6-bit inputs"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "section"),
    [("bench.json", "speed"), ("plan.json", "plan"), ("test_steps.json", "step_errors")],
)
def test_what_was_not_measured_has_no_section(
    name: str, section: str, whole_run: Path, text: str, tmp_path: Path
) -> None:
    root = copied(whole_run, tmp_path / "run")
    (root / name).unlink()
    assert f'<section id="{section}">' in text
    assert f'<section id="{section}">' not in text_of(root)


def test_the_score_map_marks_the_chosen_candidates_and_says_why(text: str, read: Page) -> None:
    assert text.count('<g class="chosen"><circle') == 2  # one choice in each of two maps
    maps = re.findall(r'<path class="h\d" d="([^"]*)"', text)
    assert sum(path.count("M") for path in maps) == 2 * 2 * 6  # scores × prompts × steps
    assert -0.8765 in read.values
    assert read.table("prompt")["prompt 0"] == [[0.0], "Random."]


def test_loss_curves_have_a_point_for_each_logged_step(whole_run: Path, text: str) -> None:
    for unit in stored(whole_run, "quantized/manifest.json")["units"]:
        (drawing,) = re.findall(rf'aria-label="Loss of {unit}">(.*?)</svg>', text, re.DOTALL)
        (path,) = re.findall(r'class="line c1" d="M([^"]*)"', drawing)
        assert len(path.split("L")) == len(LOSSES)


def test_a_sample_stands_once_with_the_numbers_of_its_own_evaluation(
    whole_run: Path, tmp_path: Path
) -> None:
    root = copied(whole_run, tmp_path / "run")
    samples = root / "samples"
    twice = (samples / "test_a-blue-ring_12.gif").read_bytes()
    (samples / "fit_a-blue-ring_12.gif").write_bytes(twice)
    shown = build(Run(root, "run"))
    assert isinstance(shown, Samples)
    assert [p.name for p in shown.pictures if "ring" in p.name] == ["test_a-blue-ring_12.gif"]
    (samples / "test_a-blue-ring_12.gif").unlink()
    again = build(Run(root, "run"))
    assert isinstance(again, Samples)
    (left,) = (p for p in again.pictures if "ring" in p.name)
    assert (left.name, left.psnr) == ("fit_a-blue-ring_12.gif", None)
    assert left.caption == "a blue ring (seed 12, made at the end of fit)"


# Nothing from outside -----------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(text: str, read: Page) -> None:
    assert [r for r in read.references if not r.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(|https?://", text)
    assert "script" not in read.tags
    assert sum(r.startswith("data:image/gif;base64,R0lGOD") for r in read.references) == 1
    assert sum(r.startswith("data:image/png;base64,iVBOR") for r in read.references) == 1


def test_a_prompt_that_is_markup_stays_text(text: str, read: Page) -> None:
    assert "<script" not in text
    assert read.words.count(SCRIPT) == 2  # as a caption and in the list of prompts
    assert "note: <b>" in read.words


def test_the_command_stands_as_it_was_typed(whole_run: Path, read: Page, tmp_path: Path) -> None:
    assert f"as it was typed:\n{COMMAND}" in read.words
    root = copied(whole_run, tmp_path / "run")
    (root / "command.txt").unlink()
    assert "as it was typed" not in Page(text_of(root)).words


def test_every_link_leads_to_a_section(text: str, read: Page) -> None:
    for reference in read.references:
        if reference.startswith("#"):
            assert f'<section id="{reference[1:]}">' in text


# Several, resumed, unfinished ---------------------------------------------------------------------


def test_several_runs_stand_side_by_side(whole_run: Path, tmp_path: Path) -> None:
    other = copied(whole_run, tmp_path / "other")
    change(other / "summary.json", error={"round_to_nearest": 0.5, "reconstructed": 0.25})
    read = Page(text_of(whole_run, other))
    rows = read.table("")
    assert rows["error, reconstructed"] == [[0.00198812716], [0.25]]
    assert rows["paired PSNR, dB"] == [[38.75], [38.75]]
    assert "seconds" not in rows
    assert read.tags.count("article") == 2 * read.tags.count("section")


def test_runs_of_one_name_are_told_apart_by_their_paths(whole_run: Path, tmp_path: Path) -> None:
    other = copied(whole_run, tmp_path / "elsewhere" / "run")
    assert [run.name for run in open_runs([whole_run, other])] == [str(whole_run), str(other)]


def test_steps_that_were_logged_twice_count_once_the_newest(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(whole_run, tmp_path / "run")
    lines = (root / "metrics.csv").read_text().splitlines()
    stale = lines[1].replace(str(LOSSES[0]), "77.0")
    assert stale != lines[1]
    (root / "metrics.csv").write_text("\n".join([lines[0], stale, *lines[1:], "41,0.5"]) + "\n")
    monkeypatch.chdir(root.parent)
    resumed = text_of(Path("run"))
    monkeypatch.chdir(whole_run.parent)
    assert resumed == text_of(Path("run"))


def test_a_page_made_again_is_the_same(whole_run: Path, text: str) -> None:
    assert text_of(whole_run) == text


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("test.json", "recon test --run {root}"),
        ("samples", "recon test --run {root}"),
        ("exports", "recon export --run {root} --format native"),
        ("calibration", "Put it back to see it here."),
        ("metrics.csv", "there are no loss curves"),
        ("config.yaml", "holds no config.yaml"),
    ],
)
def test_what_is_missing_is_said_with_the_command_that_makes_it(
    missing: str, says: str, whole_run: Path, text: str, tmp_path: Path
) -> None:
    root = copied(whole_run, tmp_path / "run")
    path = root / missing
    path.rename(tmp_path / "taken")
    expected = says.format(root=root)
    assert expected in Page(text_of(root)).words
    assert says.format(root=whole_run) not in Page(text).words


def test_an_unfinished_run_says_so_and_shows_the_units_it_closed(
    whole_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for name in ("config.yaml", "metrics.csv"):
        (root / name).write_bytes((whole_run / name).read_bytes())
    read = Page(text_of(root))
    history = stored(whole_run, "quantized/manifest.json")["unit_errors"]
    assert f"run has not ended: {len(history)} units closed so far." in read.words
    assert f"recon fit --run {root}" in read.words
    (table,) = [t for t in read.tables if t[0][:2] == ["unit", "round to nearest"]]
    assert [row[1:3] for row in table[1:]] == [
        [[unit["error_before"]], [unit["error_after"]]] for unit in history
    ]


# Other methods ------------------------------------------------------------------------------------


def test_the_dependency_of_layers_shows_the_partition(tmp_path: Path) -> None:
    root = made_run(tmp_path / "run", "llava")
    manifest = stored(root, "quantized/manifest.json")
    blocks = [block for unit in manifest["units"].values() for block in unit]
    assert len(blocks) >= 2
    pairs = [1.0 + n for n in range(len(blocks) - 1)]
    change(
        root / "quantized" / "manifest.json",
        units={"joined": blocks},
        unit_errors=manifest["unit_errors"][:1],
        findings={"dependency": {"entropy": pairs, "ded": [None] * len(pairs), "spearman": 0.625}},
        fingerprint={
            **manifest["fingerprint"], "model.proxy": "entropy", "model.partition_by": "entropy",
            "model.threshold_quantile": None,
        },
    )  # fmt: skip
    text = text_of(root)
    read = Page(text)
    assert read.table("pair") == {
        f"{a} – {b}": ["yes", [value], "–"]
        for a, b, value in zip(blocks, blocks[1:], pairs, strict=False)
    }
    assert 0.625 in read.values
    assert text.count('class="mark"') == 1  # the threshold


def test_salient_tokens_are_drawn_frame_by_frame(whole_run: Path, tmp_path: Path) -> None:
    root = copied(whole_run, tmp_path / "run")
    numbered = torch.arange(3.0 * 4 * 5).reshape(3, 4, 5) / 7
    pictures = {f"unit={n:03d}": numbered + n for n in range(9)}
    save_file(pictures, root / "salience.safetensors")
    read = Page(text := text_of(root))
    drawings = re.findall(r'aria-label="Attention that tokens.*?</svg>', text, re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        cells = re.findall(r'<path class="h(\d)" d="([^"]*)"', drawing)
        assert sum(path.count("M") for _, path in cells) == numbered.numel()
        assert {level for level, _ in cells} == set("0123456")
    # The brightest is the last place of the last frame: no other is as far right.
    corners = re.findall(r"M([\d.]+) ([\d.]+)", dict(cells)["6"])
    assert max(map(float, next(zip(*corners, strict=True)))) == pytest.approx(
        360 - 360 / (3 * 6 - 1), abs=0.05
    )
    assert {float(pictures["unit=008"].max()), float(pictures["unit=000"].min())} <= set(
        read.values
    )
    assert "6 of 9 units." in read.words


def test_a_run_that_weighs_tokens_and_kept_no_picture_says_why(
    whole_run: Path, text: str, tmp_path: Path
) -> None:
    root = copied(whole_run, tmp_path / "run")
    change(root / "quantized" / "manifest.json", method="S2QVDiT")
    assert "salience.safetensors is not in the run folder" in Page(text_of(root)).words
    assert 'id="tokens"' not in text


def test_answers_are_shown_as_pictures_are(whole_run: Path, tmp_path: Path) -> None:
    root = copied(whole_run, tmp_path / "run")
    (root / "samples").rename(tmp_path / "taken")
    model = {"accuracy": 0.75, "accuracy_interval": [0.5, 1.0], "parse_failures": 0,
             "perplexity": 1.25, "count": 8}  # fmt: skip
    write(
        root / "test.json",
        {
            "full_precision": {**model, "accuracy": 0.875},
            "quantized": model,
            "paired": {"kl": 0.000625, "same_answer": 0.5, "count": 8},
            "settings": {},
            "samples": [{"question": "?", "paired": {"kl": 0.000625, "tokens": 2}}],
        },
    )
    read = Page(text_of(root))
    assert read.table("each model alone")["accuracy"] == [[0.875, 0.5, 1.0], [0.75, 0.5, 1.0]]
    assert read.table("against full precision")["KL divergence, nats"] == [[0.000625]]
    assert "Right answers, 8 questions" in read.words


# Refusals -----------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_and_one_given_twice_are_refused(
    whole_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder: it has neither config\.yaml nor"):
        open_runs([tmp_path])
    with pytest.raises(ConfigError, match="names the same folder twice"):
        open_runs([whole_run, whole_run / ".." / "run"])


def test_damaged_and_foreign_parts_are_refused(whole_run: Path, tmp_path: Path) -> None:
    foreign = copied(whole_run, tmp_path / "foreign")
    change(foreign / "calibration" / "calibration.json", fingerprint={"seed": 5})
    with pytest.raises(CheckpointMismatch, match="was made with the calibration set"):
        text_of(foreign)
    cut = copied(whole_run, tmp_path / "cut")
    (data,) = (cut / "calibration").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CalibrationError, match="bytes is"):
        text_of(cut)
    old = copied(whole_run, tmp_path / "old")
    write(old / "quantized" / "manifest.json", {"format_version": 1})
    with pytest.raises(CheckpointMismatch, match="has format_version 1"):
        text_of(old)


def test_what_learns_before_there_are_units_is_drawn_apart(whole_run: Path, tmp_path: Path) -> None:
    root = copied(whole_run, tmp_path / "run")
    with (root / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    before = Run(root, "run")
    shown = units.build(before)
    assert isinstance(shown, units.Units)
    assert [panel.title for panel in shown.curves] == ["Loss while each unit learned"]
    ahead = [{"step": str(step), "recon/loss": "3", "recon/entropy": "2"} for step in (0, 1)]
    with (root / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "recon/entropy"])
        writer.writeheader()
        writer.writerows([*ahead, *rows])
    shown = units.build(Run(root, "run"))
    assert isinstance(shown, units.Units)
    encoder, own = shown.curves
    assert [name for name, _ in encoder.terms] == ["loss", "entropy"]
    assert [curve.name for curve in encoder.curves] == ["visual encoder"]
    assert [name for name, _ in own.terms] == ["loss"]
    assert [curve.name for curve in own.curves] == [unit.label for unit in before.units]


def test_long_names_of_joined_blocks_are_shortened() -> None:
    blocks = tuple(f"model.language_model.layers.{number}" for number in (3, 4, 5))
    unit = ClosedUnit(f"{blocks[0]} to {blocks[-1]}", blocks, 0, 1, {})
    assert unit.label == "layers.3–5"
    assert ClosedUnit("a", blocks[:1], 0, 1, {}).label == "layers.3"
    assert ClosedUnit("a", (), 0, 1, {}).label == "a"
