"""The page in a real browser: no error on its console, no request, nothing cut off, readable in the dark."""

from __future__ import annotations

import pytest

from s2sam.report.html import render
from s2sam.report.write import make_table


@pytest.fixture(scope="module")
def page(design_page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(design_page, encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_is_quiet_and_fits(browser, page, width, dark):
    errors, requests, evaluate = browser.open(page, width=width, dark=dark)
    assert errors == []
    assert requests == []
    assert evaluate("document.documentElement.scrollWidth") <= width
    assert evaluate("document.querySelectorAll('figure svg').length") >= 10
    assert evaluate("document.querySelectorAll('tbody .pill').length") == 7
    sizes = evaluate("[...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])")
    assert all(w > 250 and h > 100 for w, h in sizes)
    channels = evaluate("getComputedStyle(document.querySelector('figure svg text')).fill").strip("rgb()").split(",")
    light_text = sum(map(int, channels)) > 3 * 128
    assert light_text == dark  # the text of the figures follows the theme


@pytest.fixture
def long_names(make_run, tmp_path):
    """A page whose arms differ in many settings, so that their names are long."""
    late = {"direction": "momentum", "scale": "relative", "scope": "weights", "rho_schedule": "late", "sign": -1}
    runs = [make_run("rigl"), make_run("rigl", "s2sam"), make_run("rigl", "s2sam", sam=late)]
    path = tmp_path / "long.html"
    path.write_text(render(make_table(runs)), encoding="utf-8")
    assert "S2-SAM (direction momentum, sign -1, scale relative" in path.read_text(encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("which", ["page", "long_names"])
def test_text_of_figures_stays_inside_their_cards(browser, which, request):
    _, _, evaluate = browser.open(request.getfixturevalue(which), width=390)
    outside = evaluate(
        "[...document.querySelectorAll('figure')].flatMap(f => { const box = f.getBoundingClientRect();"
        " return [...f.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + "
        "1 })"
        ".map(t => t.textContent) })"
    )
    assert outside == []


def test_unticking_an_arm_fades_it_without_any_script(browser, page):
    _, _, evaluate = browser.open(page)
    opacity = "getComputedStyle(document.querySelector('svg .s1')).opacity"
    assert evaluate("document.scripts.length") == 0
    assert float(evaluate(opacity)) == 1
    evaluate("document.getElementById('show-1').click(); new Promise(done => setTimeout(done, 400))")
    assert float(evaluate(opacity)) < 0.2


@pytest.mark.parametrize(
    ("body", "error", "request_made"),
    [
        ("<p>quiet</p>", False, False),
        ("<script>console.error('something is wrong')</script>", True, False),
        ("<script>undefined_function()</script>", True, False),
        ("<img src='http://127.0.0.1:9/missing.png'>", True, True),
        ("<style>@import url(http://127.0.0.1:9/style.css);</style>", True, True),
    ],
)
def test_the_detector_detects(browser, tmp_path, body, error, request_made):
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>t</title>{body}", encoding="utf-8")
    errors, requests, _ = browser.open(path.as_uri())
    assert bool(errors) == error
    assert bool(requests) == request_made
