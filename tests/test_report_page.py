"""The page of a run in a real browser: it opens without errors, draws, filters, sorts, and runs nothing it shows."""

import json

import pandas as pd
import pytest
from fabricated_run import fabricate_run
from headless_chromium import EXECUTABLE, Chromium

from dgrpo.report.data import write_report
from dgrpo.report.run_folder import read_metrics


@pytest.fixture(scope="module")
def chromium():
    if EXECUTABLE is None:
        pytest.skip("Chromium is not installed")
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return fabricate_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir)


COUNT = "document.querySelectorAll('#rows tr').length"


def choose(chromium, view: int) -> None:
    chromium.evaluate(f"document.querySelectorAll('#views button')[{view}].click()")


def column(chromium, name: str) -> list[str]:
    """The cells of one column of the table of completions."""
    heads = chromium.evaluate("[...document.querySelectorAll('#head th')].map(head => head.textContent)")
    cells = "[...document.querySelectorAll('#rows tr')].map(row => row.children[{}].textContent)"
    return chromium.evaluate(cells.format(heads.index(name)))


def test_page_opens_without_errors_and_draws_its_charts(chromium, page):
    grounds = []
    for dark in (False, True):
        chromium.open(page, dark=dark)
        assert chromium.problems == []
        grounds.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
        titles = chromium.evaluate(
            "[...document.querySelectorAll('#charts h3 span:first-child')].map(t => t.textContent)"
        )
        assert titles[:2] == ["Reward and held-out accuracy", "Reward"]
        assert titles[-1] == "Seconds per step"
        assert len(titles) == 11
        paths = chromium.evaluate(
            "[...document.querySelectorAll('#charts .curve')].map(path => path.getAttribute('d'))"
        )
        assert len(paths) == 14
        assert all(path.count("L") >= 4 and "NaN" not in path for path in paths)
        sizes = chromium.evaluate("[...document.querySelectorAll('#charts .curve')].map(path => path.getBBox().width)")
        assert min(sizes) > 150
        assert chromium.evaluate("document.querySelectorAll('#charts rect').length") == 5 * 40
    assert grounds[0] != grounds[1]


def test_page_fits_its_window(chromium, page):
    for width in (360, 800, 1280):
        chromium.open(page, width=width)
        assert chromium.evaluate("document.documentElement.scrollWidth") == width
        outside = "[...document.querySelectorAll('.chart text')].filter(t => { const a = t.getBoundingClientRect(), "
        outside += (
            "b = t.closest('.chart').getBoundingClientRect(); return a.left < b.left || a.right > b.right; }).length"
        )
        assert chromium.evaluate(outside) == 0
        tops = "[...document.querySelectorAll('#charts svg')].map(svg => svg.getBoundingClientRect().bottom)"
        assert len({round(top) for top in chromium.evaluate(tops)[:3]}) == {360: 3, 800: 2, 1280: 1}[width]


def test_other_metrics_are_drawn_when_opened(chromium, page):
    chromium.open(page)
    assert chromium.evaluate("document.querySelectorAll('#more svg').length") == 0
    chromium.evaluate("document.querySelector('#more-metrics summary').click()")
    chromium.evaluate("new Promise(done => setTimeout(done, 100))")
    assert chromium.evaluate("document.querySelectorAll('#more .curve').length") == 3
    assert chromium.problems == []


def test_pointing_at_a_chart_tells_its_values(chromium, page, run_dir):
    chromium.open(page)
    box = "(box => [box.right - 8, box.top + 50])(document.querySelector('#charts svg').getBoundingClientRect())"
    chromium.move_mouse(*chromium.evaluate(box))
    reward, accuracy = (read_metrics(run_dir)[name][-1][1] for name in ("reward", "eval_accuracy"))
    told = chromium.evaluate("document.getElementById('tip').textContent")
    assert told.startswith(f"step 40reward{float(f'{reward:.3g}'):g}held-out accuracy")


