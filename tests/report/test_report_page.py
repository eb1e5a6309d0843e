"""The report page holds the numbers of the files, stands alone, and is quick."""

import html.parser
import json
import re

import numpy as np
import pytest
import toy
from matplotlib import pyplot as plt

from memoryformer.errors import DataError, StorageError
from memoryformer.report import charts, drawing, page, studies
from memoryformer.runs import compatibility, console, metrics, outcome
from memoryformer.sweep import files, points, statistics
from memoryformer.training import experiment

SWEEPS = """

def sweep_rate():
    for rate in (1e-3, 2e-3):
        yield {"optimizer.learning_rate": rate}

def sweep_seed():
    for seed in range(10):
        yield {"train.seed": seed}
"""


def write_run(workdir, run, offset):
    """What training leaves: a config and rows, the last ones at known values."""
    workdir.mkdir(parents=True)
    config = compatibility.plain(experiment.as_dict(run))
    (workdir / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, 21):
        rows.append({"step": step, "train/loss": 9.0 / step + offset})
        rows[-1]["train/tokens_per_second"] = 1000.0 + step
    for step in (10, 20):
        bits = offset + 20 / step
        use = {"utilisation/blocks.0.ffn.up/used_fraction": 0.25}
        rows.append({"step": step, "val/loss": bits, "val/bits_per_byte": bits, **use})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 21, "train')


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two learning rates, ten seeds each: bits per byte 2 and 2.5, ± the seed's 0.01."""
    folder = tmp_path_factory.mktemp("report")
    path = toy.config_file(folder)
    path.write_text(path.read_text() + SWEEPS)
    made = points.expand(str(path), ["rate", "seed"], folder / "runs")
    for point in made.points:
        second = point.run.optimizer.learning_rate == 2e-3
        offset = 1 + 0.5 * second + 0.01 * point.run.train.seed
        write_run(point.workdir, point.run, offset)
    files.write_manifest(made)
    return made


