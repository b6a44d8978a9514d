"""report.html opened in a headless Chromium: laid out, and legible in light and dark."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from dynrank.run.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["quic", "gpu", "background-networking", "component-update", "sync", "dev-shm-usage"]

# Runs after the page is laid out, in a copy of it, and leaves what it has measured in the document.
MEASURE = """<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const all = (selector) => [...document.querySelectorAll(selector)];
  parent.postMessage(JSON.stringify({
    pictures: all("img").map((i) => [...box(i), i.naturalWidth]),
    width: document.documentElement.scrollWidth,
    ink: ["body", "figcaption"].map((name) => getComputedStyle(document.querySelector(name)).color),
    paper: getComputedStyle(document.body).backgroundColor,
  }), "*");
});
</script>"""
# A window is never narrower than 500 pixels, a frame in it is; it tells the page around it what it has measured.
FRAME = """<body><script>addEventListener("message", (m) => { document.body.dataset.measured = m.data; });</script>
<iframe src="report.html" style="border: 0" width="%d" height="4000"></iframe>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def report(run_folder, tmp_path_factory):
    return write_report(run_folder(tmp_path_factory.mktemp("browser") / "run", kinds=("up", "<b>&", "x" * 60)))


def browse(file, folder, *options):
    """Open a file; returns (stdout, stderr)."""
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    command += [f"--disable-{what}" for what in QUIET] + [f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--v=0", *options, file.as_uri()],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_page_is_laid_out_and_legible(report, tmp_path, width, scheme):
    copy, frame = tmp_path / "report.html", tmp_path / "frame.html"
    frame.write_text(FRAME % width)
    copy.write_text(report.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    options = [
        f"--window-size={width + 100},4100",
        "--virtual-time-budget=10000",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
    ]
    dom, log = browse(frame, tmp_path, "--dump-dom", *options)
    (measured,) = re.findall(r'data-measured="([^"]*)"', dom)
    page = json.loads(measured.replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    # Wide tables scroll by themselves, so the page is no wider than its window.
    assert page["width"] == width
    assert len(page["pictures"]) == 3
    with Image.open(report.parent / "plots" / "loss.png") as picture:
        dpi = picture.info["dpi"][0]
    for left, top, right, bottom, pixels in page["pictures"]:
        assert left >= 0
        assert right <= width
        # A letter of 9 points has so many pixels.
        assert 9 * (right - left) / pixels * dpi / 72 >= 8.9
        assert bottom - top > 150
    assert (luminance(page["paper"]) < 0.1) == (scheme == "dark")
    for ink in page["ink"]:
        low, high = sorted((luminance(ink), luminance(page["paper"])))
        assert (high + 0.05) / (low + 0.05) > 4.5
    assert "CONSOLE" not in log
