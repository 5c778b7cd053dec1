"""The HTML report: what is in the file, and what a real browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hand_made_tables import examples_of, many_benchmarks, one_benchmark, photograph, renamed, value, wide_table
from PIL import Image

from prunetune.evaluation.report.tables.layouts.examples import Answered, Examples, Picture
from prunetune.evaluation.report.tables.layouts.html.page_data import packed
from prunetune.evaluation.report.tables.layouts.html.report import to_html, write_report
from prunetune.evaluation.report.tables.layouts.html.series import SHAPES, series_of

HOSTILE = '</script><img src=x onerror="window.attacked = true"> <b>\'&amp;\u2028 {{ 7 * 7 }}'


class Elements(HTMLParser):
    """The elements of a page, the text outside scripts, and what scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.attributes = [], "", [], []
        self.within = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.within = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within == "script":
            self.scripts[-1] += data
        elif not self.within:
            self.text += f"{data} "


def data_of(text):
    return json.loads(Elements(text).scripts[0])


# ---- the file --------------------------------------------------------------------------------------------------------


def test_thirty_rows_and_24_photographs_stay_below_3_mb(tmp_path):
    table = wide_table()
    write_report(table, examples_of(table, 24), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(table.rows) == 31 and len(data_of(text)["examples"]) == 24 and len(text.encode()) < 3_000_000


def test_the_page_names_no_address_and_lets_nothing_in():
    text = to_html(wide_table(), examples_of(wide_table(), 2))
    assert set(re.findall(r"[a-z]+://[^\s\"'<>]*", text)) == {"http://www.w3.org/2000/svg"}
    page = Elements(text)
    assert not [found for found in page.attributes if found[0] == "src" or found[0].startswith("on")]
    policy = next(found for name, found in page.attributes if name == "content" and "default-src" in found)
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    style = text.partition("<style>")[2].partition("</style>")[0]
    for inline in (style, page.scripts[1]):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_text_from_models_and_files_stays_text():
    """The hostile page has the elements of the harmless one, and every text comes back to the letter."""
    table = many_benchmarks()
    harmless = to_html(renamed(table, "text"), examples_of(table, 3))
    examples = examples_of(table, 3, said=HOSTILE)
    bad = Examples(how=HOSTILE, examples=[one.model_copy(update={"question": HOSTILE}) for one in examples.examples])
    text = to_html(renamed(table, HOSTILE), bad)
    page = Elements(text)
    assert page.tags == Elements(harmless).tags and page.tags.count("script") == 2 and "<img" not in text
    data = json.loads(page.scripts[0])
    assert data["examples"][0]["question"] == HOSTILE and data["rows"][0]["label"] == f"dense {HOSTILE}"
    assert data["examples"][2]["arms"]["dense"]["said"].endswith(f"{HOSTILE} 2")
    assert page.text.count("onerror=") > 5 and "49" not in page.text.partition("{{ 7 * 7 }}")[0][-200:]


def test_cells_are_those_of_the_table():
    text = re.sub(r"\s+", " ", Elements(to_html(many_benchmarks())).text)
    assert "divprune + tuned projector 64 80.5 ± 0.3 [79.5, 81.5]" in text
    assert "+11.4 * [+10.0, +12.9] p = 0.025" in text
    assert "DivPrune (quoted: arXiv 2503.02175, table 1) 64 70.1 ours +0.1" in text
    assert "hidden answers: vqav2_upload.json" in text and "arms may differ in device: cpu, cuda" in text
    assert "Answers that flipped" not in text  # there are no examples


def test_what_is_drawn_are_the_tables_own_numbers():
    data = data_of(to_html(many_benchmarks(), examples_of(many_benchmarks(), 1)))
    assert [one["title"] for one in data["across"]] == ["visual tokens", "TFLOPs", "prefill ms"]
    assert data["upwards"][0] == {"key": "relative", "title": "relative average (%)", "digits": 1}
    tuned = data["rows"][2]
    assert tuned["upwards"]["relative"] == [92.84, 91.5, 94.2] and tuned["across"]["prefill ms"] == [15.2, 14, 16]
    assert tuned["upwards"]["value coco/cider"] == [1.051] and "value vqav2/accuracy" not in tuned["upwards"]
    assert data["quoted"][0]["upwards"]["value pope/f1"] == [70.1] and data["quoted"][0]["across"] == {"tokens": [64]}
    kinds = data_of(to_html(one_benchmark()))["upwards"]
    assert [one["title"] for one in kinds] == ["of dense (%)", "world accuracy (%)", "where (%)", "what (%)"]


def test_examples_of_arms_that_are_not_in_the_table_are_left_out():
    table = many_benchmarks()
    two = table.model_copy(update={"rows": table.rows[:2], "quoted": []})
    text = to_html(two, examples_of(table, 2))
    assert [list(one["arms"]) for one in data_of(text)["examples"]] == [["dense", "free"]] * 2
    none = to_html(two.model_copy(update={"rows": []}), examples_of(table, 2))
    assert data_of(none)["examples"] == [] and "Answers that flipped" not in none


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 24), (7, 9)])
def test_packed_positions_are_the_kept_ones(grid):
    size = grid[0] * grid[1]
    kept = sorted(np.random.default_rng(0).permutation(size)[: (size + 1) // 2].tolist())
    digits = packed(kept, grid)
    number = int(digits, 16)  # the first patch is the highest bit
    assert [place for place in range(size) if number >> (4 * len(digits) - 1 - place) & 1] == kept
    assert packed([], (2, 2)) == "0" and packed([3], (2, 2)) == "1"


def test_pictures_are_kept_exactly_where_that_is_small():
    pixels = np.zeros((72, 72, 3), dtype=np.uint8)
    pixels[10:20, 30:50] = (250, 20, 90)
    small = Picture.of(pixels)
    assert small.media == "image/png" and (small.width, small.height) == (72, 72)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(small.data)))), pixels)
    large = Picture.of(photograph(0, side=900))
    assert large.media == "image/jpeg" and (large.width, large.height) == (448, 448)
    with pytest.raises(ValueError, match="should match pattern"):
        Picture(media="image/png", data='"><script>', width=1, height=1)


