"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import (
    base,
    hashhop,
    linear_maps,
    listops,
    mqar,
    pathfinder,
    relations,
    stories,
    texts,
    triangles,
)
from memoryformer.tasks.memorised import network

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
    "mqar": mqar.MQAR,
    "hashhop": hashhop.HashHop,
    "texts": texts.Texts,
    "pathfinder": pathfinder.Pathfinder,
    "relations": relations.Relations,
    "stories": stories.Stories,
    "triangles": triangles.Triangles,
    "linear_maps": linear_maps.LinearMaps,
    "memorised": network.Memorised,
}
