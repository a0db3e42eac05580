"""The page in headless Chromium: it opens, plays, fits a phone and follows the reader's colours."""

import json
from pathlib import Path

import pytest

from recon.report.page import page
from recon.report.run import open_runs
from tests.report.browser import browser, look
from tests.report.made_run import change, copied

COMMAND = browser()

pytestmark = [
    pytest.mark.slow,  # each test starts a browser: seconds
    pytest.mark.skipif(COMMAND is None, reason="There is no Chromium on this machine."),
]


def test_it_opens_without_complaints_loads_its_samples_and_asks_for_nothing(
    whole_run: Path, tmp_path: Path
) -> None:
    assert COMMAND is not None
    seen = look(COMMAND, page(open_runs([whole_run])), tmp_path, 1200)
    assert seen.console == []
    assert seen.found["title"] == "run · recon report"
    assert seen.found["headings"] == 12
    assert seen.requests == []
    assert sorted(image["type"] for image in seen.found["images"]) == ["image/gif", "image/png"]
    for image in seen.found["images"]:
        assert image["width"] > 0
        assert image["frames"] == (3 if image["type"] == "image/gif" else 1)  # a film plays


@pytest.mark.parametrize("several", [False, True], ids=["one run", "two runs"])
def test_it_fits_a_phone(whole_run: Path, tmp_path: Path, several: bool) -> None:
    assert COMMAND is not None
    roots = [whole_run, *([copied(whole_run, tmp_path / "other")] if several else [])]
    seen = look(COMMAND, page(open_runs(roots)), tmp_path, 390)
    assert seen.found["window"] == 390
    assert seen.found["content"] == 390


def test_no_table_is_wider_than_its_place_on_a_desk(whole_run: Path, tmp_path: Path) -> None:
    assert COMMAND is not None
    root = copied(whole_run, tmp_path / "run")
    file = root / "quantized" / "manifest.json"
    units = json.loads(file.read_text())["units"].values()
    first, last = (f"language_model.model.layers.{number}" for number in (0, 2))
    change(file, units={f"{first} to {last}{' ' * n}": blocks for n, blocks in enumerate(units)})
    assert look(COMMAND, page(open_runs([root])), tmp_path, 1280).found["cut"] == []


def test_it_is_dark_where_the_reader_wants_it_dark(whole_run: Path, tmp_path: Path) -> None:
    assert COMMAND is not None
    text = page(open_runs([whole_run]))
    light, dark = (look(COMMAND, text, tmp_path, 800, dark=dark).found for dark in (False, True))
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
    assert light["ink"] == "rgb(28, 33, 38)"
    assert dark["ink"] == "rgb(227, 231, 235)"


def test_a_complaint_on_the_console_would_be_seen(tmp_path: Path) -> None:
    assert COMMAND is not None
    text = '<body><script>missing()</script><img src="data:image/png;base64,x"></body>'
    assert "missing is not defined" in look(COMMAND, text, tmp_path, 390).console


def test_a_request_would_be_seen(tmp_path: Path) -> None:
    assert COMMAND is not None
    text = '<body><link rel="stylesheet" href="elsewhere.css">text</body>'
    seen = look(COMMAND, text, tmp_path, 390)
    assert seen.requests == [(tmp_path / "elsewhere.css").as_uri()]


def test_a_page_wider_than_the_phone_would_be_seen(tmp_path: Path) -> None:
    assert COMMAND is not None
    text = '<!doctype html><body><div style="width: 700px">wide</div></body>'
    assert look(COMMAND, text, tmp_path, 390).found["content"] >= 700
