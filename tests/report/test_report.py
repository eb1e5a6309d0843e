"""The pictures hold the numbers they claim to, and the command line says what is wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

from memoryformer import data, errors, model
from memoryformer.evaluation import buckets
from memoryformer.report import __main__ as command
from memoryformer.report import drawing
from memoryformer.report import pictures as report
from memoryformer.runs import checkpoint


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def write_metrics(workdir, rows, ending="\n"):
    workdir.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows) + ending
    (workdir / "metrics.jsonl").write_text(text)
    return workdir


def lines(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): line.get_data() for line in axes.get_lines()}


def test_quickstart_refuses_what_it_does_not_look_at(capsys):
    """In one line. Mutation: further words, or --output, read by nobody."""
    for word, said in (
        ("runs/mine", "report quickstart 'runs/mine': takes no further word"),
        ("--output=x", "--output: report quickstart prints"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(["report", "quickstart", "--workdir=none", word])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and said in printed and printed.count("\n") == 1


def test_flops_figure_holds_figure_1():
    """At D = L = 2048: 120.3 and 23.6 G; half the length at most half the cost. Red: the
    exact count in place of the paper's, or a baseline without its output projection."""
    drawn = lines(report.flops_figure().axes[0])
    at = {name: dict(zip(x, y, strict=True))[2048] for name, (x, y) in drawn.items()}
    assert len(at) == 4
    assert f"{at['Transformer, L = 2048']:.1f}" == "120.3"
    assert f"{at['MemoryFormer, L = 2048']:.1f}" == "23.6"
    assert at["Transformer, L = 1024"] < at["Transformer, L = 2048"] / 2
    assert at["MemoryFormer, L = 1024"] < at["MemoryFormer, L = 2048"] / 2


def test_curves_stand_over_tokens(tmp_path):
    """Validation rows without a token count stand where their step is; a cut last line,
    a value that is not finite and rows without losses do no harm. Red: `_against` gives
    steps always, or `isfinite` left out."""
    rows = [{"step": s, "train/loss": 9 - s, "train/tokens": 100 * s} for s in (1, 2)]
    rows += [{"step": 2, "val/loss": 6.5, "val/bits_per_byte": 2.0}, {"step": 3}]
    rows += [{"step": 4, "train/loss": "nan", "train/tokens": 400}]
    workdir = write_metrics(tmp_path / "a", rows, ending='\n{"step": 5, "train')
    loss, bits = report.curves_figure([workdir]).axes
    drawn = lines(loss)
    np.testing.assert_array_equal(drawn["a, train"], [[100, 200], [8, 7]])
    np.testing.assert_array_equal(drawn["a, validation"], [[200], [6.5]])
    assert loss.get_xlabel() == "training tokens"
    assert list(lines(bits)) == ["a, validation: 2.000 at the end"]


def test_curves_of_several_runs(tmp_path):
    """Without tokens in one of them the x axis is the step; runs of one name are told
    apart; without bits per byte there is one panel. Red: names by the last part alone."""
    runs = [
        write_metrics(tmp_path / "x" / "run", [{"step": 7, "train/loss": 3.0}]),
        write_metrics(
            tmp_path / "y" / "run",
            [{"step": 9, "train/loss": 2.0, "train/tokens": 900}],
        ),
    ]
    (axes,) = report.curves_figure(runs).axes
    drawn = lines(axes)
    assert set(drawn) == {"x/run, train", "y/run, train"}
    np.testing.assert_array_equal(drawn["y/run, train"], [[9], [2.0]])
    assert axes.get_xlabel() == "step"


def test_a_long_legend_hides_no_curve(tmp_path):
    """It stands below the axes, and the picture grows by it. Mutations: WITHIN = 99; a height
    that stays, which leaves the axes less than half of it."""
    row = {"step": 7, "train/loss": 3.0, "val/loss": 2.0, "val/bits_per_byte": 1.0}
    runs = [write_metrics(tmp_path / name, [row]) for name in "abcdefgh"]
    for count in (1, 8):
        with plt.rc_context(drawing.STYLE):
            figure = report.curves_figure(runs[:count])
        figure.canvas.draw()
        for axes in figure.axes:
            legend = axes.get_legend()
            box, within = legend.get_window_extent(), axes.get_window_extent()
            if count == 1:
                assert box.y0 > within.y0
            else:
                assert box.y1 < within.y0 and box.y0 > -0.05 * figure.dpi
            assert within.height > 2.5 * figure.dpi  # inches


