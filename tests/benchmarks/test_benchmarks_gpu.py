"""What cannot be timed here is checked here: toy sizes, and what the compilers say."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def load(name, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets some on import
    return importlib.import_module(f"benchmarks.{name}")


def day(folder, *parts):
    """What `gpu_day.sh` writes at toy size, by the command that a GPU gets, from the root."""
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONPATH", None)
    command = ["bash", "benchmarks/gpu_day.sh", str(folder), "--check", *parts]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    for name, part in written.items():
        if name != "lookups":
            assert part["rows"] and not part["skipped"]
            assert not [row for row in part["rows"].values() if "error" in row]
    return written


def test_a_lean_step_at_toy_size(tmp_path):
    """One part. Mutation: an import without its package."""
    (row,) = day(tmp_path, "base")["base"]["rows"].values()
    assert row["MFU"] > 0 and row["losses"][0] != row["losses"][1]


@pytest.mark.slow  # 90 CPU-seconds
def test_a_whole_day_at_toy_size(tmp_path):
    """Every part. Mutation: a part that is not in PARTS."""
    parts = day(tmp_path)
    assert set(parts) == {"checks", "quickstart", "step", "base", "lookups", "decode"}
    assert len(parts["lookups"]["cases"]) == 3
    assert parts["quickstart"]["rows"]["cpu, float32 products"]["first gap"] == 0
    assert parts["step"]["rows"]["memoryformer_tiny gpu"]["MFU"] > 0


def test_a_part_that_fails_is_told(tmp_path, monkeypatch):
    """The row holds the error, the others are measured, and the exit code is 1.

    Mutation: `failed` never set.
    """
    day = load("gpu_day", monkeypatch)
    rows = [("bad", lambda: 1 / 0), ("good", lambda: {"ms": 1.0})]
    monkeypatch.setitem(day.PARTS, "step", lambda toy: rows)
    with pytest.raises(SystemExit) as ended:
        day.main(["step", "--check", f"--output={tmp_path}"])
    assert ended.value.code == 1
    written = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert "ZeroDivisionError" in written["bad"]["error"]
    assert written["good"] == {"ms": 1.0}


def test_benchmark_checks_itself(tmp_path, monkeypatch):
    """Every case runs at toy size; a wrong kernel is named before anything is timed.

    Mutation: no comparison in `checked`.
    """
    benchmark = load("gpu", monkeypatch)
    output = tmp_path / "gpu.json"
    benchmark.main(["--check", f"--output={output}"])
    cases = json.loads(output.read_text())["cases"]
    assert [name.split(", ")[1] for name in cases] == ["forward", "backward", "train"]
    for rows in cases.values():
        assert all(row["ms"][1] > 0 for row in rows.values()) and len(rows) >= 3
    case = benchmark.Case(**benchmark.TOY_CASES["toy"], interpret=True)
    wrong = {"gpu": lambda inputs: 1.01 * case.forward()["xla group 8"](inputs)}
    with pytest.raises(AssertionError, match="forward, gpu: y is off by"):
        benchmark.checked(case, "forward", wrong, {})


@pytest.mark.parametrize("flag", ["--cases=none", "--kinds=forward,none"])
def test_cases_that_are_none_are_told(tmp_path, monkeypatch, capsys, flag):
    """Mutation: no check: a KeyError, or an AttributeError after the ceilings."""
    gpu = load("gpu", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--check", flag, f"--output={tmp_path / 'x.json'}"])
    assert ended.value.code == 2
    assert f"{flag.split('=')[0]}: 'none' is none of " in capsys.readouterr().err


def test_a_stored_onehot_is_seen(monkeypatch):
    """In a program that stores one, and not in one that has the same columns elsewhere.

    Mutation: `found` never appended to in `stored_onehots`.
    """
    compiled = load("compiled", monkeypatch)

    def stored(tables, codes):
        onehot = jax.nn.one_hot(codes, 16)
        return jax.lax.optimization_barrier(onehot) @ tables

    shape = jax.ShapeDtypeStruct
    operands = shape((16, 48), "float32"), shape((33,), "int32")
    text = jax.jit(stored).lower(*operands).compile().as_text()
    assert compiled.stored_onehots(text, 33, (1, 16, 48))
    read = jax.jit(lambda tables, codes: jnp.take(tables, codes, axis=0, mode="clip"))
    text = read.lower(*operands).compile().as_text()
    assert not compiled.stored_onehots(text, 33, (1, 16, 48))


def compile_only(tmp_path, *flags):
    """Rows of `benchmarks/compiled.py` in a process of its own."""
    output = tmp_path / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.compiled", *flags]
    command.append(f"--output={output}")
    environment = dict(os.environ)
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=1800)
    return json.loads(output.read_text())


HAVE_CUDA = any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
)


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_CUDA, reason='needs `pip install "jax[cuda12]"`')
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_for_h200(tmp_path, dtype):
    """The reference size: two blocks to a multiprocessor, no spills, temporary memory.

    Mutation: `SUMS` 256 and `TOKENS` 32.
    """
    flags = "gpu", "--implementations=gpu", f"--dtype={dtype}"
    *programs, forward, sums = sorted(
        compile_only(tmp_path, *flags), key=lambda row: row.get("kernel", "")
    )
    (back,) = (row for row in programs if "kernel" in row)
    assert [row["kernel"].split("_")[1] for row in (back, forward, sums)] == [
        "backward", "forward", "sum",
    ]  # fmt: skip
    for row in (back, forward, sums):
        assert row["registers"] <= 255 and not row["spilled"], row
    temporary = {r["direction"]: r["temp_bytes"] for r in programs if "direction" in r}
    assert temporary["forward"] <= 32 * 2**20  # codes and scores by table
    assert temporary["backward"] <= 300 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason='needs `pip install "jax[tpu]"`'
)
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_onehot_is_fused_on_tpu(tmp_path, topology):
    """No one-hot in memory, and less temporary memory than one of them takes.

    Mutation: `jax.lax.optimization_barrier` around `weights` in `onehot_products`.
    """
    sizes = "--tokens=2048", "--tables=16", "--features=512"
    rows = compile_only(tmp_path, "tpu", f"--topology={topology}", *sizes)
    assert len(rows) == 2
    for row in rows:
        assert not row["onehots"], row
        assert row["temp_bytes"] < 2048 * 256 * 4, row
        assert max(row["cycles"].values()) > 10_000  # the products are in there
