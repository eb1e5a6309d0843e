"""Processes of this machine: `submit` is `run`, and ends with the last point."""

from memoryformer.runs import console
from memoryformer.sweep import runner
from memoryformer.sweep.launchers.base import Launcher, Request, Submitted


class Local(Launcher):
    """Trains the points here and now; nobody has to be asked about them later."""

    queues = False

    def submit(self, request: Request) -> Submitted:
        """Train what is not done; see `runner.run`."""
        with console.unbroken():
            code = runner.run(
                request.sweep,
                parallel=request.parallel or 1,
                retry_failed=request.retry_failed,
            )
        return Submitted(exit_code=code)
