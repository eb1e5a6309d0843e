"""The decoding benchmark: what it makes of seconds, and engines that hold our twin's weights.

The engines are of the extra `decode`; `make test-peers` says which are not installed.
"""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.decode import __main__ as benchmark
from benchmarks.decode import ours, peers


class Clock:
    """Seconds that only the peers below let pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def peer(self, a_token, a_prompt):
        """One that takes `a_token` seconds a pass and `a_prompt` a token of a prompt."""

        def decode(streams, tokens):
            self.now += a_token * (tokens + 1)

        def prefill(length):
            self.now += a_prompt * length

        return peers.Peer(decode, prefill, 2_000_000)


def test_rates_and_ratios(tmp_path, monkeypatch, capsys):
    """Two works and two peers. Mutations: streams or the prompt's pass are not counted; the
    warm round is; ratios to another peer than the first."""
    clock = Clock()
    made = {
        "memoryformer-int8": clock.peer(0.5, 0.25),
        "dense-int8": clock.peer(1, 0.125),
    }
    monkeypatch.setattr(peers, "make", lambda size, names, folder: made)
    monkeypatch.setitem(timing.CLOCKS, "cpu", clock)
    output = tmp_path / "decode.json"
    words = ["--peers=memoryformer-int8,dense-int8", "--batch_size=1,4", "--prefill=8"]
    words += ["--tokens=3", "--rounds=2", "--clock=cpu", f"--output={output}"]
    result = benchmark.main(words)
    assert result == json.loads(output.read_text())
    one, four, prefill = result["works"]
    assert (one["streams"], four["streams"], prefill["length"]) == (1, 4, 8)
    middles = [
        [rate[1] for rate in work["tokens_per_second"].values()]
        for work in result["works"]
    ]
    assert middles == [[2, 1], [8, 4], [4, 8]]
    assert one["times_slower_than_memoryformer-int8"]["dense-int8"] == [2, 2, 2]
    assert prefill["times_slower_than_memoryformer-int8"]["dense-int8"][1] == 0.5
    assert result["processor"] and result["weight_bytes"]["dense-int8"] == 2_000_000
    printed = capsys.readouterr().out
    assert "toy, 4 streams" not in printed and "base, 4 streams" in printed
    assert result["processor"] in printed and "0.00 GB of weights" in printed


def test_every_family_has_its_packages(monkeypatch, capsys):
    """Mutation: a peer that is not installed ends the run."""
    assert {peers.family(name) for name in peers.NAMES} == peers.PACKAGES.keys()
    monkeypatch.setitem(peers.PACKAGES, "llama.cpp", ("no_such_engine",))
    names = ["llama.cpp-q8_0", "dense-int8"]
    assert peers.installed(names) == ["dense-int8"]
    assert "without llama.cpp-q8_0: no_such_engine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--peers=llama.cpp"],
        ["--batch_size=1,0"],
        ["--batch_size=a"],
        ["--prefill=5000"],
        ["--rounds=1"],
    ],
    ids=str,
)
def test_what_is_refused(words, capsys):
    """One line, before anything is made. Mutation: a check left out."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words)
    assert ended.value.code == 2
    assert words[0].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def twin(request):
    config, params = ours.random_twin("toy")
    return dataclasses.replace(config, residual=request.param), params


def check(peer, twin, expected_bytes):
    """Two streams are each alone, and a prefill's token follows the prompt."""
    config, params = twin
    together, alone = peer.decode(2, 6), peer.decode(1, 6)
    assert together.shape == (7, 2) and alone.shape == (7, 1)
    assert together[:, 0].tolist() == alone[:, 0].tolist()
    prompt = peers.long_prompt(40, config.vocab_size)
    logits = ours.twin_logits(config, params, prompt, "gelu")[-1]
    chosen = int(np.ravel(peer.prefill(40))[0])
    assert logits.max() - logits[chosen] < 0.2 * np.abs(logits).max()
    assert expected_bytes < peer.weight_bytes < 1.3 * expected_bytes


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8.5), ("q4_0", 4.5)])
def test_llama_cpp_holds_our_twin(twin, kind, bits, tmp_path):
    """`make` compares the float32 file's logits. Mutations: rows of K before those of Q; a
    bias left out; the second norm's scale in the place of the first's."""
    pytest.importorskip("gguf", reason="pip install -e '.[decode]'")
    pytest.importorskip("llama_cpp", reason="pip install -e '.[decode]'")
    from benchmarks.decode import llama_cpp_peer

    weights = 2 * 512 * 64 + 2 * 12 * 64 * 64
    check(llama_cpp_peer.make(lambda: twin, kind, tmp_path), twin, weights * bits / 8)


def test_ctranslate2_holds_our_twin(twin, tmp_path):
    """Mutations: rotary positions over all of a head; up and down exchanged; always parallel."""
    pytest.importorskip("ctranslate2", reason="pip install -e '.[decode]'")
    from benchmarks.decode import ctranslate2_peer

    weights = 2 * 512 * 64 + 2 * 12 * 64 * 64
    check(ctranslate2_peer.make(lambda: twin, "int8", tmp_path), twin, weights)
