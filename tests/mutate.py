"""Small changes of source code that should change what it does: `find` and `Mutant`.

Comparisons, arithmetic, and/or, not, integers, defaults, deleted statements, returned values;
left alone are annotations, docstrings, format strings and what runs only as a script, and
`strict=True` of a zip, which like an assertion changes nothing where it holds.
"""

import ast
import copy
import dataclasses
import hashlib
import pathlib

COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`before`, the text from `start` to `end` (characters) of `path`, becomes `after`."""

    path: str
    line: int
    operator: str
    start: int
    end: int
    before: str
    after: str

    @property
    def id(self) -> str:
        """Names the place and the change, whatever else is drawn."""
        told = f"{self.path} {self.start} {self.before} {self.after}"
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def apply(self, source: str) -> str:
        """The source with the change."""
        assert source[self.start : self.end] == self.before, self
        return source[: self.start] + self.after + source[self.end :]

    def described(self) -> dict:
        """What a table says of it."""
        names = ("id", "path", "line", "operator", "before", "after")
        return {name: getattr(self, name) for name in names}


def find(root: pathlib.Path, path: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    source = (root / path).read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    encoded = source.encode()

    def place(line, column):  # ast counts bytes
        return len(encoded[: starts[line - 1] + column].decode())

    found = []
    for node, operator, changed in _changes(ast.parse(source)):
        start = place(node.lineno, node.col_offset)
        end = place(node.end_lineno, node.end_col_offset)
        after = ast.unparse(changed)
        if isinstance(node, ast.expr):  # so that it binds as what it replaces
            after = f"({after})" if not isinstance(node, ast.Constant) else after
        before = source[start:end]
        found.append(Mutant(path, node.lineno, operator, start, end, before, after))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.after))


def _changes(tree):
    """(node, operator, its replacement) for every change of a module."""
    for node in _walk(tree):
        for operator, changed in _of_node(node):
            ast.parse(ast.unparse(ast.fix_missing_locations(changed)))
            yield node, operator, changed
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _of_defaults(node.args)
        if isinstance(node, ast.ClassDef):
            yield from _of_fields(node)


def _walk(node):
    """Nodes that run: no annotations, docstrings, format strings, `__main__` blocks."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in (
            "annotation",
            "returns",
            "decorator_list",
            "defaults",
            "kw_defaults",
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            skipped = isinstance(child, ast.JoinedStr) or _is_script(child)
            skipped = skipped or (_is_strict(child) and _is_zip(node))
            if isinstance(child, ast.AST) and not skipped:
                yield from _walk(child)


def _is_script(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _is_zip(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip"


def _is_strict(node):
    return isinstance(node, ast.keyword) and ast.unparse(node) == "strict=True"


def _of_node(node):
    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARED[type(op)]:
                boundary = (
                    len(COMPARED[type(op)]) == 2 and other is COMPARED[type(op)][0]
                )
                kind = "compare" if boundary else "negate"
                yield kind, _with(node, ops=[other()])
        case ast.BinOp(op=op) if type(op) in COMPUTED and not _is_text(node):
            yield "arithmetic", _with(node, op=COMPUTED[type(op)]())
        case ast.AugAssign(op=op) if type(op) in COMPUTED:
            yield "arithmetic", _with(node, op=COMPUTED[type(op)]())
        case ast.BoolOp(op=op):
            yield (
                "and-or",
                _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And()),
            )
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "arithmetic", node.operand
        case ast.Constant(value=bool()):
            yield "boolean", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "integer", ast.Constant(node.value + 1)
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield "delete", ast.Pass()
        case ast.If(orelse=[], body=[ast.Raise() | ast.Expr() | ast.Return()]):
            yield "delete", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "delete", ast.Pass()
        case ast.Return(value=ast.expr()) if not _is_none(node.value):
            yield "return", ast.Return(ast.Constant(None))


def _of_defaults(args):
    for default in [*args.defaults, *args.kw_defaults]:
        if (changed := _other(default)) is not None:
            yield default, "default", changed


def _of_fields(node):
    """Defaults of a dataclass; `_walk` has them as constants, so only others here."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant):
            if isinstance(field.value.value, float):
                yield field.value, "default", ast.Constant(field.value.value * 2 + 1)


def _other(default):
    match default:
        case ast.Constant(value=bool()):
            return ast.Constant(not default.value)
        case ast.Constant(value=int() | float()):
            return ast.Constant(default.value + 1)
    return None


def _with(node, **fields):
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_text(node):
    """A sum or a format of strings, as far as can be seen."""
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None
