"""Whether data determine a layer: studies, and the certificates of a trained run.

python -m memoryformer.identifiability --study=teachers --output=DIR
python -m memoryformer.identifiability --study=associative --output=DIR
python -m memoryformer.identifiability --workdir=runs/mine [--step=N] [--max_tokens=N]

A study fits linear attention exactly, and by Adam with 1 to 16 heads beside it; what has been
trained is not trained again when the command is repeated. A run's certificate is that of its
memory layers' tables, or of its first mixer where that is linear in its features.
"""

from collections.abc import Sequence

from absl import flags

from memoryformer import cli, errors

STUDIES = ("teachers", "associative")


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_enum("study", None, STUDIES, "Which study to run.")
    cli.define_path_flag("output", "Folder of a study: its runs and study.json.")
    flags.DEFINE_integer(
        "seeds", 3, "Seeds of a study.", lower_bound=1, upper_bound=100
    )
    cli.define_path_flag("workdir", "The run to look at.", in_store=True)
    flags.DEFINE_integer("step", -1, "Its checkpoint; the newest if negative.")
    flags.DEFINE_integer(
        "max_tokens",
        2**15,
        "Tokens of its validation text to look at.",
        lower_bound=1,
        upper_bound=2**40,
    )
    flags.DEFINE_integer(
        "max_unknowns",
        4096,
        "Layers with more unknowns are left out: time grows with the cube.",
        lower_bound=1,
        upper_bound=2**20,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Run the study, or look at the run."""
    cli.check_arguments(argv, config=None, required=False)
    values = flags.FLAGS
    if (values.study is None) == (values.workdir is None):
        raise errors.ConfigError(
            "identifiability: name one of --study=teachers|associative and --workdir=RUN."
        )
    if values.workdir is not None:
        cli.refuse_flags(["output", "seeds"], "is of a study, and --workdir is given")
        from memoryformer.identifiability import trained

        step = None if values.step < 0 else values.step
        found = trained.of_run(
            values.workdir, step, values.max_tokens, values.max_unknowns
        )
        print(trained.table(found))
        return
    looks = ["step", "max_tokens", "max_unknowns"]
    cli.refuse_flags(looks, "is of a run, and --study is given")
    if values.output is None:
        raise errors.ConfigError("--output is missing: name the folder of the study.")
    from memoryformer.identifiability import studies

    print(studies.run(values.study, values.output, values.seeds))


if __name__ == "__main__":
    main()
