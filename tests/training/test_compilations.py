"""What a run compiles, it compiles once: five evaluations cost the compilations of one."""

import contextlib

import jax
import numpy as np
import pytest
import toy

from memoryformer import evaluation, model, sharding
from memoryformer.evaluation import buckets, slots
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import mixers, recurrence
from memoryformer.runs import metrics
from memoryformer.training import experiment, loop, programs

TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
JIT = jax.jit
OPTIONS = {  # small ones
    "luna": {"num_slots": 3},
    "conv_luna": {"num_slots": 3},
    "linformer": {"num_slots": 3, "max_len": 16},
    "performer": {"num_features": 8},
}
CASES = {
    **{
        name: {"mixer": name, "mixer_options": OPTIONS.get(name, {})}
        for name in mixers.MIXERS
    },
    **{kind: {"recurrence": kind} for kind in recurrence.KINDS},
    "rmt of luna": {
        "recurrence": "rmt",
        "mixer": "luna",
        "mixer_options": OPTIONS["luna"],
    },
}
CHUNKS = {"recurrence_options": {"num_slots": 2, "chunk_size": 4}}


@contextlib.contextmanager
def counted(event):
    """Yield a list that grows by one with every such event of jax."""
    seen = []

    def listen(name, *_, **__):
        if name == event:
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def traced_only(function, **options):
    """`jax.jit` without the compiler, which takes the time: results are ones."""
    jitted = JIT(function, **options)

    def call(*args, **kwargs):
        results = jitted.trace(*args, **kwargs).out_info
        return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), results)

    return call


def forget_steps():
    """Empty the caches of compiled meters, where they have one."""
    makers = (loss_lib.make_eval_step, slots.make_step, buckets.make_count_step)
    for make in makers:
        getattr(make, "cache_clear", lambda: None)()


@pytest.mark.parametrize("case", CASES)
def test_five_evaluations_compile_once(case, monkeypatch):
    """Of the loss, of the tables and of the slots, at five steps of a run: what jax does not
    trace again, it does not compile again.

    Mutation tried: `evaluation.slots.make_step` without its cache (red for luna, conv_luna and
    every recurrence); `evaluation.buckets.make_count_step` without its own (red for all).
    """
    fields = CASES[case] | (CHUNKS if "recurrence" in CASES[case] else {})
    config = toy.model_config("memory", num_layers=1, **fields)
    single = sharding.make("single")
    shapes = jax.eval_shape(lambda: model.init(config))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    monkeypatch.setattr(jax, "jit", traced_only)
    forget_steps()
    batches = [toy.batch(config, seed, batch_size=2) for seed in range(2)]
    token_bytes = np.ones(config.vocab_size, np.int32)
    subject = evaluation.Subject(config, single, batches, token_bytes)
    counts = []
    with counted(TRACED) as traced:
        for _ in range(5):
            for evaluator in evaluation.make(subject):
                evaluator(params)
            counts.append(len(traced))
    forget_steps()  # they only trace
    assert counts[0] > 0, "nothing was counted: the event has another name"
    assert counts == counts[:1] * 5


def test_a_run_compiles_nothing_after_its_first_evaluation(tmp_path, monkeypatch):
    """Five steps, each evaluated: neither the step nor a meter is compiled again.

    Mutation tried: as above; `make_eval_step` called in the loop.
    """
    counts = []
    with counted(COMPILED) as compiled:
        write = metrics.MetricsWriter.write

        def note(self, step, values):
            if "val/loss" in values:
                counts.append(len(compiled))
            write(self, step, values)

        monkeypatch.setattr(metrics.MetricsWriter, "write", note)
        fields = {
            "model.mixer": "luna",
            "model.mixer_options.num_slots": 3,
            "train.num_steps": 6,
            "train.log_every": 1,
            "eval.every_steps": 1,
            "checkpoint.every_steps": 0,
        }
        toy.corpus(tmp_path / "corpus")
        loop.train(toy.run_config(tmp_path, **fields), tmp_path / "run")
    # The first row of the log, and with it the schedule, is computed at the second step.
    assert len(counts) == 6 and counts[1:] == counts[1:2] * 5


def test_one_set_of_programs_is_kept(tmp_path):
    """Runs share it that differ in inputs, or in what the loop alone does.

    Mutations: the set not kept; seeds, rates or phases compared.
    """

    def made(**fields):
        run = experiment.resolve(toy.run_config(tmp_path, **fields))
        return cache.programs(run, sharding.make("single"), None)

    cache = programs.Cache()
    first = oldest = made()
    for fields in (
        {},
        {"train.seed": 3},
        {"optimizer.learning_rate": 0.1, "optimizer.weight_decay": 0.0},
        {"train.log_every": 1, "train.timeout_scale": 9.0, "train.max_skipped": 3},
        {"eval.every_steps": 3, "checkpoint.keep": 9},
    ):
        assert made(**fields) is first, fields
    for fields in (
        {"train.num_microbatches": 2},
        {"optimizer.b1": 0.8},
        {"model.score": "l1"},
        {"train.num_steps": 21},
    ):
        other = made(**fields)
        assert other is not first and made(**fields) is other, fields
        first = other
    assert made() is not oldest  # one set, not each
