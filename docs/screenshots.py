"""Takes the screenshots of the page that docs/serve.md shows, of the built-in merge and the image specialist, in Chromium.

python docs/screenshots.py [--out docs]
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from modalloy import builtin

WIDE, NARROW = {"width": 1100, "height": 720}, {"width": 390, "height": 760}
FOUR = ("horse.webp", "dog.flac", "cow-animated.webp", "dog.npy")
WHICH = "Which is it: a pig, a ship, a horse or a drum?"
PATIENCE = 600_000  # milliseconds: the machine may be in use by others
FLAGS = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


@contextmanager
def server() -> Iterator[str]:
    """Address of a server of two models."""
    models = ("--demo", "--no-open", "--model", f"image={builtin.specialist('image')}")
    command = [sys.executable, "-m", "modalloy.cli", "serve", *models, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(match[1] for line in process.stderr if (match := re.match(r"serving  (http://\S+)", line)))
    finally:
        process.terminate()
        process.wait()


def add(page: Any, *names: str) -> None:
    page.locator("#files").set_input_files([builtin.SAMPLES / name for name in names])
    expect(page.locator("#attachments .medium")).to_have_count(len(names))


def ask(page: Any, words: str, *names: str) -> None:
    """Ask, and wait for every answer."""
    add(page, *names)
    page.get_by_label("Your question").fill(words)
    page.get_by_label("Your question").press("Enter")
    expect(page.locator(".turn").last.locator(".answer[aria-busy=false]").first).to_be_visible()
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out = parser.parse_args().out
    expect.set_options(timeout=PATIENCE)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with server() as url, sync_playwright() as playwright:
        flags = (*FLAGS, *(("--no-sandbox",) if os.geteuid() == 0 else ()))
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def visit(colours: str, size: dict[str, int]) -> Any:
            context = browser.new_context(viewport=size, color_scheme=colours, reduced_motion="reduce")
            context.set_default_timeout(PATIENCE)
            page = context.new_page()
            page.goto(url)
            expect(page.locator(".card .medium")).to_have_count(5)
            page.wait_for_timeout(2000)  # pictures and clouds are drawn
            return page

        def shoot(page: Any, name: str) -> None:
            page.wait_for_timeout(1500)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(256).save(out / f"serve-{name}.png", optimize=True)
            print(name, file=sys.stderr)

        page = visit("light", WIDE)
        shoot(page, "first")
        page.get_by_role("checkbox", name="image").check()
        ask(page, "What is this?", "violin.webp")
        ask(page, "What is in the picture: a dog, a cat, a horse or a cow?", "horse.webp")
        shoot(page, "light")
        page = visit("dark", WIDE)
        ask(page, WHICH, *FOUR)
        add(page, "dog.flac")
        page.get_by_label("Your question").fill("Which word is it?")
        page.evaluate("window.scrollTo(0, 0)")
        shoot(page, "dark")
        page.get_by_role("button", name="How it was merged").click()
        page.get_by_role("button", name="Measure the updates").click()
        expect(page.locator(".chart")).to_have_count(2)
        page.locator(".chart").first.scroll_into_view_if_needed()
        shoot(page, "merge")
        page = visit("light", NARROW)
        ask(page, WHICH, *FOUR)
        shoot(page, "narrow")
        browser.close()


if __name__ == "__main__":
    main()
