"""What the command line's flags are called in Python, for messages that name them."""

from __future__ import annotations

import re

# arguments of LaserKV that are called as their flag is; others keep the flag's name
_SAME = (
    "alpha block-size ctx-size document gpu-layers keep lookahead model parallel policy positions "
    "probe-tokens protection-divisor queue ratio read-policy recall recall-file recall-limit "
    "recall-mode scoring seed system"
)
_CONTEXT = {
    "-b": "batch_size",
    "-ub": "ubatch_size",
    "-ctk": "type_k",
    "-ctv": "type_v",
    "-fa": "flash_attn",
    "-tb": "threads_batch",
}
_OTHERS = {"-n": "max_tokens", "-t": "threads", "--policy-option": "policy_options"}
_PLACEMENT = (
    "device lora main-gpu mlock n-cpu-moe numa override-tensor rope-freq-base rope-freq-scale "
    "rope-scaling rpc split-mode tensor-split yarn-orig-ctx"
)
_WORDS = (
    "auto ram disk off on original compact host device replay shortlist same laser keydiff kvzip "
    "f32 f16 q8_0 none layer row"
)
_FLAG = re.compile(
    r"(?<![\w-])(?P<flag>--?[a-z][a-z-]*)(?![\w-])(?: (?P<value>\"[^\"]*\"|-?\d+(?:\.\d+)?|(?:"
    + "|".join(_WORDS.split())
    + r"))(?![\w-]|[.,]\w))?"
)
_ONE_AFTER_ANOTHER = re.compile(r"(?<=[\w\"])\) ContextOptions\(")
_COMMAND = re.compile(r"(?<![\w/.])/(reset|drop|docs|read|add)(?![\w/.])")
_SET = re.compile(r"/set (\w+) ([\d.]+)")
_METHODS = {"docs": "documents"}  # others are called as the chat's command is
_OPTION = re.compile(r"--policy-option ([\w-]+)=([^\s,;:]+)")


def by_arguments(said: str) -> str:
    """A message with the flags it names as the arguments that they are in Python.

    `--ctx-size 4096` is `ctx_size=4096` there, `-ctk f16` is `ContextOptions(type_k="f16")`. Flags
    that are none of `LaserKV`'s arguments stay. A chat's `/reset` is `reset()`.
    """
    said = said.replace("see --debug", "see llama.cpp's log: logging.DEBUG shows it")
    said = _OPTION.sub(_option, said)
    said = _SET.sub(r"configure(\1=\2)", said)
    said = _COMMAND.sub(lambda found: _METHODS.get(found[1], f"{found[1]}()"), said)
    return _ONE_AFTER_ANOTHER.sub(", ", _FLAG.sub(_argument, said))


def _option(found: re.Match[str]) -> str:
    value = found[2] if re.fullmatch(r"[\d.]+", found[2]) else f'"{found[2]}"'
    return f'policy_options={{"{found[1].replace("-", "_")}": {value}}}'


def _argument(found: re.Match[str]) -> str:
    flag, value = found["flag"], found["value"]
    name, home = flag.lstrip("-").replace("-", "_"), ""
    if flag in _CONTEXT:
        name, home = _CONTEXT[flag], "ContextOptions"
    elif flag in _OTHERS:
        name = _OTHERS[flag]
    elif flag.startswith("--") and flag[2:] in _PLACEMENT.split():
        home = "Placement"
    elif not flag.startswith("--") or flag[2:] not in _SAME.split():
        return found[0]
    if value is None:
        return name
    written = f'"{value}"' if value[0].isalpha() else value
    return f"{home}({name}={written})" if home else f"{name}={written}"
