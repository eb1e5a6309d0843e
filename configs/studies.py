"""The paper's studies as sweeps, at their true size and (`:mini`) at one that runs here.

    python -m memoryformer.sweep --config=configs/studies.py:mini --sweep=table3,seed run --parallel=2
    python -m memoryformer.sweep --config=configs/studies.py:mini --sweep=table3,seed collect

Sweeps, each to be multiplied by `seed`: table3 table4 table5 table6 (the paper's), score,
equal_flops, equal_parameters; `rate` is the search before them, `table_rates` one of tables' own
rate and decay. `variants` has what is not in the paper, beside the published layer at equal bytes
read; `isoflop` is four sizes of memory and dense models at four budgets, of which the report
draws loss over FLOPs, time and bytes, and fits a law; `rule` checks its learning rates;
`table3_tokens`, `score_tokens` and `variants_tokens` go on for ten and forty times as long.
Points that several of them have are trained once. After a run was stopped or killed, the same
command goes on.

True size: MemoryFormer-tiny, 8,000 steps of 2.1M tokens as in the paper's ablations; not run.

The miniature: width 80, two layers, bytes of the standard library's sources, none read twice
(at most 9 % of the training text). With three seeds some 110 runs of 1,000 steps (30 of them
2,000), 38 seconds of one core each. Its default learning rate is the best of `rate`: 3.076,
2.823, 2.681, 2.742, 2.923 bits per byte at 8e-3 to 128e-3, one seed. docs/results.md has what
all of them gave.

    for sweep in table3 table4 table5 table6 score equal_flops equal_parameters; do
      python -m memoryformer.sweep --config=configs/studies.py:mini --sweep=$sweep,seed run --parallel=2
    done
    python -m memoryformer.report runs/sweeps/studies-mini
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from memoryformer import accounting, presets
from memoryformer.training import experiment

# size: steps, peak learning rate
SIZES = {"": (8000, 3e-3), "mini": (1000, 32e-3)}
# Parts of that rate that each score is tried at: by its own scale, `l1_softmax` moves the
# outputs some seven times as far at the same rate.
SCORES = {"softmax": (1, 2, 0.5), "l1_softmax": (0.5, 1, 0.25, 0.125, 0.0625)}
# .. and rates over more tokens, at CODE_BITS.
SCORE_TOKENS_RATES = {
    "": {"softmax": (3e-3,), "l1_softmax": (3e-3,)},
    "mini": {"softmax": (5.3e-3, 2.66e-3), "l1_softmax": (1e-3, 2e-3, 5e-4, 2.5e-4)},
}
DENSE = {
    "model.projection": "dense",
    "model.ffn_activation": "gelu",
    "model.output_projection": True,
}
DENSE_RATES = {
    "": (1e-3, 2e-3, 5e-4),
    "mini": (5e-3, 1e-2, 2.5e-3, 1.25e-3, 6.25e-4),
}  # Pythia's: 1e-3
# size: width, layers, heads of the dense model with the FLOPs of the memory model ...
EQUAL_FLOPS = {"": (384, 6, 6), "mini": (40, 2, 1)}
# ... and with its parameters (of the memory model of tau = 4, for the miniature: at tau = 8
# a dense model of as many parameters would cost sixty times as much).
EQUAL_PARAMETERS = {"": (1280, 17, 20), "mini": (128, 2, 2)}
CODE_BITS = {"": 8, "mini": 4}

# Variants against the published layer: bits of both, that read as many rows, of n-grams, ..
TWO_ROW_BITS = {"": (4, 8), "mini": (4, 8)}
NGRAM_ROWS, LONGEST_NGRAM = {"": 1 << 16, "mini": 1 << 11}, 5
BEST_VARIANT = "n-grams to 5, half the rows, token rows"
# .. at parts of the default rate; and rates over more tokens, where lower ones are better.
VARIANT_RATES = {"": (1, 2 / 3), "mini": (2 / 3, 1)}
VARIANT_TOKENS_RATES = {
    "": (3e-3, 2e-3),
    "mini": (5.3e-3, 21.3e-3, 10.7e-3, 2.66e-3),
}
# .. and curves: widths, layers and heads; training FLOPs; the rate at a width of the memory
# model and of the dense one, from which others follow as 1 / width.
CURVE_SIZES = {
    "": ((256, 4, 4), (384, 6, 6), (512, 8, 8), (768, 12, 12)),
    "mini": ((40, 2, 1), (56, 2, 2), (80, 2, 2), (120, 2, 3)),
}
CURVE_FLOPS = {"": (1e17, 3e17, 1e18, 3e18), "mini": (2e10, 4e10, 8e10, 16e10)}
CURVE_RATES = {
    "": {"memory": (512, 3e-3), "dense": (512, 1e-3)},
    "mini": {"memory": (80, 21.3e-3), "dense": (40, 5e-3)},
}

# Rates of Table 3 over more tokens.
TABLE3_TOKENS_RATES = {"": (3e-3, 1.5e-3), "mini": (10.7e-3, 5.3e-3, 2.66e-3, 21.3e-3)}

# Learning rates of tables, as parts of the default one; times the others' and decays.
TABLE_RATES = {"": (1, 1 / 3, 3), "mini": (2 / 3, 1 / 3, 4 / 3)}
TABLE_SCALES, DECAYS = (1, 5, 25, 75), (0.1, 0.0, 0.5)

Points = Iterator[dict[str, Any]]


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """MemoryFormer-tiny, or 'mini'."""
    config = _mini() if size == "mini" else presets.memoryformer("tiny", size)
    config.train.num_steps, config.optimizer.learning_rate = SIZES[size]
    config.optimizer.warmup_steps = config.train.num_steps // 50
    return config


def _mini() -> ml_collections.ConfigDict:
    config = experiment.default_config()

    model = config.model
    model.vocab_size = 264  # bytes, the end of text, padding
    model.embed_dim = 80
    model.num_layers = 2
    model.num_heads = 2
    model.seq_len = 128
    model.norm = "layernorm"
    model.norm_eps = 1e-5

    config.data.source = "stdlib"
    config.data.tokenizer = "bytes"

    config.train.batch_size = 4
    config.train.log_every = 50

    config.eval.every_steps = 250
    config.eval.num_batches = 32  # 65,536 bytes, the same ones for all
    config.checkpoint.every_steps = 500
    config.checkpoint.keep = 1
    config.metrics.trackers = ""
    config.mesh = "single"
    return config


def metrics() -> tuple[str, ...]:
    """The columns of `sweep collect`."""
    return ("val/bits_per_byte", "val/loss", "train/tokens_per_second")


def sweep_seed() -> Points:
    """Three seeds, of the parameters and of the order of the data."""
    for seed in range(3):
        yield {"train.seed": seed}


def sweep_rate(size: str) -> Points:
    """A coarse search of the peak learning rate, to choose the default one by."""
    for part in (0.25, 0.5, 1, 2, 4):
        yield {"optimizer.learning_rate": SIZES[size][1] * part}


def sweep_table3(size: str) -> Points:
    """Bits per code against tables: tau x K at a fixed width (510 for tau = 10)."""
    yield {"label": "tau=8", "model.code_bits": 8}
    yield {"label": "tau=4", "model.code_bits": 4}
    wide = {} if size else {"model.embed_dim": 510, "model.num_heads": 5}
    yield {"label": "tau=10", "model.code_bits": 10, **wide}


def sweep_table_rates(size: str) -> Points:
    """Tables at 1 to 75 times the rate of the other parameters, x decay; both rates move.

    First the tables' own rate stays and the others are slower, then the others' stays and tables
    are faster.
    """
    for slower, scales in ((True, TABLE_SCALES), (False, TABLE_SCALES[1:])):
        for scale in scales:
            for decay in DECAYS:
                for part in TABLE_RATES[size]:
                    rate = _rounded(SIZES[size][1] * part)
                    kept = "tables'" if slower else "others'"
                    yield {
                        "label": f"tables x {scale}, decay {decay}, {kept} lr={rate:g}",
                        "optimizer.table_learning_rate_scale": scale,
                        "optimizer.weight_decay": decay,
                        "optimizer.learning_rate": rate / scale if slower else rate,
                    }


def sweep_table4(size: str) -> Points:
    """The peak learning rate: 1, 1/3, 2/3 and 4/3 of the default one."""
    for part in (3, 1, 2, 4):
        rate = SIZES[size][1] * part / 3
        yield {"optimizer.learning_rate": _rounded(rate)}


def sweep_table5() -> Points:
    """Extra bits of the second feed-forward layer's codes."""
    for bits in (2, 0, 1, 3):
        yield {"model.projection_options.extra_bits": bits}


