"""A page in headless Chromium: what it measures and what its console says."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PROBE = """
async () => {
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
  const content = document.documentElement.scrollWidth;
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  const cut = [...document.querySelectorAll(".table")]
    .filter((box) => box.scrollWidth > box.clientWidth)
    .map((box) => `${box.closest("section").id}: ${box.scrollWidth} in ${box.clientWidth}`);
  return {
    title: document.title, window: innerWidth, content, cut, images,
    paper: style.backgroundColor, ink: style.color,
    headings: document.querySelectorAll("h2").length,
  };
}
"""


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page."""

    found: dict[str, Any]
    console: list[str]
    """Messages and uncaught errors."""
    requests: list[str]
    """Addresses it asked for, beside the page itself and what the page holds."""


def browser() -> str | None:
    """The command of a Chromium on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(command: str, text: str, folder: Path, width: int, *, dark: bool = False) -> Seen:
    """Opens the page in a window of that width.

    Args:
        command: Of the browser.
        text: The page.
        folder: Where the page is put.
        width: CSS pixels.
        dark: Whether the reader prefers dark pages.
    """
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    console: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        # In a container Chromium's sandbox has no rights to start.
        opened = playwright.chromium.launch(executable_path=command, args=["--no-sandbox"])
        window = opened.new_page(
            viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light"
        )
        window.on("console", lambda message: console.append(message.text))
        window.on("pageerror", lambda error: console.append(str(error)))
        window.on("request", lambda request: requests.append(request.url))
        window.goto(file.as_uri(), wait_until="load")
        # Pictures of a page that complains may be broken, and a broken one has no frames to count.
        found = window.evaluate(PROBE) if not console else {}
        opened.close()
    return Seen(
        found, console, [url for url in requests if not url.startswith(("data:", file.as_uri()))]
    )
