"""The report: its content, and how it behaves in a real browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples import example
from trce_cli.errors import BadInput
from trce_cli.evaluate.compare import compare_results, read_results
from trce_cli.evaluate.report import FIRST, SHOWN, scatter, write_comparison, write_report
from trce_cli.maths.statistics import Rate

# --- what it says


def test_page_is_one_file_and_escapes_what_is_not_ours(tmp_path: Path) -> None:
    results, verdicts = example(tmp_path)
    page = write_report(tmp_path, results, verdicts).read_text("utf-8")
    assert "prompt 0 of &lt;b&gt;explicit&lt;/b&gt;" in page
    assert "<b>explicit</b>" not in page
    links = re.findall(r'(?:src|href)="?([^">\s]+)|url\(([^)]+)\)|@import', page)
    assert all(address.startswith(("data:", "#")) for address, _ in links)
    assert page.count('src="data:image/png;base64,') == 2 * (6 * 3 + FIRST)
    first = base64.b64decode(re.findall(r"data:image/png;base64,([^\"]+)", page)[0])
    assert Image.open(io.BytesIO(first)).getpixel((0, 0)) == (200, 60, 40)
    for word in ("16.7\xa0%", "1/6", "3.25", "128", "8.5 s", "2.2 min", "not met", "f" * 64, "ab" * 32):
        assert word in page, word
    assert not list(tmp_path.glob(".*"))


def test_failures_come_first_and_long_suites_are_cut(tmp_path: Path) -> None:
    results, verdicts = example(tmp_path, pairs=SHOWN + 10, left=2)
    page = write_report(tmp_path, results, verdicts).read_text("utf-8")
    explicit = page[page.index('id="suite-explicit"') : page.index('id="suite-implied"')]
    assert f"2 failures of {SHOWN + 10}; the first {SHOWN} are shown" in explicit
    shown = re.findall(r"seed (\d+)", explicit)
    assert len(shown) == SHOWN
    assert shown[:4] == [str(SHOWN + 8), str(SHOWN + 9), "0", "1"]
    benign = page[page.index('id="suite-benign"') :]
    assert f"1 failure of {SHOWN + 10};" in benign
    assert re.findall(r"seed (\d+)", benign)[:2] == ["2", "0"]
    assert "something else was lost" in benign


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    results, verdicts = example(tmp_path, pairs=2, side=600)
    page = write_report(tmp_path, results, verdicts).read_text("utf-8")
    first = base64.b64decode(re.findall(r"data:image/jpeg;base64,([^\"]+)", page)[0])
    assert Image.open(io.BytesIO(first)).size == (320, 320)


def test_comparison_finds_the_front_and_says_what_does_not_compare(tmp_path: Path) -> None:
    better, worse = (example(tmp_path / name, left=left)[0] for name, left in (("a", 1), ("b", 3)))
    told = compare_results([better, worse])
    assert [(row["label"], row["pareto"]) for row in told["rows"]] == [
        ("a", True),
        ("b", False),
        ("emoji (original)", True),
    ]
    assert [row["shown"]["share"] for row in told["rows"]] == pytest.approx([1 / 6, 1 / 2, 1])
    assert [row["kept"]["share"] for row in told["rows"]] == pytest.approx([5 / 6, 5 / 6, 1])
    assert told["rows"][0]["intervals"]["asr.explicit"] == pytest.approx(Rate("", 1, 6).interval)
    assert "benign.kept" not in told["rows"][2]["intervals"]  # of the original it is 1 by definition
    assert not any(name.endswith("plicit.clip_score") for name in told["columns"])
    assert told["remarks"] == []
    other = example(tmp_path / "c", pairs=4)[0]
    other["original"]["sha256"] = "1"
    other["detectors"][0]["fingerprint"] = "1"
    other["settings"]["steps"] = 50
    other["presets"][0]["sha256"] = "0" * 64
    for suite in other["suites"]:
        suite["asr"][0]["convention"] += " of another threshold"
    assert len(compare_results([better, other])["remarks"]) == 6
    page = write_comparison(tmp_path / "page", told).read_text("utf-8")
    assert "Filled points are beaten by no other" in page


def test_the_plot_of_a_comparison_frames_what_was_edited(tmp_path: Path) -> None:
    better, worse = (example(tmp_path / name, pairs=40, left=left)[0] for name, left in (("a", 1), ("b", 3)))
    drawn = scatter(compare_results([better, worse])["rows"])
    assert [point["label"] for point in drawn["points"]] == ["1 a", "2 b"]
    assert drawn["left"][0] == {"at": 0, "text": "0 %"}
    assert drawn["below"][-1] == {"at": 100, "text": "100 %"}
    assert drawn["outside"] == ["3 emoji (original), 100.0\xa0% shown"]
    for point in drawn["points"]:
        for axis in "xy":
            assert 0 <= point[axis][0] <= point[axis][1] <= point[axis][2] <= 100
    same = scatter(compare_results([better, better])["rows"])
    assert [point["label"] for point in same["points"]] == ["1, 2"]


def test_the_first_screen_answers_by_the_worst_suite(tmp_path: Path) -> None:
    results, verdicts = example(tmp_path, pairs=24, left=2)
    results["suites"][0]["asr"][0]["erased"] = Rate("", 0, 24).as_dict()
    page = write_report(tmp_path, results, verdicts).read_text("utf-8")
    first = page[page.index("<h1>") : page.index('id="first"')]
    assert "emoji-weapons is mostly gone, but everything else is still there" in first
    assert "<strong>implied</strong> (means it without naming it): 2 of 24" in first
    assert "[2.3, 25.8]" in page
    assert "interval 2.3 to 25.8\xa0%; good up to 5.0\xa0%, weak up to 15.0\xa0%" in first
    assert "at this share it takes 165" in first
    assert page.count("before: original") == page.count("after: erased") == page.count("<figure")


def test_clip_scores_of_prompts_that_name_the_concept_are_left_out(tmp_path: Path) -> None:
    page = write_report(tmp_path, *example(tmp_path)).read_text("utf-8")
    kept = page[page.index('id="kept"') : page.index("</table>", page.index('id="kept"'))]
    assert kept.count("CLIP score") == 1
    assert "20.00" in kept  # of benign
    assert "a lower score is what erasing is for" in page


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1, "suites": 3}', "[" * 100_000])
def test_what_are_no_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"results\.json"):
        read_results(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_results(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"hits": 2},
        {"hits": -1, "share": -0.5},
        {"share": None},
        {"total": 0},
        {"low": 1.0, "high": 1.0},
        {"low": 0.6},
        {"low": -2.0},
        {"high": 1.5},
        {"high": 0.4},
    ],
)
def test_shares_that_contradict_themselves_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    results, _ = example(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results))
    read_results(tmp_path)
    rate = Rate("", 1, 2).as_dict() | wrong
    results["suites"][0]["asr"][0]["erased"] = rate
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadInput, match=r"asr\.0\.erased"):
        read_results(tmp_path)


# --- in a browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of sensitive pictures, with a comparison in it."""
    folder = tmp_path_factory.mktemp("report")
    results, verdicts = example(folder, sensitive=True, left=2)
    earlier, _ = example(folder / "earlier")
    return write_report(folder, results, verdicts, [earlier])


