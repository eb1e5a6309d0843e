"""Evaluators of a model's parameters. A new figure is one file and one line of `EVALUATORS`."""

from memoryformer.evaluation import buckets, loss, slots
from memoryformer.evaluation.base import Evaluator, Stopped, Subject, is_due

EVALUATORS = (loss.Loss, buckets.Buckets, slots.Slots)


def make(subject: Subject) -> tuple[Evaluator, ...]:
    """Make the evaluators of what a model has; each compiles once, at its first call."""
    return tuple(cls(subject) for cls in EVALUATORS if cls.measures(subject.model))


__all__ = ["EVALUATORS", "Evaluator", "Stopped", "Subject", "is_due", "make"]
