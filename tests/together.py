"""Several processes that belong together, for tests: they start quickly, cannot hang, and leave nothing behind."""

import contextlib
import multiprocessing
import os
import socket
import time

import torch

servers = multiprocessing.get_context("forkserver")  # one process that has imported the libraries starts all others
servers.set_forkserver_preload(["hypothesis", "pytest", "llamba_ref.mohawk", "llamba_ref.data", "llamba_ref.parallel"])


def process(function, *args, **environment):
    """A process of its own that runs a function of a test file."""
    started = servers.Process(target=inside, args=(function, args, environment))
    started.start()
    return started


def inside(function, args, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def begin(number, function, *args):
    """Start processes that run a function of a test file, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [process(function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(number)]


@contextlib.contextmanager
def killed_at_the_end(started):
    """Whatever happens, none of the processes goes on."""
    try:
        yield started
    finally:
        for one in started:
            one.kill()
            one.join()


def run(number, function, *args, seconds=120):
    """Processes that must all end well, within a time."""
    with killed_at_the_end(begin(number, function, *args)) as started:
        deadline = time.monotonic() + seconds
        while any(one.exitcode is None for one in started) and time.monotonic() < deadline:
            assert not any(one.exitcode for one in started), "a process failed: see its traceback"
            time.sleep(0.02)
        assert [one.exitcode for one in started] == [0] * number
