"""LlamaIndex asks a document of any length: the server reads it once, so nothing is retrieved.

laserkv-gguf serve -m model.gguf
pip install llama-index-llms-openai-like
python examples/server/llamaindex_client.py book.txt "Who is Jack?" "And his mother?"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL = os.environ.get("LASERKV_SERVER", "http://127.0.0.1:8080") + "/v1"


def main() -> None:
    """Asks all questions about the document, one after the other."""
    document = Path(sys.argv[1]).read_text("utf-8")
    # the context window is the server's business: say one that no document reaches
    model = OpenAILike(
        model="any", api_base=URL, api_key="none", is_chat_model=True, context_window=1 << 20,
        max_tokens=64, temperature=0,
    )  # fmt: skip
    for question in sys.argv[2:]:
        said = model.chat([ChatMessage(role="user", content=f"{document}\n\n{question}")])
        print(said.message.content)


if __name__ == "__main__":
    main()
