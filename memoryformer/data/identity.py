"""Where a corpus is or would be prepared: the name of its directory says what is in it.

    CACHE/LABEL-HASH/     HASH is of all that determines the bytes: corpus, split, tokenizer

Start at `resolve_dir`.
"""

import hashlib
import json
import pathlib
from typing import Any

from memoryformer.data import blocks, listing, local_files, names, options, stored_files
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.files import paths, stores

_SAMPLE = 2  # of the rule by which these are drawn
# Of the rules by which a corpus is dealt to parts: 1 cut long texts where tokens change.
_PARTS = 2


def resolve_dir(data_config: options.DataConfig) -> pathlib.Path:
    """Where this data set is or would be prepared: cache / slug-hash.

    The hash covers the corpus, the split and the tokenizer. Raises `DataError` if the
    corpus is not there.
    """
    return located(data_config)[0]


def located(data_config: options.DataConfig) -> tuple[pathlib.Path, bool]:
    """The directory, and whether it is prepared in parts.

    A large corpus that an older version has prepared whole stays as it is.
    """
    if data_config.source == "prepared":
        if stores.is_store(data_config.path):
            root = options.cache_root(data_config)
            return stored_files.prepared(data_config.path, root), False
        return paths.local(data_config.path, "data.path"), False
    wanted = request(data_config)
    parts = wanted.pop("parts", None)
    whole = _named(data_config, wanted)
    if parts is None or (
        not data_config.source_options.deduplicate
        and (whole / manifest_lib.FILE).is_file()
    ):
        return whole, False
    for older in range(1, _PARTS):  # prepared already, they stay as they are
        known = _named(data_config, wanted | {"parts": [older, *parts[1:]]})
        if (known / manifest_lib.FILE).is_file():
            return known, True
    return _named(data_config, wanted | {"parts": parts}), True


def _named(data_config: options.DataConfig, request: dict) -> pathlib.Path:
    text = json.dumps(request, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    label = data_config.name or data_config.source
    label = "".join(c if c.isalnum() else "-" for c in label).strip("-").lower()
    return options.cache_root(data_config) / f"{label}-{digest}"


def request(data_config: options.DataConfig) -> dict:
    """Everything that determines the bytes of the token files, cheap enough to ask often."""
    settings = data_config.source_options
    request = {
        "format": manifest_lib.FORMAT,
        "source": data_config.source,
        "max_documents": settings.max_documents,
        "validation_every": settings.validation_every,
        "tokenizer": data_config.tokenizer,
    }
    if data_config.source == "stdlib":
        request["files"] = local_files.fingerprint(listing.stdlib_files())
    elif data_config.source == "tfds":
        request["tfds"] = _catalogue_identity(data_config)
    else:
        request |= _local_identity(data_config)
    if data_config.source != "stdlib":
        request["text_field"] = settings.text_field
    if tokenizer_lib.bpe_size(data_config.tokenizer):
        request["sample"] = _SAMPLE
    elif data_config.tokenizer != "bytes":
        tokenizer = tokenizer_lib.load(data_config.tokenizer, data_config.end_token)
        request["tokenizer"] = tokenizer.fingerprint
    return request


def _local_identity(data_config: options.DataConfig) -> dict:
    only, settings = data_config.source == "c4", data_config.source_options
    files = listing.list_files(data_config.path, json_only=only)
    identity: dict[str, Any] = {"files": local_files.fingerprint(files)}
    if part_bytes := _part_bytes(data_config, files):
        identity["parts"] = [_PARTS, part_bytes, data_config.source_options.deduplicate]
    if settings.validation_path:
        held_out = listing.list_files(
            settings.validation_path,
            json_only=only,
            field="data.source_options.validation_path",
        )
        identity["validation"] = local_files.fingerprint(held_out)
        files = files + held_out
    if data_config.source == "text" and settings.separator:
        identity["separator"] = names.unescaped(settings.separator)
        if "\n" in identity["separator"]:
            identity["line_ends"] = "\\n or \\r\\n"
    if any(_may_be_cut(path) for _, path in files):
        identity["max_chars"] = local_files.MAX_CHARS
    return identity


def _part_bytes(data_config: options.DataConfig, files: listing.Files) -> int:
    """About the size of the parts of a corpus; 0 for one that is prepared whole."""
    part_bytes = options.part_bytes(data_config)
    if data_config.source_options.deduplicate:  # which only parts do
        return part_bytes
    is_large = sum(path.stat().st_size for _, path in files) > part_bytes
    limited = data_config.source_options.max_documents  # in the order of the corpus
    return part_bytes if is_large and not limited else 0


def _may_be_cut(path: blocks.File) -> bool:
    """Whether a file's text may be longer than a document can be."""
    is_compressed = path.suffix.lower() in blocks.COMPRESSED
    large = is_compressed or path.stat().st_size > local_files.MAX_CHARS
    return large and not blocks.has_fields(path)


def _catalogue_identity(data_config: options.DataConfig) -> str:
    from memoryformer.data import tfds_catalogue  # TFDS: slow to import

    return tfds_catalogue.builder(data_config).info.full_name
