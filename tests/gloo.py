"""A function on several processes with torch's gloo backend, forked from this one so that nothing is imported again."""

import io
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import wait

import torch
from torch import distributed

SECONDS = 1800  # until a hanging process is ended, on a busy machine too
AFTER_A_FAILURE = 20  # the others wait for the one that failed: what they say, if they end at all, is said as well


def run(function, *arguments, size=2, seconds=SECONDS):
    """`[function(rank, *arguments) for rank in range(size)]`, each in a process of its own, as one group."""
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    given = [(function, rank, size, port, sender, arguments) for rank, (_, sender) in enumerate(pipes)]
    workers = [context.Process(target=_work, args=one, daemon=True) for one in given]
    for worker in workers:
        worker.start()
    try:
        answers = _answers([receiver for receiver, _ in pipes], seconds)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    failures = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if not isinstance(answer, tuple)]
    assert not failures, "\n".join(failures)
    return [torch.load(io.BytesIO(value), weights_only=False) for (value,) in answers]


def _answers(receivers, seconds):
    """What each process sent, by rank: a value in a tuple, a traceback, or that nothing came."""
    came = {}
    while len(came) < len(receivers):
        failed = any(not isinstance(answer, tuple) for answer in came.values())
        ready = wait([one for one in receivers if one not in came], AFTER_A_FAILURE if failed else seconds)
        if not ready:
            break
        came |= {one: one.recv() for one in ready}
    return [came.get(one, "no answer") for one in receivers]


def _work(function, rank, size, port, sender, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        distributed.init_process_group("gloo", rank=rank, world_size=size)
        answer = io.BytesIO()
        torch.save(function(rank, *arguments), answer)
        sender.send((answer.getvalue(),))
    except BaseException:
        sender.send(traceback.format_exc())
    finally:
        os._exit(0)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
