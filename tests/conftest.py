"""Property tests try the same examples every time; `--hypothesis-profile search` tries others."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from laserkv_gguf.llama import trial

os.environ["LASERKV_CONFIG"] = ""  # nobody's own settings; processes that tests start inherit it

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile("same")


def pytest_sessionstart() -> None:
    """The trial of the CPU kernels warns once on a new machine: before tests that read stderr."""
    trial.extra_buffers_work()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-rpc",
        action="store_true",
        help="put every model on an RPC device of this machine, with flash attention",
    )


@pytest.fixture(scope="session", autouse=True)
def _on_rpc(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --on-rpc tests get a second device, whose memory is not the host's, by default."""
    if not request.config.getoption("--on-rpc"):
        yield
        return
    import rpc_device

    rpc_device.needed()
    with rpc_device.Server() as server, rpc_device.every_model_on(server):
        yield
