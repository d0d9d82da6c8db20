"""The report: nothing in it can break out of its place or load from a network, and a real browser draws it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_train.report import Figure, Pair, Table, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
DASH = "\N{EN DASH}"
HOSTILE = "</script><script>document.title='taken'</script><!-- {{css}} &amp; \" ' \u2028 https://example.org"


def cif(edge: float = 3.9, b_site: str = "Ti") -> str:
    atoms = ["Sr 0 0 0", f"{b_site} .5 .5 .5", "O .5 .5 0", "O .5 0 .5", "O 0 .5 .5"]
    lengths = "".join(f"_cell_length_{axis} {edge}\n" for axis in "abc")
    angles = "".join(f"_cell_angle_{angle} 90\n" for angle in ("alpha", "beta", "gamma"))
    columns = "".join(f"_atom_site_{name}\n" for name in ("type_symbol", "fract_x", "fract_y", "fract_z"))
    return f"data_test\n{lengths}{angles}loop_\n{columns}" + "\n".join(atoms) + "\n"


class Page(HTMLParser):
    """Start tags with their attributes, and the texts of the elements by id or tag name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or tag
        self.texts.setdefault(self.inside, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside][-1] += data

    @property
    def root(self) -> dict[str, str]:
        """The attributes of <html>."""
        return next({key: value or "" for key, value in attrs.items()} for tag, attrs in self.tags if tag == "html")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "report.html"
    write_report(
        path,
        title=HOSTILE,
        summary=HOSTILE,
        tables=[Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 10), ("b", 9.5), ("c", None), ("d", -100)), HOSTILE)],
        pairs=[
            Pair(HOSTILE, cif(), cif(4.1, "Zr"), note=HOSTILE),
            Pair("failed", cif(), None, HOSTILE, HOSTILE, note="two atoms 0.2 A apart"),
        ],
        samples=[(HOSTILE, cif() + HOSTILE), ("not a CIF", "data_x\n")],
        path_frames=[(f"t = {i}", cif(4 + i / 10)) for i in range(3)],
        figures=[Figure(HOSTILE, PIXEL, HOSTILE)],
    )
    return path


def test_hostile_text_stays_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert HOSTILE not in text
    assert page.texts["title"] == page.texts["h1"] == page.texts["td"][:1] == [HOSTILE]
    # The viewer, crystal.js, report.js and the JSON; '<!--' inside any of them could swallow an end tag.
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert all("<!--" not in script for script in re.findall(r"<script.*?</script>", text, re.DOTALL))


def test_every_crystal_is_in_the_page(report: Path) -> None:
    data = json.loads(Page(report.read_text(encoding="utf-8")).texts["data"][0])
    assert [(pair["left"], pair["right"]) for pair in data["pairs"]] == [(cif(), cif(4.1, "Zr")), (cif(), None)]
    assert data["pairs"][1]["note"] == "two atoms 0.2 A apart"
    assert data["samples"][0] == {"title": HOSTILE, "cif": cif() + HOSTILE}
    assert [frame["cif"] for frame in data["path"]] == [cif(4 + i / 10) for i in range(3)]


