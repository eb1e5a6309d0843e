"""Random mutations of the source, each against its module's own quick tests.

    python -m tests.sampled_mutants --seed=1 --count=20 [--modules=ops/,losses] [--jobs=2]

Draws `count` of all places where `mutate` knows a change, copies the working tree, applies
one change at a time to the copy and runs the tests that `scope.MODULES` gives the module, the
quick ones first, until one fails. A change that no test notices survives: a test is missing,
or the change is equivalent, and `equivalent.json` says why.

Each mutant is a line of build/mutants-sampled/SEED.jsonl, so that a run goes on where it was
stopped; with a larger count the same seed adds to the same draw. Mutation testers that exist
(cosmic-ray, mutmut) give one test command to all modules, draw no samples and import jax for
every mutant; here it is imported once, and a fork runs the tests.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from tests import mutate, scope

ROOT = pathlib.Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "mutants-sampled"
EQUIVALENT = ROOT / "tests" / "equivalent.json"
LONGEST = 20.0  # seconds: a test that takes longer is not a quick one
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(OUTPUT / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
LIBRARIES = (
    "flax.nnx",
    "grain",
    "hypothesis.strategies",
    "jax.experimental.pallas",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "pytest",
    "tokenizers",
)
PASSED, FAILED, NOT_COLLECTED = 0, 1, 2  # pytest's exit codes


class Plugin:
    """Orders tests and notes their seconds and the first failure."""

    def __init__(self, seconds, killers):
        self.seconds = collections.Counter()
        self.failure = None
        self._known, self._killers = seconds, killers

    def pytest_collection_modifyitems(self, config, items):
        """Tests that killed mutants of this module before, then file by file."""
        files = list(dict.fromkeys(item.path for item in items))

        def rank(item):
            known = self._known.get(item.nodeid, 0.0)
            return -self._killers[item.nodeid], files.index(item.path), known

        quick = [i for i in items if self._known.get(i.nodeid, 0.0) <= LONGEST]
        items[:] = sorted(quick, key=rank)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        self._note(report)

    def pytest_collectreport(self, report):
        self._note(report)

    def _note(self, report):
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(report.longrepr).strip().splitlines()
            place = f"{pathlib.Path(crash.path).name}:{crash.lineno} " if crash else ""
            message = crash.message if crash else lines[-1]
            self.failure = (report.nodeid, place + " ".join(message.split())[:200])


def copy_tree(folder: pathlib.Path) -> None:
    """Copy what git knows or would add, and compile it so that no stale code is read."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True)
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compiled = ["compileall", "-q", "--invalidation-mode=checked-hash"]
    places = [str(folder / name) for name in ("memoryformer", "tests", "configs")]
    subprocess.run([sys.executable, "-m", *compiled, *places], check=True)


