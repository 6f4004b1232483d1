"""The page in a real browser: asks for nothing, complains of nothing, fits phone, desk and paper, light and dark."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report import report
from pipeline.report.page import tables
from pipeline.report.reproduce import Commands
from tests.report.browser import Browser, chromium, needs_chromium
from tests.report.conftest import HOSTILE, Case

pytestmark = needs_chromium

PHONE, DESK, PAPER = 390, 1280, 680  # px; paper is A4 less its margins
PAPER_HIGH = 1008
UNFOLD = "document.querySelectorAll('details').forEach(part => part.open = true)"

TOO_WIDE = """
const edge = document.documentElement.clientWidth, inside = element => element.closest('.scroll');
return [document.documentElement.scrollWidth - edge, [...document.querySelectorAll('body *')]
  .filter(e => !inside(e) || e.matches('.scroll'))
  .filter(e => e.getBoundingClientRect().right > edge + 0.5).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))];
"""

WITHOUT_WORDS = """
const words = e => e.tagName === 'IMG' ? e.alt : e.getAttribute('aria-label');
return [...document.querySelectorAll('img, svg:not([aria-hidden=true])')].filter(e => (words(e) || '').length < 20)
  .map(e => e.outerHTML.slice(0, 80));
"""

FAINT = """
const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1]; };
const over = (top, base) => [0, 1, 2].map(k => top[3] * top[k] + (1 - top[3]) * base[k]).concat(1);
const ground = e => { const c = parse(getComputedStyle(e).backgroundColor);
  return c[3] === 1 ? c : over(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255, 1]); };
