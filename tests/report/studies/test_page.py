"""The page: whole, harmless, and opened in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fedsplit.apps.report import report_page, report_protocol
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.page import turns_of
from fedsplit.report.turns import TurnRow, append_turns

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--enable-logging=stderr",
]


@pytest.fixture
def page(study: Study) -> Path:
    routes = ("device[0:2] -> server[2:6]", "device[0:1] -> edge[1:3] -> cloud[3:6]")
    for member in study.members[:-1]:
        rows = [
            TurnRow(round=2, phase="train", device=device, route=route, loss=3.0, targets=5)
            for device, route in enumerate(routes)
        ]
        append_turns(study.folder / member.folder, rows)
        (study.folder / member.folder / "modelled_trace.json").write_text(json.dumps(TRACE))
    assert report_page(study.folder, None, Console(quiet=True)) == 0
    return study.folder / "report.html"


ARGS = {"branch": 0, "turn": 1}
TRACE = {
    "traceEvents": [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "device 3"}},
        {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "server"}},
        {"name": "up", "ph": "X", "pid": 1, "ts": 1e6, "dur": 2e6, "args": ARGS},
        {"name": "down", "ph": "X", "pid": 1, "ts": 5e6, "dur": 1e6, "args": ARGS},
        {"name": "compute", "ph": "X", "pid": 2, "ts": 0.0, "dur": 9e6, "args": ARGS},
    ]
}


def test_a_turn_lasts_from_its_first_activity_to_its_last() -> None:
    assert turns_of(TRACE) == [["device 3", 0, 1, 1.0, 5.0]]


def test_the_page_says_what_there_is_to_say(page: Path) -> None:
    text = page.read_text()
    for words in (
        "7 runs, over strategy, seed; 6 done, 1 not.",
        "evaluation loss (nats per target) against modelled time (s); 95 % intervals over 3 seeds",
        "slow: routes of round 2",
        "Best evaluation loss within modelled time 2 s",
        "3 seeds cannot give a p below 0.25",
        "device 3",
        "as they are by default",
    ):
        assert words in text, words


def test_what_runs_say_is_text_and_nothing_is_loaded(page: Path) -> None:
    text = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;link&lt;/b&gt; broke" in text
    assert not re.search(r"<script|<b>|@import|url\(", text)
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in text


def test_a_study_without_a_round_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(
        json.dumps({"members": [{"name": "a", "folder": "a", "swept": {}, "status": "failed"}]})
    )
    with pytest.raises(FedsplitError, match="no run has come to a round yet"):
        report_page(tmp_path, None, Console(quiet=True))


def test_a_protocol_is_printed_and_written(study: Study) -> None:
    console = Console(record=True, quiet=True, width=160)
    assert report_protocol(study.folder, "target", console, reach=3.4) == 0
    assert (study.folder / "reports" / "target.csv").read_text().count("\n") == 3
    assert (study.folder / "reports" / "target_test.csv").exists()


def browse(place: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Open `address` in a browser whose profile is below `place`; stdout is the page's text."""
    profile = f"--user-data-dir={place / 'profile'}"
    return subprocess.run(
        [str(CHROMIUM), *FLAGS, profile, *more, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_opens_it_without_a_complaint_or_a_request(page: Path, tmp_path: Path) -> None:
    """In a browser of no network, with a log of all that it asks for."""
    asked = tmp_path / "asked.json"
    done = browse(tmp_path, page.as_uri(), f"--log-net-log={asked}")
    assert "Slowest turns" in done.stdout
    assert "CONSOLE" not in done.stderr
    log = asked.read_text()
    urls = set(re.findall(r'"url":"([^"]+)"', log))
    # What the browser asks for itself has no page that initiated it.
    pages = set(re.findall(r'"initiator":"([^"]+)"', log)) - {"not an origin"}
    assert not any(name.startswith("file") for name in pages), pages
    assert not [url for url in urls if page.name in url and not url.startswith("file:")]


WIDE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument.documentElement;
  const cut = [...page.querySelectorAll("h1, h2, p, li, img, svg, figure")]
    .filter(one => one.getBoundingClientRect().right > page.clientWidth + 1)
    .map(one => one.tagName + " " + one.textContent.slice(0, 40));
  found.push([page.clientWidth, page.scrollWidth, cut]);
}
document.body.textContent = "found " + JSON.stringify(found) + " end";
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_fits_a_desk_and_a_telephone(page: Path, tmp_path: Path) -> None:
    """Nothing to be read lies beyond 1280 or 400 pixels; wide tables scroll in a box of theirs."""
    inner = html.escape(page.read_text())
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe>'
        for width in (1280, 400)
    )
    outer = tmp_path / "widths.html"
    outer.write_text(f"<body>{frames}<script>onload = () => {{{WIDE}}}</script></body>")
    shown = html.unescape(browse(tmp_path, outer.as_uri()).stdout)
    found = re.search(r"found (\[.*?\]) end</body>", shown, re.DOTALL)
    assert found, shown[-500:]
    for width, (inside, whole, cut) in zip((1280, 400), json.loads(found[1]), strict=True):
        assert width - 20 <= inside <= width  # but for a scroll bar
        assert whole <= inside, f"at {width} pixels the page is {whole} wide"
        assert cut == [], width
