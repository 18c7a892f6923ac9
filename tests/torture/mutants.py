"""Small faults that can be put into a Python module: a comparison turned, a constant off by one, a call left out.

A mutant replaces one node of the syntax tree, or takes one out of a list. Annotations, strings, the insides of
f-strings (messages) and assertions (invariants of our own) are left alone, and so are the ``strict`` of zip and the
``stacklevel`` of a warning, which no correct program notices.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
IGNORED_KEYWORDS = {"strict", "stacklevel"}
ANNOTATIONS = {"annotation", "returns"}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        function: the name of the function that it is in; "" outside of any.
        outermost: the outermost function whose body holds it: names from the module down, and the first line. None
            for code that runs when the module is imported.
        lines: those of the statement's head.
        nth: its number among those in the function that read the same.
    """

    function: str
    outermost: tuple[tuple[str, ...], int] | None
    line: int
    lines: range
    kind: str
    before: str
    after: str
    nth: int
    parent: ast.AST
    field: str
    place: int | None
    replacement: ast.AST | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the fault, whatever changes elsewhere in the file."""
        return self.function, self.kind, self.before, self.after, self.nth

    def put_in(self) -> None:
        """Puts the fault into the tree that it was made from."""
        if self.place is None:
            setattr(self.parent, self.field, self.replacement)
            return
        items = getattr(self.parent, self.field)
        items[self.place : self.place + 1] = [] if self.replacement is None else [self.replacement]

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("line", "function", "kind", "before", "after", "nth")}


def mutants(tree: ast.Module) -> list[Mutant]:
    """All mutants of a module, in the order of its source."""
    seen: Counter[tuple[str, ...]] = Counter()
    made = []
    for function, outermost, statement, parent, field, place, node in _slots(tree, (), None, None):
        for kind, replacement in _replacements(parent, field, node):
            if replacement is not None:
                ast.copy_location(replacement, node)
                ast.fix_missing_locations(replacement)
            before, after = _text(node), "" if replacement is None else _text(replacement)
            text = function, kind, before, after
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            where = function, outermost, line, _head(statement)
            made.append(Mutant(*where, kind, before, after, seen[text], parent, field, place, replacement))
            seen[text] += 1
    return made


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _head(statement: ast.stmt) -> range:
    """The lines of a statement without those of the statements in it."""
    first = min([statement.lineno, *(item.lineno for item in getattr(statement, "decorator_list", []))])
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return range(first, max(first, last) + 1)


def _slots(
    parent: ast.AST, path: tuple[str, ...], outermost: Any, statement: ast.stmt | None
) -> Iterator[tuple[Any, ...]]:
    """Yields every node that may change, after its function, the outermost one, its statement, and where it hangs."""
    if isinstance(parent, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(parent, ast.If) and isinstance(parent.test, ast.Name) and parent.test.id == "TYPE_CHECKING":
        return
    for field, value in ast.iter_fields(parent):
        if field in ANNOTATIONS:
            continue
        within = outermost
        if isinstance(parent, ast.FunctionDef) and field == "body" and outermost is None:
            within = path, min([parent.lineno, *(item.lineno for item in parent.decorator_list)])
        items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for place, node in items:
            if not isinstance(node, ast.AST) or isinstance(node, ast.expr_context):
                continue
            if isinstance(node, ast.keyword) and node.arg in IGNORED_KEYWORDS:
                continue
            inner = node if isinstance(node, ast.stmt) else statement
            if inner is not None:
                yield ".".join(path), within, inner, parent, field, place, node
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            yield from _slots(node, (*path, node.name) if named else path, within, inner)


def _replacements(parent: ast.AST, field: str, node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    if field == "decorator_list":
        yield "decorator", None
    if isinstance(node, ast.stmt):
        yield from _statements(node)
    if isinstance(node, ast.keyword):
        yield "keyword", None
    if isinstance(node, ast.withitem) and node.optional_vars is None:
        yield "context", ast.withitem(ast.parse("__import__('contextlib').nullcontext()", mode="eval").body)
    if field in ("test", "ifs") and not isinstance(node, ast.Compare):
        yield "condition", ast.UnaryOp(ast.Not(), node)
    if field == "ifs":
        yield "condition", ast.Constant(True)
    if isinstance(parent, ast.Slice) and field in ("lower", "upper"):
        yield "slice", None
    yield from _expressions(node)


def _statements(node: ast.stmt) -> Iterator[tuple[str, ast.AST | None]]:
    match node:
        case ast.Return(value=ast.expr()) if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield "return", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Constant()):
            return
        case ast.Assign() if not any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            return
        case ast.AugAssign() if type(node.op) in OPERATORS:
            yield "operator", ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
            yield "statement", ast.Pass()
        case ast.Expr() | ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Delete() | ast.Continue():
            yield "statement", ast.Pass()


def _expressions(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    changed = copy.copy(node)
                    changed.ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                    yield "comparison", changed
        case ast.BinOp(op=ast.MatMult()):
            yield "operands", ast.BinOp(node.right, node.op, node.left)
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield "unary", node.operand
        case ast.BoolOp():
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            for place in range(len(node.values)):
                rest = [*node.values[:place], *node.values[place + 1 :]]
                yield "boolean", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.IfExp():
            yield "condition", node.body
            yield "condition", node.orelse
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", ast.Constant(node.value + 1)
            yield "constant", ast.Constant(node.value - 1)
        case ast.Call():
            if len(node.args) > 1 and not any(isinstance(item, ast.Starred) for item in node.args[:2]):
                swapped = [node.args[1], node.args[0], *node.args[2:]]
                yield "arguments", ast.Call(node.func, swapped, node.keywords)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.expr):
                yield "method", node.func.value
