"""The tasks by name: a new one is a file here and a line in `TASKS`."""

from memoryformer.tasks import base, listops, relations, stories, triangles

TASKS: dict[str, type[base.Task]] = {
    "listops": listops.ListOps,
    "relations": relations.Relations,
    "stories": stories.Stories,
    "triangles": triangles.Triangles,
}
