"""What a compiled program sends: its collectives, read from the optimised HLO text.

    kind                 payload, the array of the whole group   wire bytes per device (ring of n)
    all-gather           result                                  (n - 1) / n
    reduce-scatter       operand                                 (n - 1) / n
    all-reduce           operand                                 2 (n - 1) / n
    all-to-all           operand                                 (n - 1) / n
    collective-permute   operand                                 1

A collective in a loop's body counts as often as the loop runs; groups of one device send
nothing and are left out. The text is no stable format: tests/dryrun/hlo_samples holds what each
version of jax writes. Start at `collectives`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

WIRE = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
ITEM_BYTES = {"pred": 1, "token": 0, "c64": 8, "c128": 16}  # others end in their bits

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_OP = re.compile(
    r"^(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(WIRE) + r")(-start)?\((.*)$"
)
# The opcode of another instruction that names the devices it talks to.
_UNKNOWN = re.compile(
    r"^(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(.*"
    r"\b(?:replica_groups|source_target_pairs)=(?:mesh)?[\[{]."
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of message, `count` times per run of the program."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, that the group spans
    group_size: int
    dtype: str
    shape: tuple[int, ...]  # of the payload
    count: int

    @property
    def payload_bytes(self) -> float:
        """Bytes of one payload."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, all `count` together."""
        return self.count * self.payload_bytes * WIRE[self.kind](self.group_size)


def collectives(
    text: str, mesh_shape: Mapping[str, int], unknown: set[str] | None = None
) -> list[Collective]:
    """Read the collectives of an optimised HLO module, equal ones counted together.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: the mesh that it was compiled for, axis -> size, in the mesh's order.
      unknown: gets the names of instructions that send messages and are not in the table,
        which are not counted; without it they are an error.

    Raises `ValueError` for what is no such module, or sends a message of an unknown kind.
    """
    counts: Counter[Collective] = Counter()
    for line, times in _lines_with_counts(text):
        match = _OP.match(line)
        if match is None:
            if other := _UNKNOWN.match(line):
                note_unknown(other[1], unknown, "hlo_messages.WIRE")
            continue
        result, kind, start, operands = match.groups()
        axes, size = _group(kind, operands, mesh_shape)
        if size == 1:
            continue
        for dtype, shape in _payloads(kind, result, bool(start), size, operands):
            counts[Collective(kind, axes, size, dtype, shape, 1)] += times
    return sorted_by_bytes(counts)


def note_unknown(name: str, unknown: set[str] | None, table: str) -> None:
    """Put what sends messages and is not in `table` into `unknown`; None: `ValueError`."""
    if unknown is None:
        raise ValueError(
            f"{name!r} sends messages of an unknown kind; add it to {table}."
        )
    unknown.add(name)


def sorted_by_bytes(counts: Mapping[Collective, int]) -> list[Collective]:
    """Return the collectives with their counts, those of most wire bytes first."""
    counted = [dataclasses.replace(c, count=n) for c, n in counts.items() if n]
    return sorted(counted, key=lambda c: -c.wire_bytes)


def wire_bytes(messages: Iterable[Collective], *axes: str) -> float:
    """Bytes that a device sends in the groups that span one of `axes`."""
    return sum(c.wire_bytes for c in messages if set(axes) & set(c.axes))


def difference(
    more: Iterable[Collective], fewer: Iterable[Collective]
) -> list[Collective]:
    """What the first program sends beyond the second; negative counts where it does less."""
    counts: Counter[Collective] = Counter()
    for messages, sign in ((more, 1), (fewer, -1)):
        for c in messages:
            counts[dataclasses.replace(c, count=1)] += sign * c.count
    return sorted_by_bytes(counts)


def extrapolated(
    one: Iterable[Collective], two: Iterable[Collective], num_layers: int
) -> list[Collective]:
    """What a program of `num_layers` equal blocks sends, from those of one and of two."""
    block = difference(two, one)
    less = [dataclasses.replace(c, count=(1 - num_layers) * c.count) for c in block]
    return difference(one, less)


def item_bytes(dtype: str) -> float:
    """Bytes of one value of an HLO type, such as 'bf16' or 'f8e4m3fn'."""
    if dtype in ITEM_BYTES:
        return ITEM_BYTES[dtype]
    sized = re.match(r"[a-z]+(\d+)", dtype)
    if sized is None:
        raise ValueError(f"the HLO type {dtype!r} has no size")
    bits = int(sized[1])
    return bits / 8 if bits < 8 else bits // 8


