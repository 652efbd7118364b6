"""The report: pictures that show what was logged, and a page that is whole, safe and legible in a real browser."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_folders
from matplotlib.text import Text
from PIL import Image

from scale_guide.__main__ import main
from scale_guide.analysis import report
from scale_guide.analysis.figures import NUM_POINTS, pictures
from scale_guide.analysis.groups import Group, group
from scale_guide.analysis.records import read_runs

NASTY = '<script>alert("1")</script> & $\\frac{'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes; three seeds of the first, one of them under way, a diverged run, a damaged one; nasty names."""
    path = tmp_path_factory.mktemp("runs")
    run_folders.quickstart(path / "quickstart", seeds=2)
    run_folders.add_maps(path / "quickstart/seed_0/guided")
    under_way = run_folders.recipe("guided", seed=2)
    run_folders.make(path / "quickstart/seed_2/guided", under_way, num_steps=60, finished=False)
    nasty = replace(run_folders.recipe("guided", name="_<b>other</b>"), variant=NASTY, published={NASTY: "1 < 2"})
    metrics = run_folders.lines(100, guided=True)
    for line in metrics[10:]:
        line["task_loss"] = math.nan
    run_folders.make(path / "other/<i>run</i>", nasty, metrics=metrics)
    (path / "damaged").mkdir()
    (path / "damaged/config.yaml").write_text("training: [")
    return path


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of their report."""
    out = tmp_path_factory.mktemp("report")
    report.write([runs], out)
    return out


def figures(path: Path) -> dict[str, Any]:
    groups, _ = group(read_runs([path])[0])
    return {picture.name: picture for picture in pictures(groups)}


@pytest.fixture(scope="module")
def drawn(runs: Path) -> dict[str, Any]:
    """The pictures of the first recipe by name."""
    return figures(runs / "quickstart")


def test_curves_show_what_was_logged(drawn: dict[str, Any]) -> None:
    """A thin line for each seed, the mean of finished ones in bold, in the legend what has not finished."""
    wanted = {"losses", "scores", "gradients", "speed", "pairs_guided", "maps_guided"}
    assert drawn.keys() == wanted
    losses = drawn["losses"].figure
    training, validation = losses.axes
    lines = training.lines[3:]  # behind the two seeds of the unguided one and their mean
    assert [len(line.get_xdata()) for line in lines] == [10, 10, 6, 10]
    logged = [run_folders.lines(100, guided=True, seed=seed) for seed in range(2)]
    for seed in range(2):
        points = [(line["step"], line["task_loss"]) for line in logged[seed] if "task_loss" in line]
        assert np.allclose(lines[seed].get_xydata(), points)
    mean = np.mean([line.get_ydata() for line in lines[:2]], axis=0)
    assert np.allclose(lines[3].get_ydata(), mean)
    assert (training.get_title(), validation.get_title()) == ("training loss", "validation loss")
    legend = [text.get_text().strip() for text in losses.legends[0].get_texts()]
    assert legend == ["unguided", "guided (1 running)"]
    share = drawn["speed"].figure.axes[1].lines[0].get_ydata()
    assert np.allclose(share, 0.07 * 900 / 256)


def test_pairs_have_a_line_each_in_three_panels(drawn: dict[str, Any]) -> None:
    picture = drawn["pairs_guided"]
    logged = [run_folders.lines(100, guided=True, seed=seed) for seed in range(2)]
    for axis, key in zip(picture.figure.axes[:3], ("similarity", "debiased", "floor"), strict=True):
        assert len(axis.lines) == len(run_folders.PAIRS)
        for (target, guide), line in zip(run_folders.PAIRS, axis.lines, strict=True):
            own = [[x["pairs"][f"{target} <- {guide}"][key] for x in seed if "pairs" in x] for seed in logged]
            assert np.allclose(line.get_ydata(), np.mean(own, axis=0))
    assert "1 is hidden.0.linear <- layer0.conv, 5 is hidden.4.linear <- layer4.conv." in picture.caption


def test_maps_are_drawn_before_and_after_with_the_guided_pairs(drawn: dict[str, Any]) -> None:
    figure = drawn["maps_guided"].figure
    before, after = (np.asarray(axis.images[0].get_array()) for axis in figure.axes[:2])
    assert np.allclose(before, 0.2)
    assert np.allclose(after, np.where(np.eye(5), 0.9, 0.3))
    assert {patch.get_xy() for patch in figure.axes[1].patches} == {(i - 0.5, i - 0.5) for i in range(5)}


def test_long_runs_are_drawn_as_means_of_stretches(tmp_path: Path) -> None:
    metrics = [{"step": step, "task_loss": float(step % 2)} for step in range(1, 10 * NUM_POINTS + 1)]
    run_folders.make(tmp_path / "run", run_folders.recipe("unguided"), metrics=metrics)
    (line,) = figures(tmp_path)["losses"].figure.axes[0].lines
    assert np.allclose(line.get_ydata(), 0.5)
    assert np.allclose(line.get_xdata(), np.arange(NUM_POINTS) * 10 + 5.5)


def test_a_diverged_run_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    """Losses that are no numbers, infinite, or negative; steps out of order; pairs that lack a figure."""
    metrics = run_folders.lines(60, guided=True)
    metrics[0]["task_loss"], metrics[1]["task_loss"], metrics[3]["task_loss"] = -1e-3, 1e300, float("inf")
    metrics[0]["pairs"] = {"a <- b": {"similarity": 0.5}}
    for line in metrics:
        line["gradient_norm_at_activations"] = 0.0
    run_folders.make(tmp_path / "run", run_folders.recipe("guided"), metrics=metrics[::-1])
    found = figures(tmp_path)
    assert list(found["losses"].figure.axes[0].lines[0].get_xdata()) == [10, 40, 50, 60]
    assert [axis.get_title() for axis in found["gradients"].figure.axes] == ["gradient from above"]
    assert report.write([tmp_path], tmp_path / "out")


def test_many_variants_with_long_names_fit_in_a_legend(tmp_path: Path) -> None:
    (record,), _ = read_runs([run_folders.make(tmp_path / "run", run_folders.recipe("guided"), num_steps=20)])
    names = [f"variant_{number}, {'with_another_setting=1, ' * number}" for number in range(12)]
    groups = [Group("recipe", name, {}, [record]) for name in names]
    for figure in (picture.figure for picture in islice(pictures(groups), 2)):
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert all(axis.get_window_extent().height > 150 for axis in figure.axes)


def test_runs_without_a_line_have_a_report(tmp_path: Path) -> None:
    run_folders.make(tmp_path / "run", run_folders.recipe("guided"), metrics=[], finished=False)
    printed = report.write([tmp_path], tmp_path / "out")
    assert "| guided | 0, running |" in printed
    assert list((tmp_path / "out/figures").iterdir()) == []


def test_every_picture_is_a_png_and_an_svg_that_the_markdown_names(made: Path) -> None:
    files = sorted(path.name for path in (made / "figures").iterdir())
    stems = {name.rpartition(".")[0] for name in files}
    assert files == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    assert {"quickstart_losses", "quickstart_maps_guided", "__b_other_b__losses"} <= stems
    text = (made / "report.md").read_text()
    assert {stem for stem in stems if f"](figures/{stem}.png)" in text} == stems
    for path in (made / "figures").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300
    for problem in (
        "damaged: left out",
        "step 60 of 500, running",
        "task_loss is nan at step",
        "quickstart unguided: no run of seed 2",
    ):
        assert problem in text
    assert "seed_1/guided" in text, "every run is listed"


class Tags(HTMLParser):
    """Collects the tags of a page, and fails where they do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(made: Path) -> None:
    """No script, no address but data: and all that came from the runs is text."""
    text = (made / "report.html").read_text()
    page = Tags()
    page.feed(text)
    assert page.open == []
    names = {tag for tag, _ in page.found}
    assert names & {"script", "b", "i", "iframe", "object"} == set()
    places = [attributes[name] or "" for _, attributes in page.found for name in ("src", "href") if name in attributes]
    assert len(places) > 8
    assert all(place.startswith("data:") for place in places)
    assert "url(" not in text
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; $\\frac{" in text


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "quickstart/seed_2"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| guided | 60 of 500, running |" in printed
    assert printed.strip().endswith(f"report: {tmp_path / 'out/report.html'}")
    assert main(["report", str(runs / "quickstart/seed_O")]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["report", str(runs), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made (Not a directory). Choose another place." in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MEASURE = """
const text = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), sizes = [];
while (text.nextNode())
  if (text.currentNode.data.trim()) sizes.push(parseFloat(getComputedStyle(text.currentNode.parentElement).fontSize));
const scrolls = e => e && (getComputedStyle(e).overflowX == 'auto' || scrolls(e.parentElement));
return {
  inside: document.documentElement.clientWidth,
  width: document.documentElement.scrollWidth,
  smallest: Math.min(...sizes),
  images: [...document.images].map(i => {
    const box = i.getBoundingClientRect();
    return {
      alt: i.alt, natural: i.naturalWidth, complete: i.complete, width: box.width, height: box.height,
      held: box.right <= document.documentElement.clientWidth || !!scrolls(i.parentElement),
    };
  }),
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    unfit = pytest.importorskip("selenium.common.exceptions").SessionNotCreatedException
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except unfit as error:
        pytest.skip(f"{DRIVER} cannot drive {BROWSER}: {error}")
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_legible_in_a_browser(
    browser: Any, runs: Path, drawn: dict[str, Any], made: Path, width: int
) -> None:
    """No console message; every picture loaded, and seen whole or scrolled in its box; no scrolling of the page."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((made / "report.html").as_uri())
    for summary in browser.find_elements("css selector", "summary"):
        summary.click()
    found = browser.execute_script(MEASURE)
    assert browser.get_log("browser") == []
    assert found["inside"] == width
    assert found["width"] <= width, "the page scrolls sideways"
    assert found["smallest"] >= 12
    assert len(found["images"]) == len(list((made / "figures").glob("*.png")))
    texts = {name: picture.figure.findobj(Text) for name, picture in (drawn | figures(runs / "other")).items()}
    smallest = {name: min(text.get_fontsize() for text in own if text.get_text()) for name, own in texts.items()}
    for image in found["images"]:
        assert image["complete"]
        assert image["natural"] > 0
        assert image["held"]
        points = smallest[image["alt"]]
        assert points * report.DPI / 72 * image["width"] / image["natural"] >= 12
