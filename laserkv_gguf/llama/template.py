"""Chat templates with limits: a model's file brings a program, and it may not run away.

Jinja's sandbox keeps a template away from Python's internals, but not from a loop of 10¹⁰ rounds or
a text of 3 GB. Here everything a template does is paid for out of one budget of `WORK` units: a
round of a loop and a call of a macro pay for the nodes in their body, and every value pays for its
size where it is made, printed, compared, joined or handed to a function. A size counts a value's
parts as often as they occur, so that a list of lists of lists that share their parts pays for what
printing it would take. Costs are counted and not timed: the same template passes or fails on every
machine, however busy.
"""

from __future__ import annotations

import json
import re
import string
import threading
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import BaseLoader, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

# Of 97 templates that GGUF files carry (those Ollama's library knows) the longest has 12,807
# characters, the most parts are 493, and the dearest spends 12,386 units on a system prompt and two
# questions.
SOURCE = 1 << 17  # characters of a template
NODES = 10_000  # parts it is parsed into
WORK = 1 << 20  # units that one rendering may spend
BITS = 4096  # of a whole number

_CALL, _OPERATION = 8, 2  # units beside what goes in and comes out
_INDENT = 16  # most blanks that tojson may indent by
_WEIGH, _SPEND = " weigh", " spend"  # filters of our own; no template can write the blank

_FILTERS = """
    abs attr batch capitalize center count d default dictsort e escape filesizeformat first float
    forceescape format groupby indent int items join last length list lower map max min random
    reject rejectattr replace reverse round safe select selectattr slice sort string sum title trim
    truncate unique upper urlencode wordcount
"""
_OF_TEXT = """
    capitalize casefold center count endswith expandtabs find format format_map index isalnum
    isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
    isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_OF_TEXT.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_VIEWS: tuple[type[Collection[Any]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_MANY: tuple[type[Collection[Any]], ...] = (list, tuple, set, frozenset, *_VIEWS)
_PERCENT = re.compile(r"\*|\d{5}")
_WIDE = re.compile(r"\d{4}")


class TemplateLimit(TemplateRuntimeError):
    """A template does more than any chat template needs to."""


class ChatFormatter:
    """Renders messages with a chat template, as Transformers and llama.cpp do.

    Args:
        source: the template.
        bos_token, eos_token: what it writes for them.

    Raises:
        TemplateLimit: the template is too long.
        Exception: it cannot be compiled; a template is a program, anything may be wrong with it.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        if len(source) > SOURCE:
            raise TemplateLimit(f"it has {len(source):,} characters, more than {SOURCE:,}")
        self._environment = _Bounded()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        with _deep(), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # Python's, of code that nobody sees
            self._environment.begin()
            self._template = self._environment.from_string(source)

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt up to where an answer begins.

        Raises:
            TemplateLimit: rendering takes more than `WORK` units.
            Exception: whatever the template runs into, or raises itself.
        """
        with _deep():
            self._environment.begin()
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                raise_exception=_raise_exception,
                strftime_now=_strftime_now,
                functions=None,
                function_call=None,
                tools=None,
                tool_choice=None,
                **self._tokens,
            )


class _deep:  # noqa: N801 (a context manager that reads like a word)
    """Python's own limits, said as this module's."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, RecursionError):
            raise TemplateLimit("it nests too deeply") from error
        if isinstance(error, MemoryError):
            raise TemplateLimit("it needs too much memory") from error


