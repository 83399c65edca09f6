"""Property tests try the same examples every time; `--hypothesis-profile search` tries others."""

import os

from hypothesis import settings

from laserkv_gguf.llama import trial

os.environ["LASERKV_CONFIG"] = ""  # nobody's own settings; processes that tests start inherit it

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile("same")


def pytest_sessionstart() -> None:
    """The trial of the CPU kernels warns once on a new machine: before tests that read stderr."""
    trial.extra_buffers_work()
