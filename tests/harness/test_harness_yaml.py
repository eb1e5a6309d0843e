"""Tasks, groups and tags from a folder, through the harness: values, refusals, few-shot."""

import json

import pytest
from known_model import known_model

from memoryformer import errors
from memoryformer.harness import evaluate_tasks, summary
from memoryformer.model import narrow

pytest.importorskip("lm_eval", reason="needs lm-eval")

# ' x' costs 2 nats and its letters; the first choice's letters cost 1 each, a z costs 3.
ROWS = [
    {"q": "a", "choices": ["e", "z"], "label": 0, "answer": "eee"},  # right
    {"q": "b", "choices": ["z", "ee"], "label": 0, "answer": "ee"},  # wrong
    {"q": "c", "choices": ["z", "e"], "label": 1, "answer": "eee"},  # right
]
CHOICE = """
output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_choice: '{{choices}}'
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{answer}}'
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[1:]))
    return tmp_path


def define(folder, name, text, rows="rows.jsonl", **fields):
    files = {"test": str(folder / rows), "train": str(folder / rows)}
    head = {"task": name, "dataset_path": "json", "test_split": "test"}
    head |= {"dataset_kwargs": {"data_files": files}, "training_split": "train"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in (head | fields).items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + text)


def evaluate(folder, names, **options):
    return evaluate_tasks.evaluate(
        *known_model(), names, tasks_path=str(folder), **options
    )


def test_groups_tags_filters_and_texts(folder):
    """Each by hand: 2 of 3, 1 of 2, their mean by size 3 of 5; texts of three e's.

    Red when a group ends the evaluation, a filter hides another, or a text's score is lost.
    """
    define(folder, "three", CHOICE)
    define(folder, "two", CHOICE, rows="two.jsonl", tag="tagged")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [three, two]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    filters = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {
            "name": "pair",
            "filter": [
                {"function": "regex", "regex_pattern": "^(e{2})"},
                {"function": "take_first"},
            ],
        },
    ]
    kwargs = {"max_gen_toks": 3, "until": []}
    define(folder, "text", TEXT, generation_kwargs=kwargs, filter_list=filters)
    result = evaluate(folder, "both,text,tagged,both")
    found = result["tasks"]
    assert found["three"]["acc"] == pytest.approx(2 / 3)
    assert found["two"]["acc"] == 0.5
    assert found["both"]["acc"] == pytest.approx(3 / 5)
    assert found["both"]["documents"] == 5
    assert found["both"]["subtasks"] == ["three", "two"]
    assert found["text"]["exact_match,whole"] == pytest.approx(2 / 3)
    assert found["text"]["exact_match,pair"] == pytest.approx(1 / 3)
    assert result["average"] is None and result["notes"] == {}
    shown = summary.table(result).splitlines()
    for name, metric, value in (
        ("both", "acc", "0.600"),
        ("text", "exact_match,whole", "0.667"),
        ("", "exact_match,pair", "0.333"),
    ):
        row = next(r for r in shown if r.startswith(name) and metric in r)
        assert value in row
    json.dumps(result)


def test_a_task_that_does_not_say_how_much_to_generate(folder):
    """512 tokens of model, 256 of reply: a long prompt stays whole, and that is said.

    Red when the prompt is cut to what the reply leaves: the count of its tokens is wrong.
    """
    rows = [ROWS[0] | {"q": "x" * size} for size in (256, 300, 511, 600)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    define(folder, "long", TEXT, generation_kwargs={"until": ["."]})
    result = evaluate(folder, "long")
    assert result["notes"] == {"long": {"replies shortened": 2, "prompts cut": 1}}
    assert "note: long: 2 replies shortened, 1 prompts cut" in summary.table(result)


def test_what_was_scored_is_kept_before_anything_is_made_of_it(folder, monkeypatch):
    """Red when a later task, or a failing summary, loses what came before."""
    define(folder, "three", CHOICE)
    long = [ROWS[0], ROWS[1] | {"choices": ["e", "z" * 600]}]
    (folder / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in long))
    define(folder, "bad", CHOICE, rows="long.jsonl")
    kept = []
    with pytest.raises(errors.DataError, match=r"task bad, document 1: .* 601 tokens"):
        evaluate(folder, "three,bad", keep=lambda r: kept.append(json.dumps(r)))
    (text,) = kept
    acc = json.loads(text)["three"]["results"]["three"]["acc,none"]
    assert acc == pytest.approx(2 / 3)

    def broken(results):
        raise KeyError("three")

    monkeypatch.setattr(summary, "flat", broken)
    with pytest.raises(KeyError):
        evaluate(folder, "three", keep=lambda r: kept.append(json.dumps(r)))
    assert len(kept) == 2


def test_examples_before_a_question(folder):
    """The task's own number unless the flag says another; never dropped in silence.

    Red when the flag's default overrides the task, or a task overrides the flag.
    """
    define(folder, "own", CHOICE, num_fewshot=1)
    define(folder, "none", CHOICE, num_fewshot=0)
    define(folder, "free", CHOICE)
    whole = "\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    whole += "doc_to_target: '{{q}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    define(folder, "page", whole)
    found = evaluate(folder, "own,none,free")["tasks"]
    assert [found[n]["num_fewshot"] for n in ("own", "none", "free")] == [1, 0, 0]
    found = evaluate(folder, "own,free", num_fewshot=2)["tasks"]
    assert [found[n]["num_fewshot"] for n in ("own", "free")] == [2, 2]
    for name, message in (("none", "num_fewshot: 0, which stays"), ("page", "whole")):
        with pytest.raises(errors.ConfigError, match=rf"--num_fewshot=2.*{message}"):
            evaluate(folder, name, num_fewshot=2)


YAML = {
    "no_yaml": ("x.yaml", "task: [", r"x\.yaml: cannot be read"),
    "no_data": ("x.yaml", "task: x\ndataset_path: json\n" + CHOICE, "task x"),
    "no_output": ("x.yaml", "task: x\n", "task x"),
    "a_list": ("x.yaml", "- task: x\n", "x"),
    "foreign_group": ("x.yaml", "group: x\ntask: [nowhere]\n", "task x"),
    "foreign_include": ("x.yaml", "task: x\ninclude: nowhere.yaml\n", "x"),
}


@pytest.mark.parametrize("case", YAML)
def test_task_files_that_make_no_task(folder, case, monkeypatch, tmp_path_factory):
    """One line with its reason. Red when the harness's own exception comes through.

    Without data files, `datasets` reads all that lies below the working directory: nothing.
    """
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    name, text, message = YAML[case]
    (folder / name).write_text(text)
    with pytest.raises(errors.MemoryFormerError, match=message) as caught:
        evaluate(folder, "x")
    assert "\n" not in str(caught.value)


FIELDS = {
    "empty_choice": (CHOICE + "target_delimiter: ''\n", "document 2: .* no tokens"),
    "no_column": (CHOICE.replace("{{choices}}", "{{choice}}"), "task x"),
    "template": (CHOICE.replace("'{{q}}'", "'{{q / 2}}'"), "task x"),
    "metric": (CHOICE.replace("metric: acc}", "metric: none_such}"), "task x"),
    "beams": (TEXT + "generation_kwargs: {num_beams: 5}\n", "num_beams=5"),
    "null": (TEXT + "generation_kwargs: {temperature: null}\n", "task x"),
    "until": (TEXT + "generation_kwargs: {until: [5]}\n", r"until=\[5\]"),
    "no_tokens": (TEXT + "generation_kwargs: {max_gen_toks: 0}\n", "max_gen_toks"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_tasks_that_cannot_be_evaluated(folder, case):
    """Red when a template's or a metric's exception comes through, or nothing is said."""
    text, message = FIELDS[case]
    rows = [*ROWS[:2], ROWS[2] | {"choices": ["", "e"]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    define(folder, "x", text)
    with pytest.raises(errors.MemoryFormerError, match=message) as caught:
        evaluate(folder, "x")
    assert "\n" not in str(caught.value)


def test_a_fault_of_ours_is_not_the_tasks(folder, monkeypatch):
    """Red when every exception becomes an error of the task."""
    define(folder, "three", CHOICE)

    def broken(self, windows):
        raise ValueError("ours")

    monkeypatch.setattr("memoryformer.harness.scoring.Scorer.score", broken)
    with pytest.raises(ValueError, match=r"^ours$") as caught:
        evaluate(folder, "three")
    assert not isinstance(caught.value, errors.MemoryFormerError)


def test_rounded_and_pruned_weights_are_what_is_scored(folder):
    """Red when `kinds` or `density` is ignored: another text, or nothing, in the result."""
    page = "\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    page += "doc_to_target: '{{q}} eze'\nmetric_list: [{metric: bits_per_byte}]\n"
    define(folder, "page", page)
    config, params, tokenizer = known_model()
    path = str(folder)

    def bits(params, **options):
        result = evaluate_tasks.evaluate(
            config, params, tokenizer, "page", tasks_path=path, **options
        )
        return result["tasks"]["page"]["bits_per_byte"], result

    kinds = narrow.WeightKinds(head="int4")
    rounded = narrow.round_weights(config, params, kinds)
    value, result = bits(params, kinds=kinds)
    assert value == bits(rounded)[0] != bits(params)[0]
    assert result["weights"]["head"] == "int4"
    _, result = bits(params, density=0.5)
    assert result["effective_multiply_adds"] * 2 == result["multiply_adds"]
    assert "weights" not in result
    with pytest.raises(errors.ConfigError, match="--density=0"):
        bits(params, density=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": -1}, "--limit=-1"),
        ({"batch_size": 0}, "--task_batch_size=0"),
        ({"num_fewshot": -2}, "--num_fewshot=-2"),
        ({"tasks": " , "}, "--tasks: name some of"),
        ({"tasks_path": "nowhere"}, "--tasks_path=nowhere"),
    ],
)
def test_options_out_of_range(options, message):
    """Red when one reaches the harness."""
    with pytest.raises(errors.ConfigError, match=message):
        evaluate_tasks.evaluate(*known_model(), **({"tasks": "piqa"} | options))