def sweep_table6() -> Points:
    """A GELU between the feed-forward layers, or nothing."""
    for activation in ("none", "gelu"):
        yield {"model.ffn_activation": activation}


def sweep_score(size: str) -> Points:
    """`softmax` and `l1_softmax` at two horizons, each at three learning rates."""
    steps, peak = SIZES[size]
    for times in (1, 2):
        for score, parts in SCORES.items():
            for part in parts:
                rate = _rounded(peak * part)
                yield {
                    "label": f"{score}, {times * steps} steps, lr={rate:g}",
                    "model.score": score,
                    "train.num_steps": times * steps,
                    "optimizer.warmup_steps": times * steps // 50,
                    "optimizer.learning_rate": rate,
                }


def sweep_equal_flops(size: str) -> Points:
    """Memory x dense at equal FLOPs per token, each at three learning rates."""
    yield from _against_dense(size, {}, EQUAL_FLOPS[size])


def sweep_equal_parameters(size: str) -> Points:
    """Memory x dense at equal parameters, each at three learning rates."""
    memory = {"model.code_bits": CODE_BITS[size]}
    yield from _against_dense(size, memory, EQUAL_PARAMETERS[size])


def _against_dense(
    size: str, memory: dict[str, Any], shape: tuple[int, int, int]
) -> Points:
    dense = _dense(shape)
    memory_rates = [SIZES[size][1] * part / 3 for part in (3, 2, 4)]  # as in Table 4
    sides = (("memory", memory, memory_rates), ("dense", dense, DENSE_RATES[size]))
    for kind, fields, rates in sides:
        for rate in rates:
            rate = _rounded(rate)
            label = f"{kind}, lr={rate:g}"
            yield {"label": label, "optimizer.learning_rate": rate, **fields}


