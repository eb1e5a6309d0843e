"""The text of a conversion, in batches. Start at `Batches`."""

from collections.abc import Iterator

from memoryformer import data
from memoryformer.convert.memorise.options import Options
from memoryformer.convert.memorise.source import Source
from memoryformer.data.progress import Progress
from memoryformer.errors import ConfigError

BATCH_TOKENS = 8192  # of one pass through the model
HELD_OUT_TOKENS = 16_384  # that choose a ridge, at most a quarter as many as are fitted


class Batches:
    """The tokens of a conversion: to fit to, to choose by, to tell the loss on."""

    def __init__(self, source: Source, options: Options):
        run, dataset = source.run, source.dataset
        length = run.model.seq_len
        self.rows = max(1, min(BATCH_TOKENS, options.tokens // 4) // length)
        per_batch = self.rows * length
        self.count = -(-options.tokens // per_batch)
        self.held_out = max(1, min(HELD_OUT_TOKENS, options.tokens // 4) // per_batch)
        self._train = dataset.train.batches(length, self.rows, run.train.seed)
        needed = (self.count + self.held_out) * self.rows
        if needed > self._train.windows_per_epoch:
            raise ConfigError(
                f"--tokens={options.tokens}: with what is held out they are {needed} rows of "
                f"{length} tokens, but the text has {self._train.windows_per_epoch}; give more "
                "text or fewer tokens."
            )
        validation = dataset.validation.eval_batches(length, self.rows)
        number = min(options.eval_batches or len(validation), len(validation))
        every = [validation[i * len(validation) // number] for i in range(number)]
        self.validation: list[data.Batch] = every

    def fitted(self, progress: Progress | None = None) -> Iterator[data.Batch]:
        """The batches to fit to."""
        for i in range(self.count):
            if progress:
                progress.update(i * self.rows)
            yield self._train.batch(i)
        if progress:
            progress.finish(self.count * self.rows)

    def others(self) -> Iterator[data.Batch]:
        """The batches held out."""
        for i in range(self.count, self.count + self.held_out):
            yield self._train.batch(i)
