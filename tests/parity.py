"""What a checkpoint says in every way that it can be asked: python tests/parity.py --workdir=DIR.

Prints one JSON line: losses by batch size and order, [largest difference to the full forward
pass, same most likely tokens] of what reads the model in another way, and greedy texts
beside those of the full forward pass.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np

from memoryformer import convert, data, model, sharding
from memoryformer.convert import reference_reader, transfer
from memoryformer.evaluation import loss as loss_lib
from memoryformer.generation import sampler
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment

PROMPT = 4  # tokens


def main(workdir):
    """Ask and print."""
    config, params = run_steps.load(workdir)
    run = experiment.resolve(config)
    params = jax.tree.map(jax.numpy.asarray, params)
    dataset = data.load(run.data)
    length = run.model.seq_len
    tokens = dataset.validation.eval_batches(length, 8).batch(0)["inputs"]
    forward = jax.jit(lambda tokens: model.forward(run.model, params, tokens))
    expected = np.asarray(forward(tokens))
    continued = _greedy(forward, tokens)
    logits, greedy = {}, {}
    sampling = sampler.SamplingConfig(max_tokens=length - PROMPT, temperature=0.0)
    generator = sampler.Generator(run.model, params)
    rows = list(generator.stream_batch(tokens[:, :PROMPT].tolist(), sampling))
    greedy["cached"] = np.transpose(rows).tolist(), continued
    with tempfile.TemporaryDirectory() as folder:
        transfer.export_run(workdir, folder)
        loaded = model.forward(*convert.load_export(folder), tokens)
        logits["loaded"] = _compare(loaded, expected)
        reader = reference_reader.load(pathlib.Path(folder))
    for size in (length // 2 - 1, length):
        answer = reader.logits(tokens[:, :size])
        logits[f"reader {size}"] = _compare(answer, expected[:, :size])
    texts = [reader.greedy(row[:PROMPT], length - PROMPT) for row in tokens[:2]]
    greedy["reader"] = texts, continued[:2]
    losses, counts = _losses(run, params, dataset)
    found = {"losses": losses, "counts": counts, "logits": logits, "greedy": greedy}
    print(json.dumps(found))


def _losses(run, params, dataset):
    place = sharding.make("single")
    step = loss_lib.make_eval_step(run.model, place)
    losses, counts = {}, []
    for size, order in ((8, 1), (8, -1), (1, 1), (3, 1)):
        batches = dataset.validation.eval_batches(run.model.seq_len, size)
        ordered = [batches[i] for i in range(len(batches))][::order]
        token_bytes = dataset.tokenizer.token_bytes
        values = loss_lib.evaluate(step, params, ordered, token_bytes, place)
        losses[f"{size} x {order}"] = values["val/loss"]
        counts.append(values["val/tokens"])
    return losses, counts


def _greedy(forward, tokens):
    """Continue the first tokens of each row by the full forward pass."""
    tokens = tokens.copy()
    for i in range(PROMPT, tokens.shape[1]):
        tokens[:, i] = np.asarray(forward(tokens))[:, i - 1].argmax(-1)
    return tokens[:, PROMPT:].tolist()


def _compare(ours, theirs):
    ours = np.asarray(ours)
    same = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    return float(np.abs(ours - theirs).max()), same


if __name__ == "__main__":
    main(next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir=")))