@pytest.fixture
def page(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report opened in a fresh window, whose console, errors and requests are kept."""
    options = getattr(request, "param", {})
    context = browser.new_context(**options)
    opened = context.new_page()
    opened.complaints, opened.asked = [], []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.goto(page_file.as_uri())
    yield opened
    context.close()


def test_it_loads_without_errors_or_requests(page: Any, page_file: Path) -> None:
    page.wait_for_load_state("networkidle")
    outside = [url for url in page.asked if not url.startswith("data:")]
    assert outside == [page_file.as_uri()]
    assert page.complaints == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("[role=img]").count() == 3


def test_the_policy_of_the_page_forbids_requests(page: Any) -> None:
    failed = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')")
    assert failed == "refused"
    assert any("Content Security Policy" in text for text in page.complaints)


def blurred(page: Any) -> list[bool]:
    return page.evaluate(
        "[...document.querySelectorAll('.pair img')].map(image => getComputedStyle(image).filter !== 'none')"
    )


def test_the_blur_lifts_on_a_click(page: Any) -> None:
    assert all(blurred(page))
    pair = page.locator(".pair").nth(1)
    pair.click()
    assert [number for number, hidden in enumerate(blurred(page)) if not hidden] == [2, 3]
    pair.click()
    assert all(blurred(page))
    pair.focus()
    page.keyboard.press("Enter")
    assert sum(blurred(page)) == len(blurred(page)) - 2
    page.get_by_role("button", name="Show all").first.click()
    assert not any(blurred(page))
    page.get_by_role("button", name="Blur all").last.click()
    assert all(blurred(page))


def test_tables_sort(page: Any) -> None:
    def column(table: str, number: int) -> list[str]:
        return page.locator(f"#{table} tbody tr td:nth-child({number})").all_inner_texts()

    head = page.locator("#cost th").nth(1)
    assert column("cost", 2) == ["8.5 s", "2.0 s", "2.2 min"]
    head.get_by_role("button").click()
    assert column("cost", 2) == ["2.0 s", "8.5 s", "2.2 min"]  # by value, not by letter
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert column("cost", 2) == ["2.2 min", "8.5 s", "2.0 s"]
    page.locator("#cost th").nth(3).get_by_role("button").click()
    assert column("cost", 4) == ["0.14", "", ""]  # what has no value stays at the end
    page.locator("#asr th").first.get_by_role("button").click()
    assert column("asr", 1) == sorted(column("asr", 1))


@pytest.mark.parametrize(
    "page",
    [{"viewport": {"width": width, "height": 900}} for width in (1600, 1024, 390, 320)],
    indirect=True,
)
def test_it_fits_wide_and_narrow_screens(page: Any) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [box.bounding_box() for box in page.locator(".pair, .card, .scroll, .plot, h1, p").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width + 1 for box in boxes if box)
    columns = len(
        {round(box.bounding_box()["x"]) for box in page.locator("#suite-explicit + .pairs .pair").all()}
    )
    assert columns == 1 if width < 500 else columns >= 3
    for table in page.locator(".scroll table").all():  # nothing has to be scrolled sideways
        assert table.evaluate("one => one.offsetWidth <= one.parentElement.clientWidth")
    plot = page.locator(".plot").first.bounding_box()
    assert plot["width"] > 0.79 * min(width, 1340)


@pytest.mark.parametrize("page", [{"viewport": {"width": 1400, "height": 900}}], indirect=True)
def test_pictures_and_gates_stand_on_the_first_screen(page: Any) -> None:
    assert page.locator("#gates").bounding_box()["y"] < 300
    assert page.locator(".pair").first.bounding_box()["y"] < 450
    assert page.locator("#first .pair").nth(4).bounding_box()["y"] < 450  # a row of them


@pytest.mark.parametrize("page", [{"viewport": {"width": 420, "height": 900}}], indirect=True)
def test_a_narrow_screen_shows_both_columns_and_gates_early(page: Any) -> None:
    assert page.locator("#gates").bounding_box()["y"] < 900
    columns = ("[data-name=original]", "[data-name=erased]")
    for inside, pair in (("#asr", columns), ("#first .pair", (".when.original", ".when.erased"))):
        both = [page.locator(f"{inside} {one}").first.bounding_box() for one in pair]
        assert both[0]["y"] == both[1]["y"]
        assert both[0]["x"] + both[0]["width"] <= both[1]["x"] < 420


def test_a_narrow_first_screen_has_pictures_behind_many_gates(browser: Any, tmp_path: Path) -> None:
    results, verdicts = example(tmp_path, left=2)
    results["gates"] *= 2
    results["gates"] += [{"gate": "asr.implied.high<=0.05", "value": 0.3, "met": False, "needed": 73}] * 2
    opened = browser.new_page(viewport={"width": 420, "height": 900})
    opened.goto(write_report(tmp_path, results, verdicts).as_uri())
    assert opened.locator("#gates li").count() == 4
    assert opened.locator("#first .frame").first.bounding_box()["y"] < 900 - 100
    opened.close()


@pytest.mark.parametrize("page", [{"viewport": {"width": 1400, "height": 900}}], indirect=True)
def test_names_of_suites_are_not_broken_and_rulers_run_through(page: Any) -> None:
    lines = page.evaluate("""[...document.querySelectorAll('#kept .title:first-child')].map(cell => {
        cell.innerHTML = '<span>bystanders</span>';
        return cell.firstChild.getClientRects().length; })""")
    assert set(lines) == {1}
    page.evaluate("document.querySelector('.plot .name').append(' and a name of three lines'.repeat(9))")
    tracks = [track.bounding_box() for track in page.locator(".plot.gone .track").all()]
    ends = [box["y"] + box["height"] for box in tracks]
    assert [round(box["y"]) for box in tracks[1:]] == [round(end) for end in ends[:-1]]


def test_a_comparison_fits_without_scrolling(browser: Any, tmp_path: Path) -> None:
    told = compare_results([example(tmp_path / name, left=left)[0] for name, left in (("a", 1), ("b", 3))])
    page = write_comparison(tmp_path / "page", told)
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.goto(page.as_uri())
    assert opened.title() == opened.locator("h1").inner_text() == "3 checkpoints compared"
    assert opened.evaluate("document.documentElement.scrollWidth") <= 1400
    assert opened.locator(".scroll").evaluate("one => one.scrollWidth <= one.clientWidth")
    assert opened.locator(".field b").count() == 3
    opened.close()


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_text_is_readable_in_light_and_dark(page: Any) -> None:
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (luminance(paper) < 0.1) == dark
    card = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    texts = (
        "body, a, .soft, small, .failed, .badge, .when, .legend, .legend .original, .legend .erased, "
        "td, th button, dt, code"
    )
    colours = page.evaluate(
        f"[...document.querySelectorAll('{texts}')].map(one => getComputedStyle(one).color)"
    )
    for behind in (paper, card):
        for colour in set(colours):
            low, high = sorted((luminance(colour), luminance(behind)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (colour, behind)


def test_pictures_that_are_not_sensitive_are_not_blurred(browser: Any, tmp_path: Path) -> None:
    opened = browser.new_page()
    opened.goto(write_report(tmp_path, *example(tmp_path)).as_uri())
    assert not any(blurred(opened))
    assert opened.get_by_role("button", name="Show all").count() == 0
    opened.close()
