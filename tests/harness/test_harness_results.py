"""What the harness returns, laid out and kept; without the harness."""

import json

import numpy as np
import pytest

from memoryformer import errors
from memoryformer.harness import output, summary, task_files

RESULTS = {
    "results": {
        "part": {
            "name": "part",
            "alias": "part",
            "sample_len": 4,
            "acc,none": np.float32(0.25),
            "acc_stderr,none": 0.125,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": "N/A",
            "exact_match,loose": 1,
            "exact_match_stderr,loose": np.float64(0.0625),
            "by_letter,none": {"a": np.int64(3)},
            "perplexity,none": 131_700.0,
        },
        "other": {"name": "other", "alias": "other", "sample_len": 2, "f1,none": 0.75},
        "whole": {"name": "whole", "alias": "w", "sample_len": 6, "acc,none": 0.5},
        "bare": {"name": "bare", "alias": "bare"},
    },
    "group_subtasks": {"whole": ["part", "other"], "bare": ["part"]},
    "versions": {"part": 2.0, "other": "N/A", "whole": "1"},
    "n-shot": {"part": 3, "other": 0},
    "n-samples": {
        "part": {"original": 9, "effective": 4},
        "other": {"original": 2, "effective": 2},
    },
    "configs": {"part": {"process_docs": print}},
}


def test_every_metric_group_and_filter_is_there():
    """Red when two filters share a name, a group has no entry, or float32 is dropped."""
    kept = summary.kept(RESULTS)
    assert kept == json.loads(json.dumps(kept))
    assert "configs" not in kept
    odd = [
        np.datetime64("2024-01-02"),
        np.longdouble(0.5),
        np.bytes_(b"x"),
        np.bool_(1),
    ]
    assert json.loads(json.dumps(summary.plain(odd))) == [
        "2024-01-02",
        0.5,
        "b'x'",
        True,
    ]
    found = summary.flat(kept)
    assert found["part"] == {
        "acc": 0.25,
        "acc_stderr": 0.125,
        "exact_match,strict": 0.5,
        "exact_match,loose": 1.0,
        "exact_match_stderr,loose": 0.0625,
        "by_letter": {"a": 3},
        "perplexity": 131_700.0,
        "documents": 4,
        "num_fewshot": 3,
        "version": 2.0,
    }
    assert found["whole"] == {
        "acc": 0.5,
        "documents": 6,
        "num_fewshot": None,
        "version": "1",
        "subtasks": ["part", "other"],
    }
    assert found["bare"]["documents"] is None


def test_the_table_shows_every_metric():
    """Red when a metric other than acc and acc_norm has no row."""
    found = summary.flat(summary.kept(RESULTS))
    text = summary.table(
        {
            "tasks": found,
            "average": None,
            "notes": {"whole": {"replies shortened": 3, "prompts cut": 1}},
            "settings": {"seq_len": 32},
        }
    )
    rows = [line.split() for line in text.splitlines()]
    assert rows == [
        ["metric", "value", "docs"],
        ["part", "acc", "0.250+-0.125", "4"],
        ["exact_match,strict", "0.500"],
        ["exact_match,loose", "1.000+-0.062"],
        ["by_letter", "{'a':", "3}"],
        ["perplexity", "1.317e+05"],
        ["other", "f1", "0.750", "2"],
        ["whole", "acc", "0.500", "6"],
        ["bare"],
        "+- is one standard error".split(),
        "note: whole: 3 replies shortened, 1 prompts cut (the model reads 32 tokens)"
        "".split(),
    ]


def test_the_papers_six_stand_beside_published_figures():
    """Figures in acc's rows only; the average where all six have one."""
    six = {
        name: {"acc": 0.5 + i / 100, "documents": 9}
        for i, name in enumerate(task_files.TASKS)
    }
    six["piqa"]["acc_norm"] = 0.75
    assert summary.average(six) == pytest.approx(0.525)
    assert summary.average({k: v for k, v in six.items() if k != "wsc"}) is None
    assert summary.average(six | {"wsc": {"f1": 1.0}}) is None
    result = {"tasks": six, "average": 0.525, "notes": {}, "settings": {}}
    rows = {
        tuple(line.split()[:2]): line.split()
        for line in summary.table(result).splitlines()
    }
    figures = [f"{row[0]:.3f}" for row in task_files.FIGURES.values()]
    assert rows["piqa", "acc"][4:] == figures
    assert rows["acc_norm", "0.750"] == ["acc_norm", "0.750"]
    mean = np.mean(task_files.FIGURES["MF-tiny"])
    assert rows["average", "acc"][3] == f"{mean:.3f}"


def test_what_came_is_kept_in_the_file(tmp_path, capsys):
    """After each task, and the whole in its place; printed where there is no file.

    Red when a task's results live only in memory until all are done.
    """
    path = tmp_path / "new" / "out.json"
    out = output.Output(str(path))
    assert not path.parent.exists()
    with pytest.raises(ZeroDivisionError), out.unfinished():
        out.keep({"a": {"results": {}}})
        raise ZeroDivisionError
    unfinished = {"finished": False, "harness": {"a": {"results": {}}}}
    assert json.loads(path.read_text()) == unfinished
    assert capsys.readouterr().out == ""
    out.give({"tasks": {}})
    assert json.loads(path.read_text()) == {"tasks": {}}
    assert json.loads(capsys.readouterr().out) == {"tasks": {}}
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]

    out = output.Output("")
    with pytest.raises(KeyboardInterrupt), out.unfinished():
        out.keep({"a": {"results": {}}})
        raise KeyboardInterrupt
    assert json.loads(capsys.readouterr().out) == unfinished
    with pytest.raises(ZeroDivisionError), output.Output("").unfinished():
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


def test_where_no_file_can_be_written(tmp_path):
    """Said before anything is computed; a device is written to, not replaced."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(errors.ConfigError, match=r"--output=.*no file"):
            output.Output(str(path))
    output.Output("/dev/null").give({})
    rows = tmp_path / "piqa.jsonl"
    rows.write_text("{}")
    (tmp_path / "own.yaml").write_text("task: own")
    files = task_files.files_read(["piqa"], str(tmp_path))
    assert [path.name for path in files] == ["piqa.jsonl", "own.yaml"]
    for path in (*files, tmp_path / "config.json"):
        with pytest.raises(errors.ConfigError, match="would be written over"):
            output.Output(str(path), files, [tmp_path])
    assert rows.read_text() == "{}"
