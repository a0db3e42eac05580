"""A page in headless Chromium: what it measures and what its console says."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PROBE = """
<script id="probe">
addEventListener("load", async () => {
  const root = document.documentElement;
  const frames = async (image) => {
    const data = await (await fetch(image.src)).arrayBuffer();
    const decoder = new ImageDecoder({data, type: image.src.slice(5).split(";")[0]});
    await decoder.tracks.ready;
    return decoder.tracks.selectedTrack.frameCount;
  };
  const images = await Promise.all([...document.images].map(async (image) => ({
    type: image.src.slice(5).split(";")[0], width: image.naturalWidth, frames: await frames(image),
  })));
  const style = getComputedStyle(document.body);
  const found = {
    title: document.title, window: innerWidth, content: root.scrollWidth, images,
    paper: style.backgroundColor, ink: style.color,
    headings: document.querySelectorAll("h2").length,
    requests: performance.getEntriesByType("resource")
      .map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
  };
  parent.document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""
"""Put behind the page: it asks the browser and leaves the answers in the document around it."""


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page."""

    found: dict[str, Any]
    console: list[str]


def browser() -> str | None:
    """The command of a Chromium on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(command: str, text: str, folder: Path, width: int, *, dark: bool = False) -> Seen:
    """Opens the page in a frame of that width.

    Args:
        command: Of the browser.
        text: The page.
        folder: Where a copy with the probe is put, and the browser's profile.
        width: CSS pixels.
        dark: Whether the reader prefers dark pages.
    """
    file = folder / "probed.html"
    probed = escape(text.replace("</body>", f"{PROBE}</body>"))
    # A window has a smallest width, larger than a phone; a frame in it has none.
    frame = f'<iframe style="border: 0; width: {width}px; height: 844px" srcdoc="{probed}">'
    file.write_text(f"<!doctype html><body>{frame}</iframe></body>", encoding="utf-8")
    done = subprocess.run(
        [
            command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1600,1000", "--virtual-time-budget=10000", "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answers = re.search(r'data-found="([^"]*)"', done.stdout)
    assert answers is not None, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(json.loads(unescape(answers[1])), console)
