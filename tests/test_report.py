"""The report: nothing in it can break out of its place or load from a network, and a real browser draws it."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import zipfile
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train import report as report_module
from dist_train.crystal.structure import Crystal
from dist_train.report import Chart, Density, Figure, Line, Link, Pair, Table, View, Volume, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
DASH = "\N{EN DASH}"
ROWS = (("b", 9.5), ("c", None), ("d", -100), ('e, "f"', 1 / 3), ("g", 12))
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


def stripes() -> Density:
    """Two cells of 4 A. True: two voxels from b = 0 to 0.25 at a = 0.25, in the plane c = 0.5; decoded: at c = 0.25."""
    true, decoded = np.zeros((2, 2, 4, 4, 4), np.float32)
    true[0, 1, :2, 2] = decoded[0, 1, :2, 1] = 0.5
    atom = Crystal(HOSTILE, 4 * np.eye(3), [[0.75, 0.5, 0.5]], [22])
    volumes = Volume("true", true, 4 * np.eye(3), crystal=atom), Volume(HOSTILE, decoded, 4 * np.eye(3))
    return Density(HOSTILE, ("occupancy", HOSTILE), volumes, HOSTILE)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_everything(tmp_path / "new" / "report.html")


def write_everything(path: Path) -> Path:
    write_report(
        path,
        title=HOSTILE,
        summary=HOSTILE,
        tables=[Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 10), *ROWS), HOSTILE)],
        pairs=[
            Pair(HOSTILE, cif(), cif(4.1, "Zr"), note=HOSTILE),
            Pair("failed", cif(), None, HOSTILE, HOSTILE, note="two atoms 0.2 A apart"),
        ],
        densities=[stripes()],
        samples=[View(HOSTILE, cif() + HOSTILE), View("not a CIF", "data_x\n"), View("none", None, "no atoms")],
        path_frames=[View(f"t = {i}", cif(4 + i / 10)) for i in range(3)],
        charts=[Chart("Curve", (Line(HOSTILE, range(5), [1, 2, np.nan, 4, 100]), Line("val", [2, 4], [3, 0.5])), HOSTILE)],
        figures=[Figure(HOSTILE, PIXEL, HOSTILE)],
    )
    return path


def test_hostile_text_stays_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert HOSTILE not in text
    assert page.texts["title"] == page.texts["h1"] == page.texts["td"][:1] == [HOSTILE]
    # The viewer, our own and the JSON; '<!--' inside any of them could swallow an end tag.
    assert [tag for tag, _ in page.tags].count("script") == 2 + len(report_module.SCRIPTS)
    assert all("<!--" not in script for script in re.findall(r"<script.*?</script>", text, re.DOTALL))


def test_every_crystal_is_in_the_page(report: Path) -> None:
    data = json.loads(Page(report.read_text(encoding="utf-8")).texts["data"][0])
    assert [(pair["left"], pair["right"]) for pair in data["pairs"]] == [(cif(), cif(4.1, "Zr")), (cif(), None)]
    assert data["pairs"][1]["note"] == "two atoms 0.2 A apart"
    assert data["samples"][0] == {"title": HOSTILE, "cif": cif() + HOSTILE, "note": ""}
    assert data["samples"][2] == {"title": "none", "cif": None, "note": "no atoms"}
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
    assert cells == [repr(1 / 3), None, None, "", "", None, None, "Infinity"]
    assert page.texts["td"] == ["0.3333", "12345", "yes", DASH, DASH, "7", "no", "inf"]


def test_same_input_same_bytes_and_no_leftovers(report: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, title="t", summary="s", samples=[View("x", cif())], densities=[stripes()])
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


def test_a_page_without_crystals_holds_no_viewer(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    write_report(path, title="t", summary="s", tables=[Table("T", ("a",), ((Link("step 4", "a b/<c>"),),))])
    text = path.read_text(encoding="utf-8")
    assert "Licence of 3Dmol" not in text and len(text) < 60_000
    assert '<a href="a%20b/%3Cc%3E">step 4</a>' in text


def densities_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Page(path.read_text(encoding="utf-8")).texts["data"][0])["densities"]
    return found


def values(density: dict[str, Any], which: int) -> np.ndarray:
    """[C, D, H, W] of a volume, from the bytes in the page."""
    volume = density["volumes"][which]
    steps = np.frombuffer(base64.b64decode(volume["bytes"]), np.uint8).reshape(-1, *volume["shape"])
    low, high = (np.array(density[name])[:, None, None, None] for name in ("low", "high"))
    return low + (high - low) * steps / 255


def test_densities_keep_their_values_and_share_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    grids = [rng.normal(size=(3, 4, 5, 6)), 2 + 3 * rng.normal(size=(3, 6, 5, 4))]
    volumes = tuple(Volume("x", grid, np.diag([4.0, 5, 6])) for grid in grids)
    density = Density("d", ("a", "b", "c"), volumes)
    write_report(tmp_path / "all.html", title="t", summary="s", densities=[density])
    (found,) = densities_of(tmp_path / "all.html")
    assert found["low"] == pytest.approx(np.minimum(*(grid.min((1, 2, 3)) for grid in grids)))
    step = (np.array(found["high"]) - found["low"])[:, None, None, None] / 255
    for which, grid in enumerate(grids):
        assert (np.abs(values(found, which) - grid) <= 0.5001 * step).all()
    monkeypatch.setattr(report_module, "MAX_VOXELS", 700)  # 720 are there
    write_report(tmp_path / "first.html", title="t", summary="s", densities=[density])
    (found,) = densities_of(tmp_path / "first.html")
    assert (found["channels"], found["left_out"]) == (["a"], 2)
    assert np.abs(values(found, 0) - grids[0][:1]).max() <= 0.5001 * step[0]


def test_a_long_line_keeps_its_extremes_its_ends_and_its_gap(tmp_path: Path) -> None:
    series = np.sin(np.arange(100_000.0))
    series[[4321, 50_000]] = 99, np.nan
    chart = Chart("c", (Line("l", np.arange(1, 100_001), series),))
    write_report(tmp_path / "r.html", title="t", summary="s", charts=[chart])
    (line,) = json.loads(Page((tmp_path / "r.html").read_text()).texts["data"][0])["charts"][0]["lines"]
    found = dict(zip(line["steps"], line["values"], strict=True))
    assert len(found) <= report_module.MAX_POINTS
    assert (found[4322], found[50_001]) == (99, None)
    assert {1, 100_000} <= found.keys()
    assert list(found) == sorted(found)


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
NO_WEBGL = """<script>{
  const real = OffscreenCanvas.prototype.getContext;
  OffscreenCanvas.prototype.getContext = function (kind) { return kind === "2d" ? real.call(this, kind) : null; };
}</script>"""
# Files that are saved, by name, as base64; and how bright a density of panel `i` is at fractions of its cell, of 4 A.
TOOLS = """<script>{
  window.root = document.documentElement;
  root.dataset.saved = "{}";
  let blob = null;
  URL.createObjectURL = (content) => { blob = content; return "data:,"; };
  HTMLAnchorElement.prototype.click = function () {
    const name = this.download;
    blob.arrayBuffer().then((data) => {
      const text = btoa(String.fromCharCode(...new Uint8Array(data)));
      root.dataset.saved = JSON.stringify({ ...JSON.parse(root.dataset.saved), [name]: text });
    });
  };
  window.$$ = (css) => [...document.querySelectorAll(css)];
  window.named = (css, text) => $$(css).find((node) => node.textContent.includes(text));
  window.brightness = (i, fu, fv) => {
    const canvas = $$("canvas.slice")[i];
    const scale = (330 - 2 * 26) / (4 * 1.3); // pixels of an angstrom: margins, and what is drawn beyond the cell
    const [x, y] = [canvas.width / 2 + 4 * scale * (fu - 0.5), canvas.height / 2 - 4 * scale * (fv - 0.5)];
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3).reduce((sum, part) => sum + part);
  };
}</script>"""
EXERCISE = (
    TOOLS
    + """<script>{
  const probe = {};
  named("#pairs .buttons button:not([hidden])", "Bonds").click();
  $$("#pairs .buttons button")[3].click();
  const views = $$("#pairs canvas").map((canvas) => canvas._3dmol_viewer);
  views[0].rotate(40, "y");
  probe.linked = views.map((view) => view.getView().join());
  probe.formulas = $$("#pairs .formula").map((node) => node.textContent);
  probe.facts = $$("#pairs .facts").map((node) => node.textContent);
  probe.legend = $$("#pairs .legend")[1].textContent;
  named("#pairs .bar button", "all CIFs").click();

  $$("th button")[1].click();
  probe.rising = $$("td:last-child").map((cell) => cell.textContent);
  $$("th button")[1].click();
  probe.falling = $$("td:last-child").map((cell) => cell.textContent);
  const box = $$("#tables input")[0];
  probe.counts = ["", "E 0.33", "nowhere", "b"].map((words) => {
    box.value = words;
    box.oninput();
    return [$$("#tables .count")[0].textContent, $$("tbody tr:not([hidden])").length];
  });
  box.value = "e 0.";
  box.oninput();
  named("#tables button", "CSV").click();

  $$("#samples .thumb")[1].click();
  probe.unreadable = $$("#samples .failure")[0].textContent;
  $$("#samples .thumb")[2].click();
  probe.none = $$("#samples .failure")[0].textContent;

  const plane = $$("#densities input")[0];
  probe.fullest = $$("#densities .bar .count")[1].textContent;
  probe.true_at_half = [[0, 0.25, 0.12], [0, 0.25, 0.6], [0, 0.6, 0.12], [1, 0.25, 0.12]].map((at) => brightness(...at));
  probe.scale = $$(".scale span").map((node) => node.textContent);
  plane.value = 1;
  plane.oninput();
  probe.decoded_at_quarter = [brightness(0, 0.25, 0.12), brightness(1, 0.25, 0.12)];
  named("#densities button", "across a").click();
  probe.across_a = [$$("#densities .bar .count")[1].textContent,
    brightness(0, 0.12, 0.5), brightness(0, 0.6, 0.5), brightness(0, 0.12, 0.8)];

  const chart = $$("#charts .plot")[0];
  const key = (name) => chart.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
  probe.last = $$(".readout")[0].textContent;
  key("Home");
  key("ArrowRight");
  probe.second = $$(".readout")[0].textContent;
  const bounds = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: bounds.left + 58 + (bounds.width - 72) / 2 }));
  probe.pointed = $$(".readout")[0].textContent;
  probe.path = $$("#charts path")[0].getAttribute("d");
  named("#charts button", "Log").click();
  probe.linear = $$("#charts path")[0].getAttribute("d");
  named("#charts button", "CSV").click();

  $$("#pairs .bar button")[1].click();
  probe.failed = $$("#pairs .failure")[1].textContent;
  $$(".top, #charts, #tables").forEach((node) => node.remove()); // so that the screenshot holds the first view
  const stage = $$("#pairs .stage")[0].getBoundingClientRect();
  probe.box = [stage.left, stage.top, stage.right, stage.bottom];
  root.dataset.probe = JSON.stringify(probe);
}</script>"""
)
# Two steps of the animation; then the slider, if it is asked for, and what is shown two steps later.
ANIMATE = (
    TOOLS
    + """<script>{
  const slider = $$("#path input")[0];
  const play = named("#path button", "Play");
  const shown = [];
  const name = () => $$("#path .name")[0].textContent;
  const note = () => {
    shown.push([name(), /[A-Z]+/i.exec(play.textContent)[0]]);
    root.dataset.shown = JSON.stringify(shown);
  };
  const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  (async () => {
    note();
    play.click();
    for (const old of ["t = 0", "t = 1"]) {
      while (name() === old) await wait(50);
      note();
    }
    if (SLIDE) {
      slider.value = 1;
      slider.oninput();
    }
    await wait(2 * STEP_MS + 100);
    note();
  })();
}</script>"""
)


def browse(report: Path, before: str, after: str, *flags: str, milliseconds: int = 1000, seconds: int = 60) -> Page:
    """The page as a headless browser leaves it, with scripts added; the browser and its children are ended.

    milliseconds: of virtual time, in which timers run.
    """
    text = report.read_text(encoding="utf-8").replace("<style>", before + "<style>", 1)
    head, body, end = text.rpartition("</body>")
    copy = report.with_name("copy.html")
    copy.write_text(head + after + body + end, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={report.parent / 'profile'}", *flags]
    command += [f"--virtual-time-budget={milliseconds}", copy.as_uri()]
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


def is_bright(sum: int) -> bool:
    """Of red, green and blue: 44 for the least value, 696 for the largest; browsers round weights when they enlarge."""
    assert sum < 150 or sum > 600
    return sum > 600


@pytest.fixture(scope="module")
def exercised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """The page after EXERCISE, and a screenshot of it."""
    screenshot = tmp_path_factory.mktemp("exercised") / "shot.png"
    report = write_everything(screenshot.with_name("report.html"))
    page = browse(report, RECORD_ERRORS, EXERCISE, f"--screenshot={screenshot}")
    assert page.root["data-ready"] == "true"
    assert page.root["data-errors"] == ""
    return page, screenshot


@needs_browser
def test_a_browser_draws_the_crystals(exercised: tuple[Page, Path]) -> None:
    page, screenshot = exercised
    assert page.texts["title"] == [HOSTILE]
    probe: dict[str, Any] = json.loads(page.root["data-probe"])
    assert probe["formulas"] == ["O3SrTi", "O3SrZr"]
    assert re.search(r"4\.10 .* 90\.0° .* 68\.9 Å³ .* 5 atoms", probe["facts"][1])
    assert probe["legend"] == "OSrZr"
    assert probe["linked"][0] == probe["linked"][1]
    assert probe["failed"] == "No crystaltwo atoms 0.2 A apart"
    assert "no complete cell" in probe["unreadable"]
    assert probe["none"] == "No crystalno atoms"
    thumbnails = [attrs for tag, attrs in page.tags if tag == "img" and attrs.get("alt") == ""]
    assert (thumbnails[0]["src"] or "").startswith("data:image/png") and "src" not in thumbnails[1]
    assert colours(screenshot, probe["box"]) > 100


@needs_browser
def test_tables_are_sorted_and_filtered(exercised: tuple[Page, Path]) -> None:
    probe: dict[str, Any] = json.loads(exercised[0].root["data-probe"])
    assert probe["rising"] == ["-100", "0.3333", "9.5", "10", "12", DASH]
    assert probe["falling"] == ["12", "10", "9.5", "0.3333", "-100", DASH]
    assert probe["counts"] == [["6 of 6 rows", 6], ["1 of 6 rows", 1], ["0 of 6 rows", 0], ["1 of 6 rows", 1]]


@needs_browser
def test_planes_of_densities_lie_where_they_are_said_to(exercised: tuple[Page, Path]) -> None:
    probe: dict[str, Any] = json.loads(exercised[0].root["data-probe"])
    assert probe["fullest"] == "c = 0.500 · 2.00 of 4.00 Å"
    assert [is_bright(sum) for sum in probe["true_at_half"]] == [True, False, False, False]
    assert [is_bright(sum) for sum in probe["decoded_at_quarter"]] == [False, True]
    where, *sums = probe["across_a"]
    assert where == "a = 0.250 · 1.00 of 4.00 Å"
    assert [is_bright(sum) for sum in sums] == [True, False, False]
    assert probe["scale"] == ["0.000", "", "0.500"]


@needs_browser
def test_curves_tell_their_values_at_the_pointer_and_by_keys(exercised: tuple[Page, Path]) -> None:
    probe: dict[str, Any] = json.loads(exercised[0].root["data-probe"])
    assert probe["last"].startswith("step 4") and probe["last"].endswith(" 100val 0.5")
    assert probe["second"].startswith("step 1") and probe["second"].endswith(" 2val 3 at 2")
    assert probe["pointed"].startswith("step 2") and probe["pointed"].endswith("val 3")
    assert probe["path"].count("M") == probe["linear"].count("M") == 2, "a value that isn't finite leaves a gap"
    assert probe["path"] != probe["linear"]


@needs_browser
def test_files_are_saved_with_what_is_shown(exercised: tuple[Page, Path]) -> None:
    saved = {name: base64.b64decode(text) for name, text in json.loads(exercised[0].root["data-saved"]).items()}
    assert len(saved) == 4
    one = next(name for name in saved if name.endswith(".cif"))
    assert re.fullmatch(r"test-reconstructed\.cif", one) and saved[one].decode() == cif(4.1, "Zr")
    with zipfile.ZipFile(io.BytesIO(saved["crystals.zip"])) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 3 and len(set(archive.namelist())) == 3
        assert sorted(archive.read(name).decode() for name in archive.namelist()) == sorted([cif(), cif(4.1, "Zr"), cif()])
    chart = saved.pop("Curve.csv").decode()
    (table,) = (text.decode() for name, text in saved.items() if name.endswith(".csv"))
    assert list(csv.reader(io.StringIO(table))) == [[HOSTILE, "n"], ['e, "f"', repr(1 / 3)]]
    rows = list(csv.reader(io.StringIO(chart)))
    assert rows[0][2] == "val" and [row[2] for row in rows[1:]] == ["", "", "3", "", "0.5"]
    assert [row[1] for row in rows[1:]] == ["1", "2", "", "4", "100"]


@needs_browser
@pytest.mark.parametrize("reduced", [False, True])
def test_the_animation_stops_for_the_user(tmp_path: Path, reduced: bool) -> None:
    """And goes round and round, unless less motion is wanted: then it is slower, and ends."""
    report = tmp_path / "report.html"
    write_report(report, title="t", summary="s", path_frames=[View(f"t = {i}", cif(4 + i / 10)) for i in range(3)])
    script = ANIMATE.replace("STEP_MS", "1500" if reduced else "450").replace("SLIDE", "false" if reduced else "true")
    flags = ["--force-prefers-reduced-motion"] if reduced else []
    page = browse(report, RECORD_ERRORS, script, *flags, milliseconds=8000 if reduced else 3000)
    assert page.root["data-errors"] == ""
    start, first, second, later = json.loads(page.root["data-shown"])
    assert start == ["t = 0", "Play"]
    assert first == ["t = 1", "Pause"]
    assert second == ["t = 2", "Play" if reduced else "Pause"]
    assert later == ["t = 2" if reduced else "t = 1", "Play"]


@needs_browser
def test_without_webgl_the_page_says_so_and_still_works(report: Path) -> None:
    page = browse(report, RECORD_ERRORS + NO_WEBGL, "")
    assert page.root["data-ready"] == "true"
    assert page.root["data-errors"] == ""
    notice = next(attrs for _, attrs in page.tags if attrs.get("id") == "no-webgl")
    assert "hidden" not in notice
    assert {attrs.get("class") for tag, attrs in page.tags if tag == "canvas"} == {"slice"}
    assert "This browser offers no WebGL 2." in page.texts["span"]
