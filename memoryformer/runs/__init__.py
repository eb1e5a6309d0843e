"""What lies in a run's folder."""

from memoryformer.runs.steps import load

__all__ = ["load"]
