"""What a launcher has to do: start points, and say later what has become of them."""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from memoryformer.sweep.points import Point, Sweep

QUEUED, RUNNING = "queued", "running"
FAILED = "failed"  # ended by the scheduler, so that the run wrote no outcome down
ENDED = "ended"  # in any other way: what the point's files say counts


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be trained, and how."""

    sweep: Sweep
    points: Sequence[Point]  # of the sweep, those to do
    parallel: int = 0  # at a time; 0: as many as the launcher likes
    retry_failed: bool = False
    options: Sequence[str] = ()  # words for the scheduler's own command
    script: pathlib.Path | None = None  # for the scheduler; None: the launcher's own


@dataclasses.dataclass(frozen=True)
class Submitted:
    """What has been started: the scheduler's name of it, or how it has ended already."""

    job: str = ""
    exit_code: int = 0


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a scheduler says of a point: one of the words above, and its own words."""

    state: str
    text: str = ""


class Launcher(abc.ABC):
    """Starts points somewhere. All facts about a job lie with its scheduler, by its name."""

    # Whether `submit` returns before the points are trained, so that they can be asked for.
    queues: ClassVar[bool] = True

    @abc.abstractmethod
    def submit(self, request: Request) -> Submitted:
        """Start the points of a request; raises `ConfigError` for what cannot be."""

    def look(self, unused_jobs: Sequence[str]) -> Mapping[tuple[str, int], Seen]:
        """Return {(job, a point's index): what is seen}; jobs long ended may lack.

        Raises `ConfigError` where the scheduler cannot be asked.
        """
        return {}
