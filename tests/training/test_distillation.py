"""A teacher in the step: the objective and its gradient, resumed, frozen, refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import accounting, data, model, sharding
from memoryformer.accounting import __main__ as accounting_command
from memoryformer.convert import transfer
from memoryformer.dryrun import examine
from memoryformer.errors import ConfigError, Preempted, StorageError
from memoryformer.model import distillation
from memoryformer.runs import metrics, state_spec
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment, loop, programs, trainable
from memoryformer.training import step as step_lib
from memoryformer.training import teacher as teacher_lib

B, L, V, D = 3, 4, 7, 5
MIXED = {
    "model.projection": "mixed",
    "model.output_projection": True,
    "model.ffn_activation": "gelu",
    "model.projection_options.memory_bias": True,
    "model.projection_options.parts": "ffn=memory_block,thresholds; qkv=memory",
}
STDS = {"embed_std": 1.0, "mixer_std": 0.5, "ffn_std": 0.3, "head_std": 0.5}
STDS = {f"model.{name}": value for name, value in STDS.items()}
MIXED |= STDS
DENSE = STDS | {"model.projection": "dense", "model.ffn_activation": "gelu"}
DENSE |= {"model.output_projection": True}
TAUGHT = MIXED | {
    "train.teacher_options.temperature": 2.0,
    "train.teacher_options.weight": 0.75,
    "train.teacher_options.hidden": 0.5,
    "train.trainable": "converted",
    "train.num_steps": 4,
    "train.log_every": 1,
    "optimizer.learning_rate": 0.03,
    "checkpoint.every_steps": 2,
    "eval.every_steps": 0,
}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "temperature, weight, hidden", [(1, 1, 0), (2.5, 0.7, 0), (0.5, 0.25, 1.5)]
)
def test_the_objective_and_its_gradient(temperature, weight, hidden):
    """Of float64 numpy, from the definitions, with the gradient by hand.

    Mutations: no T^2; T^1; the divergence of student from teacher; logits divided by T in one
    of the two alone; `hidden` not divided by the teacher's squares; the weight of the nats 1;
    no `stop_gradient` of the teacher.
    """
    rng = np.random.default_rng(0)
    z, zt = 2 * rng.normal(size=(2, B, L, V))
    x, xt = rng.normal(size=(2, B, L, D))
    targets = rng.integers(0, V, (B, L))
    weights = rng.random((B, L)) * (rng.random((B, L)) > 0.3)
    p, pt = softmax(z / temperature), softmax(zt / temperature)
    apart = temperature**2 * (pt * np.log(pt / p)).sum(-1)
    chosen = np.eye(V)[targets]
    nats = -np.log((softmax(z) * chosen).sum(-1))
    squares = np.square(xt).sum(-1)
    distance = np.square(x - xt).sum(-1) / squares
    want = weights * ((1 - weight) * nats + weight * apart + hidden * distance)
    dz = (1 - weight) * (softmax(z) - chosen) + weight * temperature * (p - pt)
    dx = hidden * 2 * (x - xt) / squares[..., None]

    def total(z, x, zt, xt):
        ours = (distillation.Output(x, z), distillation.Output(xt, zt))
        batch = {"targets": targets, "weights": jnp.float32(weights)}
        options = {"temperature": temperature, "weight": weight, "hidden": hidden}
        terms = distillation.objective(*ours, batch, **options)
        return terms["objective"].sum(), terms

    arrays = [jnp.float32(a) for a in (z, x, zt, xt)]
    grads, terms = jax.grad(total, (0, 1, 2, 3), has_aux=True)(*arrays)
    near = dict(rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(terms["objective"], want, **near)
    np.testing.assert_allclose(terms["divergence"], weights * apart, **near)
    np.testing.assert_allclose(terms["nats"], weights * nats, **near)
    np.testing.assert_allclose(grads[0], weights[..., None] * dz, **near)
    np.testing.assert_allclose(grads[1], weights[..., None] * dx, **near)
    assert not np.any(grads[2]) and not np.any(grads[3])


def test_a_teacher_that_is_not_finite_in_padding():
    """Neither value nor gradient. Mutation: a product with the weights for `weighted`."""
    z = jnp.ones((1, 2, V)).at[0, 1].set(jnp.inf)
    student = distillation.Output(jnp.ones((1, 2, D)), z)
    batch = {"targets": jnp.zeros((1, 2), int), "weights": jnp.float32([[1, 0]])}
    options = {"temperature": 1.0, "weight": 0.5, "hidden": 0.0}
    terms = distillation.objective(student, student, batch, **options)
    assert all(np.isfinite(term).all() for term in terms.values())


def begin(folder, name, fields):
    """A run at step 0, its parameters drawn: training it would compile."""
    if not (folder / "corpus").exists():
        toy.corpus(folder / "corpus")
    run = experiment.resolve(toy.run_config(folder, **fields))
    dataset = data.load(run.data)
    params = model.init(run.model, len(name))
    about = (dataset.fingerprint, dataset.tokenizer)
    transfer.begin_run(folder / name, run, params, *about)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    begin(folder, "teacher", DENSE)
    begin(folder, "straight", MIXED)
    shutil.copytree(folder / "straight", folder / "stopped")
    return folder


@pytest.fixture(scope="module")
def shared():
    return programs.Cache()


def config_of(folder, **fields):
    teacher = {"train.teacher": str(folder / "teacher")}
    return toy.run_config(folder, **TAUGHT | teacher | fields)


def flat(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def straight(folder, shared):
    """Four steps from the step 0 that another config wrote, of converted parts alone."""
    loop.train(config_of(folder), folder / "straight", programs=shared)
    return folder / "straight"


def test_what_is_not_trained_stays_bit_for_bit(folder, straight):
    """And has no moments; what is trained has moved.

    Mutations: `groups` of all parameters in `new_state`; decay of what is fixed; the patterns
    of one layer; the norm of the block taken for converted.
    """
    _, before = run_steps.load(straight.parent / "stopped", 0)
    _, after = run_steps.load(straight, 4)
    before, after = flat(before), flat(after)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    tables = {path for path in before if "['tables']" in path}
    assert tables and tables <= moved
    assert all("['ffn']" in path or "['qkv']" in path for path in moved)
    leaves = run_steps.facts(straight)["leaves"]
    moments = {"/".join(path[2:]) for path, _, _ in leaves if path[1:2] == ["mu"]}
    run = experiment.resolve(config_of(folder))
    trained, _ = trainable.split(run, model.param_specs(run.model))
    paths = {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree.leaves_with_path(trained)
    }
    assert moments == paths
    assert {path.split("/")[-1] for path in paths} == {"tables", "bias", "thresholds"}
    parameters = [path for path, _, _ in leaves if path[0] == "params"]
    assert len(parameters) == len(before)  # and none of the teacher's


def test_an_imported_step_begins_a_run(folder):
    """What is read of it is a fresh state with its parameters.

    Mutations: ones for zeros; the parameters left zero.
    """
    run = experiment.resolve(config_of(folder))
    made = sharding.make("single")
    _, abstract = programs.init_state(run, made, programs.check_fit(run, made))
    params = run_steps.load(folder / "stopped", 0)[1]
    ours = state_spec.begun(abstract, params)
    wanted = step_lib.new_state(run, jax.tree.map(jnp.asarray, params))
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [
        x.dtype for x in jax.tree.leaves(wanted)
    ]


def test_a_teacher_is_learnt_from(straight):
    """The divergence falls, and is told beside the loss. Mutation: not told."""
    rows = [row for row in metrics.read(straight) if "train/loss" in row]
    apart = [row["train/divergence"] for row in rows]
    assert len(apart) == 4 and 0 < apart[-1] < apart[0]


def test_resumed_is_uninterrupted(folder, straight, shared, monkeypatch):
    """Stopped after two steps and gone on with: the same state and rows, bit for bit.

    Mutations: moments of an imported step not zero; the optimizer's state not restored.
    """
    workdir, real = folder / "stopped", loop._Loop._save

    def stop(self, step, state, **how):
        real(self, step, state, **how)
        if step == 2:
            self.signal.name = "SIGTERM"

    monkeypatch.setattr(loop._Loop, "_save", stop)
    with pytest.raises(Preempted):
        loop.train(config_of(folder), workdir, programs=shared)
    monkeypatch.setattr(loop._Loop, "_save", real)
    loop.train(config_of(folder), workdir, programs=shared)
    ours, wanted = (run_steps.load(w, 4)[1] for w in (workdir, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    ours, wanted = (
        [metrics.comparable(row) for row in metrics.read(w)]
        for w in (workdir, straight)
    )
    assert ours == wanted


def test_another_teacher_is_refused_on_resume(folder, straight, shared, tmp_path):
    """One that has changed; the same one in another place is the same.

    Mutation: the fingerprint of the config alone.
    """
    config = config_of(folder, **{"train.num_steps": 4})
    shutil.copytree(folder / "teacher", tmp_path / "moved")
    config.train.teacher = str(tmp_path / "moved")
    loop.train(config, straight, programs=shared)  # has nothing left to do
    begin(folder, "another teacher", DENSE)
    config.train.teacher = str(folder / "another teacher")
    with pytest.raises(ConfigError, match="another config: teacher_fingerprint: ") as e:
        loop.train(config, straight, programs=shared)
    assert "\n" not in str(e.value)
    alone = {k: v for k, v in TAUGHT.items() if "teacher_options" not in k}
    with pytest.raises(ConfigError, match=r"teacher_options\.weight: 0\.75 -> "):
        loop.train(toy.run_config(folder, **alone), straight, programs=shared)


def refused(kind, fields, folder, message):
    run = experiment.resolve(config_of(folder, **fields))
    with pytest.raises(kind, match=message) as caught:
        tokenizer = data.load(run.data).tokenizer
        teacher_lib.load(run, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_does_not_fit(folder, straight, tmp_path):
    """Each in one line. Mutations: any of these checks left out."""
    refused(
        ConfigError, {"model.vocab_size": 300}, folder, "has 264 tokens, and model.voc"
    )
    refused(
        ConfigError, {"model.seq_len": 32}, folder, "on rows of 16 tokens, and model.s"
    )
    wider = {"model.embed_dim": 32}
    refused(
        ConfigError, wider, folder, r"hidden=0\.5: the teacher's width is 16, and mod"
    )
    missing = {"train.teacher": str(tmp_path / "none")}
    refused(
        StorageError, missing, folder, "none': is no folder of a run; if it has moved"
    )
    transfer.export_run(straight, tmp_path / "export")
    exported = {"train.teacher": str(tmp_path / "export")}
    refused(StorageError, exported, folder, "is an export; make a run of it: python -m")
    bpe = {"data.tokenizer": "bpe:264"}
    refused(ConfigError, bpe, folder, "is not the tokenizer of .*teacher: token")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train.teacher_options.temperature": 0.0}, r"temperature=0\.0: must be > 0"),
        ({"train.teacher_options.weight": 1.5}, r"weight=1\.5: must be in \[0, 1\]"),
        ({"train.teacher_options.hidden": -1.0}, r"hidden=-1\.0: must be >= 0"),
        (
            {"train.teacher": ""},
            "teacher='' has no such option \\(an option of any teach",
        ),
        (
            {"train.trainable": "blocks.*.fnn.*"},
            r"'blocks\.\*\.fnn\.\*' names no param",
        ),
        (DENSE | {"train.trainable": "converted"}, "the model has no memory layers"),
    ],
)
def test_mistakes_of_a_config(folder, fields, message):
    """Each in one line, before anything is read. Mutations: any of these checks left out."""
    if "model.projection" in fields:
        fields = {"model.projection_options": {}} | fields
    with pytest.raises(ConfigError, match=message) as caught:
        run = experiment.resolve(config_of(folder, **fields))
        programs.check_fit(run, sharding.make("single"))
    assert "\n" not in str(caught.value)


def test_paths_that_are_trained(folder):
    """Of several patterns; a feed-forward layer of two has its norm with it.

    Mutations: the first pattern alone; the norm between the two left out.
    """
    patterns = {"train.trainable": "head.*, blocks.0.norm1.*"}
    run = experiment.resolve(config_of(folder, **patterns))
    trained, _ = trainable.split(run, model.param_specs(run.model))
    assert set(flat(trained)) == {
        "['blocks']['0']['norm1']['scale']",
        "['head']['kernel']",
    }
    two = {"model.projection_options.parts": "ffn=memory"}
    run = experiment.resolve(config_of(folder, **two))
    trained, _ = trainable.split(run, model.param_specs(run.model))
    assert set(trained["blocks"]["0"]) == {"ffn"}
    assert set(trained["blocks"]["0"]["ffn"]) == {"up", "norm", "down"}


def test_what_a_dry_run_counts(folder, capsys):
    """The teacher's parameters and its forward pass; gradients and moments of what is trained.

    Mutations: the teacher three times; gradients of all parameters; no teacher.
    """
    run = experiment.resolve(config_of(folder))
    report = examine.examine(run, "cpu", "none")
    trained, _ = trainable.split(run, jax.eval_shape(lambda: model.init(run.model)))
    size = sum(x.size for x in jax.tree.leaves(trained))
    teacher = teacher_lib.config_of(run)
    cost, theirs = accounting.count(run.model), accounting.count(teacher)
    assert report.gradient_bytes == 4 * size
    history = 4 * (2 * run.train.spikes_options.window + 1)
    assert report.optimizer_bytes == 8 * size + 4 + history
    assert report.teacher_bytes == 4 * theirs.parameters.total
    flops = cost.training_flops_per_token + theirs.flops_per_token
    assert report.training_flops_per_token == flops
    with pytest.raises(ConfigError, match="--compile=blocks: the blocks of model"):
        examine.examine(run, "cpu", "blocks")
    words = [f"--config={toy.config_file(folder)}", "--json"]
    words += [f"--config.train.teacher={folder / 'teacher'}"]
    with pytest.raises(SystemExit) as ended:
        accounting_command.main(["accounting", *words])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)["teacher"]
    assert told["parameters"]["total"] == theirs.parameters.total
    assert told["flops_per_token"] == theirs.flops_per_token


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, microbatches, dtype",
    [
        ("fsdp_tensor:model=2", 2, "float32"),
        ("sequence:sequence=4", 1, "float32"),
        ("single", 2, "float32"),
        ("single", 1, "bfloat16"),
    ],
)
def test_a_teacher_on_every_mesh(folder, mesh, microbatches, dtype):
    """One step: the sums and the gradients of one device, whatever the division.

    Mutations: `terms` not summed over `model`; the distance of a device's part alone; the
    teacher's parameters not gathered.
    """
    wide = {"model.vocab_size": 264, "model.num_heads": 4, "model.dtype": dtype}
    sizes = wide | {
        "model.projection_options.parts": "qkv=memory",
        "model.code_bits": 4,
    }
    sizes |= {"train.num_microbatches": microbatches, "train.batch_size": 16}
    sizes |= {"model.lookup": "xla", "train.trainable": "all", "mesh": mesh}

    def step_on(name, **fields):
        run = experiment.resolve(config_of(folder, **sizes | fields))
        made = sharding.make(name, striped=teacher_lib.striped(run))
        specs = programs.check_fit(run, made)
        config = teacher_lib.config_of(run)
        params = jax.tree.map(np.asarray, model.init(run.model, 1))
        teacher = teacher_lib.Teacher(config, model.init(config, 2), "")
        with made.activate():
            _, abstract = programs.init_state(run, made, specs)
            state = jax.tree.map(
                lambda x, a: jax.device_put(x, a.sharding) if a.sharding else x,
                step_lib.new_state(run, params),
                abstract,
            )
            step = step_lib.make_train_step(run, made, specs, config)
            batch = made.put_batch(toy.batch(run.model, 0, 16, 16))
            taught = teacher_lib.placed(teacher, made)
            state, sums = step(state, batch, None, *taught)
        return jax.device_get((state.opt_state.mu, sums))

    mu, sums = step_on(mesh)
    plain = {"train.num_microbatches": 1, "model.dtype": "float32", "mesh": "single"}
    wanted_mu, wanted = step_on("single", **plain)
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    for name in ("nats", "divergence", "objective", "weight", "grad_norm"):
        np.testing.assert_allclose(sums[name], wanted[name], rtol=tolerance)
    if dtype == "float32":
        for ours, theirs in zip(*map(jax.tree.leaves, (mu, wanted_mu)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