def test_nothing_is_loaded_from_elsewhere(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    sources = [attrs[key] or "" for _, attrs in page.tags for key in ("src", "href", "data", "action") if key in attrs]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import", page.texts["style"][0])
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_cells_show_rounded_values_and_sort_by_exact_ones(tmp_path: Path) -> None:
    rows = ((1 / 3, 12345, True, float("nan")), (None, 7, False, float("inf")))
    write_report(tmp_path / "r.html", title="t", summary="s", tables=[Table("T", ("a", "b", "c", "d"), rows)])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    cells = [attrs.get("data-v") for tag, attrs in page.tags if tag == "td"]
    assert cells == [repr(1 / 3), "12345.0", None, "", "", "7.0", None, "Infinity"]
    assert page.texts["td"] == ["0.3333", "12345", "yes", DASH, DASH, "7", "no", "inf"]


def test_same_input_same_bytes_and_no_leftovers(report: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, title="t", summary="s", samples=[("x", cif())])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_report(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, title="t", summary="s")
    assert report.read_bytes() == before
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_every_line_of_the_evaluation_is_measured() -> None:
    """The keys that the page asks for are those of a summary; torch loads only for this test."""
    from dist_train.crystal.metrics import summarise
    from dist_train.evaluate_report import METRICS

    assert {key for _, key in METRICS} <= summarise([]).keys()


# Headless, drawing in software, without its own traffic; timers run in virtual time before the page is returned.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=850,1000",
    "--virtual-time-budget=1000",
    "--dump-dom",
]
# What a browser is told before and after the page's own scripts; results come back as attributes of <html>.
RECORD_ERRORS = """<script>{
  const note = (text) => { document.documentElement.dataset.errors += text + "; "; };
  document.documentElement.dataset.errors = "";
  for (const level of ["error", "warn"]) console[level] = (...args) => note(args.join(" "));
  for (const name of ["error", "unhandledrejection", "securitypolicyviolation"]) {
    addEventListener(name, (e) => note([name, e.message, e.reason, e.blockedURI].join(" ")), true);
  }
}</script>"""
NO_WEBGL = "<script>OffscreenCanvas.prototype.getContext = () => null;</script>"
EXERCISE = """<script>{
  const $$ = (css) => [...document.querySelectorAll(css)];
  const root = document.documentElement;
  const probe = {};
  URL.createObjectURL = (blob) => { blob.text().then((text) => { root.dataset.saved = text; }); return "data:,"; };
  HTMLAnchorElement.prototype.click = function () { root.dataset.savedName = this.download; };
  $$("#pairs .buttons button")[3].click();
  const views = $$("#pairs canvas").map((canvas) => canvas._3dmol_viewer);
  views[0].rotate(40, "y");
  probe.linked = views.map((view) => view.getView().join());
  probe.formulas = $$("#pairs .formula").map((node) => node.textContent);
  probe.facts = $$("#pairs .facts").map((node) => node.textContent);
  probe.legend = $$("#pairs .legend")[1].textContent;
  $$("th button")[1].click();
  probe.rising = $$("td:last-child").map((cell) => cell.textContent);
  $$("th button")[1].click();
  probe.falling = $$("td:last-child").map((cell) => cell.textContent);
  const slider = $$("#path input")[0];
  slider.value = 2;
  slider.oninput();
  probe.frame = $$("#path .name")[0].textContent;
  $$(".thumb")[1].click();
  probe.unreadable = $$("#samples .failure")[0].textContent;
  $$("#pairs .bar button")[1].click();
  probe.failed = $$("#pairs .failure")[1].textContent;
  $$(".top, #tables").forEach((node) => node.remove()); // so that the screenshot holds the first view
  const box = $$("#pairs .stage")[0].getBoundingClientRect();
  probe.box = [box.left, box.top, box.right, box.bottom];
  root.dataset.probe = JSON.stringify(probe);
}</script>"""


def browse(report: Path, before: str, after: str, *flags: str, seconds: int = 60) -> Page:
    """The page as a headless browser leaves it, with scripts added; the browser and its children are ended."""
    text = report.read_text(encoding="utf-8").replace("<style>", before + "<style>", 1)
    head, body, end = text.rpartition("</body>")
    copy = report.with_name("copy.html")
    copy.write_text(head + after + body + end, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={report.parent / 'profile'}", *flags, copy.as_uri()]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, stdin=quiet, start_new_session=True) as browser:
        try:
            dom, _ = browser.communicate(timeout=seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)  # it leads the group of its children
    return Page(dom.decode("utf-8"))


def colours(png: Path, box: list[float]) -> int:
    """How many colours a rectangle of a picture has."""
    image = pytest.importorskip("PIL.Image")
    with image.open(png) as picture:
        assert box[2] <= picture.width and box[3] <= picture.height
        return len(picture.convert("RGB").crop(tuple(map(round, box))).getcolors(1 << 24))


@needs_browser
def test_a_browser_draws_the_crystals(report: Path) -> None:
    screenshot = report.parent / "shot.png"
    page = browse(report, RECORD_ERRORS, EXERCISE, f"--screenshot={screenshot}")
    assert page.root["data-ready"] == "true"
    assert page.root["data-errors"] == ""
    assert page.texts["title"] == [HOSTILE]
    probe: dict[str, Any] = json.loads(page.root["data-probe"])
    assert probe["formulas"] == ["O3SrTi", "O3SrZr"]
    assert re.search(r"4\.10 .* 90\.0° .* 68\.9 Å³ .* 5 atoms", probe["facts"][1])
    assert probe["legend"] == "OSrZr"
    assert probe["linked"][0] == probe["linked"][1]
    assert probe["rising"] == ["-100", "9.5", "10", DASH]
    assert probe["falling"] == ["10", "9.5", "-100", DASH]
    assert probe["frame"] == "t = 2"
    assert probe["failed"] == "No crystaltwo atoms 0.2 A apart"
    assert "no complete cell" in probe["unreadable"]
    assert page.root["data-saved"] == cif(4.1, "Zr")
    assert re.fullmatch(r"[\w.-]+\.cif", page.root["data-saved-name"])
    thumbnails = [attrs for tag, attrs in page.tags if tag == "img" and attrs.get("alt") == ""]
    assert (thumbnails[0]["src"] or "").startswith("data:image/png") and "src" not in thumbnails[1]
    assert colours(screenshot, probe["box"]) > 100


@needs_browser
def test_without_webgl_the_page_says_so_and_still_works(report: Path) -> None:
    page = browse(report, RECORD_ERRORS + NO_WEBGL, "")
    assert page.root["data-ready"] == "true"
    assert page.root["data-errors"] == ""
    notice = next(attrs for _, attrs in page.tags if attrs.get("id") == "no-webgl")
    assert "hidden" not in notice
    assert not [tag for tag, _ in page.tags if tag == "canvas"]
    assert "This browser offers no WebGL 2." in page.texts["span"]
