"""One measurement in a process of its own: a job in JSON on stdin, its result on stdout.

    python -m laserkv_gguf.benchmark.child < job.json

What reads the full cache imports neither Numba nor the engine: its memory is llama.cpp's.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from typing import Any

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.shown import Formatter


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Does a job, of one of the kinds "facts", "policy", "full", "search", "token" and "idle"."""
    if job["kind"] in ("facts", "policy"):
        from laserkv_gguf.benchmark import policy

        return policy.KINDS[job["kind"]](job)
    from laserkv_gguf.benchmark import full

    return full.KINDS[job["kind"]](job)


def main() -> int:
    """Does the job; an error is told in the result, with its exit code."""
    job = json.load(sys.stdin)
    level = logging.DEBUG if job["debug"] else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("warning: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level)
    logging.getLogger("numba").setLevel(logging.WARNING)
    if job["kind"] != "facts" and not job["debug"]:
        # what it warns of is said once, with the facts
        logging.getLogger("laserkv_gguf").setLevel(logging.ERROR)
    try:
        result = measured(job)
    except LaserKVError as error:
        result = {"error": error.with_flags, "code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}", "code": 1}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
