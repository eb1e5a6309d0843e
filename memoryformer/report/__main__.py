"""The command line of reports: see the package's docstring."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from memoryformer import cli, config, errors
from memoryformer.files import paths, stores

PICTURES = ("flops", "utilisation", "curves", "slots", "costs")


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_path_flag("output", "File, or folder for pictures; not given: in DIR.")
    cli.define_path_flag(
        "workdir", "The run to look at (utilisation, quickstart).", in_store=True
    )
    flags.DEFINE_integer(
        "max_tokens",
        2**18,
        "Validation tokens to count (utilisation); 0 = all.",
        lower_bound=0,
        upper_bound=2**40,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv):
    """Draw the pictures that the first word names, or the page of directories."""
    words = argv[1:]
    if not words:
        raise errors.ConfigError(
            f"report: name run or sweep directories, or one of {', '.join(PICTURES)}."
        )
    known = (*PICTURES, "quickstart")
    if words[0] not in known and not _is_there(words[0]):
        near = config.suggest(words[0], known)
        raise errors.ConfigError(f"report {words[0]!r}: no such directory{near}.")
    if words[0] not in ("utilisation", "quickstart"):
        cli.refuse_flags(["workdir"], "is of report utilisation and quickstart")
    if words[0] != "utilisation":
        cli.refuse_flags(["max_tokens"], "is of report utilisation")
    if words[0] == "quickstart":
        cli.refuse_flags(["output"], "report quickstart prints, and writes no file")
        if len(words) > 1:
            raise errors.ConfigError(
                f"report quickstart {words[1]!r}: takes no further word; name the run as "
                "--workdir."
            )
        from memoryformer.report import quickstart

        print(quickstart.summary(paths.local(flags.FLAGS.workdir or "", "--workdir")))
        return 0
    if words[0] in PICTURES:
        from memoryformer.report import pictures  # with matplotlib

        names = [field.name for field in dataclasses.fields(pictures.Options)]
        values = {name: flags.FLAGS[name].value for name in names}
        options: dict[str, Any] = {
            name: "" if value is None else value for name, value in values.items()
        }
        return pictures.main(argv, pictures.Options(**options))
    from memoryformer.report import page
    from memoryformer.runs import remote

    output = remote.output(flags.FLAGS.output, words[0], "report.html")
    directories = [remote.copied(word, name="report", params=False) for word in words]
    if output.is_dir():
        output = output / "report.html"
    try:
        sizes = page.write(directories, output)
    except OSError as error:
        raise errors.StorageError(f"{output}: cannot be written: {error}.") from error
    print(output)
    print(", ".join(f"{name}: {size} runs" for name, size in sizes.items()))
    return 0


def _is_there(word: str) -> bool:
    """Whether a word may name a directory; what lies in a store is looked up later."""
    if stores.is_store(word):
        return bool(stores.checked(word, "report"))
    return paths.local(word, "report").exists()


if __name__ == "__main__":
    main()
