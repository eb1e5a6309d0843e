"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import base, hashhop, listops, mqar

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
    "mqar": mqar.MQAR,
    "hashhop": hashhop.HashHop,
}
