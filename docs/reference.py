"""The two references of the site, made from the package: config fields and public functions.

`write` makes `configuration.inc` (the tables of `configuration.md`) and `api/PART.md`, one page
for each part of the package. `as_rst` turns a docstring of ours into what Sphinx reads.
"""

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import pkgutil
import re

import memoryformer
from memoryformer import config
from memoryformer.training import experiment


def write(folder: pathlib.Path) -> None:
    """Write every generated page into `folder`, a page only where its text is new."""
    pages = {"configuration.inc": configuration()}
    for part, modules in parts().items():
        pages[f"api/{part}.md"] = api_page(part, modules)
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for old in folder.glob("api/*.md"):
        if f"api/{old.name}" not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def configuration() -> str:
    """A heading and a table for each section of a config."""
    lines, single = [], []
    for section in dataclasses.fields(experiment.Experiment):
        if not dataclasses.is_dataclass(section.type):
            single.append(section)
            continue
        lines += [f"## `{section.name}`", "", _summary(section.type), ""]
        lines += _table(section.type, section.name, section.metadata)
    lines += ["## Fields of no section", "", *_rows(single, "", {}), ""]
    return "\n".join(lines)


def _table(cls, prefix, metadata):
    """The fields of a dataclass; then those of what a field chooses, by name."""
    fields = dataclasses.fields(cls)
    lines = [*_rows(fields, f"{prefix}.", metadata), ""]
    for field in fields:
        for name, choice in (field.metadata.get("options") or {}).items():
            options = config.options_class(choice)
            if dataclasses.fields(options):
                chooser = field.name.removesuffix("_options")
                of = f"any `{chooser}`" if name == config.ANY else f"`{name}`"
                lines += [f"### `{prefix}.{field.name}` of {of}", ""]
                lines += _table(options, f"{prefix}.{field.name}", {})
    return lines


def _rows(fields, prefix, inherited):
    yield "| field | type | default | meaning | a change changes |"
    yield "|---|---|---|---|---|"
    for field in fields:
        metadata = {**field.metadata, **inherited}
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{field.default!r}`"
        kind = getattr(field.type, "__name__", str(field.type))
        if field.metadata.get("options"):
            kind, default = "section", "see below"
        meaning = field.metadata.get("doc", "").replace("|", r"\|")
        changes = metadata.get("changes", "numbers")
        yield f"| `{prefix}{field.name}` | {kind} | {default} | {meaning} | {changes} |"


def _summary(cls):
    return inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")


def parts() -> dict[str, list[str]]:
    """{part of the package: names of its public modules}, in the order of their names."""
    found = {}
    for info in pkgutil.walk_packages(memoryformer.__path__, "memoryformer."):
        if info.name.split(".")[-1].startswith("_") or not _public(info):
            continue
        found.setdefault(info.name.split(".")[1], []).append(info.name)
    return found


def _public(info):
    """Whether a module says something: a package that only holds modules does not."""
    source = pathlib.Path(importlib.util.find_spec(info.name).origin)
    tree = ast.parse(source.read_text("utf-8"))
    return not info.ispkg or len(tree.body) > 1


def api_page(part: str, modules: list[str]) -> str:
    """A page of one part: every public module with what it defines."""
    lines = [f"# {part}", ""]
    for name in modules:
        if name != f"memoryformer.{part}" or len(modules) > 1:
            lines += [f"## {name}", ""]
        lines += ["```{eval-rst}", f".. automodule:: {name}", "   :members:"]
        lines += ["   :ignore-module-all:", "```", ""]
    return "\n".join(lines)


def short_types(app, what, name, obj, options, signature, returns) -> tuple:
    """Write `Array` for jaxlib's private path to it."""
    texts = (signature, returns)
    return tuple(t and t.replace("jaxlib._jax.Array", "Array") for t in texts)


def as_rst(app, what, name, obj, options, lines) -> None:
    """Keep the layout of a docstring: prose is prose, what is indented stays as it is."""
    paragraphs = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    out = []
    for paragraph in filter(None, paragraphs):
        if any(line[0] in " |-*" or "   " in line for line in paragraph):
            out += ["::", "", *(f"   {line}" for line in paragraph), ""]
        else:
            out += [*_prose("\n".join(paragraph)).split("\n"), ""]
    lines[:] = out


def _prose(text):
    """Backticks as literals, also before a letter (`Block`s); other signs as they are."""
    pieces = []
    for piece in re.split(r"(`[^`]+`)", text):
        if piece.startswith("`") and len(piece) > 2:
            pieces.append(f"``{piece[1:-1]}``")
        else:
            escaped = re.sub(r"([\\*|_<>])", r"\\\1", piece)
            after_literal = pieces and piece[:1].isalnum()
            pieces.append(f"\\ {escaped}" if after_literal else escaped)
    return "".join(pieces)