def test_train_curve_is_a_running_mean(tmp_path):
    """100 points: means of 2, at the means of their steps. Red: mode='same'."""
    rows = [{"step": s, "train/loss": float(s % 2)} for s in range(100)]
    (axes,) = report.curves_figure([write_metrics(tmp_path / "a", rows)]).axes
    x, y = lines(axes)["a, train (mean of 2)"]
    np.testing.assert_allclose(y, np.full(99, 0.5))
    np.testing.assert_allclose(x, np.arange(99) + 0.5)


def test_run_without_losses_is_an_error(tmp_path):
    """Red: the check in `_read` left out."""
    workdir = write_metrics(tmp_path / "a", [{"step": 1, "train/tokens": 5}])
    with pytest.raises(errors.DataError, match="holds no loss"):
        report.curves_figure([workdir])


def test_utilisation_figures_hold_the_counts():
    """First and last table of each layer of the first block, over their mean. Red: the
    last table left out, or counts in place of shares."""
    rng = np.random.default_rng(0)
    widths = {"mixer.qkv": 16, "ffn.up": 16, "ffn.down": 64}
    counts = {
        f"blocks.{block}.{name}": rng.integers(1, 50, (3, width))
        for block in range(2)
        for name, width in widths.items()
    }
    axes = report.buckets_figure(counts).axes
    assert len(axes) == 6
    for column, name in enumerate(widths):
        for row, table in enumerate((0, 2)):
            expected = counts[f"blocks.0.{name}"][table].astype(float)
            drawn = np.asarray(axes[3 * row + column].patches[0].get_data().values)
            np.testing.assert_allclose(drawn, expected / expected.mean())
    used, entropy, load, flips = report.layers_figure(counts).axes
    for panel in (used, entropy, load, flips):
        assert len(panel.containers) == 3  # one per layer of a block
    use = [buckets.utilisation(counts[f"blocks.{b}.ffn.up"]) for b in range(2)]
    drawn = np.asarray(entropy.containers[1].lines[0].get_ydata(), float)
    np.testing.assert_allclose(drawn, [np.mean(u.entropy) for u in use])


def test_utilisation_command(tmp_path, capsys):
    """From a checkpoint and its data to two pictures and a line for every layer.
    Red: `_collect` opens the training text (it has another number of tokens)."""
    text = tmp_path / "text"
    text.mkdir()
    for index in range(60):
        (text / f"{index}.txt").write_text(f"document {index} says hello. " * 10)
    run_config = {
        "model": {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 2},
        "data": {"source": "text", "path": str(text), "tokenizer": "bytes"},
    }
    run_config["model"] |= {"seq_len": 32, "lookup": "xla"}
    run_config["train"] = {"num_steps": 1, "batch_size": 4}
    run_config["data"] |= {"data_dir": str(tmp_path / "cache")}
    run_config["data"] |= {"source_options": {"validation_every": 4}}
    dataset = data.load(data.DataConfig(**run_config["data"]))
    params = model.init(model.ModelConfig.from_config(run_config["model"]))
    workdir = tmp_path / "run"
    with checkpoint.Checkpointer(
        workdir,
        checkpoint.CheckpointConfig(),
        run_config=run_config,
        data_fingerprint=dataset.fingerprint,
    ) as checkpointer:
        state = {"step": jnp.int32(1), "params": params, "opt_state": {}}
        checkpointer.save(1, state, wait=True)
    report.main(["report", "utilisation"], report.Options(workdir=str(workdir)))
    *paths, summary = capsys.readouterr().out.split("\n", 2)
    names = ["utilisation_buckets.png", "utilisation_layers.png"]
    assert paths == [str(workdir / "plots" / name) for name in names]
    for path in paths:
        assert plt.imread(path).std() > 0.05  # not a blank page
    batches = list(dataset.validation.eval_batches(32, 256))
    config = model.ModelConfig.from_config(run_config["model"])
    expected = buckets.summary(buckets.collect(config, params, batches))
    header, *lines = summary.splitlines()
    assert header.split() == ["layer", "used", "entropy", "max/mean", "flip"]
    assert len(lines) == 2 * 3
    for name, used, entropy, _, flip in map(str.split, lines):
        told = {
            "used_fraction": float(used.rstrip("%")) / 100,
            "entropy": float(entropy),
            "flip_rate": float(flip),
        }
        for key, value in told.items():
            wanted = expected[f"utilisation/{name}/{key}"]
            assert value == pytest.approx(wanted, abs=6e-4)


