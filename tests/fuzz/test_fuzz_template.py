"""Chat templates: a text or an error comes of them, soon; and within limits what Jinja makes."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from test_chat_template import TEMPLATES, user
from test_hostile_input import LONG_MACROS, RUNAWAY, render

from fuzz import budget
from laserkv_gguf.llama.template import WORK, TemplateLimit

pytest.importorskip("llama_cpp")

NAMES = ["a", "b", "messages", "m", "loop", "ns", "bos_token", "tools", "f", "caller", "self"]
WORDS = ["", "x", "user", "%s", "%5d", "{}", "{0}", "{:>5}", "%(a)s", "a\\n\\tb", "\u2063", "é"]
FILTERS = """
    abs batch(2) batch(2,'x') capitalize center(7) count default('d') d(1,true) dictsort escape
    first float format(1) groupby('role') indent(2) indent('>',true) int items join join(',') last
    length list lower map(attribute='role')|list map('upper')|list max min reject('odd')|list
    rejectattr('role')|list replace('a','bb') reverse round(1) safe select|list
    selectattr('role','equalto','user')|list slice(2)|list sort string sum title tojson
    tojson(indent=2) trim truncate(9) unique|list upper urlencode wordcount
"""
TESTS = """
    defined none string number mapping sequence iterable odd even true false boolean integer
    divisibleby(2) eq('x') in('xy') sameas(1) lower upper callable undefined
"""
METHODS = """
    upper() strip() split() split('a') replace('a','b') replace('','bb') startswith('x') find('a')
    rfind('a') rsplit('a',1) join(['a','b']) center(9) ljust(9) zfill(5) expandtabs(4) format(1,2)
    title() count('a') partition('a') splitlines() items() keys() values() get('role') index('a')
    copy() encode() __class__ pop() append(1) format_map({'a':1}) removeprefix('x') isdigit()
"""
BIG = ["99999", "3000000000", "10**9", "-99999", "4096", "0x" + "f" * 50, "1e308", "2.5"]
HOSTILE = """
    center(99999) ljust(3000000000) zfill(99999) expandtabs(99999) replace('','xxxxxxxxxx')
    join(range(99999)) format(1) rfind('b'*9999) split('') to_bytes(99999,'big') translate({})
