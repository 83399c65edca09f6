"""The same questions about every document of a folder, answered overnight.

    python examples/night.py papers questions.txt --model model.gguf

questions.txt has a question a line. The answers come as papers.csv, a row for each document and
question, with a page for each answer in papers-pages/. What was stopped goes on when it is started
again: it is `laserkv-gguf batch` that does the work. Other arguments go to it (--ratio 0.1 …).
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

KINDS = (".pdf", ".md", ".txt")


def main() -> int:
    """Writes the questions, has them answered, and writes the table."""
    parser = argparse.ArgumentParser(description="Questions about every document of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", type=Path)
    given, more = parser.parse_known_args()

    papers = sorted(path for path in given.folder.rglob("*") if path.suffix.lower() in KINDS)
    asked = [line.strip() for line in given.questions.read_text("utf-8").splitlines()]
    asked = [line for line in asked if line]
    if not papers or not asked:
        print(f"no documents in {given.folder}, or no questions in {given.questions}")
        return 2
    lines = [
        {"id": f"{path.relative_to(given.folder)} #{number}", "document_path": str(path.resolve()),
         "question": question}
        for path in papers
        for number, question in enumerate(asked, 1)
    ]  # fmt: skip

    name = given.folder.resolve()
    source, target = name.with_suffix(".questions.jsonl"), name.with_suffix(".answers.jsonl")
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    pages = name.with_name(f"{name.name}-pages")
    command = ["-m", "laserkv_gguf", "batch", "--input", str(source), "--output", str(target)]
    code = subprocess.call([sys.executable, *command, "--report", str(pages), *more])
    if code not in (0, 1):  # 1: some could not be answered, the others are
        return code

    answers = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    with name.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["document", "question", "answer", "kept", "error"])
        for line, answer in zip(lines, answers, strict=True):
            kept = answer.get("account", {}).get("kept_fraction", "")
            document = str(line["id"]).rpartition(" #")[0]
            table.writerow(
                [document, line["question"], answer.get("answer"), kept, answer.get("error")]
            )
    print(f"{len(answers)} answers in {name.with_suffix('.csv')}, pages in {pages}")
    return code


if __name__ == "__main__":
    sys.exit(main())
