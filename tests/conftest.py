"""Shared by all tests: one thread, no network, caches in a folder of the test session."""

import logging
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cps-hf-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


def pytest_configure(config):
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # with -n, this process runs no test, and its workers wait for it: importing torch takes seconds
    import datasets
    import torch

    # Closing a streamed parquet set sleeps five seconds (a guard against a crash of Arrow when a process ends).
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05
    torch.set_num_threads(1)  # with default threads on a busy two-core box a 0.3 s test takes 10 s


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the long grids too, as .ci/run does")
    parser.addoption("--write-docs", action="store_true", help="write what the docs show of tests, not compare it")


def pytest_collection_modifyitems(config, items):
    """Skip tests marked gpu if there is no CUDA device; nothing else may be skipped for missing hardware.

    Tests marked exhaustive only run on request.
    """
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if "exhaustive" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def loggers_at_their_level():
    """Commands set the log level, since they end with their process: here it would affect the next test."""
    loggers = [logging.getLogger(name) for name in ("cps_hf", "transformers", "datasets", "accelerate", "httpx")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
