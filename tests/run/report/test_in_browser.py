"""report.html opened in a headless Chromium: what a reader gets to see, light and dark, and that nothing is fetched."""

import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from dynrank.run.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["quic", "gpu", "background-networking", "component-update", "sync", "dev-shm-usage"]
WIDTH, HEIGHT = 1280, 4000

# Runs after the page is laid out, in a copy of it, and leaves what it has measured in the document.
MEASURE = """<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const colour = (e) => getComputedStyle(e).color;
  const bars = Object.fromEntries(all("g[id^=ranks-row-]").map(
    (row) => [row.querySelector("title").textContent, [...row.querySelectorAll("path")].map(box)]));
  document.body.dataset.measured = JSON.stringify({
    charts: all("svg").map(box),
    names: all("g[id^=ranks-name-] text").map(box),
    bars: bars,
    width: document.documentElement.scrollWidth,
    sections: all("main section").map((s) => [s.querySelector("h2").textContent, box(s)]),
    ink: [colour(document.body), getComputedStyle(document.querySelector("svg text")).fill],
    paper: getComputedStyle(document.body).backgroundColor,
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name),
  });
});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a file; returns (stdout, stderr)."""

    def run(file, *options):
        command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
        command += [f"--disable-{what}" for what in QUIET]
        command += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"--window-size={WIDTH},{HEIGHT}"]
        command += ["--enable-logging=stderr", "--v=0", *options, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def report(run_folder, tmp_path_factory):
    return write_report(run_folder(tmp_path_factory.mktemp("browser") / "run", kinds=("up", "<b>&", "x" * 60)))


@pytest.fixture(scope="module")
def measure(browse, tmp_path_factory):
    """What MEASURE finds in a report, and what the browser logged."""

    def run(report, *options):
        copy = tmp_path_factory.mktemp("copy") / "report.html"
        text = report.read_text(encoding="utf-8")
        assert "</body>" in text
        copy.write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        dom, log = browse(copy, "--dump-dom", *options)
        (measured,) = re.findall(r'data-measured="([^"]*)"', dom)
        return json.loads(measured.replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&")), log

    return run


@pytest.fixture(scope="module")
def measured(measure, report):
    return measure(report)


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_pictures_are_laid_out_one_below_the_other_within_the_page(measured):
    page, _ = measured
    assert len(page["charts"]) == 3
    for left, top, right, bottom in page["charts"]:
        assert right - left > 900
        assert bottom - top > 200
        assert 0 <= left < right <= WIDTH
    assert page["width"] == WIDTH  # nothing to scroll sideways
    boxes = [box for _, box in page["sections"]]
    assert all(above[3] <= below[1] for above, below in zip(boxes, boxes[1:], strict=False))
    headings = ["Changes of rank", "Loss", "Ranks by layer", "Singular values", "Layers", "Speed and memory"]
    assert [heading for heading, _ in page["sections"]] == [*headings, "Configuration"]


def test_page_fits_a_narrow_window(measure, report):
    page, _ = measure(report, "--window-size=600,4000")
    assert page["width"] == 600  # wide tables scroll by themselves
    assert all(0 <= left < right <= 600 for left, _, right, _ in page["charts"])


def test_nothing_is_fetched_and_nothing_is_complained_of(measured):
    page, log = measured
    assert page["fetched"] == []
    assert "CONSOLE" not in log


def test_names_of_layers_stand_beside_their_bars_and_not_on_each_other(measured):
    page, _ = measured
    assert len(page["names"]) == len(page["bars"]) == 7
    chart = page["charts"][1]
    for name, bars in zip(page["names"], page["bars"].values(), strict=True):
        assert chart[0] <= name[0] < name[2] <= bars[0][0] + 1
        assert bars[0][1] < (name[1] + name[3]) / 2 < bars[0][3]
    assert all(a[3] <= b[1] + 1 for a, b in zip(page["names"], page["names"][1:], strict=False))


def test_colours_on_the_screen_say_the_ranks(browse, measured, report, tmp_path):
    page, _ = measured
    browse(report, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as image:
        pixels = image.convert("RGB")
    shown = {}
    for title, bars in page["bars"].items():
        ranks = re.findall(r"(\d+) from|rank (\d+)", title)
        assert len(ranks) == len(bars)
        for rank, (left, top, right, bottom) in zip(ranks, bars, strict=True):
            shown.setdefault("".join(rank), set()).add(pixels.getpixel(((left + right) // 2, (top + bottom) // 2)))
    assert set(shown) == {"8", "4", "2"}
    assert all(len(colours) == 1 for colours in shown.values())
    assert len(set.union(*shown.values())) == 3
    widths = [bar[2] - bar[0] for bar in next(iter(page["bars"].values()))]
    assert widths == pytest.approx([sum(widths) / 3] * 3, abs=2)  # 8 until step 10, 4 until 20, 2 until 30


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_text_can_be_read_in_both_colour_schemes(measure, report, scheme):
    page, _ = measure(report, f"--blink-settings=preferredColorScheme={scheme}")
    assert (luminance(page["paper"]) < 0.1) == (scheme == 0)
    assert all(contrast(ink, page["paper"]) > 7 for ink in page["ink"])


def test_report_of_a_real_run_opens(measure, smoke_run):
    page, log = measure(smoke_run[0] / "report.html")
    assert len(page["bars"]) == 37
    assert len(page["charts"]) == 5  # with the quality in validation, and the singular values before the drop
    assert page["fetched"] == []
    assert "CONSOLE" not in log


def test_page_prints(browse, report, tmp_path):
    browse(report, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 8
