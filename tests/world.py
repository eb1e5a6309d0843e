"""Where promises are tried: runs of one toy config in processes of their own.

`World` starts them and knows the straight run, which nothing disturbs; the functions below
read what a run has left.
"""

import functools
import hashlib
import pathlib
import shutil
import socket

import jax
import numpy as np
import orbax.checkpoint as ocp
import toy
from runner import Runner

from memoryformer.runs import manifest, metrics, state_spec
from memoryformer.runs import steps as run_steps

FIELDS = {
    "train.num_steps": 12,
    "train.batch_size": 4,
    "train.log_every": 1,
    "eval.every_steps": 6,
    "eval.num_batches": 2,
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 2,
    "data.source_options.max_documents": 5,  # 12 steps cross the end of an epoch
}
CONFIG = '''"""The toy run of the promises."""

import pathlib

import toy
import world


def get_config():
    """A run of 12 steps."""
    return toy.run_config(pathlib.Path({folder!r}), **world.FIELDS)
'''


class World:
    """A corpus, a runner and the straight run that others are compared with."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        toy.corpus(folder / "corpus")
        config = folder / "config.py"
        config.write_text(CONFIG.format(folder=str(folder)), encoding="utf-8")
        self.runner = Runner(folder, config)
        self.mutation = ""
        self._count = 0

    def __enter__(self) -> "World":
        self.runner.__enter__()
        return self

    def __exit__(self, *unused_exception) -> None:
        self.runner.__exit__()

    @functools.cached_property
    def straight(self) -> pathlib.Path:
        """The straight run, made when it is first asked for; under no mutation."""
        workdir = self.folder / "straight"
        expect(self.runner.run(workdir), 0)
        return workdir

    def workdir(self) -> pathlib.Path:
        """A new directory name."""
        self._count += 1
        return self.folder / f"workdir{self._count}"

    def mutate(self, mutation: str) -> None:
        """Have the runs that follow make this mistake; none with ''."""
        self.mutation = mutation
        self.runner.timeouts = 0
        self.runner.calls.unlink(missing_ok=True)

    def calls(self) -> list[tuple[str, str]]:
        """What the mutation has done: ('bound' or 'called', name of a function)."""
        if not self.runner.calls.exists():
            return []
        lines = self.runner.calls.read_text(encoding="utf-8").splitlines()
        return [(what, name) for what, _, name in (x.partition(" ") for x in lines)]

    def start(self, workdir, **options):
        """Start a run under the current mutation."""
        return self.runner.start(workdir, mutation=self.mutation, **options)

    def run(self, workdir, code=0, **options):
        """Run under the current mutation and assert the exit code."""
        return expect(self.runner.wait(self.start(workdir, **options)), code)

    def run_together(
        self, workdir, count, faults=(), ids=None, wait=600, own=(), **options
    ):
        """Run `count` processes of one run, or only those in `ids`; their results.

        `faults` and `own`, further options, by process id.
        """
        common = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        faults, own = dict(faults), dict(own)
        options = {"mesh": "data"} | options
        started = [
            self.start(
                workdir,
                fault=faults.get(i, ""),
                flags=[*common, f"--init_timeout={wait}", f"--process_id={i}"],
                **options | own.get(i, {}),
            )
            for i in (range(count) if ids is None else ids)
        ]
        return [self.runner.wait(one) for one in started]

    def copy(self, until: int = 12) -> pathlib.Path:
        """A copy of the straight run, cut back to its checkpoint of step `until`."""
        workdir = self.workdir()
        shutil.copytree(self.straight, workdir)
        for step in steps(workdir):
            if step > until:
                shutil.rmtree(workdir / run_steps.FOLDER / str(step))
        return workdir

    def until_4(self) -> pathlib.Path:
        """A run that was asked to stop in step 5: its step 4, which others delete."""
        workdir = self.folder / "until4"
        if not workdir.exists():
            expect(self.runner.run(workdir, fault="term:4"), 42)
        return workdir

    def assert_straight(self, workdir) -> None:
        """Final state and every logged value equal the straight run's, bit for bit."""
        ours, theirs = rows(workdir), rows(self.straight)
        for a, b in zip(ours, theirs, strict=False):
            assert a == b, f"logged {a} not {b}"
        assert len(ours) == len(theirs), f"{len(ours)} rows, not {len(theirs)}"
        assert steps(workdir)[-1] == 12, f"steps on disk: {steps(workdir)}"
        assert digest(workdir) == digest(self.straight), "another final state"


class Crash(AssertionError):
    """A run ended in a traceback where another end was expected."""


def expect(result, code):
    """Assert the exit code, showing what the run printed, and return the result."""
    message = f"exit {result.code}, not {code}:\n{result.err[-2000:]}"
    if code != 1 and result.code == 1 and "Traceback" in result.err:
        raise Crash(message)
    assert result.code == code, message
    if code not in (0, 1, -9, 143):  # a user's error is one line, never a traceback
        # Beside it, threads may tell what a failed save left unfinished in Orbax, and a
        # line of theirs be cut in two by ours.
        told = [x for x in result.err.splitlines() if x.strip().startswith("error: ")]
        assert len(told) == 1, result.err
        # Stacks after a hang; and TensorStore prints some when many writes fail at once.
        assert code in (43, 45) or "Traceback" not in result.err, result.err
    return result


def rows(workdir):
    """The logged rows without what depends on the clock."""
    return [metrics.comparable(row) for row in metrics.read(workdir)]


def steps(workdir):
    """Finished steps on disk."""
    folder = workdir / run_steps.FOLDER
    named = (p for p in folder.glob("*") if p.name.isdecimal())
    return sorted(int(p.name) for p in named if manifest.exists(p))


def state(workdir, step=12):
    """Every leaf of a checkpoint by path: parameters, optimizer, step, history."""
    target = workdir / run_steps.FOLDER / str(step)
    described = manifest.verify(target)["leaves"]
    roots = {path[0] for path, _, _ in described if len(path) > 1}
    abstract = {k: v for r in roots for k, v in state_spec.nested(described, r).items()}
    args = jax.tree.map(
        lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), abstract
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            target / "state",
            args=ocp.args.PyTreeRestore(
                item=abstract, restore_args=args, partial_restore=True
            ),
        )
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(restored)}


def digest(workdir, step=12):
    """SHA-256 over every leaf of a checkpoint."""
    found = hashlib.sha256()
    for path, leaf in sorted(state(workdir, step).items()):
        found.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def assert_same_state(ours, theirs, tolerance):
    """Final states of two runs agree, leaf by leaf."""
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(
            ours[path], leaf, rtol=0, atol=tolerance, err_msg=path
        )


def assert_close(ours, theirs, tolerance):
    """Losses of two runs agree, step by step."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        name = "val/loss" if "val/loss" in a else "train/loss"
        assert abs(a[name] - b[name]) <= tolerance, (a["step"], a[name], b[name])


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