def test_table_filters_sorts_and_opens(chromium, page):
    chromium.open(page)
    assert chromium.evaluate(COUNT) == 40
    chromium.evaluate("document.getElementById('next').click()")
    assert chromium.evaluate(COUNT) == 80
    chromium.evaluate("document.getElementById('filter').focus()")
    chromium.type("PROBLEM 7:")
    filtered = column(chromium, "prompt")
    assert filtered
    assert all(text.startswith("Problem 7:") for text in filtered)
    assert chromium.evaluate("document.querySelector('#rows mark').textContent") == "Problem 7:"
    chromium.type(" no such text")
    assert chromium.evaluate(COUNT) == 0
    assert chromium.evaluate("document.getElementById('none').textContent") == "Nothing matches the filter."

    chromium.open(page)
    chromium.evaluate("[...document.querySelectorAll('#head th')].find(h => h.textContent === 'total').click()")
    totals = [float(text) for text in column(chromium, "total")]
    assert totals == sorted(totals, reverse=True)
    chromium.evaluate("[...document.querySelectorAll('#head th')].find(h => h.textContent === 'total').click()")
    assert column(chromium, "total")[0] == "0.00"
    assert chromium.evaluate("document.querySelector('#head [aria-sort=ascending]').textContent") == "total"
    chromium.evaluate("document.querySelector('#rows tr').click()")
    assert chromium.evaluate("document.querySelectorAll('#rows tr.open').length") == 1
    assert chromium.problems == []


def test_views_show_the_completions_they_name(chromium, page):
    chromium.open(page)
    choose(chromium, 1)
    # A group names its prompt once, and shows all of its advantages.
    prompts, advantages = column(chromium, "prompt"), column(chromium, "advantage")
    assert [bool(text) for text in prompts[:9]] == [True] + [False] * 7 + [True]
    assert all(advantages)
    choose(chromium, 2)
    totals = [float(text) for text in column(chromium, "total")]
    assert totals[0] == 2.0
    assert totals == sorted(totals, reverse=True)
    choose(chromium, 3)
    assert column(chromium, "total")[0] == "0.00"
    choose(chromium, 4)
    changes = [abs(float(text)) for text in column(chromium, "change")]
    assert changes == sorted(changes, reverse=True)
    choose(chromium, 5)
    assert set(column(chromium, "format")) == {"0.00"}
    assert column(chromium, "correctness")[0] == "1.00"
    assert all("because I looked it up" in text for text in column(chromium, "completion"))


def test_what_a_model_writes_is_shown_as_text(chromium, tmp_path):
    run = fabricate_run(tmp_path / "run", steps=8)
    hostile = (
        "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)><b>bold</b>{{script}}\x1b[2J"
    )
    logged = pd.DataFrame({"step": [9], "prompt": [hostile], "completion": [hostile], "correctness_reward": [5.0]})
    logged.to_parquet(run / "completions" / "completions_00009.parquet")
    (run / "samples.json").write_text(
        json.dumps([{"prompt": hostile, "gold": "1", "before": hostile, "after": hostile}])
    )
    chromium.open(write_report(run))
    choose(chromium, 2)
    shown = hostile.replace("\x1b", "\ufffd")
    assert column(chromium, "completion")[0] == shown
    assert chromium.evaluate("document.querySelector('.sample p').textContent") == shown
    assert chromium.evaluate("document.querySelectorAll('main img, main b b, #rows b, .sample b').length") == 0
    assert chromium.problems == []


def test_marks_and_flips_are_shown(chromium, page):
    chromium.open(page)
    marks = chromium.evaluate("[...document.querySelectorAll('.sample .mark')].map(mark => mark.textContent.slice(2))")
    assert marks == ["wrong", "right"] * 5 + ["right", "right"]
    assert chromium.evaluate("document.getElementById('flips').textContent").startswith("240 problems")


def test_page_of_an_empty_run_opens(chromium, tmp_path):
    chromium.open(write_report(tmp_path))
    assert chromium.evaluate("document.getElementById('charts').textContent") == "No metrics yet."
    assert chromium.evaluate("document.getElementById('completions').hidden")
    assert chromium.problems == []


@pytest.mark.slow
def test_report_of_300_steps_is_small_and_opens_fast(chromium, tmp_path):
    run = fabricate_run(tmp_path / "run", steps=300, rows=8, words=400, prompts=400)
    page = write_report(run)
    assert page.stat().st_size < 5_000_000
    chromium.open(page)
    assert 0 < chromium.cpu_seconds() < 1.0
    assert chromium.problems == []