"""
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or"]


def expressions(wild: bool) -> st.SearchStrategy[str]:
    numbers = ["0", "1", "2", "3", *(BIG if wild else [])]
    methods = METHODS.split() + (HOSTILE.split() if wild else [])
    leaves = st.one_of(
        st.sampled_from(NAMES),
        st.sampled_from(numbers),
        st.sampled_from(WORDS).map(lambda word: f"'{word}'"),
        st.sampled_from(["[]", "{}", "()", "none", "true", "['x','a']", "{'role':'user'}"]),
        st.sampled_from(["range(3)", "messages[0]", "messages[0].content", "namespace(a=1)"]),
        st.sampled_from(["range(99999)", "'x'*9999", "['x']*9999"] if wild else ["loop.index"]),
    )

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda p: f"({' '.join(p)})"),
            st.tuples(inner, st.sampled_from(FILTERS.split())).map(lambda p: f"({p[0]})|{p[1]}"),
            st.tuples(inner, st.sampled_from(TESTS.split())).map(lambda p: f"({p[0]} is {p[1]})"),
            st.tuples(inner, st.sampled_from(methods)).map(lambda p: f"({p[0]}).{p[1]}"),
            st.tuples(inner, inner).map(lambda p: f"[{p[0]}, {p[1]}, {p[1]}]"),
            st.tuples(inner, inner).map(lambda p: f"{{'role': {p[0]}, 'a': {p[1]}}}"),
            st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}]"),
            st.tuples(inner, st.sampled_from(["1:", "::-1", ":2", "::2"])).map(
                lambda p: f"({p[0]})[{p[1]}]"
            ),
            st.tuples(inner, inner).map(lambda p: f"({p[0]} if {p[1]} else b)"),
            inner.map(lambda a: f"(not {a})"),
            inner.map(lambda a: f"f({a})"),
        )

    return st.recursive(leaves, grown, max_leaves=6)


def templates(wild: bool) -> st.SearchStrategy[str]:
    expression = expressions(wild)
    simple = st.one_of(
        st.sampled_from(["text ", "\n  ", "<|im_start|>", "{# no #}"]),
        expression.map(lambda e: f"{{{{ {e} }}}}"),
        st.tuples(st.sampled_from(["a", "b", "ns.a"]), expression).map(
            lambda p: f"{{% set {p[0]} = {p[1]} %}}"
        ),
    )

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        loops = st.tuples(
            st.sampled_from(["messages", "range(3)", "a", "'xyz'"])
            | (expression if wild else st.just("[1, 2]")),
            st.sampled_from(["", " if m", " if loop is not defined", " recursive"]),
            inner,
        )
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            loops.map(lambda p: f"{{%- for m in {p[0]}{p[1]} %}}{p[2]}{{% endfor -%}}"),
            st.tuples(expression, inner, inner).map(
                lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}{p[2]}{{% endif %}}"
            ),
            inner.map(lambda t: f"{{% set a %}}{t}{{% endset %}}"),
            inner.map(lambda t: f"{{% filter upper %}}{t}{{% endfilter %}}"),
            st.tuples(inner, inner).map(
                lambda p: f"{{% macro f(a, b=2) %}}{p[0]}{{% endmacro %}}{p[1]}"
            ),
            inner.map(lambda t: f"{{% call f(1) %}}{t}{{% endcall %}}"),
            inner.map(lambda t: f"{{% with b = 3 %}}{t}{{% endwith %}}"),
            inner.map(lambda t: f"{{% generation %}}{t}{{% endgeneration %}}"),
        )

    start = st.just("{%- set ns = namespace(a='x') -%}{% macro f(a) %}{{ a }}{% endmacro %}")
    return st.tuples(start, st.recursive(simple, grown, max_leaves=8)).map("".join)


@st.composite
def broken(draw: st.DrawFn) -> str:
    """A template with pieces cut out, doubled or put elsewhere."""
    text = draw(st.sampled_from([*TEMPLATES.values(), LONG_MACROS, *RUNAWAY.values()]))[:4000]
    for _ in range(draw(st.integers(1, 5))):
        at, end, to = (draw(st.integers(0, len(text))) for _ in range(3))
        piece = text[min(at, end) : max(at, end)]
        how = draw(st.sampled_from(["cut", "double", "move", "write"]))
        if how == "cut":
            text = text[:at] + text[at + min(len(piece), 30) :]
        elif how == "write":
            text = (
                text[:at]
                + draw(st.sampled_from([*BIG, "{%", "%}", "{{", "}}", "*", "("]))
                + text[at:]
            )
        else:
            text = text[:to] + piece[:200] + text[to:]
    return text  # fmt: skip


MESSAGES = [user("Why?\nB"), {"role": "assistant", "content": "b"}, user("x")]


def test_wild_templates() -> None:
    counts: Counter[str] = Counter()

    def wild_templates(template: str) -> None:
        started = time.process_time()
        try:
            text = render(template, MESSAGES)
            counts["rendered"] += 1
            assert len(text) <= WORK + len(template)
        except TemplateLimit:
            counts["stopped"] += 1
        except AssertionError:
            raise
        except (MemoryError, RecursionError):
            pytest.fail("Python's own limits come first")
        except Exception:  # what the template runs into
            counts["failed"] += 1
        spent = round(1000 * (time.process_time() - started))
        counts["slowest, ms"] = max(counts["slowest, ms"], spent)

    budget.run(wild_templates, templates(wild=True) | broken(), 300, counts)


def test_tame_templates() -> None:
    """Against llama-cpp-python's formatter, which has no limits."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    counts: Counter[str] = Counter()

    def free(template: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            formatter = Jinja2ChatFormatter(template, bos_token="<s>", eos_token="</s>")
        messages: Any = MESSAGES
        return str(formatter(messages=messages).prompt)

    def told(make_it: Any, template: str) -> tuple[str, str]:
        try:
            text = make_it(template)
        except Exception as error:
            return type(error).__name__, ""
        # iterators are others, and say where they are
        return "", re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+(&gt;|>)", "<>", text)

    def tame_templates(template: str) -> None:
        found = told(lambda it: render(it, MESSAGES), template)
        if found[0] in ("TemplateLimit", "SecurityError"):
            counts["stopped"] += 1
            return
        wanted = told(free, template)
        if wanted[0] == "RecursionError" or found[0]:
            # what fails lazily in Jinja may fail at once here
            counts["failed"] += 1
            return
        counts["rendered"] += 1
        assert found == wanted

    budget.run(tame_templates, templates(wild=False), 150, counts)
