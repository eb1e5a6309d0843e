"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import base, linear_maps, listops
from memoryformer.tasks.memorised import network

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
    "linear_maps": linear_maps.LinearMaps,
    "memorised": network.Memorised,
}
