"""Forks of the test's own process that train together: as torchrun's, without the seconds that imports take."""

import multiprocessing
import os
import pickle
import signal
import traceback

import torch

from archzoo.training import distributed


def together(count, function, *args, timeout=30.0, seconds=90.0, lost=None):
    """Calls `function(*args)` in `count` processes of one group; returns their results by rank.

    What a process raises is raised here, and one that does not answer in `seconds` is killed. The rank `lost`, which
    kills or stops itself, is not waited for, and gives None.
    """
    context = multiprocessing.get_context("fork")
    answers, tells = context.Pipe(duplex=False)
    agent = context.Process(target=_keep_store, args=(tells,))
    agent.start()
    port = answers.recv()
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(rank, count, port, theirs, timeout, function, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            if rank == lost:
                results.append(None)
                continue
            assert pipe.poll(seconds), f"rank {rank} does not answer"
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                results.append(None)  # it was killed
    finally:
        for rank, process in enumerate(processes):
            process.join(0 if rank == lost else 5)
            if process.is_alive():
                process.kill()
        agent.kill()
    errors = [r for r in results if isinstance(r, str) and r.startswith("Traceback")]
    assert not errors, errors[0]
    return results


def _keep_store(pipe):
    """As torchrun's agent does. Not in the test's own process: a fork of what has threads may hang."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


def _run(rank, count, port, pipe, timeout, function, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        with distributed.group(torch.device("cpu"), timeout):
            result = function(*args)
        pipe.send_bytes(pickle.dumps(result))
    except distributed.RankLost as lost:
        pipe.send_bytes(pickle.dumps(lost.reason))
    except BaseException:
        pipe.send_bytes(pickle.dumps(traceback.format_exc()))
    pipe.close()
    os._exit(0)  # pytest's own handlers are not this process's