def cells(text):
    """The rows of all tables, as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    plain = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in plain]


def test_page_of_a_sweep(sweep, tmp_path, monkeypatch):
    """Means, spreads and the difference are those of the rows; a run's rows are read once.

    Mutations: population s.d. in `summarise`; the difference's sign turned round; rows read
    again by every picture.
    """
    reads, read = [], metrics.read
    monkeypatch.setattr(metrics, "read", lambda path: reads.append(path) or read(path))
    sizes = page.write([sweep.directory.parent], tmp_path / "new" / "report.html")
    assert len(reads) == len(set(reads)) == 20
    assert sizes == {"rate-seed": 20}
    text = (tmp_path / "new" / "report.html").read_text()
    rows = cells(text)
    spread = np.std(np.arange(10) * 0.01, ddof=1)
    error = spread * np.sqrt(2 / 10)
    first, second = rows[1:3]
    assert first[:5] == ["learning_rate=0.001", "10", "2.0450 ± 0.03", "", "baseline"]
    assert second[2] == "2.5450 ± 0.03"
    assert second[3:5] == [f"+0.5000 ± {error:.2g}", "higher"]
    assert first[5] == console.short_number(20 * 8 * 16)
    assert ["learning_rate=0.001", "0.001"] in rows
    assert any(row[1:3] == ["ffn.up", "0.25 (0.25 to 0.25)"] for row in rows)
    assert f"{spread:.2g}" in re.search(r"Noise floor: ([\d.]+)", text)[1]


def test_page_stands_alone_and_is_well_formed(sweep):
    """No link out, no script, no tag left open; light, dark, phone and paper are styled.

    Mutations: a `<script src=...>`; `</section>` left out.
    """
    text = page.render(studies.load([sweep.directory]))
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert "<script" not in text and not re.search(r"url\((?!#)", text)
    for query in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print"):
        assert query in text
    open_tags = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "wbr"):  # which have no end
                open_tags.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(text)
    assert not open_tags


def test_names_are_escaped(tmp_path):
    """Mutation: `_text` without `html.escape`."""
    run = experiment.resolve(toy.run_config(tmp_path))
    write_run(tmp_path / "<b>x", run, 1.0)
    text = page.render(studies.load([tmp_path]))
    assert "<b>" not in text and "&lt;b&gt;x" in text


def test_band_is_of_the_steps_that_all_seeds_have(sweep):
    """Mean, lowest and highest over seeds; FLOPs are tokens times the model's cost.

    Mutation: `union1d` in place of `intersect1d`.
    """
    [study] = studies.load([sweep.directory])
    runs = study.variants["learning_rate=0.001"]
    behind = studies.Run(runs[0].workdir, runs[0].config, runs[0].rows[:5])
    one = charts.band("a", runs, studies.BITS, "tokens", marks=True)
    np.testing.assert_array_equal(one.x, [10 * 128, 20 * 128])
    np.testing.assert_allclose(one.mean, [3.045, 2.045])
    np.testing.assert_allclose(one.low, [3.0, 2.0])
    np.testing.assert_allclose(one.high, [3.09, 2.09])
    cost = runs[0].cost.training_flops_per_token
    flops = charts.band("a", runs, studies.BITS, "flops", marks=True)
    np.testing.assert_allclose(flops.x, one.x * cost)
    both = charts.band("a", [*runs, behind], studies.LOSS, "tokens", marks=False)
    assert len(both.x) == 5


def test_runs_without_a_sweep_are_grouped_by_config(tmp_path):
    """Seeds together, variants named by what differs; a folder without runs is an error.

    Mutation: `points.SEEDS` not left out of `Study.varying`.
    """
    for seed in (0, 1):
        for width in (16, 32):
            fields = {"train.seed": seed, "model.embed_dim": width}
            run = experiment.resolve(toy.run_config(tmp_path, **fields))
            write_run(tmp_path / f"{width}-{seed}", run, 1.0)
    [study] = studies.load([tmp_path])
    assert {k: len(v) for k, v in study.variants.items()} == {
        "embed_dim=16": 2,
        "embed_dim=32": 2,
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        studies.load([tmp_path / "empty"])
    with pytest.raises(DataError, match="there is no such directory"):
        studies.load([tmp_path / "nowhere"])


ENDS = {
    "done": {"state": "done"},
    "failed": {"state": "failed", "exit_code": 44, "error": "nan"},
}


@pytest.mark.parametrize("content", [b'{"model": ', b"\xff\xfe", b"[]"])
def test_a_damaged_config_is_named(tmp_path, content):
    """Mutation: `json.loads` without an except."""
    workdir = tmp_path / "run"
    write_run(workdir, experiment.resolve(toy.run_config(tmp_path)), 0.0)
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"run/config\.json: cannot be read"):
        studies.load([tmp_path])


DAMAGED = ["{", "[]", '{"model": {"embed_dim": "x"}}', '{"model": 3}', "[" * 100_000]


@pytest.mark.parametrize(
    "content", [*DAMAGED, '{"model": {"code_bits": 0}, "train": {}}']
)
@pytest.mark.parametrize("name", ["config.json", "sweep.json"])
def test_a_damaged_file_costs_its_run_only(tmp_path, capsys, content, name):
    """The page has the others, and a line says what is left out, and why.

    Mutation: `_run` without an except.
    """
    for number in range(2):
        run = experiment.resolve(toy.run_config(tmp_path, **{"train.seed": number}))
        write_run(tmp_path / f"run{number}", run, 0.0)
    (tmp_path / "run0" / name).write_text(content)
    found = [run.workdir.name for s in studies.load([tmp_path]) for run in s.runs]
    assert found == (["run1"] if name == "config.json" else ["run0", "run1"])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"run0/{name}" in told


def test_only_done_runs_count(tmp_path):
    """Two seeds are done, at 1.9 and 2.1; a third is at step 10, at 3.0; a fourth has failed
    before its first validation. Table, headline and curve are of the two, as in `collect`;
    the others are named. While nothing has ended, all stand in.

    Mutations: `counted` returns all; `headline` looks at all runs.
    """
    path = toy.config_file(tmp_path)
    path.write_text(path.read_text() + SWEEPS)
    made = points.expand(str(path), ["seed"], tmp_path / "runs")
    ends = ["done", "done", "", "failed"]
    for point, offset in zip(made.points, [0.9, 1.1, 1.0, 5.0], strict=False):
        write_run(point.workdir, point.run, offset)
    files.write_manifest(made)
    for point, last in zip(made.points[2:], (10, 5), strict=False):
        kept = [r for r in files.read_rows(point.workdir) if r["step"] <= last]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (point.workdir / "metrics.jsonl").write_text(text)
    [study] = studies.load([made.directory])
    assert study.headline == studies.LOSS and study.provisional
    assert "No run has ended" in page.render([study])

    for point, end in zip(made.points, ends, strict=False):
        if end:
            (point.workdir / outcome.FILE).write_text(json.dumps(ENDS[end]))
    [study] = studies.load([made.directory])
    assert study.headline == studies.BITS
    [summary] = study.summaries(studies.BITS)
    assert (summary.count, summary.mean) == (2, pytest.approx(2.0))
    assert summary.deviation == pytest.approx(0.2 / 2**0.5)
    assert "| base | 2 | 2.0000 ± 0.14 | baseline | |" in statistics.collect(made)
    text = page.render([study])
    assert cells(text)[1][1:3] == ["2", "2.0000 ± 0.14"]
    label = next(iter(study.variants))
    listed = (
        f"{label}, seed 2 (partial, step 10 of 20); {label}, seed 3 (failed, step 5"
    )
    assert f"Not done, and in no mean: {listed} of 20)." in text
    [runs] = study.drawn.values()
    one = charts.band("a", runs, studies.BITS, "steps", marks=True)
    np.testing.assert_allclose([one.x[-1], one.mean[-1]], [20, 2.0])


def test_charts_draw_what_they_are_given():
    """Line, band and bars hold the values; text stays text; colours are the page's; the
    same figure is the same text. A variant keeps its colour where another is empty.

    Mutations: `fill_between` from low to mean; no `svg.hashsalt`; empty bands dropped before
    colours are chosen; `after_start` of the lowest values.
    """
    x, y = np.array([1.0, 50.0, 100.0]), np.array([3.0, 2.0, 1.0])
    empty = charts.Band("none", *np.zeros((4, 0)))
    bands = [empty, charts.Band("a", x, y, y - 1, y + 1, marks=True)]
    figure = charts.lines(bands, "training tokens", "loss, nats")
    [axes] = figure.axes
    _, line = axes.get_lines()
    np.testing.assert_array_equal(line.get_data(), [x, y])
    assert line.get_color() == drawing.COLOURS[1] and line.get_marker() == "o"
    [shade] = axes.collections
    corners = shade.get_paths()[0].get_extents()
    np.testing.assert_allclose([corners.min, corners.max], [[1, 0], [100, 4]])
    assert axes.get_ylim() == pytest.approx((0 - 0.24, 4 + 0.24))
    first, second = (
        drawing.svg(charts.lines(bands, "training tokens", "loss, nats"), "<a>")
        for _ in range(2)
    )
    assert first == second and 'aria-label="&lt;a&gt;"' in first
    assert ">training tokens</text>" in first and "var(--c1)" in first
    assert "var(--c0)" not in first and "#0" not in re.sub(r"#\w{11}", "", first)
    ids = re.findall(r'\bid="([^"]*)"', first)
    assert set(re.findall(r"#(\w+)", first)) == set(ids) and len(ids) == len(set(ids))

    [axes] = charts.bars(["a", "b$x^$"], [(1.0, 2.0, 3.0), (4.0, 4.0, 4.0)]).axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 4.0]
    assert list(axes.get_lines()[0].get_xdata()) == [1.0, 3.0]
    assert [text.get_text() for text in axes.texts] == ["a: 2", "b$x^$: 4"]
    plt.close("all")


def test_the_start_of_a_curve_may_leave_the_picture():
    """Mutation: `after_start` of all values."""
    x = np.arange(100.0)
    y = np.where(x < 5, 1000.0, 2.0)
    [axes] = charts.lines([charts.Band("a", x, y, y, y)], "x", "y").axes
    assert axes.get_ylim()[1] < 3 and len(axes.collections) == 0
    plt.close("all")
