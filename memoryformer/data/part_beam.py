"""The parts of a corpus by Apache Beam, on whatever machines its runner has.

The files are those of `prepare`, byte for byte, and a part that is there is not done again.
Beam's own sources read and its file systems write, so workers may see the corpus and the cache
under other names than this machine, such as gs://. Beam is imported by `run` alone. Start there.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from memoryformer import errors
from memoryformer.data import part_runner
from memoryformer.data.names import shown
from memoryformer.files import paths

RUNNERS = (
    "DirectRunner",
    "PortableRunner",
    "PrismRunner",
    "FlinkRunner",
    "SparkRunner",
    "DataflowRunner",
)
_FLAG = "--workers_see"
_OURS = re.compile(r"\bmemoryformer\.[\w.]+Error: (.*)")

# A folder of this machine, and its name for workers.
Views = Sequence[tuple[pathlib.Path, str]]


def run(
    job: part_runner.Job, runner: str, arguments: Sequence[str], views: Views = ()
) -> None:
    """Do all missing parts of a job; `arguments` are Beam's own.

    Raises `ConfigError` where Beam is not installed, `DataError` for a part that has
    failed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options import pipeline_options

        from memoryformer.data import beam_pipeline
    except ModuleNotFoundError as error:
        raise errors.ConfigError(
            f"--runner={runner}: needs Apache Beam ({error.name} is not installed); pip "
            "install 'memoryformer-jax[beam]'."
        ) from error
    with job.while_it_lasts():
        job.rules()  # which workers read
    url = namer(views)
    task = beam_pipeline.Task(
        url(job.work),
        dataclasses.replace(job.corpus, files=[], held_out=[]),
        len(job.parts),
        job.config.end_token,
        job.config.source_options.deduplicate,
    )
    if not (missing := job.missing()):
        return
    wanted = range(len(job.parts)) if task.deduplicate else missing
    places = beam_pipeline.places(job.parts, wanted, url)
    settings = pipeline_options.PipelineOptions([*arguments, f"--runner={runner}"])
    try:
        pipeline = beam.Pipeline(options=settings)
        beam_pipeline.build(pipeline, task, places, missing)
        result = pipeline.run()
        result.wait_until_finish()
    except (OSError, RuntimeError, ValueError) as error:
        raise errors.DataError(
            f"--runner={runner}: {_reason(error)}; {part_runner.AGAIN}."
        ) from error
    job.progress.note(f"{runner}: {_counted(result, beam_pipeline.NAMESPACE)}")
    if left := job.missing():
        raise errors.DataError(
            f"--runner={runner}: has ended, but {len(left)} of {len(job.parts)} parts "
            f"are not in {job.work}; is that {task.folder} for the workers ({_FLAG})?"
        )


def views(text: str) -> Views:
    """[(/mnt/c4, gs://bucket/c4)] of '/mnt/c4=gs://bucket/c4', more of them after commas."""
    pairs = []
    for item in filter(None, text.split(",")):
        folder, sign, name = item.partition("=")
        if not (sign and folder and name):
            raise errors.ConfigError(
                f"{_FLAG}={text!r}: {item!r} is not FOLDER=NAME, as in "
                "/mnt/c4=gs://bucket/c4."
            )
        pairs.append((paths.local(folder, _FLAG).absolute(), name.rstrip("/")))
    return pairs


def namer(views: Views) -> Callable[[os.PathLike], str]:
    """What workers call a file; the innermost folder decides."""
    innermost = sorted(views, key=lambda view: -len(view[0].parts))

    def url(path: os.PathLike) -> str:
        if "://" in os.fspath(path):
            return os.fspath(path)
        here = pathlib.Path(path).absolute()
        for folder, name in innermost:
            if here.is_relative_to(folder):
                return f"{name}/{here.relative_to(folder).as_posix()}"
        if views:
            raise errors.ConfigError(
                f"{_FLAG}: does not say what workers call {shown(here)}; add its folder."
            )
        return str(here)

    return url


def _counted(result: Any, namespace: str) -> str:
    """'1,234 tokens, 5 documents', as Beam has counted them."""
    from apache_beam.metrics import MetricsFilter

    wanted = MetricsFilter().with_namespace(namespace)
    counters = result.metrics().query(wanted)["counters"]
    totals = {found.key.metric.name: found.result for found in counters}
    return ", ".join(f"{totals[name]:,} {name}" for name in sorted(totals))


def _reason(error: BaseException) -> str:
    """The line of ours in what a runner wraps around it, or the runner's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [found[1] for line in lines if (found := _OURS.search(line))]
    text = ours[-1] if ours else errors.first_line(error)
    return text.rstrip(".")
