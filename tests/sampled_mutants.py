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
import hashlib
import json
import os
import pathlib
import random
import sys
import tempfile

from tests import forks, mutate, scope

ROOT = pathlib.Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "mutants-sampled"
EQUIVALENT = ROOT / "tests" / "equivalent.json"
DEAD, LEFT = ("killed", "timeout"), ("survived", "error")


class Session:
    """The draw of one seed: what is known of it, and what runs next.

    `again` forgets who survived, after a test has been added.
    """

    def __init__(self, seed, count, prefixes, again=False):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        self.file = OUTPUT / f"{seed}.jsonl"
        found = [m for path in scope.paths(prefixes) for m in mutate.find(ROOT, path)]
        random.Random(seed).shuffle(found)
        self.drawn = found[:count]
        self.rows = {
            mutant: row
            for mutant, row in self.known().items()
            if not (again and row["outcome"] in LEFT)
        }
        known = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
        self.equivalent = {key for entry in known for key in ids_of(entry)}
        code = hashlib.sha256()
        for folder in ("memoryformer", "tests"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                code.update(path.read_bytes())
        self._baselines = OUTPUT / "baselines" / code.hexdigest()[:12]

    def known(self):
        """The rows on file by the mutant's id; of several the last."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {row["id"]: row for row in map(json.loads, lines)}

    def killers(self, path):
        """How many mutants of a module each test has killed."""
        rows = (row for row in self.rows.values() if row["path"] == path)
        return collections.Counter(row["by"] for row in rows if row["by"])

    def baseline(self, tree, path):
        """Seconds of the module's tests on unchanged code, all of which must pass."""
        seconds = {}
        for name in scope.MODULES[path]:
            file = self._baselines / f"{name}.json"
            if not file.exists():
                tests = [f"tests/{name}"], {}, collections.Counter()
                found = forks.run_tests(tree, *tests, timeout=1800)
                if found["code"] != forks.PASSED:
                    text = (tree / "log").read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{name} fails without any mutant:\n{text}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found["seconds"]), encoding="utf-8")
            seconds |= json.loads(file.read_text(encoding="utf-8"))
        return seconds

    def judge(self, tree, mutant):
        """Run one mutant in the copy `tree` and return its row."""
        row = mutant.described()
        if mutant.id in self.equivalent:
            return row | {"outcome": "equivalent", "by": "", "cpu": 0.0, "wall": 0.0}
        seconds = self.baseline(tree, mutant.path)
        file = tree / mutant.path
        original = file.read_text(encoding="utf-8")
        file.write_text(mutant.apply(original), encoding="utf-8")
        try:
            names = [f"tests/{name}" for name in scope.MODULES[mutant.path]]
            patience = 60 + 5 * sum(seconds.values())
            killers = self.killers(mutant.path)
            found = forks.run_tests(tree, names, seconds, killers, patience)
        finally:
            file.write_text(original, encoding="utf-8")
        outcomes = {
            forks.PASSED: "survived",
            forks.FAILED: "killed",
            forks.NOT_COLLECTED: "killed",
        }
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
            forks.copy_tree(tree)
            for mutant in self.drawn[part::parts]:
                if mutant.id not in self.rows:
                    row = self.judge(tree, mutant)
                    self.rows[mutant.id] = row
                    with self.file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")
                    print(told(row), flush=True)

    def table(self) -> str:
        """Outcomes by operator, and every survivor, as Markdown."""
        known = self.known()
        rows = [known[m.id] for m in self.drawn if m.id in known]
        counts = collections.Counter(row["outcome"] for row in rows)
        judged = len(rows) - counts["equivalent"]
        killed = sum(counts[outcome] for outcome in DEAD)
        text = [f"{len(rows)} mutants, {dict(counts)}: {killed} of {judged} killed", ""]
        text += ["| operator | killed | drawn |", "| --- | --- | --- |"]
        for operator in sorted({row["operator"] for row in rows}):
            ours = [row for row in rows if row["operator"] == operator]
            dead = sum(row["outcome"] in DEAD for row in ours)
            text.append(f"| {operator} | {dead} | {len(ours)} |")
        left = [row for row in rows if row["outcome"] in LEFT]
        cpu = sum(row["cpu"] for row in rows) / max(len(rows), 1)
        text += ["", f"{cpu:.1f} CPU-seconds a mutant.", "", *map(told, left)]
        return "\n".join(text) + "\n"


def ids_of(entry) -> list[str]:
    """Ids of the mutants that an entry of equivalent.json names: it should be one.

    An entry is a place and a change: `path`, the whole `source` line in which the mutant
    begins, stripped, and `before` and `after`.
    """
    lines = (ROOT / entry["path"]).read_text(encoding="utf-8").splitlines()
    return [
        mutant.id
        for mutant in mutate.find(ROOT, entry["path"])
        if (mutant.before, mutant.after) == (entry["before"], entry["after"])
        and lines[mutant.line - 1].strip() == entry["source"]
    ]


def told(row) -> str:
    """One line about a mutant."""
    return (
        f"{row['outcome']:9} {row['path']}:{row['line']} {row['operator']}: "
        f"`{row['before']}` -> `{row['after']}` {row['by'] or row.get('message', '')} "
        f"({row['cpu']} s)"
    )


def wait_for(children) -> None:
    """Wait for child processes; raises `SystemExit` if one has failed, at the end."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        raise SystemExit(f"jobs ended with {codes}: not every mutant was judged")


def main() -> int:
    """Draw, run, print; exit code 1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--modules", default="", help="beginnings of paths, by commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="those that survived")
    flags = parser.parse_args()
    prefixes = tuple(name for name in flags.modules.split(",") if name)
    for prefix in prefixes:
        if not scope.paths((prefix,)):
            parser.error(f"--modules: no module's path begins with {prefix!r}")
    if flags.count < 1 or flags.jobs < 1:
        parser.error("--count and --jobs: at least 1")
    session = Session(flags.seed, flags.count, prefixes, flags.again)
    forks.import_libraries(OUTPUT / "jax")
    children = []
    for part in range(1, flags.jobs):
        if not (pid := os.fork()):
            code = 1
            try:
                session.run(part, flags.jobs)
                code = 0
            finally:  # never back into the parent's code
                os._exit(code)
        children.append(pid)
    session.run(0, flags.jobs)
    wait_for(children)
    table = session.table()
    session.file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    known = session.known()
    return int(any(known[m.id]["outcome"] in LEFT for m in session.drawn))


if __name__ == "__main__":
    sys.exit(main())
