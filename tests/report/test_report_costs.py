"""What losses cost: fronts, kinds at equal cost, laws; and the words that a person wrote."""

import json

import numpy as np
import pytest
import toy
from matplotlib import pyplot as plt

from memoryformer import errors
from memoryformer.report import about, page, pareto, pictures, scaling, studies
from memoryformer.runs import compatibility
from memoryformer.sweep import files
from memoryformer.training import experiment

WIDTHS = (16, 32, 64)


def law(size, tokens):
    return 1.2 + 30 * size**-0.3 + 200 * tokens**-0.45


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two kinds of three sizes and three lengths; losses lie on a law, 'dense' 0.1 above it."""
    folder = tmp_path_factory.mktemp("costs") / "curves"
    points = {}
    for kind, more in (("memory", 0.0), ("dense", 0.1)):
        projection = {} if kind == "memory" else dense()
        for width in WIDTHS:
            for steps in (10, 100, 1000):
                fields = {"model.embed_dim": width, "train.num_steps": steps}
                run = experiment.resolve(toy.run_config(folder, **fields, **projection))
                name = f"{kind}-{width}-{steps}"
                points[name] = {"label": f"{kind}, D={width}, {steps} steps"}
                write(folder / name, run, steps, more)
    facts = {"points": points, "titles": ["Sizes and lengths"]}
    (folder / files.MANIFEST).write_text(json.dumps(facts))
    yield folder
    plt.close("all")


def dense():
    return {
        "model.projection": "dense",
        "model.projection_options": {},
        "model.ffn_activation": "gelu",
    }


def write(folder, run, steps, more):
    folder.mkdir(parents=True)
    config = compatibility.plain(experiment.as_dict(run))
    (folder / "config.json").write_text(json.dumps(config))
    tokens = steps * run.train.batch_size * run.model.seq_len
    row = {"step": steps, "train/tokens_per_second": 1e6 / run.model.embed_dim}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    [study] = studies.load([folder])
    loss = law(study.runs[0].cost.parameters.total, tokens) + more
    row |= {"val/bits_per_byte": float(loss), "val/loss": float(loss)}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_picture_of_each_cost(sweep, tmp_path):
    """Of those that differ; several sweeps, or one variant, have no picture.

    Mutations: `differ` not asked; the first of several taken.
    """
    options = pictures.Options(output=str(tmp_path / "plots"))
    pictures.main(["report", "costs", str(sweep)], options)
    names = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert names == {f"costs_{cost}" for cost in pareto.COSTS}
    both = tmp_path / "both"
    for name, count in (("one", 1), ("two", 2)):
        (both / name).mkdir(parents=True)
        points = dict(list(read_points(sweep).items())[:count])
        for point in points:
            (both / name / point).symlink_to(sweep / point)
        (both / name / files.MANIFEST).write_text(json.dumps({"points": points}))
    with pytest.raises(errors.DataError, match=r"no two variants .* differ in cost"):
        pictures.main(["report", "costs", str(both / "one")], options)
    with pytest.raises(errors.ConfigError, match="holds several; name one"):
        pictures.main(["report", "costs", str(both)], options)


def read_points(sweep):
    return json.loads((sweep / files.MANIFEST).read_text())["points"]


def test_costs_and_the_front(sweep):
    """Of each variant, by its config and its speed; what another beats in both is off the front.

    Mutations: FLOPs without the tokens; tokens times the speed; `<=` for `<` in `front`.
    """
    [study] = studies.load([sweep])
    one = study.variants["memory, D=32, 100 steps"][0]
    tokens = 100 * one.tokens_per_step
    expected = {
        "flops": tokens * one.cost.training_flops_per_token,
        "seconds": tokens / (1e6 / 32),
        "parameters": one.cost.parameters.total,
        "bytes": one.cost.decode_bytes_per_token,
    }
    for cost, value in expected.items():
        placed = {s.name: s for s in pareto.spots(study, studies.BITS, cost)}
        assert placed["memory, D=32, 100 steps"].cost == pytest.approx(value)
        assert len(placed) == 18 and pareto.differ(list(placed.values()))
    dots = [
        pareto.Spot(name, i, cost, loss, loss, loss)
        for i, (name, cost, loss) in enumerate(
            [("a", 2, 3.0), ("b", 1, 4.0), ("c", 3, 3.0), ("d", 4, 2.0), ("e", 4, 2.5)]
        )
    ]
    assert [s.name for s in pareto.front(dots)] == ["b", "a", "d"]
    assert not pareto.differ(dots[:1]) and not pareto.differ([dots[3], dots[4]])
    [axes] = pareto.scatter(dots, "x", "y").axes
    steps, *drawn = axes.get_lines()
    np.testing.assert_array_equal(steps.get_data(), [[1, 2, 4], [4, 3, 2]])
    dot_data = [tuple(np.ravel(line.get_data())) for line in drawn]
    assert dot_data == [(s.cost, s.mean) for s in dots]
    assert [text.get_text() for text in axes.texts] == list("abcde")
    placed = pareto.spots(study, studies.BITS, "flops")
    [axes] = pareto.scatter(placed, "x", "y").axes
    kinds = [text.get_text() for text in axes.get_legend().get_texts()]
    assert kinds == ["memory", "dense"] and not axes.texts


def test_the_law_is_found(sweep):
    """Exactly, from losses that lie on it; with noise its exponents lie in their intervals.

    Mutations: N and D swapped; middles not undone; the intervals of another number.
    """
    [study] = studies.load([sweep])
    fitted = scaling.laws(study, studies.BITS)
    assert list(fitted) == ["memory", "dense"]
    np.testing.assert_allclose(
        fitted["memory"].values, [1.2, 30, 0.3, 200, 0.45], rtol=1e-4
    )
    assert fitted["dense"].values[0] == pytest.approx(1.3, rel=1e-4)
    rng = np.random.default_rng(0)
    noisy = [
        scaling.Observation(n, d, law(n, d) * np.exp(0.004 * rng.normal()))
        for n in 1e5 * 4.0 ** np.arange(4)
        for d in 3e5 * 4.0 ** np.arange(4)
    ]
    found = scaling.fit(noisy)
    for i, true in ((2, 0.3), (4, 0.45)):
        low, high = found.intervals[i]
        assert low < true < high and high - low < 0.2
    assert 0.001 < found.residual < 0.006
    lines = scaling.picture(found, "loss").axes[0].get_lines()
    assert len(lines) == 8


def test_too_few_are_not_fitted(sweep):
    """Mutation: `LEAST` of 2."""
    [study] = studies.load([sweep])
    few = [run for run in study.runs if run.config["train.num_steps"] > 10]
    assert scaling.laws(studies.Study("x", few), studies.BITS) == {}


def test_kinds_at_equal_cost(sweep):
    """Between the neighbours of each front. Mutations: of the first kind for both; not over
    the logarithm of the cost.
    """
    [study] = studies.load([sweep])
    compared = scaling.equal(study, studies.BITS, "seconds")
    assert len(compared) == 4
    for seconds, losses in compared:
        assert set(losses) == {"memory", "dense"}
        placed = pareto.spots(study, studies.BITS, "seconds")
        best = pareto.front([s for s in placed if s.name.startswith("dense,")])
        x, y = [np.log(s.cost) for s in best], [s.mean for s in best]
        assert losses["dense"] == pytest.approx(np.interp(np.log(seconds), x, y))


def test_the_page_says_what_a_person_wrote(sweep):
    """The sweep's docstring is its title, until there is `about.txt`; text is no markup.

    Mutations: the sweep's folder as the title; the first line again as a paragraph; `html.escape`
    left out.
    """
    [study] = studies.load([sweep])
    assert study.title == "Sizes and lengths"
    path = sweep / about.FILE
    path.write_text("Loss & size\n\nLarger is\nbetter.\n\n\n<b>Two</b>\n")
    [study] = studies.load([sweep])
    path.unlink()
    assert study.about == about.About(
        "Loss & size", ("Larger is better.", "<b>Two</b>")
    )
    text = page.render([study], about.About("All", ("Of one.",)))
    assert "<h1>All</h1>" in text and "<p>Of one.</p>" in text
    assert "<h2>Loss &amp; size</h2>" in text and "<p>Larger is better.</p>" in text
    assert "<p>&lt;b&gt;Two&lt;/b&gt;</p>" in text
    for summary in ("What the loss costs", "Kinds at equal cost", "Sizes and tokens"):
        assert f"<summary>{summary}</summary>" in text


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"x" * (about.MAX_BYTES + 1)])
def test_a_text_that_is_none_is_named(tmp_path, content):
    """Mutations: any file is read; the size not looked at."""
    (tmp_path / about.FILE).write_bytes(content)
    with pytest.raises(errors.StorageError, match=r"about\.txt"):
        about.read(tmp_path)
    assert about.read(tmp_path / "nowhere") == about.NOTHING
