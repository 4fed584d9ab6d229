"""A function on several processes with torch's gloo backend, forked from this one so that nothing is imported again."""

import io
import multiprocessing
import os
import socket
import traceback

import torch
from torch import distributed

SECONDS = 1800  # until a hanging process is ended, on a busy machine too


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
        answers = [receiver.recv() if receiver.poll(seconds) else "no answer" for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for rank, answer in enumerate(answers):
        assert isinstance(answer, tuple), f"rank {rank}: {answer}"
    return [torch.load(io.BytesIO(value), weights_only=False) for (value,) in answers]


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
