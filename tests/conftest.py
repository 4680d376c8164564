"""Profiles and markers: hypothesis draws the same examples on every run, without deadlines."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from processes import Python  # noqa: E402

hypothesis.settings.register_profile(
    "house", derandomize=True, deadline=None, print_blob=True, max_examples=30, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs CUDA; left out where there is none")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background jobs; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA here"))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder of its own, with a cache of its own, and with denormal numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # a main() before set it; hypothesis wants all numbers there are
    torch.set_float32_matmul_precision("highest")  # a main() with --gpu lowered it


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    """Starts scripts as real processes, quickly: python("x.py", "--steps", 2) -> exit code, stdout, stderr."""
    server = Python(tmp_path_factory.mktemp("server"))
    yield server
    server.end()
