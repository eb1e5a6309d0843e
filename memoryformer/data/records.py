"""A TFDS builder of named texts that writes its records without TensorFlow.

TFDS's own writer holds a split in memory to sort it, and beyond a gigabyte it needs
TensorFlow. Here records go to one array_record file for each split, in the order of the
examples: it is the same everywhere, and windows are shuffled when they are drawn.
"""

from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters

from memoryformer import errors

Example = tuple[str, dict[str, str]]  # key, and the features by name


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Ask no bucket: these data sets exist only here."""


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
    """Examples with the features `name` and `text`; `text_bytes` counts them by split."""

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        # TFDS's own default, tfrecord, cannot be written without TensorFlow.
        super().__init__(file_format=file_format, **kwargs)
        self.text_bytes: dict[str, int] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"name": tfds.features.Text(), "text": tfds.features.Text()}
        )
        return _LocalInfo(
            builder=self,
            description=type(self).__doc__,
            features=features,
            disable_shuffling=True,
        )

    def _generate_examples(self, **kwargs) -> Iterator[Example]:
        raise NotImplementedError("`_split_generators` has the examples themselves")

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        splits = self._split_generators(dl_manager).items()
        infos = [self._write_split(split, examples) for split, examples in splits]
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _write_split(
        self, split: str, examples: Iterable[Example]
    ) -> tfds.core.SplitInfo:
        features = self.info.features
        specs = features.get_serialized_info()
        serializer = example_serializer.ExampleSerializer(specs)
        sizes = []
        self.text_bytes[split] = 0

        def records() -> Iterator[tuple[str, bytes]]:
            for key, example in examples:
                encoded = features.encode_example(example)
                record = serializer.serialize_example(encoded)
                sizes.append(len(record))
                self.text_bytes[split] += len(example["text"].encode("utf-8"))
                yield key, record

        template = self._get_filename_template(split_name=split)
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        adapter = file_adapters.ADAPTER_FOR_FORMAT[self.info.file_format]
        adapter.write_examples(path, records())
        if not sizes:
            raise errors.DataError(f"{split}: no document holds any text.")
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(sizes)],
            num_bytes=sum(sizes),
            filename_template=template,
        )