def _dense(shape):
    width, layers, heads = shape
    return DENSE | {
        "model.embed_dim": width,
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.projection_options.output_std": 0.02 / (2 * layers) ** 0.5,
    }


def sweep_variants(size: str) -> Points:
    """Two rows, rows of n-grams and of tokens against the published layer at equal bytes read.

    And the dense model of equal FLOPs, without n-grams and with them.
    """
    first, later = _variants(size)
    rates = [_rounded(SIZES[size][1] * part) for part in VARIANT_RATES[size]]
    yield from _at_rates(rates, first)
    yield from _at_rates(rates, later)
    dense, rows = _dense(EQUAL_FLOPS[size]), _ngrams(NGRAM_ROWS[size])
    kinds = {"dense": dense, "dense, n-grams": dense | rows}
    yield from _at_rates(DENSE_RATES[size][:3], kinds)


def _variants(size):
    """Fields of each kind: those that were first, and those that came later."""
    few, many = TWO_ROW_BITS[size]
    rows = _ngrams(NGRAM_ROWS[size])
    half = _ngrams(NGRAM_ROWS[size] // 2)
    longer = {"model.projection_options.ngram_order": LONGEST_NGRAM}
    tokens = {"model.projection_options.token_rows": True}
    published = {"model.code_bits": few}
    two = {"model.code_bits": many, "model.projection_options.rows_read": 2}
    first = {
        "published": published,
        "n-grams": published | rows,
        "two rows": two,
        "two rows and n-grams": two | rows,
    }
    later = {
        "token rows": published | tokens,
        "n-grams, token rows": published | rows | tokens,
        "n-grams to 5": published | rows | longer,
        "n-grams to 5, token rows": published | rows | longer | tokens,
        "n-grams to 5, half the rows": published | longer | half,
        "n-grams to 5, half the rows, token rows": published | longer | half | tokens,
    }
    return first, later


def _ngrams(rows):
    return {"model.projection_options.ngram_rows": rows}


def _at_rates(rates, kinds):
    """Each kind at each rate, named by kind, bits and rate."""
    for rate in rates:
        for kind, fields in kinds.items():
            bits = fields.get("model.code_bits")
            of_bits = f", {bits} bits" if bits else ""
            label = f"{kind}{of_bits}, lr={rate:g}"
            yield {"label": label, "optimizer.learning_rate": rate, **fields}


def sweep_isoflop(size: str) -> Points:
    """Memory and dense models of four sizes at four budgets of training FLOPs."""
    for flops in CURVE_FLOPS[size]:
        for kind in ("memory", "dense"):
            for shape in CURVE_SIZES[size]:
                fields = _of_shape(size, kind, shape)
                steps = max(1, round(flops / _flops_per_step(size, fields)))
                yield {
                    "label": f"{kind}, D={shape[0]}, {steps} steps",
                    "train.num_steps": steps,
                    "optimizer.warmup_steps": max(1, steps // 50),
                    **fields,
                }


def sweep_rule(size: str) -> Points:
    """Half and twice the learning rate of the rule, at the smallest and the largest size."""
    for kind in ("memory", "dense"):
        for shape in (CURVE_SIZES[size][0], CURVE_SIZES[size][-1]):
            fields = _of_shape(size, kind, shape)
            for part in (1, 0.5, 2):
                rate = _rounded(fields["optimizer.learning_rate"] * part)
                label = f"{kind}, D={shape[0]}, lr={rate:g}"
                yield fields | {"label": label, "optimizer.learning_rate": rate}


def sweep_table3_tokens(size: str) -> Points:
    """Bits per code over ten times the tokens of Table 3, six bits beside them, at several rates."""
    wide = (
        {"model.embed_dim": 84}
        if size
        else {"model.embed_dim": 510, "model.num_heads": 5}
    )
    six = {"label": "tau=6", "model.code_bits": 6, **wide}
    for rate in TABLE3_TOKENS_RATES[size]:
        for fields in (*sweep_table3(size), six):
            label = f"{fields['label']}, lr={rate:g}"
            at_rate = {"label": label, "optimizer.learning_rate": rate}
            yield fields | at_rate | _longer(size, 10)


def sweep_score_tokens(size: str) -> Points:
    """Both scores over forty times the tokens, of the published layer and of the best variant."""
    first, later = _variants(size)
    kinds = {"": first["published"], f", {BEST_VARIANT}": later[BEST_VARIANT]}
    for kind, variant in kinds.items():
        for score, rates in SCORE_TOKENS_RATES[size].items():
            for rate in rates:
                yield {
                    "label": f"{score}{kind}, lr={rate:g}",
                    "model.score": score,
                    "optimizer.learning_rate": rate,
                    **variant,
                    "model.code_bits": CODE_BITS[size],
                    **_longer(size, 40 if size else 1),
                }


def sweep_variants_tokens(size: str) -> Points:
    """The published layer, the best of `variants` within a tenth of its time, dense: longer."""
    first, later = _variants(size)
    best = ("published", "n-grams", BEST_VARIANT)
    kinds = {kind: (first | later)[kind] for kind in best}
    longer = _longer(size, 40 if size else 1)
    for fields in _at_rates(VARIANT_TOKENS_RATES[size], kinds):
        yield fields | longer
    model = get_config(size).model
    shape = (model.embed_dim, model.num_layers, model.num_heads)
    dense = _of_shape(size, "dense", shape)
    rate = dense.pop("optimizer.learning_rate")
    rates = [_rounded(rate * part) for part in (1, 0.5, 2)]
    for fields in _at_rates(rates, {"dense of that width": dense}):
        yield fields | longer


def _of_shape(size, kind, shape):
    width, layers, heads = shape
    at, rate = CURVE_RATES[size][kind]
    fields = {
        "model.embed_dim": width,
        "model.num_layers": layers,
        "model.num_heads": heads,
        "optimizer.learning_rate": _rounded(rate * at / width),
    }
    if kind == "dense":
        return (
            DENSE
            | {"model.projection_options.output_std": 0.02 / (2 * layers) ** 0.5}
            | fields
        )
    return fields | {"model.code_bits": CODE_BITS[size]}


def _flops_per_step(size, fields):
    config = get_config(size)
    if fields.get("model.projection") == "dense":
        config.model.projection_options = {}  # which the memory model's are not
    config.update_from_flattened_dict(fields)
    run = experiment.resolve(config)
    cost = accounting.count(run.model).training_flops_per_token
    return cost * run.train.batch_size * run.model.seq_len


def _rounded(rate):
    return float(f"{rate:.3g}")


def _longer(size, times):
    steps = times * SIZES[size][0]
    return {"train.num_steps": steps, "optimizer.warmup_steps": steps // 50}