def test_positions_outside_of_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"kept positions are from 0 to 3, got \[4\]"):
        Answered(prediction="", score=1, kept=[4], grid=(2, 2))


# ---- looks -----------------------------------------------------------------------------------------------------------


def test_no_two_series_are_told_apart_by_colour_alone():
    table = wide_table()
    looks = series_of(table)
    distinct = set(looks.values())
    assert len(distinct) == 11 and len({(one.shape, one.variant) for one in distinct}) == 11
    for row in table.rows:
        if row.twin:  # a tuned arm looks like its twin, filled
            twin = looks[row.twin]
            assert (looks[row.id].shape, looks[row.id].colour) == (twin.shape, twin.colour)
            assert (looks[row.id].variant, twin.variant) == ("tuned", "training-free")
    assert looks["dense"].level and not looks["divprune-64"].level


def test_two_projectors_tuned_for_one_arm_are_drawn_differently():
    table = many_benchmarks()
    tuned = table.rows[2]
    others = [
        tuned.model_copy(update={"id": f"t{number}", "label": f"tuned otherwise {number}"}) for number in range(5)
    ]
    looks = series_of(table.model_copy(update={"rows": [*table.rows, *others]}))
    assert len({(one.shape, one.variant) for one in looks.values()}) == 8
    assert all(one.shape in SHAPES for one in looks.values())


