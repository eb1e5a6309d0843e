"""Through the lm-evaluation-harness, offline: hand-computed sets, perplexity, settings."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from known_model import SPACE, E, Z, known_model

from memoryformer import convert, errors, model, sharding
from memoryformer import data as data_lib
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.evaluation import loss as loss_lib
from memoryformer.harness import (
    evaluate_tasks,
    scoring,
    summary,
    task_files,
    task_loading,
)
from memoryformer.model import params as params_lib
from memoryformer.training import experiment

needs_harness = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"),
    reason="needs lm-eval",
)


def arc(question, texts, key):
    labels = ["A", "B", "C", "D"][: len(texts)]
    return {
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }


def wsc(label):
    return {
        "text": "Mark told Pete lies, and Pete believed him.",
        "span1_text": "Mark",
        "span2_text": "him",
        "span1_index": 0,
        "span2_index": 7,
        "label": label,
    }


# Costs of ' x' are 2 + its letters. In brackets: what acc picks, what acc_norm picks.
ROWS = {
    "piqa": [
        # 6 against 5; per letter 6/4 against 5/1: [1, 0]
        {"goal": "g", "sol1": "eeee", "sol2": "z", "label": 1},
        # 5 against 8; 5/1 against 8/2: [0, 1]
        {"goal": "g", "sol1": "z", "sol2": "zz", "label": 0},
        # 4 against 3; 4/2 against 3/1: [1, 0]
        {"goal": "g", "sol1": "ee", "sol2": "e", "label": 0},
        # 6 against 7; 6/2 against 7/3: [0, 1]
        {"goal": "g", "sol1": "ez", "sol2": "eez", "label": 0},
    ],
    "winogrande": [
        # ' z' costs 4 + 3 after an e, 2 + 3 after anything else: [1], [0], [0: a tie]
        {"sentence": "a _ z", "option1": "ze", "option2": "ez", "answer": "2"},
        {"sentence": "a _ z", "option1": "zz", "option2": "ee", "answer": "2"},
        {"sentence": "a _ e", "option1": "ez", "option2": "zz", "answer": "1"},
    ],
    # ' no' costs 2 + 2 others, ' yes' 2 + 2 others + 1: always no.
    "wsc": [wsc(0), wsc(1), wsc(1), wsc(0), wsc(1)],
    "arc_easy": [
        # 3, 5, 4, 6; per letter 3, 5, 2, 3: [0, 2]
        arc("q", ["e", "z", "ee", "ez"], "C"),
        # 'e e' is 2 + 1 + 4 + 1 = 8, 'zz' 8: a tie, the first; 8/3 against 8/2: [0, 0]
        arc("q", ["e e", "zz"], "A"),
        # 8, 5, 7; 8/2, 5/3, 7/3: [1, 1]
        arc("q", ["zz", "eee", "eez"], "C"),
    ],
    "arc_challenge": [
        # 6, 5, 8; 6/4, 5/1, 8/2: [1, 0]
        arc("q", ["eeee", "z", "zz"], "A"),
        arc("q", ["eeee", "z", "zz"], "B"),
    ],
    "logiqa": [
        # 5, 6, 3, 8; 5/1, 6/4, 3/1, 8/2: [2, 1]
        {"label": label, "context": "c", "question": "q", "options": options}
        for label, options in (
            ("c", ["z", "eeee", "e", "zz"]),
            ("b", ["z", "eeee", "e", "zz"]),
            ("b", ["z", "eeee", "e", "zz"]),
            ("a", ["z", "eeee", "e", "zz"]),
        )
    ],
}
# task -> (acc, acc_norm)
EXPECTED = {
    "piqa": (3 / 4, 1 / 4),
    "winogrande": (2 / 3, None),
    "wsc": (2 / 5, None),
    "arc_easy": (1 / 3, 2 / 3),
    "arc_challenge": (1 / 2, 1 / 2),
    "logiqa": (1 / 4, 2 / 4),
}


@pytest.fixture
def rows_path(tmp_path):
    for name, rows in ROWS.items():
        lines = "\n".join(map(json.dumps, rows)) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.train.jsonl").write_text(lines)
    return str(tmp_path)


@needs_harness
def test_hand_computed_accuracies_in_the_six_formats(rows_path):
    """acc, acc_norm and standard errors, exactly; the same in any batch size.

    Red when a score leaves out the first or last token of a continuation, when contexts and
    continuations are cut at another place, or when a choice is read from another column.
    """
    config, params, tokenizer = known_model()
    result = evaluate_tasks.evaluate(
        config, params, tokenizer, tasks_path=rows_path, batch_size=64
    )
    for name, (acc, acc_norm) in EXPECTED.items():
        values, count = result["tasks"][name], len(ROWS[name])
        assert values["acc"] == pytest.approx(acc, abs=1e-12), name
        assert values["documents"] == count
        error = math.sqrt(acc * (1 - acc) / (count - 1))
        assert values["acc_stderr"] == pytest.approx(error, abs=1e-12)
        assert values["version"] == 1.0
        if acc_norm is None:
            assert "acc_norm" not in values
        else:
            assert values["acc_norm"] == pytest.approx(acc_norm, abs=1e-12), name
    mean = sum(acc for acc, _ in EXPECTED.values()) / 6
    assert result["average"] == pytest.approx(mean, abs=1e-12)
    settings = result["settings"]
    assert settings["compilations"] <= 6 and settings["harness"] == "0.4.13"
    json.dumps(result)

    text = summary.table(result)
    assert "piqa" in text and "0.750+-0.250" in text and "MF-tiny" in text
    again = evaluate_tasks.evaluate(
        config, params, tokenizer, tasks_path=rows_path, batch_size=1
    )
    assert again["tasks"] == result["tasks"]


@needs_harness
def test_few_shot_limit_and_bos(rows_path):
    """Red when `num_fewshot` or `limit` does not reach the harness."""
    config, params, tokenizer = known_model()
    seen = []

    class Spy(tokenizer_lib.Tokenizer):
        def encode(self, text):
            seen.append(text)
            return super().encode(text)

    spy = Spy(json.dumps(tokenizer.spec), "bytes")
    result = evaluate_tasks.evaluate(
        config,
        params,
        spy,
        tasks="piqa",
        tasks_path=rows_path,
        num_fewshot=2,
        limit=3,
        add_bos=True,
    )
    assert result["tasks"]["piqa"]["documents"] == 3
    assert result["tasks"]["piqa"]["acc"] == pytest.approx(2 / 3)
    assert result["average"] is None
    assert result["settings"]["bos"] == "every context"
    assert max(text.count("Question:") for text in seen) == 3


@needs_harness
def test_bos_rule_and_long_contexts():
    """The prefix token stands where it should, and a context is cut on its left.

    Red when the prefix is put before continuations too, or the right end is cut off.
    """
    from lm_eval.api import instance

    from memoryformer.generation import sampler
    from memoryformer.harness import adapter as adapter_lib

    config, params, tokenizer = known_model()
    scorer = scoring.Scorer(config, params)
    sent = []
    original = scorer.score
    scorer.score = lambda windows: (sent.extend(windows), original(windows))[1]
    generator = sampler.Generator(config, params)

    def loglikelihood(context, continuation, **kwargs):
        adapter = adapter_lib.HarnessModel(scorer, generator, tokenizer, **kwargs)
        request = instance.Instance("loglikelihood", {}, (context, continuation), 0)
        return adapter.loglikelihood([request], disable_tqdm=True)[0]

    logprob, greedy = loglikelihood("a", " ee")
    assert logprob == pytest.approx(-(SPACE + E + E), abs=1e-5) and not greedy
    assert loglikelihood("a", "ee") == (pytest.approx(-2 * E, abs=1e-5), True)
    assert sent[-1].tokens == [97, 101, 101]
    loglikelihood("a", "ee", add_bos=True)
    assert sent[-1] == ([256, 97, 101, 101], 2)
    loglikelihood("", "ee")
    assert sent[-1] == ([256, 101, 101], 2)
    loglikelihood("abc" * 400 + "d", "ee")
    assert len(sent[-1].tokens) == 513 and sent[-1].tokens[-3:] == [100, 101, 101]


@needs_harness
def test_generate_until_stops_at_the_stop_string():
    """Greedy text of the known model is 'e' for ever.

    Red when the stop string stays in, or is only looked for in the last token.
    """
    from lm_eval.api import instance

    from memoryformer.generation import sampler
    from memoryformer.harness import adapter as adapter_lib

    config, params, tokenizer = known_model()
    adapter = adapter_lib.HarnessModel(
        scoring.Scorer(config, params), sampler.Generator(config, params), tokenizer
    )

    def generate(context, **options):
        request = instance.Instance("generate_until", {}, (context, options), 0)
        return adapter.generate_until([request])[0]

    assert generate("a", until=["eee"], max_gen_toks=9) == ""
    assert generate("a", until=["ez"], max_gen_toks=9) == "e" * 9
    assert generate("", until="z", max_gen_toks=2) == "ee"
    assert len(generate("a" * 2000, until=[], max_gen_toks=3)) == 3


@needs_harness
def test_repeats_of_a_request_are_drawn_apart():
    """Request i draws with seed i, whatever runs beside it; no batch is larger than asked.

    Red when every request has the same seed, or its seed depends on the batch.
    """
    from lm_eval.api import instance

    from memoryformer.generation import sampler
    from memoryformer.harness import adapter as adapter_lib

    config, params, tokenizer = known_model()
    generator = sampler.Generator(config, params)
    sizes = []
    original = generator.stream_batch
    generator.stream_batch = lambda prompts, sampling: (
        sizes.append(len(prompts)),
        original(prompts, sampling),
    )[1]
    options = {"max_gen_toks": 8, "temperature": 1.0, "until": []}
    requests = [
        instance.Instance("generate_until", {}, ("a", options), 0) for _ in range(5)
    ]

    def generate(batch_size):
        scorer = scoring.Scorer(config, params, batch_size=batch_size)
        adapter = adapter_lib.HarnessModel(scorer, generator, tokenizer)
        return adapter.generate_until(requests)

    texts = generate(4)
    assert len(set(texts)) == 5 and sizes == [4, 1]
    assert generate(1) == texts


@needs_harness
def test_perplexity_of_eval_harness_and_plain_loop_agree(tmp_path):
    """Nats per token of eval.py, of rolling log-likelihoods and of a loop: 1e-6.

    Each document fills one window, so that all three see the same contexts; eval.py also
    counts each document's end, which is scored beside. A YAML task of a local folder gives
    the same bits per byte.

    Red when rolling windows overlap in what they score, or eval.py divides by another count.
    """
    from lm_eval.api import instance

    from memoryformer.generation import sampler
    from memoryformer.harness import adapter as adapter_lib

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh ij"))
    texts = ["".join(rng.choice(letters, 47)) for _ in range(40)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(text)
    config = experiment.default_config()
    config.model.update(
        vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, seq_len=48, code_bits=4
    )
    config.model.update(mixer_std=0.5, ffn_std=0.5, head_std=1.0)
    config.data.update(
        source="text",
        path=str(tmp_path / "text"),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        source_options={"validation_every": 2},
    )
    config.train.update(num_steps=1, batch_size=4)
    config.optimizer.learning_rate = 1e-3
    run = experiment.resolve(config)
    dataset = data_lib.load(run.data, expected_vocab_size=257)
    stream = np.asarray(dataset.validation.tokens).tolist()
    documents = bytes_between(stream, 256)
    assert len(documents) > 5 and {len(d) for d in documents} == {47}

    params = model.init(run.model, 3)
    place = sharding.make("single")
    batches = dataset.validation.eval_batches(48, 4)
    ours = loss_lib.evaluate(
        loss_lib.make_eval_step(run.model, place),
        params,
        batches,
        dataset.tokenizer.token_bytes,
        place,
    )

    scorer = scoring.Scorer(run.model, params)
    generator = sampler.Generator(run.model, params)
    adapter = adapter_lib.HarnessModel(scorer, generator, dataset.tokenizer)
    strings = [bytes(d).decode() for d in documents]
    requests = [
        instance.Instance("loglikelihood_rolling", {}, (s,), i)
        for i, s in enumerate(strings)
    ]
    rolling = adapter.loglikelihood_rolling(requests)
    ends = scorer.score([scoring.Window([256, *d, 256], 1) for d in documents])
    forward = jax.jit(lambda t: model.forward(run.model, params, t))
    plain, plain_ends = [], []
    for document in documents:
        logits = np.asarray(forward(np.array([[256, *document]])), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        plain.append(sum(logprobs[i, t] for i, t in enumerate(document)))
        plain_ends.append(logprobs[-1, 256])
    np.testing.assert_allclose(rolling, plain, rtol=1e-6)
    count = 48 * len(documents)
    by_harness = -(sum(rolling) + sum(float(s.logprobs[0]) for s in ends)) / count
    by_loop = -(sum(plain) + sum(plain_ends)) / count
    assert ours["val/tokens"] == count
    assert by_harness == pytest.approx(by_loop, rel=1e-6)
    assert ours["val/loss"] == pytest.approx(by_loop, rel=1e-6)

    folder = tmp_path / "tasks"
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"page": s}) + "\n" for s in strings)
    (folder / "mine.yaml").write_text(
        "task: mine\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{page}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    result = evaluate_tasks.evaluate(
        run.model, params, dataset.tokenizer, "mine", tasks_path=str(folder)
    )
    bits = -sum(plain) / math.log(2) / (47 * len(documents))
    assert result["tasks"]["mine"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def bytes_between(stream, eot_id):
    documents, current = [], []
    for token in stream:
        if token == eot_id:
            documents.append(current)
            current = []
        else:
            current.append(token)
    return [d for d in [*documents, current] if d]


@needs_harness
def test_long_text_is_scored_token_by_token_once(tmp_path):
    """A text of five windows: every token once, the last window with a whole context.

    Red when a window boundary drops or repeats a token.
    """
    from lm_eval.api import instance

    from memoryformer.generation import sampler
    from memoryformer.harness import adapter as adapter_lib

    config, params, tokenizer = known_model()
    adapter = adapter_lib.HarnessModel(
        scoring.Scorer(config, params), sampler.Generator(config, params), tokenizer
    )
    text = "ez " * 700  # per period: e after a space, z after e, space after z
    request = instance.Instance("loglikelihood_rolling", {}, (text,), 0)
    expected = -700 * (E + Z + SPACE)
    assert adapter.loglikelihood_rolling([request])[0] == pytest.approx(expected, 1e-6)


@needs_harness
def test_mistakes_are_refused_in_one_line(tmp_path):
    """Red when a misspelt task runs nothing, or a foreign version is used silently."""
    config, params, tokenizer = known_model()
    for arguments, message in (
        (dict(tasks="piqua"), "did you mean 'piqa'"),
        (dict(tasks=""), "name some of"),
        (dict(tasks="piqa", tasks_path=str(tmp_path / "no")), "no such folder"),
    ):
        with pytest.raises(errors.ConfigError, match=message) as caught:
            evaluate_tasks.evaluate(config, params, tokenizer, **arguments)
        assert "\n" not in str(caught.value)
    (tmp_path / "piqa.jsonl").write_text("{")
    with pytest.raises(errors.DataError, match=r"piqa\.jsonl"):
        evaluate_tasks.evaluate(
            config, params, tokenizer, "piqa", tasks_path=str(tmp_path)
        )


@needs_harness
def test_eval_py_on_an_exported_model(rows_path, tmp_path):
    """`eval.py --export --tasks`: the JSON says what was evaluated, the table is printed.

    Red when a flag does not reach the tasks or the origin is lost.
    """
    config, params, tokenizer = known_model()
    out, result = tmp_path / "export", tmp_path / "result.json"
    source = {"step": 7, "data_fingerprint": "abc"}
    convert.save_export(out, config, params, tokenizer=tokenizer, source=source)
    command = [
        sys.executable,
        "eval.py",
        f"--export={out}",
        "--tasks=piqa,logiqa",
        f"--tasks_path={rows_path}",
        "--limit=2",
        f"--output={result}",
    ]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert (
        found["tasks"]["piqa"]["acc"] == 1 and found["tasks"]["piqa"]["documents"] == 2
    )
    assert found["tasks"]["logiqa"]["acc"] == 0.5
    assert found["checkpoint"]["step"] == 7
    assert found["checkpoint"]["model_fingerprint"] == params_lib.fingerprint(params)
    assert "Pythia-70M" in done.stderr


@needs_harness
def test_versions_are_pinned(monkeypatch):
    """Red when another version of a task is evaluated without a word."""
    monkeypatch.setitem(task_files.TASKS, "piqa", ("piqa/piqa.yaml", 2.0))
    with pytest.raises(errors.ConfigError, match=r"version 1\.0, pinned is 2\.0"):
        task_files.task_config("piqa")


def test_without_the_harness_the_message_says_what_to_install(monkeypatch):
    """Red when the import error surfaces as a traceback."""
    import importlib.metadata as metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(task_loading.importlib.metadata, "version", absent)
    with pytest.raises(errors.ConfigError, match=r"\.\[eval\]"):
        task_loading.check_installed()
