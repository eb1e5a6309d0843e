"""`sweep submit` and `status`: what a scheduler is given and asked; SLURM's words are faked.

The real SLURM is in tests/slurm.
"""

import json
import pathlib

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from memoryformer.errors import ConfigError, StorageError
from memoryformer.sweep import commands, files, jobs, launchers, points
from memoryformer.sweep.launchers import base, slurm

SWEEPS = """

def sweep_rate():
    for rate in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3):
        yield {"optimizer.learning_rate": rate}

def sweep_two():
    for rate in (6e-3, 5e-3):
        yield {"label": "two", "optimizer.learning_rate": rate}
"""
FAKE = """#!/bin/bash
printf '%s\\n' "${{0##*/}}" "$@" > {folder}/call
cat {folder}/{name}.out
cat {folder}/{name}.err >&2
exit $(cat {folder}/{name}.code)
"""


class Slurm:
    """sbatch and squeue that answer as they are told."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("sbatch", "squeue"):
            path = folder / name
            path.write_text(FAKE.format(folder=folder, name=name))
            path.chmod(0o755)
        self.says("sbatch", "17\n")
        self.says("squeue")

    def says(self, name, out="", err="", code=0):
        for suffix, text in (("out", out), ("err", err), ("code", str(code))):
            (self.folder / f"{name}.{suffix}").write_text(text)

    @property
    def call(self):
        """The words of the last call."""
        return (self.folder / "call").read_text().splitlines()


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Slurm(tmp_path / "bin")


@pytest.fixture
def sweep(tmp_path):
    """Five points: the first is done, the second has failed."""
    config = toy.config_file(tmp_path)
    config.write_text(config.read_text() + SWEEPS)
    found = points.expand(
        str(config), ["rate"], tmp_path / "runs", {"train.num_steps": 9}
    )
    end(found.points[0], state="done")
    end(found.points[1], state="failed", exit_code=44, error="nan")
    return found


def end(point, **facts):
    point.workdir.mkdir(parents=True, exist_ok=True)
    (point.workdir / "outcome.json").write_text(json.dumps(facts))


def submit(sweep, *words, **options):
    return commands.submit(sweep, commands.Options(launcher="slurm", **options))


def test_what_sbatch_is_given(sweep, scheduler, capsys):
    """The points that are neither done nor failed, a limit, options, the sweep's own flags;
    the job's id stays with the sweep.

    Mutations: overrides of the command line left out; all points; the job not remembered.
    """
    options = {"parallel": 2, "launcher_options": "--time=1:00:00 --comment='a b'"}
    assert submit(sweep, **options) == 0
    script = pathlib.Path(__file__).parents[2] / "launch" / "slurm_array.sh"
    root = sweep.directory.parents[1]
    assert scheduler.call == [
        *("sbatch", "--parsable", "--array=2-4%2", "--time=1:00:00", "--comment=a b"),
        *(str(script), f"--config={sweep.config}", "--sweep=rate", f"--root={root}"),
        "--config.train.num_steps=9",
    ]
    out = capsys.readouterr().out
    assert out == (
        "submitted as job 17: 3 points; 1 done, 1 failed, 0 partial, 0 new\n"
    )
    [entry] = json.loads((sweep.directory / jobs.FILE).read_text())
    assert (entry["launcher"], entry["job"]) == ("slurm", "17")
    names = {str(p.index): p.workdir.name for p in sweep.points[2:]}
    assert entry["points"] == names
    end(sweep.points[3], state="done")
    submit(sweep, retry_failed=True)
    assert scheduler.call[2] == "--array=1-2,4"
    assert scheduler.call[-1] == "--retry_failed"


QUEUE = """17|2|RUNNING|None
17|3|PENDING|JobArrayTaskLimit
17|4|OUT_OF_MEMORY|OutOfMemory
"""


def test_what_the_scheduler_has_is_told_apart(sweep, scheduler, capsys):
    """Running and queued points are not submitted again; one that the scheduler ended is
    failed, as long as it is remembered, and submitted.

    Mutations: `jobs.state` returns what files say; queued points are to do.
    """
    submit(sweep)
    scheduler.says("squeue", QUEUE)
    capsys.readouterr()
    assert commands.status(sweep, commands.Options()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert scheduler.call[0] == "squeue" and "--jobs=17" in scheduler.call
    assert last == "1 running, 1 queued, 1 done, 2 failed, 0 partial, 0 new"
    assert "job 17_3: PENDING (JobArrayTaskLimit)" in lines[-2]
    assert "failed" in lines[-1] and "job 17_4: OUT_OF_MEMORY" in lines[-1]
    scheduler.says("sbatch", "18;cluster\n")
    submit(sweep)
    assert scheduler.call[2] == "--array=4"
    # An older job's last word does not hide what a newer one does, nor the other way round.
    scheduler.says("squeue", QUEUE + "18|4|PENDING|Resources\n")
    capsys.readouterr()
    assert submit(sweep) == 0
    told = (
        "nothing to submit: 1 running, 2 queued, 1 done, 1 failed, 0 partial, 0 new\n"
    )
    assert capsys.readouterr().out == told
    # A point of two sweeps is one.
    folder = pathlib.Path(sweep.config).parent
    other = points.expand(sweep.config, ["two"], folder / "runs", sweep.base)
    submit(other)
    assert scheduler.call[2] == "--array=0"
    # A cancelled one is what its files say, and a forgotten job says nothing.
    scheduler.says("squeue", "17|2|CANCELLED|None\n")
    assert jobs.look(sweep)[2].state == base.ENDED
    scheduler.says("squeue", err=slurm._FORGOTTEN, code=1)
    assert jobs.look(sweep) == {}


@pytest.mark.parametrize(
    "files_say, scheduler_says, state",
    [
        ("done", "running", "done"),
        ("failed", "queued", "queued"),
        ("failed", "failed", "failed"),
        ("partial", "queued", "queued"),
        ("partial", "failed", "failed"),
        ("new", "ended", "new"),
        ("partial", None, "partial"),
    ],
)
def test_states(files_say, scheduler_says, state):
    """Mutations: a run's own 'done' overruled; 'ended' shown as it is."""
    seen = base.Seen(scheduler_says) if scheduler_says else None
    assert jobs.state(files_say, seen) == state


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranges(numbers):
    """Read back they are the same numbers, in as few runs as can be. Mutation: `number - 1`."""
    text = slurm.ranges(list(numbers))
    read = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)
    assert text.count(",") == sum(n - 1 not in numbers for n in numbers) - 1


