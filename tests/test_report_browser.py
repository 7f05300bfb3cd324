"""The report in a real browser: what a reader does with it, and what hostile text does not."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("needs chromium or google-chrome on the PATH", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "report_runs", Path(__file__).with_name("report_runs.py")
)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
record, write_run = runs.record, runs.write_run

SCRIPT = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='o'\">"
)
TURNED = "\u202egnp.exe\u202c \u200bzero"
METRICS = [{"step": i, "train/loss": 1 / (i + 1), "train/lr": 0.1} for i in range(40)]


@pytest.fixture(scope="module")
def browser():
    # as root, and in containers, Chromium cannot make its own sandbox
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    from sso_lightning.report.command import write_report

    root = tmp_path_factory.mktemp("runs")
    first = [record(f"q{i}") for i in range(60)]
    first[7] = record("hostile", good=SCRIPT, features=[SCRIPT[:40]], bad=TURNED)
    first[8] = record("long", good="x" * 100_000)
    second = [
        record(
            f"q{i}",
            means={("query", "bad"): -0.4 - i / 1000},
            features=["Safety"] if i % 2 else ["Accuracy"],
        )
        for i in range(60)
    ]
    second[3].token_scores = {"policy/query/good": [-0.1] * 5 + [-6.0] * 5}
    second[4] = record("q4", content_flags=["violence"], good="flagged words")
    sets = {"iteration-00": first, "iteration-01": second}
    run = write_run(root / "one", sets, metrics=METRICS, shard=30)
    other = write_run(root / "two", {"iteration-00": [record("q1"), record("q2")]})
    out = root / "page.html"
    write_report([run, other], out, max_records=1000)
    return out


@pytest.fixture
def open_page(browser, page_file):
    """Opens the page in a fresh context; a request, an error or a line in the console fails."""
    contexts, heard = [], []

    def open_it(path=page_file, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        assert heard == [path.as_uri()]
        heard.clear()
        if folder := os.environ.get("REPORT_SCREENSHOTS"):
            number = len([*Path(folder).iterdir()])
            page.screenshot(path=f"{folder}/{number}.png", full_page=True)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not heard


def rows(page):
    return page.locator("#list li")


def count(page):
    return page.locator("#count").inner_text()


def search(page, words):
    page.fill("#search", words)
    page.press("#search", "Enter")  # at once, not when one stops typing


def test_search_filter_and_sort(open_page):
    page = open_page()
    assert count(page) == "122 records of this page. 122 records of all 122 pass the filters."
    assert rows(page).count() == 50
    page.click("#more")
    assert rows(page).count() == 100
    page.select_option("#f-run", label="one (120)")
    page.select_option("#f-set", label="iteration-01 (60)")
    assert count(page).startswith("60 records of this page. 60 records of all 122")
    page.select_option("#f-feature", label="Safety (30)")
    assert count(page).startswith("30 records of this page.")
    page.select_option("#sort", "gap_logp")
    gaps = [page.locator("#list .meta bdi").nth(i).inner_text() for i in range(2)]
    assert gaps == ["q1", "q3"]  # -.5 - -.401 and -.5 - -.403
    page.click("#direction")
    assert page.locator("#list .meta bdi").first.inner_text() == "q59"
    search(page, "good one of Q15")
    assert rows(page).count() == 1
    search(page, "")
    page.select_option("#f-flag", "gap")
    page.select_option("#f-feature", "")
    assert "59 records of all" in count(page)  # one was made anew
    page.select_option("#f-flag", "flagged")
    assert rows(page).count() == 1
    search(page, "nothing has this")
    assert rows(page).count() == 0


def until(page, said, wanted):
    """Wait for what a page does in its own time after a key or a click."""
    for _ in range(150):
        if said() == wanted:
            return
        page.wait_for_timeout(20)
    assert said() == wanted


def open_first(page):
    row = rows(page).first
    name = row.locator(".meta bdi").first.inner_text()
    row.locator("button").click()
    page.locator("dialog[open] #pair-title", has_text=name).wait_for()


def leave(page):
    page.keyboard.press("Escape")
    page.locator("dialog[open]").wait_for(state="detached")
    until(page, lambda: "#pair" in page.url, False)


def test_an_alarm_leads_to_the_records_that_prove_it(open_page):
    page = open_page()
    alarm = page.locator(".alarm").first
    assert "Gap closing: first in iteration-01" in alarm.inner_text()
    links = alarm.locator(".proof a")
    ids = [links.nth(i).inner_text() for i in range(3)]
    assert ids == ["q0", "q1", "q2"]
    links.nth(1).click()
    dialog = page.locator("dialog[open]")
    page.locator("#pair-title", has_text="q1 in one: iteration-01").wait_for()
    assert "gap -0.099" in dialog.inner_text()
    leave(page)
    # back where one was
    until(page, lambda: page.evaluate("document.activeElement.textContent"), "q1")


def test_a_pair_by_keyboard_alone(open_page):
    page = open_page()
    page.keyboard.press("/")
    page.keyboard.type("what of q1?")
    page.locator("#count").filter(has_text="3 records").wait_for()  # without Enter
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#list') !== null"):
            break
    page.keyboard.press("Enter")
    page.locator("#pair-title", has_text="q1 in one: iteration-00").wait_for()
    page.keyboard.press("ArrowRight")
    page.locator("#pair-title", has_text="iteration-01").wait_for()
    page.keyboard.press("ArrowLeft")
    page.locator("#pair-title", has_text="iteration-00").wait_for()
    body = page.locator("#pair-body").inner_text()
    for part in (
        "What of q1?",
        "State only what is correct",
        "Mix up facts",
        "The plain one of q1.",
    ):
        assert part in body
    page.locator("#pair").get_by_role(
        "link", name="two: iteration-00"
    ).click()  # the same query in the other run
    page.locator("#pair-title", has_text="two").wait_for()
    leave(page)
    until(page, lambda: page.evaluate("document.activeElement.closest('#list') !== null"), True)


def test_themes_follow_the_system_and_a_switch(open_page):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    white, black = ground(light), ground(dark)
    assert white != black
    light.focus("#theme")
    said = []
    for _ in range(3):
        light.keyboard.press("Enter")
        said.append((light.locator("#theme").inner_text(), ground(light)))
    assert said == [("Theme: light", white), ("Theme: dark", black), ("Theme: system", white)]
    light.emulate_media(color_scheme="dark")
    assert ground(light) == black


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page()
    search(page, "owned")
    open_first(page)
    assert page.locator("#pair-body .good .text").inner_text() == SCRIPT
    # what turns or hides text is shown by its code
    marks = page.locator("#pair-body .bad .ctl").all_inner_texts()
    assert marks == ["U+202E", "U+202C", "U+200B"]
    assert page.locator("#pair-body .bad .text").inner_text() == "U+202Egnp.exeU+202C U+200Bzero"
    assert page.title() == "Run report: one, two"
    assert page.locator("main img, dialog img").count() == 0
    leave(page)
    search(page, "xxxxxxxx")
    open_first(page)
    assert len(page.locator("#pair-body .good .text").inner_text()) == 20_000
    assert "the whole text has 100,000 characters" in page.locator("#pair-body").inner_text()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]


def test_folded_text_is_seen_only_when_opened(open_page):
    page = open_page()
    page.select_option("#f-flag", "flagged")
    assert "flagged words" not in rows(page).first.inner_text()
    assert "(folded: 13 characters)" in rows(page).first.inner_text()
    open_first(page)
    words = page.locator("#pair-body").get_by_text("flagged words")
    assert not words.is_visible()
    page.locator("#pair-body .good summary").focus()
    page.keyboard.press("Enter")
    words.wait_for()
    leave(page)
    page.select_option("#f-flag", "folded")
    assert count(page).startswith("31 records of this page. 31 records of all 122")
    search(page, "What of q5?")
    assert "The bad one" not in rows(page).first.inner_text()
    open_first(page)
    assert not page.get_by_text("The bad one of q5.").is_visible()


def test_tokens_are_shaded_where_their_scores_are_stored(open_page):
    page = open_page()
    page.select_option("#f-set", "iteration-01")
    search(page, "What of q3?")
    open_first(page)
    good = page.locator("#pair-body .good")
    assert good.get_by_label("under x+ (not stored)").is_disabled()
    good.get_by_label("under x", exact=True).check()
    spans = good.locator(".text > span")
    assert spans.count() == 10
    assert spans.last.get_attribute("title") == "-6.00 nats"
    depths = [
        float(s.rpartition(", ")[2].rstrip(")"))
        for s in spans.evaluate_all(
            "spans => spans.map((span) => getComputedStyle(span).backgroundColor)"
        )
    ]
    assert depths[0] < 0.1 < 0.7 < depths[-1]
    good.get_by_label("none").check()
    assert good.locator(".text").inner_text() == "The good one of q3."
    leave(page)
    search(page, "What of q6?")
    open_first(page)
    assert (
        "Log-probabilities of single tokens were not stored" in page.locator("#pair").inner_text()
    )


def test_a_phone_shows_it_without_scrolling_sideways(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    rows(page).first.locator("button").tap()
    page.locator("dialog[open]").wait_for()
    assert page.evaluate("document.getElementById('pair').scrollWidth") <= 360
    assert page.locator("#close").is_visible()


def test_without_scripts_alarms_tables_and_charts_are_still_there(open_page, page_file, browser):
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert "Gap closing: first in iteration-01" in page.locator("#health").inner_text()
    assert page.locator("figure.chart").first.is_visible()
    assert "needs JavaScript" in page.locator("#pairs").inner_text()
    context.close()
