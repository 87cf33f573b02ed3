"""``make screenshot``: `trce play` on the embedded checkpoint, as a browser shows it: docs/play.png."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PAGE = Path("docs/play.png")
PROMPT = "a man holding a pistol next to a cat"
SIZE = {"width": 1280, "height": 640}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        weapons = Path(folder) / "weapons.safetensors"
        line = ("map", "emoji", "--preset", "emoji-weapons", "--output", str(weapons), "--as", "map")
        subprocess.run([sys.executable, "-m", "trce_cli", *line, "--quiet"], check=True)
        asked = ("--edit", str(weapons), "--steps", "25", "--guidance-scale", "4", "-n", "2", "--seed", "1")
        page = subprocess.Popen(
            [sys.executable, "-m", "trce_cli", "play", "emoji", *asked, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert page.stdout is not None
        told = ""
        while not told.endswith("}\n") and (part := page.stdout.readline()):
            told += part
        try:
            taken = Image.open(io.BytesIO(look(json.loads(told)["url"])))
        finally:
            page.send_signal(signal.SIGINT)
            page.wait()
    taken.convert("RGB").quantize(64).save(PAGE, optimize=True)
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")


def look(url: str) -> bytes:
    """What a browser shows once the pictures of the prompt are drawn, as a PNG."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--disable-gpu", "--no-sandbox"])
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.goto(url)
        page.fill("#prompt textarea", PROMPT)
        page.click("button#draw")
        page.wait_for_selector('.pairs[data-left="0"]', timeout=120_000)
        taken = page.screenshot()
        browser.close()
    return taken


if __name__ == "__main__":
    main()
