"""Fixtures and settings of all tests."""

import os
import shutil
import signal
from collections.abc import Iterator

# The workers of `pytest -n` share the cores: each has one thread, and so has each process that it starts, unless a test
# asks for more. Libraries read this when they are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # not in processes of their own, which would import torch
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads of tests that ask for more do not spin on the others' cores

import hypothesis.internal.conjecture.engine
import pytest
import torch

# Hypothesis takes some of its numbers from the source of the modules that are imported, so that the random problems
# of a test would depend on the tests before it. Old versions do not.
providers = getattr(hypothesis.internal.conjecture, "providers", None)
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = providers.Constants

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers ``-n auto`` starts: more than cores, as some tests wait for a browser or for other processes.

    Each takes about 1 GB of memory, and beyond eight they gain little.
    """
    from expressive_attention.study.training.devices import available_cores

    return min(-(-3 * available_cores() // 2), 8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Allocate over NaN, so that a result that was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    window.set_script_timeout(240)  # less than that of a test
    yield window
    window.quit()