def test_slots_over_training(tmp_path):
    """The mean over seeds at the steps that all have; one slot has nothing to compare.

    Mutations: the range in the place of the mean; steps of the first seed alone.
    """
    cosines = {"a0": [0.1, 0.2, 0.3], "a1": [0.3, 0.6], "one": [0.0]}
    for name, values in cosines.items():
        rows = [
            {
                "step": 10 * i,
                "degradation/blocks.0.mixer/cosine": value,
                "degradation/blocks.0.mixer/effective_rank": 1.0 + (name != "one"),
            }
            for i, value in enumerate(values)
        ]
        write_metrics(tmp_path / name, [*rows, {"step": 40, "val/loss": 1.0}])
    points = {name: {"label": name.rstrip("01")} for name in cosines}
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    cosine, rank = report.slots_figure([tmp_path]).axes
    drawn = {name: (list(x), list(y)) for name, (x, y) in lines(cosine).items()}
    assert drawn == {"a": ([0, 10], pytest.approx([0.2, 0.4]))}
    assert list(lines(rank)["a"][1]) == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([], {}, errors.ConfigError, "name one of flops, utilisation, curves"),
        (["flops", "x"], {}, errors.ConfigError, "'x': unexpected argument"),
        (["curves"], {}, errors.ConfigError, "at least one run"),
        (["curves", "{}/no"], {}, errors.DataError, "there is no such run directory"),
        (["curves", "{}"], {}, errors.StorageError, "metrics.jsonl"),
        (["slots"], {}, errors.ConfigError, "at least one sweep"),
        (["slots", "{}"], {}, errors.StorageError, "sweep.json"),
        (["costs"], {}, errors.ConfigError, "name one sweep"),
        (["costs", "{}"], {}, errors.DataError, "holds no run"),
        (["utilisation"], {}, errors.ConfigError, "--workdir=DIR is missing"),
        (["utilisation"], {"workdir": "{}"}, errors.StorageError, "checkpoints"),
        (["flops"], {"output": "/dev/null/x"}, errors.StorageError, "/dev/null/x"),
    ],
)
def test_mistakes_are_one_line(arguments, options, error, message, tmp_path):
    """And draw nothing. Red: `_existing`, `drawing.folder` or `_no_more` without its check."""
    arguments = [argument.format(tmp_path) for argument in arguments]
    options = {key: value.format(tmp_path) for key, value in options.items()}
    with pytest.raises(error) as raised:
        report.main(["report", *arguments], report.Options(**options))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.png"))


def test_command_line(tmp_path, runner):
    """The path of the picture is all that is printed; a mistake is one line and exit
    code 2. Red: `--output` not passed on, `config.choose` left out."""
    command = ["-m", "memoryformer.report", f"--output={tmp_path}/new"]
    good, bad = (runner.command(*command, name) for name in ("flops", "flop"))
    assert good.out == f"{tmp_path}/new/flops.png\n"
    assert plt.imread(f"{tmp_path}/new/flops.png").shape[:2] == (660, 960)
    assert bad.code == 2
    assert bad.err.strip().endswith("did you mean 'flops'?.")
    assert len(bad.err.strip().splitlines()) == 1


def test_names_are_shown_as_they_are(tmp_path):
    """A leading underscore is in the legend, a dollar sign is no formula.

    Mutation: `axes.legend()`.
    """
    names = ["_baseline", "cost$x^$", "plain"]
    row = {"step": 7, "train/loss": 3.0, "val/loss": 2.0, "val/bits_per_byte": 1.0}
    runs = [write_metrics(tmp_path / name, [row]) for name in names]
    figure = report.curves_figure(runs)
    for axes, kinds in zip(figure.axes, (2, 1), strict=True):
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(shown) == kinds * len(names)
        assert all(any(text.startswith(name) for text in shown) for name in names)
    figure.savefig(tmp_path / "curves.png")
