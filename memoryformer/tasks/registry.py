"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import base, listops

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
}