def _raise_exception(message: object) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    # C libraries take widths such as %1000000000Y
    if not isinstance(form, str) or re.search(r"%[^a-zA-Z%]*\d", form):
        raise TemplateLimit("strftime_now takes no widths")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Transformers writes it: no escapes for HTML, letters as they are."""
    if indent is not None and not (isinstance(indent, int) and indent <= _INDENT):
        raise TemplateLimit(f"tojson indents by at most {_INDENT} blanks")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}`, by which Transformers marks answers; what is inside counts as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget; one per template, usable from several threads."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            loader=BaseLoader(),
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            # nothing is worked out while compiling: it would be before the rendering pays for it
            optimized=False,
            cache_size=0,
        )
        self._purse = threading.local()
        del self.globals["lipsum"]
        own = {"tojson": _tojson}
        known = {name: self.filters[name] for name in _FILTERS.split()} | own
        self.filters = {name: self._paid_filter(name, run) for name, run in known.items()}
        self.filters[_WEIGH] = pass_context(lambda _, value: self._weighed(value))
        self.filters[_SPEND] = pass_context(lambda _, units: self.spend(units))
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._paid_test(test) for name, test in tests.items()}

    # the budget

    def begin(self) -> None:
        """Fills this thread's budget."""
        self._purse.left = WORK

    def spend(self, units: int) -> bool:
        """Takes from the budget; True, so that it can stand in a condition.

        Raises:
            TemplateLimit: nothing is left.
        """
        self._purse.left -= units
        if self._purse.left < 0:
            raise TemplateLimit("it works too long, or its text gets too long")
        return True

    def _weighed(self, value: Any) -> Any:
        """The value, paid for."""
        self.spend(weight(value, self._purse.left))
        return value

    def _weigh_all(self, values: Iterable[Any]) -> None:
        for value in values:
            self._weighed(value)

    def _finished(self, value: Any) -> Any:
        """A result, paid for. What would come item by item later comes now."""
        if not isinstance(value, Iterator):
            return self._weighed(value)
        # an iterator again: a template that asks whether it is true gets Jinja's answer
        return iter(self._listed(value))

    def _listed(self, values: Iterable[Any]) -> list[Any]:
        found = []
        for value in values:
            self._weighed(value)
            found.append(value)
        return found

    def _numbers(self, values: Iterable[Any]) -> None:
        """Numbers given to functions are widths and counts: they cost what they say."""
        for value in values:
            if isinstance(value, int):
                self.spend(abs(value))

    # what costs

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        return super()._generate(_Payments().visit(source), name, filename, defer_init)

    def _paid_filter(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(run, "jinja_pass_arg"))  # Jinja's own argument comes before the value
        growth = getattr(self, f"_filter_{name}", None)

        @wraps(run)
        def paid(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            self.spend(_CALL)
            self._weigh_all(given[first:])
            self._weigh_all(kwargs.values())
            self._numbers(given[first + 1 :])
            self._numbers(kwargs.values())
            if growth is not None:
                given[first] = growth(*given[first:], **kwargs)
            return self._finished(run(*given, **kwargs))

        return paid

    def _paid_test(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.spend(_CALL)
            self._weigh_all(args)
            return run(*args, **kwargs)

        return paid

    # filters whose results may be larger than what goes in; each returns the value to go on with

    def _filter_indent(self, value: Any, width: Any = 4, *_: Any, **__: Any) -> Any:
        each = len(width) if isinstance(width, str) else int(width)
        self.spend((str(value).count("\n") + 1) * max(each, 0))
        return value

    def _filter_replace(self, value: Any, old: Any, new: Any, *_: Any, **__: Any) -> Any:
        self.spend((str(value).count(str(old)) + 1) * len(str(new)))
        return value

    def _filter_join(self, value: Any, d: Any = "", *_: Any, **__: Any) -> Any:
        items = self._listed(value)
        self.spend(len(items) * len(str(d)))
        return items

    def _filter_format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        self._percent(str(value), (args, kwargs))
        return value

    def _filter_sum(self, value: Any, _attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise TemplateLimit("sum adds numbers only")
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend(_OPERATION)
        whole = isinstance(left, int), isinstance(right, int)
        for number in (left, right):
            self._small(number)
        if operator == "*" and whole != (True, True):
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    self.spend(weight(many, self._purse.left) * max(times, 0))
        elif operator == "**" and all(whole) and right > 0 and left.bit_length() * right > BITS:
            raise TemplateLimit("its numbers get too large")
        elif operator == "%" and isinstance(left, str):
            self._percent(left, right)
        result = super().call_binop(context, operator, left, right)
        self._small(result)
        return self._weighed(result)

    def _small(self, number: Any) -> None:
        if isinstance(number, int) and number.bit_length() > BITS:
            raise TemplateLimit("its numbers get too large")

    def _percent(self, form: str, values: Any) -> None:
        """Pays for `form % values`."""
        if "%" not in form:
            return
        if _PERCENT.search(form):
            raise TemplateLimit("it formats to too wide a text")
        widest = max(map(int, re.findall(r"[0-9]+", form)), default=0)
        self.spend(form.count("%") * (widest + weight(values, self._purse.left)))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            self._weighed(argument)  # a key is hashed with all its parts
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(_CALL)
        # names with an underscore are Jinja's own
        given = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        self._weigh_all(given)
        if not isinstance(obj, Macro):
            self._numbers(given)
            args = self._method(obj, args, given)
        return self._finished(super().call(context, obj, *args, **kwargs))

    def _method(self, obj: Any, args: tuple[Any, ...], given: list[Any]) -> tuple[Any, ...]:
        """Pays for a method of a built-in type; returns the arguments to go on with.

        Raises:
            SecurityError: no template needs it.
        """
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(obj, type) and obj not in (dict, Namespace, Cycler, Joiner):
            raise SecurityError(f"{obj.__name__} cannot be called")
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is None:
            if isinstance(method, types.BuiltinFunctionType):
                raise SecurityError(f"{name} cannot be called")
            return args
        if name not in _METHODS[kind]:
            raise SecurityError(f"{kind.__name__}.{name} cannot be called")
        if kind is not dict:
            self._weighed(owner)
        if isinstance(owner, str):
            return self._text_method(owner, name, args, given)
        return args

    def _text_method(
        self, owner: str, name: str, args: tuple[Any, ...], given: list[Any]
    ) -> tuple[Any, ...]:
        texts = [len(value) for value in given if isinstance(value, str)]
        if name == "expandtabs":
            self.spend(owner.count("\t") * (given[0] if given else 8))
        elif name == "replace" and len(texts) > 1:
            self.spend((owner.count(given[0]) + 1) * texts[1])
        elif name in ("rfind", "rindex", "rsplit", "rpartition"):  # not linear in CPython
            self.spend(len(owner) * max(texts, default=0) >> 10)
        elif name == "join" and len(args) == 1:
            items = self._listed(args[0])
            self.spend(len(owner) * len(items))
            return (items,)
        elif name in ("format", "format_map"):
            fields = [
                spec or ""
                for _, field, spec, _ in string.Formatter().parse(owner)
                if field is not None
            ]
            if any("{" in spec or _WIDE.search(spec) for spec in fields):
                raise TemplateLimit("it formats to too wide a text")
            self.spend(len(fields) * (1000 + weight(given, self._purse.left)))
        return args


def weight(value: Any, most: int) -> int:
    """Units for a value: what writing it out would take, counting shared parts each time.

    Args:
        most: nothing more than this is counted further.
    """
    total, left = 1, [value]
    while left and total <= most:
        item = left.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() >> 3
        elif isinstance(item, range):
            total += len(item)
        elif isinstance(item, dict | Namespace):
            parts = item if isinstance(item, dict) else item._Namespace__attrs
            total += 2 * len(parts)
            if total <= most:
                left.extend(parts.keys())
                left.extend(parts.values())
        elif isinstance(item, _MANY):
            total += len(item)
            if total <= most:
                left.extend(item)
    return total


class _Payments(NodeTransformer):
    """Puts the payments into a parsed template.

    Raises:
        TemplateLimit: the template has too many parts.
        TemplateSyntaxError: it wants other templates, and there are none.
    """

    def __init__(self) -> None:
        self._nodes = 0
        self._payers: dict[type[nodes.Node], Callable[[Any], Any]] = {
            # what runs more than once
            nodes.For: self._loop,
            nodes.Macro: self._body,
            nodes.CallBlock: self._body,
            nodes.Block: self._body,
            # what makes, compares or writes something of any size
            nodes.Output: self._output,
            nodes.Concat: self._concat,
            nodes.Compare: self._compare,
            nodes.List: self._made,
            nodes.Dict: self._made,
            nodes.Tuple: self._made,
            nodes.Getitem: self._getitem,
            # other templates
            nodes.Include: self._refused,
            nodes.Import: self._refused,
            nodes.FromImport: self._refused,
            nodes.Extends: self._refused,
        }

    def get_visitor(self, node: nodes.Node) -> Any:
        return self._payers.get(type(node))

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self._nodes += 1
        if self._nodes > NODES:
            raise TemplateLimit(f"it has more than {NODES:,} parts")
        return super().generic_visit(node, *args, **kwargs)

    def _body(self, node: Any) -> Any:
        size = _size(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_pay(size), lineno=node.lineno))
        return node

    def _loop(self, node: nodes.For) -> nodes.Node:
        self._body(node)
        if node.test is not None:
            node.test = nodes.And(_pay(_size([node.test])), node.test)
        return node

    def _output(self, node: nodes.Output) -> nodes.Node | list[nodes.Node]:
        text = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _weighed(part) for part in node.nodes
        ]
        return [nodes.ExprStmt(_pay(text), lineno=node.lineno), node] if text else node

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighed(part) for part in node.nodes]
        return node

    def _compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _weighed(node)

    def _getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node) if isinstance(node.arg, nodes.Slice) else node

    def _refused(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("a chat template cannot load another", node.lineno)


def _size(body: Sequence[nodes.Node]) -> int:
    """Nodes that run each time, without those of loops and macros inside, which pay themselves."""
    total, left = 1, list(body)
    while left:
        node = left.pop()
        total += 1
        if not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            left.extend(node.iter_child_nodes())
    return total


def _pay(units: int) -> nodes.Expr:
    return nodes.Filter(nodes.Const(units), _SPEND, [], [], None, None)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, _WEIGH, [], [], None, None, lineno=node.lineno)
