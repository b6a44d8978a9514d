"""report.html holds what the run's files say, as a whole page that needs nothing else."""

import json
import re

import pytest

from dynrank.output.metrics_csv import series
from dynrank.output.plots import quality_figure, quality_metrics
from dynrank.run.report import page
from dynrank.run.report.page import write_report
from dynrank.run.report.record import read_run


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("report") / "run", undone=[(15, 1)])


@pytest.fixture(scope="module")
def report(folder, page_of):
    return page_of(write_report(folder))


def test_every_layer_has_a_row_with_its_ranks(report, folder, nasty):
    headings, *rows = report.table("The adapter's layers")
    assert headings[:3] == ["layer", "d_out × d_in", "rank"]
    ranks = {row[0]: row[2] for row in rows}
    assert list(ranks) == list(json.loads((folder / "summary.json").read_text())["final_ranks"])
    assert ranks[f"layers.1.{nasty}"] == "8 → 4 → 2"
    assert ranks["head"] == "8"
    assert {row[1] for row in rows} == {"16 × 12"}
    assert {row[0]: int(row[-1]) for row in rows} == {n: (8 if n == "head" else 2) * 28 for n in ranks}


def test_changes_stand_in_order_and_one_taken_back_says_so(report):
    rows = report.table("What was changed")[1:]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("10", "8 → 4", "4"),
        ("15", "4 → 1", "4"),
        ("20", "4 → 2", "4"),
    ]
    assert [row[-1].startswith("undone") for row in rows] == [False, True, False]
    assert sum(attributes.get("class") == "undone" for tag, attributes in report.elements if tag == "tr") == 1


def test_configuration_and_what_was_given_are_there_word_for_word(report, folder, nasty):
    assert report.texts["pre"] == [(folder / ".hydra" / "config.yaml").read_text()]
    assert report.texts["code"] == ["lora.rank=8", f"note={nasty!r}"]
    assert not [tag for tag, _ in report.elements if tag == "b"]  # names are text, not markup


def test_page_needs_nothing_else(report, folder):
    assert not {tag for tag, _ in report.elements} & {"script", "link", "img", "iframe", "object", "image"}
    targets = [a[key] for _, a in report.elements for key in ("href", "src", "xlink:href") if key in a]
    ids = [attributes["id"] for _, attributes in report.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    text = (folder / "report.html").read_text()
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"https?:|@import|url\([^#]", text)


def test_pictures_and_tables_can_be_heard(report):
    labels = [attributes["aria-label"] for tag, attributes in report.elements if tag == "svg"]
    assert [attributes["role"] for tag, attributes in report.elements if tag == "svg"] == ["img"] * 3
    assert [label.split()[0] for label in labels] == ["Training", "Rank", "Singular"]
    assert {a["scope"] for tag, a in report.elements if tag == "th"} == {"col", "row"}
    assert all(len({len(row) for row in rows}) == 1 for rows in report.tables.values())
    assert ("html", {"lang": "en"}) in report.elements


def test_heat_map_names_every_layer_in_full(report, nasty):
    titles = report.texts["title"]
    for block in range(2):
        for kind in ("up", nasty):
            assert f"layers.{block}.{kind}" in titles
            assert f"layers.{block}.{kind}: rank 8, 4 from step 10, 2 from step 20" in titles
    assert "head: rank 8" in titles
    assert {"2", "4", "8", "rank"} <= {text.strip() for text in report.texts["text"]}


def test_same_run_gives_the_same_page(folder, report):
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_page_without_matplotlib_has_the_tables_and_says_what_to_install(run_folder, tmp_path, page_of, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    report = page_of(write_report(run_folder(tmp_path)))
    assert not [tag for tag, _ in report.elements if tag == "svg"]
    assert any("dynrank[plots]" in text for text in report.texts["p"])
    assert len(report.table("The adapter's layers")) == 6


def test_run_that_changed_no_rank_says_so(run_folder, tmp_path, page_of):
    report = page_of(write_report(run_folder(tmp_path, drops=())))
    assert "No rank changed in this run." in report.texts["p"]
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"8"}


def test_two_hundred_layers_and_many_steps_stay_below_two_megabytes(run_folder, tmp_path, page_of):
    drops = [(2000 * i, 12 - i) for i in range(1, 11)]
    run_folder(tmp_path, blocks=67, kinds=("a", "b", "c"), drops=drops, steps=30_000, rank=12)
    file = write_report(tmp_path)
    assert file.stat().st_size < 2e6
    report = page_of(file)
    assert len(report.table("The adapter's layers")) == 203
    assert report.table("The adapter's layers")[1][2] == "12 → … → 2"


def test_report_of_a_real_run_knows_the_spectra_before_its_drop(smoke_run, page_of):
    folder, _ = smoke_run
    run = read_run(folder)
    (change,) = run.made
    assert set(run.earlier_spectra) == {change.step}
    for name, values in run.earlier_spectra[change.step].items():
        energy = [value**2 for value in values]
        kept = sum(energy[: change.layers[name].rank_after]) / sum(energy)
        assert change.layers[name].energy_kept == pytest.approx(kept, rel=1e-5)
    report = page_of(folder / "report.html")
    assert run.last_step == 12
    assert {row[2] for row in report.table("The adapter's layers")[1:]} == {"32 → 16"}
    labels = [attributes["aria-label"] for tag, attributes in report.elements if tag == "svg"]
    assert any(f"before the change at step {change.step}" in label for label in labels)


def test_report_of_a_real_run_shows_what_validations_measured(smoke_run, page_of):
    folder = smoke_run[0]
    report = page_of(folder / "report.html")
    labels = [attributes["aria-label"] for tag, attributes in report.elements if tag == "svg"]
    (chart,) = [label for label in labels if label.startswith("In validation")]
    assert "val/accuracy, val/macro_f1" in chart
    assert quality_metrics(folder / "metrics.csv") == ["val/accuracy", "val/macro_f1"]
    figure = quality_figure(folder / "metrics.csv", {9: "rank 32 → 16"})
    for axes, name in zip(figure.axes, ["val/accuracy", "val/macro_f1"], strict=True):
        curve, drop = axes.lines
        assert (list(curve.get_xdata()), list(curve.get_ydata())) == series(folder / "metrics.csv", name)
        assert list(drop.get_xdata()) == [9, 9]
