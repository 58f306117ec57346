"""A real browser, without a screen: what a page looks like once its scripts have run."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # root has no other choice
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that needs the network fails
    "--virtual-time-budget=5000",
)


def look(page: Path, script: str = "") -> tuple[str, Any]:
    """(the page's elements as HTML, what ``script`` answers), once the page has settled.

    ``script``: a JavaScript function's body that runs in a copy of the page and returns JSON.
    """
    with tempfile.TemporaryDirectory(prefix="browser_") as folder:
        probed = Path(folder) / "page.html"
        probe = f"""<pre id="probe"></pre><script>
            setTimeout(() => {{
              const answer = (() => {{ {script or "return null;"} }})();
              document.getElementById("probe").textContent = JSON.stringify(answer);
            }}, 500);</script></body>"""
        probed.write_text(page.read_text().replace("</body>", probe))
        text = _browse(folder, "--dump-dom", probed)
    answer = re.search(r'<pre id="probe">(.*?)</pre>', text, re.DOTALL)
    assert answer is not None and answer[1], "the page's script did not get as far as the probe"
    return text, json.loads(unescape(answer[1]))


def picture(page: Path, dark: bool = False, height: int = 2400) -> npt.NDArray[np.uint8]:
    """A screenshot, (H, W, 3)."""
    with tempfile.TemporaryDirectory(prefix="browser_") as folder:
        shot = Path(folder) / "shot.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        _browse(folder, f"--screenshot={shot}", page, scheme, f"--window-size=1280,{height}")
        return np.asarray(Image.open(shot).convert("RGB"))


def _browse(folder: str, what: str, page: Path, *more: str) -> str:
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    assert found, "this test needs a browser: apt-get install chromium"
    profile = f"--user-data-dir={folder}/profile"
    done = subprocess.run(
        [found, *_OPTIONS, profile, "--window-size=1280,2400", *more, what, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
