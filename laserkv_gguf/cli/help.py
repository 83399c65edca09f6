"""`--help` in groups, as llama.cpp has it, with examples and words at the end."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMON, CACHE, SELECTION, SAMPLING, SPEED, DEVICES = GROUPS = (
    "common",
    "cache",
    "selection",
    "sampling",
    "speed",
    "devices",
)
# what each group is about, in the words of somebody who does not know them yet
_ABOUT = {
    CACHE: "cache: how much of the document stays, and where",
    SELECTION: "selection: which tokens stay",
    SAMPLING: "sampling: how the answer is worded",
    SPEED: "speed: threads, batches and the GPU",
    DEVICES: "devices: where the model lies, adapters, RoPE",
}
WORDS = """\
  token       a piece of text, about four letters
  cell        a place for one token in the KV cache; --ctx-size counts them
  block       the tokens that are read before the next eviction
  kept        in the cache; what was evicted is not, and costs no memory
  anchors     the document's first tokens, which always stay
  window      the last tokens read, which always stay
  pool        the tokens between them that the policy chooses
  draft       a token of the answer, guessed while a block is whole, to ask with
  probe       the question's last tokens and the drafts: what looks at the block"""
_ALWAYS = (
    "What you always type can stand in a file or the environment: see the page on settings in\n"
    "docs/, or: LASERKV_MODEL=model.gguf laserkv-gguf ask …"
)
EXAMPLES = {
    "ask": (
        'laserkv-gguf ask -m model.gguf -d book.txt -q "Who is Jack\'s mother?"',
        'laserkv-gguf ask -m model.gguf -d book.txt -q "Who is Jack?" --ratio 0.1 --json',
        'laserkv-gguf ask -m model.gguf -d book.txt -q "Who is Jack?" --report kept.html',
        'laserkv-gguf ask -m model.gguf -d book.txt --save book.laserkv -q "Who is Jack?"',
    ),
    "chat": (
        "laserkv-gguf chat -m model.gguf -d book.txt",
        "laserkv-gguf chat -m model.gguf -d book.txt --recall ram",
        "laserkv-gguf chat -m model.gguf -c 4096",
    ),
    "batch": (
        "laserkv-gguf batch -m model.gguf -i questions.jsonl -o answers.jsonl",
        "laserkv-gguf batch -m model.gguf -i questions.jsonl -o answers.jsonl --report pages",
        "laserkv-gguf batch -m model.gguf -i questions.jsonl -o - --quiet",
    ),
    "serve": (
        "laserkv-gguf serve -m model.gguf",
        "laserkv-gguf serve -m model.gguf --port 9000 --api-key secret",
    ),
    "bench": ("laserkv-gguf bench -m model.gguf --tokens 4096,8192 --out results/bench",),
    "eval": (
        "laserkv-gguf eval niah_single_1 -m model.gguf --policies full,laser --out results",
        "laserkv-gguf eval fidelity -m model.gguf --ratios 0.25,0.1 --out results",
    ),
    "plan": (
        "laserkv-gguf plan -m model.gguf --tokens 32768 --ratio 0.1",
        "laserkv-gguf plan -m llama-3.1-8b-instruct --tokens 65536 --vram 8GiB",
    ),
    "doctor": ("laserkv-gguf doctor", "laserkv-gguf doctor -m model.gguf"),
    "rpc-server": ("laserkv-gguf rpc-server",),
    "pull": ("laserkv-gguf pull", "laserkv-gguf pull llama-3.2-1b-instruct"),
}
_WITH_WORDS = ("ask", "chat", "batch", "serve")


class Command(TyperCommand):
    """A command whose flags stand in groups, with examples and the words it uses at the end."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        arguments: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            record = record[0].replace("<list[str]>", "<str>"), record[1]
            if param.param_type_name == "argument":
                arguments.append(record)
            else:
                panel = getattr(param, "rich_help_panel", None) or COMMON
                groups.setdefault(panel, []).append(record)
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        for panel in (*GROUPS, *(name for name in groups if name not in GROUPS)):
            if panel in groups:
                alone = len(groups) == 1
                with formatter.section("Options" if alone else _ABOUT.get(panel, panel)):
                    formatter.write_dl(groups[panel])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        # several words are taken for one question only to say that it wants quotes
        return [piece.removesuffix("...") if self.name == "ask" else piece for piece in pieces]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        name = self.name or ""
        if name in EXAMPLES:
            formatter.write("\nExamples:\n" + "".join(f"  {one}\n" for one in EXAMPLES[name]))
        if name in _WITH_WORDS:
            formatter.write(f"\nWords:\n{WORDS}\n\n{_ALWAYS}\n")


class Group(TyperGroup):
    """The program: its commands with the whole first line of what they do."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                commands.append((name, (command.help or "").strip().partition("\n")[0]))
        with formatter.section("Commands"):
            formatter.write_dl(commands)
        records = [param.get_help_record(ctx) for param in self.get_params(ctx)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(
            "\nStart with:\n  laserkv-gguf pull\n"
            '  laserkv-gguf ask -m MODEL -d book.txt -q "What is this about?"\n\n'
            "laserkv-gguf COMMAND --help has the rest; python -m laserkv_gguf is the same.\n"
        )