const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b; };
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
return [...document.querySelectorAll('body *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .map(e => [contrast(parse(e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color), ground(e)),
             e.tagName + ' ' + e.textContent.slice(0, 40)])
  .filter(([value]) => value < 4.5);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(gated: Case, tmp_path_factory) -> Path:
    """A page with all that a page can have."""
    folder = tmp_path_factory.mktemp("page")
    case = dataclasses.replace(gated, folder=folder / "run")
    shutil.copytree(gated.folder, case.folder)
    (case.folder / "explain/strips").mkdir(parents=True)
    Image.new("RGB", (188, 570), "blue").save(case.folder / "explain/strips/a.png")
    Image.new("RGB", (1600, 900), "red").save(case.folder / "explain/sheet.png")
    maps = {name: {"mass": {"value": 0.2, "low": 0.1, "high": 0.3}} for name in ("early", "neck", "Grad-CAM")}
    strip = {
        **{"id": f"images/{HOSTILE}.png", "file": "strips/a.png", "alt": f"Image {HOSTILE} and its heat maps"},
        **{"true": HOSTILE, "predicted": "b", "probability": 0.987},
        "colours": {
            "mean of the gates": {"low": 0.4956, "high": 0.5015, "own": False},
            "Grad-CAM": {"low": 0, "high": 2.0, "own": True},
        },
    }
    found = {
        "sheet": {
            "file": "sheet.png",
            "alt": f"Sheet of {HOSTILE}",
            "strips": {"Surest hits": [strip] * 6, "Misses": []},
        },
        "weights_sha256": case.collect().weights_sha256,
        "localisation": {"images": 12, "chance": {"mass": 0.1}, "maps": maps},
    }
    (case.folder / "explain/explain.json").write_text(json.dumps(found))
    (folder / "study").mkdir()
    (folder / "study/table.csv").write_text("variant,fraction,score,mean\nplain,0.1,auc,0.7\noracle,0.1,auc,0.8\n")
    Image.new("RGB", (900, 600), "white").save(folder / "study/curve.png")
    return report.write(
        case.folder, case.collect(study=folder / "study", commands=Commands(["pipeline train " + "x" * 300]))
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_whole_and_readable(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.resize(width, dark=dark)
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.run("return innerWidth") == width
    assert browser.run(TOO_WIDE) == [0, []]
    assert browser.run("return document.querySelectorAll('figure').length") == 15
    tops = "return [...document.querySelectorAll('.strips figure')].map(f => f.getBoundingClientRect().top)"
    assert len(set(browser.run(tops))) == (3 if width == PHONE else 1)  # two columns on a phone, six on a desk
    assert browser.run(WITHOUT_WORDS) == []
    assert browser.run("return [...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert browser.run(FAINT) == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    browser.run(UNFOLD)
    assert browser.run(TOO_WIDE) == [0, []]
    assert browser.run(FAINT) == []


BROKEN = """
const text = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT), found = [];
const range = document.createRange();
for (let node; node = text.nextNode();) {
  if (node.parentElement.closest('pre, h1')) continue;  // commands and paths may break anywhere
  for (const word of node.textContent.matchAll(/[A-Za-z0-9.]+/g)) {
    range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
    const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
    if (lines.size > 1) found.push(word[0]);
  }
}
return found;
"""


def test_on_a_phone_no_word_is_broken_and_wide_tables_scroll_in_their_own_box(browser: Browser, page: Path) -> None:
    browser.resize(PHONE)
    browser.open(page)
    browser.run(UNFOLD)
    assert browser.run(BROKEN) == []
    assert browser.run("window.scrollTo(500, 0); return scrollX") == 0
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 50)"
    assert browser.run(f"return {wide}.length") > 0
    assert browser.run(f"const [e] = {wide}; e.scrollLeft = 50; return e.scrollLeft") == 50


def test_the_contents_stand_beside_the_text_on_a_desk_and_lead_to_every_section(browser: Browser, page: Path) -> None:
    place = "const r = document.querySelector('{}').getBoundingClientRect(); return [r.left, r.right]"
    for width, beside in ((1440, True), (PHONE, False)):
        browser.resize(width)
        browser.open(page)
        nav, rest = (browser.run(place.replace("{}", name)) for name in ("nav", ".rest"))
        assert (nav[1] < rest[0]) == beside
    links = browser.run("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    headings = browser.run("return [...document.querySelectorAll('.rest h2')].map(h => '#' + h.id)")
    assert set(headings) <= set(links)
    lost = "return [...document.querySelectorAll('a')].filter(a => !document.querySelector(a.hash)).length"
    assert browser.run(lost) == 0
    browser.run("document.querySelector('a[href=\"#limits\"]').click()")
    assert browser.run("return document.querySelector('#limits').getBoundingClientRect().top") < 100


def test_the_summary_is_the_first_sheet_of_paper_and_no_more(browser: Browser, page: Path) -> None:
    browser.resize(PAPER, media="print")
    browser.open(page)
    assert browser.run("return document.querySelector('#summary').getBoundingClientRect().height") < PAPER_HIGH
    whole = sheets(browser)
    browser.run("document.querySelector('.rest').remove()")
    assert sheets(browser) == 1
    assert whole > 3
    text = browser.run("return document.querySelector('#summary').innerText")
    for word in ("guessing", "sensitivity", "specificity", "PPV", "NPV", "prevalence", "Before anybody relies on it"):
        assert word in text
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"


def sheets(browser: Browser) -> int:
    """How many sheets of A4 the page is printed on."""
    margin = 15 / 25.4
    margins = {f"margin{side}": margin for side in ("Top", "Bottom", "Left", "Right")}
    printed = browser.devtools("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, **margins)
    return len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed["data"])))


def test_every_table_fits_a_desk_and_the_paper(browser: Browser, tmp_path: Path) -> None:
    """The widest table, on lesions, with all its scores."""
    score = {"value": 0.123, "low": 0.101, "high": 0.145}
    names = ("mass", "lift", "pointing", "auc", "auc_elsewhere")
    found = {"images": 9, "chance": {"mass": 0.1}, "maps": {"gate early on stage1": dict.fromkeys(names, score)}}
    css = Path(tables.__file__).with_name("page.css").read_text()
    wide = tmp_path / "wide.html"
    wide.write_text(f"<!doctype html><style>{css}</style><body>{tables.localisation_table(found)}")
    for width, media in ((DESK, "screen"), (PAPER, "print")):
        browser.resize(width, media=media)
        browser.open(wide)
        assert browser.run("const e = document.querySelector('.scroll'); return [e.scrollWidth - e.clientWidth]") == [0]


def test_text_in_figures_is_legible_on_a_phone(browser: Browser, page: Path) -> None:
    browser.resize(PHONE)
    browser.open(page)
    sizes = browser.run("return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 10


def test_it_prints_light_and_nothing_is_cut_off(browser: Browser, page: Path) -> None:
    browser.resize(PAPER, dark=True, media="print")
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth") == PAPER
    assert (
        browser.run("return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > innerWidth).length")
        == 0
    )
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(FAINT) == []


def test_the_checks_see_what_they_look_for(browser: Browser, tmp_path: Path) -> None:
    """A page with every fault, so that a check that sees nothing fails."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body style='background:#fff'><img src='https://example.invalid/x.png'>"
        "<p style='color:#ccc'>faint</p><div style='width:3000px'>wide</div><script>throw Error('bad')</script>"
        "<main><p style='width:3em;overflow-wrap:anywhere'>extraordinarily</p></main>"
    )
    browser.resize(DESK)
    browser.open(bad)
    assert len(browser.requests()) == 2
    assert any("bad" in line for line in browser.complaints())
    assert browser.run(TOO_WIDE)[0] > 1000
    assert len(browser.run(WITHOUT_WORDS)) == 1
    assert [found[1] for found in browser.run(FAINT)] == ["P faint"]
    assert browser.run(BROKEN) == ["extraordinarily"]
