"""The command line of reports: see the package's docstring."""

import dataclasses
import pathlib

from absl import flags

from memoryformer import config, errors

PICTURES = ("flops", "utilisation", "curves")


def main(argv):
    """Draw the pictures that the first word names, or the page of directories."""
    words = argv[1:]
    if not words:
        raise errors.ConfigError(
            f"report: name run or sweep directories, or one of {', '.join(PICTURES)}."
        )
    if words[0] not in PICTURES and not pathlib.Path(words[0]).exists():
        near = config.suggest(words[0], PICTURES)
        raise errors.ConfigError(f"report {words[0]!r}: no such directory{near}.")
    if words[0] in PICTURES:
        from memoryformer.report import pictures  # with matplotlib

        names = [field.name for field in dataclasses.fields(pictures.Options)]
        options = {name: flags.FLAGS[name].value for name in names}
        return pictures.main(argv, pictures.Options(**options))
    from memoryformer.report import page

    directories = [pathlib.Path(word) for word in words]
    output = pathlib.Path(flags.FLAGS.output or directories[0] / "report.html")
    if output.is_dir():
        output = output / "report.html"
    try:
        sizes = page.write(directories, output)
    except OSError as error:
        raise errors.StorageError(f"{output}: cannot be written: {error}.") from error
    print(output)
    print(", ".join(f"{name}: {size} runs" for name, size in sizes.items()))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("output", "", "File, or folder for pictures; '' = in DIR.")
    flags.DEFINE_string("workdir", "", "The run to look at (utilisation).")
    flags.DEFINE_integer(
        "max_tokens", 2**18, "Validation tokens to count (utilisation); 0 = all."
    )
    errors.run_main(main)