def test_mistakes_are_one_line(sweep, scheduler, monkeypatch, capsys):
    """Nothing is remembered of a submission that was refused, and none is made blindly.

    Mutations: the exit code of sbatch not looked at; `look` after `submit`.
    """
    with pytest.raises(ConfigError, match=r"--launcher='slrm'.* did you mean 'slurm'"):
        commands.submit(sweep, commands.Options(launcher="slrm"))
    with pytest.raises(ConfigError, match=r"--launcher_options: No closing quotation"):
        submit(sweep, launcher_options="--comment='a")
    with pytest.raises(ConfigError, match=r"--script=.*/none': no such file"):
        submit(sweep, script=sweep.directory / "none")
    scheduler.says("sbatch", err="sbatch: error: invalid partition\nx", code=1)
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*invalid partition x"):
        submit(sweep)
    scheduler.says("sbatch", "what?")
    with pytest.raises(ConfigError, match="sbatch answered 'what\\?', no job's id"):
        submit(sweep)
    assert not (sweep.directory / jobs.FILE).exists()
    scheduler.says("sbatch", "17\n")
    submit(sweep)
    scheduler.says("squeue", err="no controller", code=1)
    with pytest.raises(ConfigError, match="squeue refuses: no controller"):
        submit(sweep)
    assert scheduler.call[0] == "squeue"
    monkeypatch.setenv("PATH", "/nowhere")
    capsys.readouterr()
    assert commands.status(sweep, commands.Options()) == 0
    out, err = capsys.readouterr()
    assert "by files alone: --launcher=slurm: squeue cannot be asked" in err
    assert "1 done, 1 failed, 0 partial, 3 new" in out
    (sweep.directory / jobs.FILE).write_text('[{"launcher": "slurm", "job": 17}]')
    with pytest.raises(StorageError, match=r"jobs.json: cannot be read .*; remove it"):
        commands.status(sweep, commands.Options())


class Postcards(launchers.Launcher):
    """A launcher that somebody might add: it posts points, and knows those in the box."""

    def __init__(self):
        self.box = {}

    def submit(self, request):
        job = f"card-{len(self.box)}"
        cards = {p.index: points.command(request.sweep, p) for p in request.points}
        self.box[job] = dict(list(cards.items())[: request.parallel])
        return base.Submitted(job)

    def look(self, names):
        found = [(job, index) for job in names for index in self.box[job]]
        return {
            each: base.Seen(base.QUEUED, f"in the box: {each[0]}") for each in found
        }


def test_a_third_launcher_is_one_class(sweep, monkeypatch, capsys):
    """One line of LAUNCHERS, and `submit` and `status` know it.

    Mutation: `jobs.look` asks SLURM alone.
    """
    postcards = Postcards()
    monkeypatch.setitem(launchers.LAUNCHERS, "postcards", postcards)
    options = commands.Options(launcher="postcards", parallel=2)
    assert commands.submit(sweep, options) == 0
    assert f"--workdir={sweep.points[2].workdir}" in postcards.box["card-0"][2]
    commands.status(sweep, options)
    out = capsys.readouterr().out
    assert "submitted as job card-0: 3 points" in out and "in the box: card-0" in out
    assert "2 queued, 1 done, 1 failed, 0 partial, 1 new" in out


def test_local_is_run(sweep, monkeypatch):
    """It is given the whole sweep, and its exit code is the command's; nothing is kept.

    Mutation: `parallel or 2`.
    """
    seen = []

    def run(*arguments, **options):
        seen.append((arguments, options))
        return 44

    monkeypatch.setattr(launchers.local.runner, "run", run)
    for command in (commands.run, commands.submit):
        assert command(sweep, commands.Options(retry_failed=True)) == 44
    given = {"parallel": 1, "retry_failed": True}
    assert seen == [((sweep,), given)] * 2
    assert not (sweep.directory / jobs.FILE).exists()
    assert files.state(sweep.points[2]).name == "new"
