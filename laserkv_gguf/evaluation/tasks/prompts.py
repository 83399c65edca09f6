"""What BABILong's tasks are told, in our words.

The parts are the published ones: an instruction, worked examples, and the form of the answer.
"""

from __future__ import annotations

import re

_HIDDEN = (
    "Facts about {what} are hidden in the text below. Answer the question from these facts only."
)


def _prompt(what: str, form: str, *examples: tuple[str, str], rule: str = "") -> dict[str, str]:
    return {
        "instruction": " ".join(part for part in (_HIDDEN.format(what=what), rule) if part),
        "examples": "\n".join(
            f"<example>\n{told}\nAnswer: {answer}\n</example>" for told, answer in examples
        ),
        "post_prompt": f"Answer in exactly this form, and write nothing else: {form}",
    }


_WHERE_NOW = "Somebody who was in several places is in the last of them."
_CARRIED = "Things that somebody takes go along; things that are put down stay where that was."
_ONE_WORD = "one word."
_YES_NO = "one word, yes or no."

PROMPTS = {
    "qa1": _prompt(
        "where people are",
        "The most recent location of PERSON is PLACE.",
        (
            "Ruth went to the cellar. Otto walked to the attic. Where is Ruth?",
            "The most recent location of Ruth is cellar.",
        ),
        (
            "Otto moved to the porch. Ruth went to the attic. Otto went to the cellar. "
            "Where is Otto?",
            "The most recent location of Otto is cellar.",
        ),
        rule=_WHERE_NOW,
    ),
    "qa2": _prompt(
        "where people are and what they take",
        "The THING is in PLACE.",
        (
            "Ruth went to the attic. Ruth took the lamp. Ruth moved to the porch. "
            "Where is the lamp?",
            "The lamp is in porch.",
        ),
        (
            "Otto took the hammer. Otto went to the cellar. Otto put down the hammer. "
            "Otto went to the attic. Where is the hammer?",
            "The hammer is in cellar.",
        ),
        rule=_CARRIED,
    ),
    "qa3": _prompt(
        "where people are and what they take",
        "Before the PLACE the THING was in PLACE.",
        (
            "Ruth took the lamp. Ruth went to the attic. Ruth moved to the porch. "
            "Where was the lamp before the porch?",
            "Before the porch the lamp was in attic.",
        ),
        (
            "Otto went to the porch. Otto took the hammer. Otto went to the cellar. "
            "Otto went to the attic. Where was the hammer before the attic?",
            "Before the attic the hammer was in cellar.",
        ),
        rule=_CARRIED,
    ),
    "qa4": _prompt(
        "where places lie",
        _ONE_WORD,
        (
            "The attic is north of the porch. The cellar is south of the porch. "
            "What is the porch north of?",
            "cellar",
        ),
        (
            "The porch is west of the attic. The attic is west of the cellar. "
            "What is west of the attic?",
            "porch",
        ),
    ),
    "qa5": _prompt(
        "who gives what to whom",
        _ONE_WORD,
        ("Ruth took the lamp. Ruth gave the lamp to Otto. Who gave the lamp to Otto?", "Ruth"),
        (
            "Otto took the hammer. Otto handed the hammer to Ida. What did Otto give to Ida?",
            "hammer",
        ),
        ("Ida took the lamp. Ida passed the lamp to Ruth. Who received the lamp?", "Ruth"),
    ),
    "qa6": _prompt(
        "where people are",
        _YES_NO,
        ("Ruth went to the attic. Ruth moved to the porch. Is Ruth in the porch?", "yes"),
        ("Otto went to the cellar. Otto walked to the attic. Is Otto in the cellar?", "no"),
        rule=_WHERE_NOW,
    ),
    "qa7": _prompt(
        "what people carry",
        "one word, none or a number such as one or two.",
        ("Ruth went to the attic. Ruth took the lamp. How many objects is Ruth carrying?", "one"),
        (
            "Otto took the hammer. Otto gave the hammer to Ida. How many objects is Otto carrying?",
            "none",
        ),
        ("Ida took the lamp. Ida took the hammer. How many objects is Ida carrying?", "two"),
    ),
    "qa8": _prompt(
        "what people carry",
        "nothing, one thing, or two things with a comma between them.",
        ("Ruth went to the attic. Ruth took the lamp. What is Ruth carrying?", "lamp"),
        ("Otto took the hammer. Otto put down the hammer. What is Otto carrying?", "nothing"),
        ("Ida took the lamp. Ida took the hammer. What is Ida carrying?", "lamp,hammer"),
    ),
    "qa9": _prompt(
        "where people are and are not",
        _YES_NO,
        ("Ruth is no longer in the attic. Otto is in the porch. Is Ruth in the attic?", "no"),
        ("Otto moved to the cellar. Ruth is not in the porch. Is Otto in the cellar?", "yes"),
        rule=_WHERE_NOW,
    ),
    "qa10": _prompt(
        "where people are or may be",
        "one word, yes, no or maybe.",
        (
            "Ruth is in the attic. Otto is either in the porch or the cellar. "
            "Is Ruth in the cellar?",
            "no",
        ),
        (
            "Ruth is in the attic. Otto is either in the porch or the cellar. "
            "Is Otto in the porch?",
            "maybe",
        ),
        (
            "Otto is either in the porch or the cellar. Ida went to the attic. "
            "Is Ida in the attic?",
            "yes",
        ),
        rule=_WHERE_NOW,
    ),
}

# question -> the answer in the form that was asked for
_FORMS = {
    "qa1": (r"Where is (?P<who>\w+)", "The most recent location of {who} is {gold}."),
    "qa2": (r"Where is the (?P<what>\w+)", "The {what} is in {gold}."),
    "qa3": (
        r"Where was the (?P<what>\w+) before the (?P<place>\w+)",
        "Before the {place} the {what} was in {gold}.",
    ),
}


def answer(kind: str, question: str, gold: str) -> str:
    """The right answer, in the form that was asked for."""
    pattern, form = _FORMS.get(kind, ("", "{gold}"))
    found = re.search(pattern, question)
    return form.format(gold=gold, **found.groupdict()) if found else gold
