"""Find the places of a module that a mutation can change, and change one.

A mutation replaces the text of one node of the syntax tree, so that every other line of the file
stays as it is:

    comparison    a < b       a <= b
    arithmetic    a + b       a - b
    constant      3           4
    boolean       a and b     a or b
    arguments     f(a, b)     f(b, a)
    statement     f(a)        pass

Annotations, strings, and the reasons of errors do not change: no test should depend on them.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Mutation", "find_mutations"]

KINDS = ("comparison", "arithmetic", "constant", "boolean", "arguments", "statement")
OPERATORS: dict[type[ast.AST], tuple[str, str, str]] = {  # kind, text, text of the mutant
    ast.Lt: ("comparison", "<", "<="),
    ast.LtE: ("comparison", "<=", "<"),
    ast.Gt: ("comparison", ">", ">="),
    ast.GtE: ("comparison", ">=", ">"),
    ast.Eq: ("comparison", "==", "!="),
    ast.NotEq: ("comparison", "!=", "=="),
    ast.Is: ("comparison", "is", "is not"),
    ast.IsNot: ("comparison", "is not", "is"),
    ast.In: ("comparison", "in", "not in"),
    ast.NotIn: ("comparison", "not in", "in"),
    ast.Add: ("arithmetic", "+", "-"),
    ast.Sub: ("arithmetic", "-", "+"),
    ast.Mult: ("arithmetic", "*", "/"),
    ast.Div: ("arithmetic", "/", "*"),
    ast.FloorDiv: ("arithmetic", "//", "*"),
    ast.Mod: ("arithmetic", "%", "*"),
    ast.Pow: ("arithmetic", "**", "*"),
    ast.And: ("boolean", "and", "or"),
    ast.Or: ("boolean", "or", "and"),
}
ANNOTATIONS = ("annotation", "returns")


@dataclass(frozen=True, slots=True)
class Mutation:
    """Replacement of a part of a source file."""

    kind: str
    line: int  # of the first changed character, from 1
    start: int  # offsets in bytes
    end: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Return the mutated source."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def parses(self, source: bytes) -> bool:
        """Return whether the mutated source is Python."""
        try:
            ast.parse(self.apply(source))
        except SyntaxError:
            return False
        return True


def find_mutations(source: bytes) -> list[Mutation]:
    """Find every mutation of a module. A few of them do not parse; see `Mutation.parses`."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    places = _Places(source, starts)
    mutations = []
    for node in _walk(tree):
        for kind, start, end, after in _find_changes(node, places):
            before = source[start:end].decode()
            line = source.count(b"\n", 0, start) + 1
            if after != before:
                mutations.append(Mutation(kind, line, start, end, before, after))
    return mutations


@dataclass(frozen=True, slots=True)
class _Places:
    """Offsets of nodes in a source file."""

    source: bytes
    starts: list[int]  # of each line

    def start(self, node: ast.AST) -> int:
        """Return the offset of the first byte of a node."""
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """Return the offset after the last byte of a node."""
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        """Return the text of a node."""
        return self.source[self.start(node) : self.end(node)].decode()


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except annotations, error messages and `__all__`."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ANNOTATIONS or (isinstance(node, ast.Raise) and name == "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_list_of_names = isinstance(child, ast.Assign) and "__all__" in ast.unparse(child)
            if isinstance(child, ast.AST) and not is_list_of_names:
                yield from _walk(child)


Change = tuple[str, int, int, str]  # kind, start, end, text of the mutant


def _find_changes(node: ast.AST, places: _Places) -> Iterator[Change]:
    match node:
        case ast.Compare():
            operands = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
                yield from _change_operator(operator, left, right, places)
        case ast.BoolOp():
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from _change_operator(node.op, left, right, places)
        case ast.BinOp():
            yield from _change_operator(node.op, node.left, node.right, places)
        case ast.AugAssign():
            yield from _change_operator(node.op, node.target, node.value, places)
            yield "statement", places.start(node), places.end(node), "pass"
        case ast.UnaryOp(op=ast.Not()):
            yield "boolean", places.start(node), places.end(node), places.text(node.operand)
        case ast.Constant(value=bool()):
            yield "boolean", places.start(node), places.end(node), str(not node.value)
        case ast.Constant(value=int() | float()):
            after = (
                repr(node.value + 1) if isinstance(node.value, int) else repr(node.value * 2 or 1.0)
            )
            yield "constant", places.start(node), places.end(node), after
        case ast.Call(args=[first, second, *_]):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                between = places.source[places.end(first) : places.start(second)].decode()
                after = places.text(second) + between + places.text(first)
                yield "arguments", places.start(first), places.end(second), after
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete():
            yield "statement", places.start(node), places.end(node), "pass"


def _change_operator(
    operator: ast.AST, left: ast.AST, right: ast.AST, places: _Places
) -> Iterator[Change]:
    """Yield the change of an operator, which stands between its operands."""
    if type(operator) not in OPERATORS:
        return
    kind, before, after = OPERATORS[type(operator)]
    between = places.source[places.end(left) : places.start(right)].decode()
    text = between.replace(before, after, 1)
    if text != between:  # parentheses and comments between the operands stay
        yield kind, places.end(left), places.start(right), text
