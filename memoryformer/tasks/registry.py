"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import (
    base,
    hashhop,
    listops,
    mqar,
    pathfinder,
    relations,
    stories,
    texts,
    triangles,
)

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
    "mqar": mqar.MQAR,
    "hashhop": hashhop.HashHop,
    "texts": texts.Texts,
    "pathfinder": pathfinder.Pathfinder,
    "relations": relations.Relations,
    "stories": stories.Stories,
    "triangles": triangles.Triangles,
}
