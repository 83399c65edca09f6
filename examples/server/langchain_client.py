"""LangChain asks a document of any length: the server reads it once.

laserkv-gguf serve -m model.gguf
pip install langchain-openai
python examples/server/langchain_client.py book.txt "Who is Jack?" "And his mother?"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

URL = os.environ.get("LASERKV_SERVER", "http://127.0.0.1:8080") + "/v1"


def main() -> None:
    """Asks all questions about the document, one after the other."""
    document = Path(sys.argv[1]).read_text("utf-8")
    model = ChatOpenAI(model="any", base_url=URL, api_key="none", temperature=0, max_tokens=64)
    for question in sys.argv[2:]:
        # the document first: what begins alike is read once
        print(model.invoke([HumanMessage(f"{document}\n\n{question}")]).content)


if __name__ == "__main__":
    main()
