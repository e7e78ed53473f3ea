"""The report as a browser lays it out, on a wide screen and on a telephone: nothing is cut off, tables can be sorted.

It needs a headless Chromium: on PATH, or named by BOOTVIT_CHROMIUM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, chromium, page
from test_report import make_run, make_sweep, write_runs

from bootvit.report import collect_folders, write_report, write_sweep_report

CUT = """
(() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  for (const each of document.querySelectorAll("h1, h2, p, figure, .box, .thumbs figure, figcaption")) {
    const box = each.getBoundingClientRect();
    if (box.left < 0 || box.right > wide + 0.5) found.push(`${each.tagName} ${each.className} reaches ${box.right}`);
    if (each.className !== "box" && each.scrollWidth > each.clientWidth + 1) found.push(`${each.tagName} overflows`);
  }
  for (const each of document.querySelectorAll("table, img")) {
    const box = each.parentElement, scrolls = ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    if (each.offsetWidth > box.clientWidth + 1 && !scrolls) found.push(`${each.tagName} is wider than its box`);
  }
  for (const each of document.querySelectorAll("th, td")) {
    if (each.scrollWidth > each.clientWidth + 1) found.push(`a cell is cut: ${each.textContent}`);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on PATH, and BOOTVIT_CHROMIUM is not set")
    with page(path) as tab:
        yield tab


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("browser")
    write_runs(folder / "runs")
    reason = "out of memory: " + "a-very-long-word" * 12
    make_run(folder / "runs", "broken" + "-and-long" * 20, None, status="failed", final=None, reason=reason)
    runs = write_report(collect_folders([folder / "runs"]), folder / "of-runs")
    sweep = write_sweep_report(make_sweep(folder), folder / "of-sweep")
    return [next(file for file in files if file.suffix == ".html") for files in (runs, sweep)]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off(browser: Page, reports: list[Path], width: int) -> None:
    for report in reports:
        browser.open(report, width)
        assert browser.run("document.querySelectorAll('table').length") > 1
        assert browser.run(CUT) == [], report
        assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")


def test_a_click_sorts_a_table_by_its_numbers(browser: Page, reports: list[Path]) -> None:
    browser.open(reports[1], 1280)
    column = "[...document.querySelectorAll('table')].at(-1).tBodies[0].rows"
    head = "[...document.querySelectorAll('table')].at(-1).tHead.rows[0].cells"
    names = browser.run(f"[...{head}].map(each => each.textContent)")
    place = names.index("time") if "time" in names else 0
    for order in (1, -1):
        browser.run(f"{head}[{place}].firstChild.click()")
        shown = browser.run(f"[...{column}].map(row => row.cells[{place}].dataset.order ?? '')")
        values = [float(value) for value in shown if value]
        assert values == sorted(values)[::order], json.dumps(shown)