# ---- in a browser ----------------------------------------------------------------------------------------------------

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One session for all checks; there is none where no browser is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    session.get("about:blank")  # and not the browser's own first page, which loads what it likes
    yield session
    session.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of a wide table, and of one whose texts are hostile."""
    folder = tmp_path_factory.mktemp("pages")
    table = wide_table()
    write_report(table, examples_of(table, 12), folder / "wide.html")
    small = many_benchmarks()
    # A label of one long word must not widen the page either.
    hostile = renamed(small, HOSTILE + "w" * 90)
    examples = examples_of(small, 4, side=72, grid=12, said=HOSTILE)
    write_report(hostile, examples, folder / "hostile.html")
    write_report(small.model_copy(update={"rows": small.rows[:1], "quoted": []}), None, folder / "short.html")
    return folder


@pytest.fixture
def opened(browser, pages):
    """Opens a page at a width; whatever the test does there, nothing may be loaded and nothing may fail."""
    browser.get_log("performance")
    browser.get_log("browser")

    def open_page(name, width=1280, dark=False):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        scheme.append({"name": "prefers-reduced-motion", "value": "reduce"})  # what moves can't be clicked
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme})
        browser.get((pages / f"{name}.html").as_uri())
        return browser

    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file://", "data:image/", "data:,")) for url in asked), asked
    assert browser.execute_script("return window.attacked") is None


def find(browser, selector):
    return browser.find_element("css selector", selector)


def labels(browser):
    script = "return [...document.querySelectorAll('#rows tbody:not(.quoted) tr')].map(row => row.cells[0].innerText + "
    return browser.execute_script(script + "' ' + row.cells[1].innerText)")


def ranked(table, key, higher=True):
    """Labels as a heading should sort them, best first; equals stay as they were."""
    rows = sorted(table.rows, key=lambda row: row.values[key].value, reverse=higher)
    return [f"{row.label} {row.kept:g}" for row in rows]


def test_headings_sort_by_click_and_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    page, table = opened("wide"), wide_table()
    original = [f"{row.label} {row.kept:g}" for row in table.rows]
    assert labels(page) == original
    for key, title, higher in (("pope/f1", "pope f1", True), ("chair/chairs", "chair chairs", False)):
        heading = next(
            one for one in page.find_elements("css selector", "#rows thead th") if one.text.startswith(title)
        )
        button = heading.find_element("css selector", "button")
        best, worst = ("descending", "ascending") if higher else ("ascending", "descending")
        for act in (button.click, lambda own=button: own.send_keys(Keys.ENTER)):
            act()
            assert heading.get_attribute("aria-sort") == best and labels(page) == ranked(table, key, higher)
            button.send_keys(Keys.SPACE)
            assert heading.get_attribute("aria-sort") == worst and labels(page) == ranked(table, key, not higher)
            act()
            assert heading.get_attribute("aria-sort") == "none" and labels(page) == original
    page.find_element("css selector", "#rows thead button").click()
    assert labels(page)[0].startswith("adaptive") and "sorted by arm, ascending" in page.page_source
    assert find(page, "tbody.quoted tr").text.startswith("DivPrune")  # quoted rows stay below


def test_missing_numbers_are_sorted_last_both_ways(opened):
    page = opened("wide")
    title = "tuned - training-free"
    button = next(one for one in page.find_elements("css selector", "#rows thead button") if one.text.startswith(title))
    for _ in range(2):
        button.click()
        order = labels(page)
        assert all("tuned" in label for label in order[:15]) and not any("tuned" in label for label in order[15:])


def test_further_columns_are_shown_on_request(opened):
    page = opened("wide")
    hidden = [one for one in page.find_elements("css selector", "#rows thead th") if not one.is_displayed()]
    titles = ["pope f1, tuned - training-free", "pope accuracy", "TFLOPs", "prefill ms"]
    assert len(hidden) == len(titles)
    for title, one in zip(titles, hidden, strict=True):
        assert one.get_attribute("textContent").strip().startswith(title)
    for title, shown in (("and gains", titles[:1]), ("and further metrics", titles[1:2]), ("and costs", titles[2:]),
                         ("all", titles), ("usual", [])):  # fmt: skip
        choose(page, "#columns", title)
        assert [name for name, one in zip(titles, hidden, strict=True) if one.is_displayed()] == shown
    choose(page, "#columns", "all")
    assert overflow(page) == []


def test_the_slider_changes_pictures_and_label(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened("wide")
    slider, seen = find(page, "#budget"), []
    for _ in range(4):
        label = find(page, "#budget-label").text
        veil = find(page, "#steps .veil").get_attribute("d")
        told = find(page, "#steps .picture").get_attribute("aria-label")
        assert slider.get_attribute("aria-valuetext") == label
        seen.append((label.partition(" visual")[0], told, veil))
        slider.send_keys(Keys.ARROW_RIGHT)
    assert [one[0] for one in seen] == ["64", "128", "192", "576"]
    assert [one[1] for one in seen] == [f"{kept} of 576 visual tokens kept" for kept in (64, 128, 192, 576)]
    assert len({one[2] for one in seen}) == 4 and seen[3][2] == ""  # nothing is dropped by the dense arm
    # The veil covers exactly what was dropped: as many patches as the runs are long.
    assert sum(int(run) for run in re.findall(r"M\d+ \d+h(\d+)v", seen[0][2])) == 576 - 64
    choose(page, "#series", "divprune + tuned projector")
    assert find(page, "#budget-label").text.startswith("64 visual tokens, relative average (%): 9")


def choose(page, selector, title):
    from selenium.webdriver.support.ui import Select

    Select(find(page, selector)).select_by_visible_text(title)


def test_flipped_answers_are_those_of_the_two_arms(opened):
    page, examples = opened("wide"), examples_of(wide_table(), 12).examples
    for before, after in (("dense", "adaptive-64"), ("adaptive-64", "dense"), ("divprune-64", "divprune-64-tuned")):
        for selector, name in (("#before", before), ("#after", after)):
            row = wide_table().row(name)
            choose(page, selector, f"{row.label}, {row.kept:g} visual tokens")
        change = {one.question: one.arms[after].score - one.arms[before].score for one in examples}
        for which, wanted in (("flipped", {1, -1}), ("gained", {1}), ("lost", {-1}), ("all questions", {1, 0, -1})):
            choose(page, "#which", which)
            shown = [heading.text for heading in page.find_elements("css selector", "#cards h3")]
            assert shown == [question for question, difference in change.items() if difference in wanted]
        gained, lost = ([*change.values()].count(sign) for sign in (1, -1))
        told = find(page, "#flips").text
        assert re.search(rf"Of these 12 questions {gained} (is|are) gained and {lost} lost\.", told), told
    card = find(page, "#cards .card")
    assert len(card.find_elements("css selector", "svg.picture")) == 3
    assert "✓ answer" in card.text or "✗ not answer" in card.text  # a mark, and no colour alone


def test_the_chart_shows_any_column_against_any_cost(opened):
    page = opened("wide")
    assert len(page.find_elements("css selector", "#plot .point")) == 30 + 1  # dense is a level, one row is quoted
    assert len(page.find_elements("css selector", "#plot .bar")) == 30
    first = find(page, "#plot svg").get_attribute("innerHTML")
    choose(page, "#across", "TFLOPs")
    choose(page, "#upwards", "mme perception (points)")
    assert find(page, "#plot svg").get_attribute("innerHTML") != first
    assert len(page.find_elements("css selector", "#plot .point")) == 30  # papers' costs are not known
    # Heights on the screen are in the order of the numbers.
    script = """return [...document.querySelectorAll("#plot .point")].map(point =>
        [point.ariaLabel, point.querySelector(".mark").getBoundingClientRect().y])"""
    drawn = page.execute_script(script)
    numbers = [float(re.search(r"\(points\): ([\d.]+)", told)[1]) for told, _ in drawn]
    heights = [height for _, height in drawn]
    assert np.corrcoef(numbers, heights)[0, 1] < -0.999
    point = find(page, "#plot .point")
    page.execute_script("arguments[0].focus()", point)
    assert find(page, "#tip").is_displayed() and "visual tokens" in find(page, "#tip").text
    button = page.find_elements("css selector", "#legend button")[1]
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert len(page.find_elements("css selector", "#plot .point")) == 27


def overflow(page):
    """What reaches over the page's right edge, other than inside of what scrolls by itself."""
    return page.execute_script("""
        const width = document.documentElement.clientWidth;
        const inside = ".scroll table, .hidden, option";
        const out = [...document.querySelectorAll("body *")].filter(one => !one.closest(inside)
            && one.getBoundingClientRect().right > width + 0.5 && one.getBoundingClientRect().width > 0);
        return [...out.map(one => one.outerHTML.slice(0, 120)),
                ...(document.documentElement.scrollWidth > width ? ["the page"] : [])]""")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["wide", "hostile", "short"])
