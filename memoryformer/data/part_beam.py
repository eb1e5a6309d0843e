"""The parts of a corpus as a pipeline of Apache Beam, on whatever machines its runner has.

    parts = pipeline | Create(numbers) | Reshuffle() | Map(do)

Each element is one part, done as `part_runner` does it, so the files are those of `prepare`, and
what is done is not done again when Beam tries an element twice. The machines share the folder of
the cache and that of the corpus: a runner without a mounted file system is no good here. Beam is
imported by `run` alone. Start there.
"""

import functools
import pathlib
import pickle
from collections.abc import Sequence

from memoryformer import errors
from memoryformer.data import part_runner
from memoryformer.data import progress as progress_lib

RUNNERS = (
    "DirectRunner",
    "PrismRunner",
    "FlinkRunner",
    "SparkRunner",
    "DataflowRunner",
)


def run(job: part_runner.Job, runner: str, arguments: Sequence[str]) -> None:
    """Do all missing parts of a job; `arguments` are Beam's own.

    Raises `ConfigError` where Beam is not installed, `DataError` for a part that has
    failed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options import pipeline_options
    except ModuleNotFoundError as error:
        raise errors.ConfigError(
            f"--runner={runner}: needs Apache Beam ({error.name} is not installed); pip "
            "install 'memoryformer-jax[beam]'."
        ) from error
    settings = pipeline_options.PipelineOptions([*arguments, f"--runner={runner}"])
    do = functools.partial(work, pickle.dumps((str(job.directory), job.config)))
    try:
        with beam.Pipeline(options=settings) as pipeline:
            numbers = pipeline | "missing parts" >> beam.Create(job.missing())
            # Or one machine does them all, in one bundle.
            spread = numbers | "one by one" >> beam.Reshuffle()
            _ = spread | "tokenise" >> beam.Map(do)
    except (OSError, RuntimeError, ValueError) as error:
        raise errors.DataError(
            f"--runner={runner}: {_reason(error)}; {part_runner.AGAIN}."
        ) from error


def work(content: bytes, number: int) -> int:
    """Do one part on the machine that this runs on."""
    job = _job(content)
    job.run(lambda part: part == number, wait=True)
    return number


@functools.lru_cache(maxsize=1)
def _job(content: bytes) -> part_runner.Job:
    """Once for each process: it lists the corpus."""
    directory, data_config = pickle.loads(content)
    quiet = progress_lib.Progress(f"preparing {data_config.source}", enabled=False)
    return part_runner.Job(pathlib.Path(directory), data_config, quiet)


def _reason(error: BaseException) -> str:
    """The line of ours in what a runner wraps around it, or the runner's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "memoryformer.errors." in line]
    text = ours[-1].partition(": ")[2] if ours else errors.first_line(error)
    return text.rstrip(".")