def run_tests(tree, files, seconds, killers, timeout):
    """Run `files` in a fork of this process, whose modules are none of ours.

    Returns {code, failure, seconds by test, cpu, wall}; code -9 after `timeout`.
    """
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        _run_in_child(tree, files, Plugin(seconds, killers), answer)
    killed = False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > timeout and not killed:
            os.killpg(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    _, status, usage = ended
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a failed test has left running
    found = {"failure": None, "seconds": {}}
    if answer.exists():
        found = json.loads(answer.read_text(encoding="utf-8"))
    found["code"] = -9 if killed else os.waitstatus_to_exitcode(status)
    found["cpu"] = round(usage.ru_utime + usage.ru_stime, 1)
    found["wall"] = round(time.monotonic() - began, 1)
    return found


def _run_in_child(tree, files, plugin, answer):
    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        log = os.open(tree / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
        for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
        code = int(pytest.main([*options, *files], plugins=[plugin]))
        told = {"failure": plugin.failure, "seconds": plugin.seconds}
        answer.write_text(json.dumps(told), encoding="utf-8")
        sys.stdout.flush()
    finally:
        os._exit(code)


def import_once() -> None:
    """What tests import that is not ours; no backend starts."""
    os.environ.update(ENVIRONMENT)
    for name in LIBRARIES:
        importlib.import_module(name)


class Session:
    """The draw of one seed: what is known of it, and what runs next."""

    def __init__(self, seed, count, prefixes):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        self.file = OUTPUT / f"{seed}.jsonl"
        found = [m for path in scope.paths(prefixes) for m in mutate.find(ROOT, path)]
        random.Random(seed).shuffle(found)
        self.drawn = found[:count]
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {row["id"]: row for row in map(json.loads, lines)}
        known = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
        self.equivalent = {(e["path"], e["before"], e["after"]) for e in known}
        self.baselines = {}

    def killers(self, path):
        """How many mutants of a module each test has killed."""
        rows = (row for row in self.rows.values() if row["path"] == path)
        return collections.Counter(row["by"] for row in rows if row["by"])

    def baseline(self, tree, path):
        """Seconds of the module's tests on unchanged code, all of which must pass."""
        files = scope.MODULES[path]
        for file in files:
            if file not in self.baselines:
                names = [f"tests/{file}"]
                found = run_tests(tree, names, {}, collections.Counter(), 1800)
                if found["code"] != PASSED:
                    text = (tree / "log").read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{file} fails without any mutant:\n{text}")
                self.baselines[file] = found["seconds"]
        return {k: s for file in files for k, s in self.baselines[file].items()}

    def judge(self, tree, mutant):
        """Run one mutant in the copy `tree` and return its row."""
        row = mutant.described()
        if (row["path"], row["before"], row["after"]) in self.equivalent:
            return row | {"outcome": "equivalent", "by": "", "cpu": 0.0, "wall": 0.0}
        seconds = self.baseline(tree, mutant.path)
        file = tree / mutant.path
        original = file.read_text(encoding="utf-8")
        file.write_text(mutant.apply(original), encoding="utf-8")
        try:
            names = [f"tests/{name}" for name in scope.MODULES[mutant.path]]
            patience = 60 + 5 * sum(seconds.values())
            killers = self.killers(mutant.path)
            found = run_tests(tree, names, seconds, killers, patience)
        finally:
            file.write_text(original, encoding="utf-8")
        outcomes = {PASSED: "survived", FAILED: "killed", NOT_COLLECTED: "killed"}
        outcome = outcomes.get(found["code"], "error")
        if found["code"] < 0:
            outcome = "timeout" if found["code"] == -9 else "killed"
        by, message = found["failure"] or ("", f"exit code {found['code']}")
        spent = {"cpu": found["cpu"], "wall": found["wall"]}
        return row | {"outcome": outcome, "by": by, "message": message} | spent

    def run(self, part, parts):
        """Judge every drawn mutant whose place in the draw is `part` modulo `parts`."""
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = pathlib.Path(folder)
            copy_tree(tree)
            for mutant in self.drawn[part::parts]:
                if mutant.id not in self.rows:
                    row = self.judge(tree, mutant)
                    self.rows[mutant.id] = row
                    with self.file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")
                    print(told(row), flush=True)

    def table(self) -> str:
        """Outcomes by operator, and every survivor, as Markdown."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        rows = {row["id"]: row for row in map(json.loads, lines)}
        rows = [rows[m.id] for m in self.drawn if m.id in rows]
        counts = collections.Counter(row["outcome"] for row in rows)
        judged = len(rows) - counts["equivalent"]
        killed = counts["killed"] + counts["timeout"]
        text = [f"{len(rows)} mutants, {dict(counts)}: {killed} of {judged} killed", ""]
        text += ["| operator | killed | drawn |", "| --- | --- | --- |"]
        for operator in sorted({row["operator"] for row in rows}):
            ours = [row for row in rows if row["operator"] == operator]
            dead = sum(row["outcome"] in ("killed", "timeout") for row in ours)
            text.append(f"| {operator} | {dead} | {len(ours)} |")
        left = [row for row in rows if row["outcome"] in ("survived", "error")]
        cpu = sum(row["cpu"] for row in rows) / max(len(rows), 1)
        text += ["", f"{cpu:.1f} CPU-seconds a mutant.", "", *map(told, left)]
        return "\n".join(text) + "\n"


def told(row) -> str:
    """One line about a mutant."""
    return (
        f"{row['outcome']:9} {row['path']}:{row['line']} {row['operator']}: "
        f"`{row['before']}` -> `{row['after']}` {row['by'] or row.get('message', '')} "
        f"({row['cpu']} s)"
    )


def main() -> int:
    """Draw, run, print; exit code 1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--modules", default="", help="beginnings of paths, by commas")
    parser.add_argument("--jobs", type=int, default=1)
    flags = parser.parse_args()
    prefixes = tuple(name for name in flags.modules.split(",") if name)
    session = Session(flags.seed, flags.count, prefixes)
    import_once()
    children = []
    for part in range(1, flags.jobs):
        if not (pid := os.fork()):
            session.run(part, flags.jobs)
            os._exit(0)
        children.append(pid)
    session.run(0, flags.jobs)
    for pid in children:
        os.waitpid(pid, 0)
    table = session.table()
    session.file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return int("survived " in table or "error " in table)


if __name__ == "__main__":
    sys.exit(main())
