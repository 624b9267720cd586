"""The page is one file, escapes what it is given, and its sentences claim no more than the table."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from s2sam.report.html import render, summary_sentences
from s2sam.report.tables import NO_DIFFERENCE
from s2sam.report.write import make_table, write_report

VOID = {"meta", "link", "input", "br", "img"}


class Checker(HTMLParser):
    """Collects tags, identifiers and references, and checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.references, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def checked(page):
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    return checker


def test_the_page_refers_to_nothing_outside(design_page):
    checker = checked(design_page)
    assert all(r.startswith("#") or r == "data:," for r in checker.references)
    assert not re.search(r"https?://|//cdn|@import|<script|javascript:", design_page)
    assert len(design_page) < 1_500_000


def test_identifiers_are_unique_and_resolve(design_page):
    checker = checked(design_page)
    assert len(checker.ids) == len(set(checker.ids))
    assert {r[1:] for r in checker.references if r.startswith("#")} <= set(checker.ids)


def test_every_colour_of_a_figure_follows_the_theme(design_page):
    figures = re.findall(r"<svg.*?</svg>", design_page, flags=re.DOTALL)
    assert len(figures) >= 14
    for figure in figures:
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href|clip-path)="[^"]*"', "", figure))


def test_all_parts_are_there(design_page):
    for heading in (
        "Difference in accuracy",
        "Test accuracy",
        "Test loss",
        "Training loss",
        "Sparsity per layer",
        "How the masks move",
        "What the displacement does",
        "What this does not show",
        "Configuration",
        "Environment",
    ):
        assert heading in design_page
    assert all(text in design_page for text in ("2.13.0", "s2sam demo", "A remark."))


def test_hostile_names_stay_text(make_run):
    evil = '<script>alert("1")</script>&<b>'
    folders = [
        make_run(evil, sharpness, seed, model=evil, data=evil) for sharpness in ("none", "<i>&\"'") for seed in (0, 1)
    ]
    page = render(make_table(folders), title=evil, how=evil, remarks=[evil])
    checker = checked(page)
    assert not {"script", "b", "i"} & set(checker.tags) - {"b"}
    assert "alert(" in page and "<script" not in page and "<i>" not in page
    assert page.count("<b>") == page.count("</b>") == 6  # the facts and the headline, none from a name


def test_summary_counts_what_the_table_shows(design_table):
    sentences = summary_sentences(design_table)
    shown = [row for row in design_table.rows if row.difference and row.difference.shows]
    assert sentences[0].startswith(f"{len(shown)} of 4 comparisons")
    compared = [row for row in design_table.rows if row.difference]
    for row, sentence in zip(compared, sentences[1:], strict=False):
        assert sentence.startswith(f"{row.arm.base}: {row.arm.treatment} minus SGD is ")
        assert row.verdict in sentence and "n = 3 seeds" in sentence
    assert "1.10 times as long with S2-SAM and 2.00 times as long with SAM" in sentences[-1]


def test_a_page_without_any_difference_says_so(make_run):
    tops = {"none": (0.90, 0.92, 0.94), "s2sam": (0.91, 0.93, 0.97)}
    table = make_table([make_run("rigl", s, i, top1=t) for s, values in tops.items() for i, t in enumerate(values)])
    sentences = summary_sentences(table)
    assert sentences[0] == "The comparison shows no difference."
    assert NO_DIFFERENCE in sentences[1]
    assert not re.search(
        r"\b(better|best|worse|superior|improve\w*|wins?|beats?|higher than|lower than)\b", " ".join(sentences)
    )


def test_one_dense_run_makes_a_page(make_run):
    table = make_table([make_run()])
    page = render(table)
    checked(page)
    assert "no arm to compare" in page
    assert "With one seed there is no interval" in page
    assert "How the masks move" not in page and "Test accuracy" in page


def test_written_files_are_whole(make_run, tmp_path):
    table = make_table([make_run()])
    paths = write_report(table, tmp_path / "deep" / "report.html")
    assert [p.name for p in paths] == ["table.md", "table.csv", "report.html"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["report.html", "table.csv", "table.md"]
    assert paths[-1].read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in write_report(table, tmp_path / "alone" / "a.html", tables=False)] == ["a.html"]


def test_places_that_cannot_be_written_are_refused(make_run, tmp_path):
    table = make_table([make_run()])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file stands where its folder should be"):
        write_report(table, tmp_path / "file" / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report(table, tmp_path)


def test_further_accuracies_are_on_the_page(make_run):
    folders = [make_run("rigl", sharpness) for sharpness in ("none", "s2sam")]
    for folder, top1 in zip(folders, (0.9375, 0.8125), strict=True):
        *rest, last = (folder / "metrics.jsonl").read_text().splitlines()
        record = json.loads(last) | {"recalibrated_test_top1": top1}
        (folder / "metrics.jsonl").write_text("\n".join([*rest, json.dumps(record)]) + "\n")
    page = render(make_table(folders))
    checked(page)
    assert page.count("BatchNorm re-estimated&nbsp;%") == 2  # the table of arms, the list of runs
    assert page.count("<td>93.75</td>") == page.count("<td>81.25</td>") == 2
    assert "averaged weights" not in page
    assert "step time vs SGD, same network" in page
    assert "dense network</th>" not in page
