"""Try every mutation against its promise: python -m tests.mutants [PART_OF_A_NAME].

Prints promise | mutation | caught, and exits 1 unless all are caught.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import promises
import world


def main(wanted: str = "") -> int:
    """Run all mutants whose promise or name contains `wanted`."""
    missed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        world.World(pathlib.Path(folder)) as tried,
    ):
        tried.runner.patience = 240.0  # some mistakes are to wait for ever
        for promise, mutation in promises.MUTANTS:
            if wanted not in f"{promise} {mutation}":
                continue
            tried.mutation = mutation
            verdict = "NOT CAUGHT"
            try:
                promises.CHECKS[promise](tried)
                missed += 1
            except AssertionError as error:
                verdict = "caught: " + " ".join(str(error).split())[:90]
            print(f"{promise:26} | {mutation:30} | {verdict}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