def test_nothing_overflows(opened, name, width):
    page = opened(name, width)
    assert page.execute_script("return innerWidth") == width and overflow(page) == []


CONTRASTS = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const colour = text => text.match(/[\\d.]+/g).map(Number);
const behind = node => {
    for (let one = node; one; one = one.parentElement) {
        const found = colour(getComputedStyle(one).backgroundColor);
        if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const own = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || own.closest("script, [hidden], option")) continue;
    if (!own.getClientRects().length) continue;
    const style = getComputedStyle(own);
    const front = colour(own.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const [a, b] = [luminance(front), luminance(behind(own))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), own.textContent.trim().slice(0, 40)]);
}
for (const mark of document.querySelectorAll("#legend .mark, #legend .line, #legend .level")) {
    const [a, b] = [luminance(colour(getComputedStyle(mark).stroke)), luminance(behind(mark))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), mark.outerHTML.slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_have_a_contrast_of_4_5(opened, dark):
    page = opened("wide", dark=dark)
    assert page.execute_script("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    found = page.execute_script(CONTRASTS)
    assert len(found) > 300 and min(found)[0] >= 4.5, min(found)
    find(page, "#theme").click()
    assert min(page.execute_script(CONTRASTS))[0] >= 4.5


def test_series_are_told_apart_in_grey(opened):
    """What the legend's marks look like to somebody who sees no colour at all: no two are nearly alike."""
    page = opened("wide")
    boxes = page.execute_script(
        "return [...document.querySelectorAll('#legend .glyph')].map(one => one.getBoundingClientRect().toJSON())"
        ".map(box => [box.x, box.y + scrollY, box.width, box.height].map(Math.round))"
    )
    height = page.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("L"), dtype=float)
    seen = [grey[y : y + tall, x : x + wide] for x, y, wide, tall in boxes]
    assert len(seen) == 12
    shape = np.min([one.shape for one in seen], axis=0)
    cut = [one[: shape[0], : shape[1]] for one in seen]
    for one, other in itertools.combinations(cut, 2):
        assert (np.abs(one - other) > 60).sum() >= 15


def test_hostile_texts_are_shown_as_they_are(opened):
    page = opened("hostile")
    choose(page, "#which", "all questions")
    assert f"{HOSTILE} 0".replace("\u2028", "\n").split()[0] in find(page, "#cards").text
    spoken = page.execute_script("return document.querySelector('#cards .spoken').textContent")
    assert HOSTILE in spoken and page.find_elements("css selector", "img") == []


def test_print_is_light_and_has_no_controls(opened):
    page = opened("wide", dark=True)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not find(page, "nav").is_displayed() and not find(page, "#budget").is_displayed()
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"


def test_without_examples_there_is_still_a_table_and_a_chart(opened):
    page = opened("short")
    assert labels(page) == ["dense 576"] and page.find_elements("css selector", "#answers") == []
    assert len(page.find_elements("css selector", "#plot .level")) == 1


def test_a_table_of_no_numbers_has_no_chart(opened, pages):
    table = one_benchmark()
    rows = [row.model_copy(update={"values": {"world/accuracy": value(None, note="hidden")}, "relative": None,
                                   "by_type": {}, "gains": {}}) for row in table.rows]  # fmt: skip
    write_report(table.model_copy(update={"rows": rows}), None, pages / "hidden.html")
    page = opened("hidden")
    assert "no arm that is shown has both numbers" in find(page, "#plot").get_attribute("textContent")