def table(messages: Iterable[Collective]) -> str:
    """Return messages as lines of text to read, one kind of message a line."""
    lines = [f"{'kind':<20}{'axis':<14}{'count':>6}  {'payload':<30}{'wire bytes':>16}"]
    for c in messages:
        payload = f"{c.dtype}[{','.join(map(str, c.shape))}]"
        axes = "+".join(c.axes)
        lines.append(
            f"{c.kind:<20}{axes:<14}{c.count:>6}  {payload:<30}{c.wire_bytes:>16,.0f}"
        )
    return "\n".join(lines)


def _lines_with_counts(text: str) -> Iterator[tuple[str, int]]:
    """Each line of each computation, with how often the program runs it."""
    bodies, entry = _computations(text)
    runs = Counter({entry: 1})
    # Callees precede their callers in the text; going backwards, a caller is complete
    # before those that it calls are looked at.
    for name in reversed(bodies):
        for line in bodies[name]:
            for callee, times in _called(line, bodies):
                runs[callee] += runs[name] * times
    for name, lines in bodies.items():
        for line in lines:
            if runs[name]:
                yield line, runs[name]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        line = line.strip()
        if lines is None:
            match = _COMPUTATION.match(line)
            if match and not line.startswith("HloModule"):
                lines = bodies[match[2]] = []
                entry = match[2] if match[1] else entry
        elif line == "}":
            lines = None
        else:
            lines.append(line)
    if not entry:
        raise ValueError(
            "not the text of an HLO module: there is no ENTRY computation."
        )
    return bodies, entry


def _called(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    names = _CALLS.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    if " while(" not in line:
        yield from ((name, 1) for name in names if name in bodies)
        return
    known = _TRIPS.search(line)
    trips = int(known[1]) if known else _limit(line, bodies)
    yield from ((name, trips) for name in names if name in bodies)


def _limit(line: str, bodies: Mapping[str, list[str]]) -> int:
    """The bound that a loop's condition compares its counter with; 1 where none shows."""
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
    return int(bounds[0]) if len(bounds) == 1 else 1


def _payloads(kind, result, started, size, operands):
    """(dtype, shape) of what the whole group exchanges; several where XLA combined."""
    arrays = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(result)
    ]
    if started:
        # (operands, results, contexts), with as many results as operands; an all-reduce may
        # have its results alone.
        number = operands[: operands.index(")")].count("%") or 1
        arrays = arrays[number : 2 * number] or arrays
    if kind == "all-to-all" and not started and len(arrays) == size:
        dtype, shape = arrays[0]  # one array, written as a tuple of its parts
        arrays = [(dtype, (size, *shape))]
    for dtype, shape in arrays:
        if kind == "reduce-scatter":
            dim = int(re.findall(r"dimensions=\{(\d+)\}", operands)[0])
            shape = (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
        yield dtype, shape


def _group(kind: str, operands: str, mesh_shape: Mapping[str, int]):
    """(axes, size) of the devices that talk to each other, judged by the first group."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{([\d,]+)\}", operands)
        members = [int(i) for i in pairs[1].split(",")] if pairs else [0]
        axes = _axes(members, mesh_shape)
        return axes, math.prod(mesh_shape[a] for a in axes)
    members = _members(operands, mesh_shape)
    return _axes(members, mesh_shape), len(members)


def _members(operands: str, mesh_shape: Mapping[str, int]) -> list[int]:
    """Places, in the mesh, of the devices of the first group."""
    everyone = list(range(math.prod(mesh_shape.values())))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", operands)
    if listed:
        return [int(i) for i in listed[1].split(",")]
    tiled = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", operands
    )
    if tiled:
        shape, order, turn = (_ints(part) for part in tiled.groups())
        ids = np.arange(math.prod(order)).reshape(order)
        ids = ids.transpose(turn) if turn else ids
        return ids.reshape(shape)[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", operands)
    if named:
        sizes = {
            name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])
        }
        moving = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if axis in moving else 0 for axis in sizes)
        return ids[index].reshape(-1).tolist()
    return everyone


def _axes(members: list[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    if not mesh_shape:
        return ()
    places = np.unravel_index(members, tuple(mesh_shape.values()))
    pairs = zip(mesh_shape, places, strict=True)
    return tuple(axis for axis, place in pairs if len(set(place.tolist())) > 1)


def _ints(text: str | None) -> list[int]:
    return [int(i) for i in text.split(",")] if text else []
