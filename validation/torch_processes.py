"""Starts a group of processes that talk to each other, hears what they say, and ends them all whatever happens.

They meet through a file, and gloo talks over the loopback interface: nothing leaves the machine. What a rank says comes
through a pipe of its own. If a rank fails or dies, or none says anything for a while, all are killed and the reason is
raised: a group that lost a member would wait for it.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

SILENCE_S = 90.0
Say = Callable[[object], None]


def started(target: Callable[..., None], ranks: int, backend: str, *arguments: Any) -> Generator[Any]:
    """Run ``target(rank, device, say, *arguments)`` in that many new processes; what the first one says.

    Raises:
        RuntimeError: a rank failed, or none was heard of for ``SILENCE_S``. All are ended in any case.
    """
    context = processes.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        group = [
            context.Process(target=_member, args=(target, rank, ranks, backend, store, speak, arguments), daemon=True)
            for rank, (_, speak) in enumerate(pipes)
        ]
        try:
            for process in group:
                process.start()
            for _, speak in pipes:
                speak.close()
            yield from _heard([listen for listen, _ in pipes])
            for process in group:
                process.join(SILENCE_S)
        finally:
            for process in group:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
            for listen, _ in pipes:
                listen.close()


def _heard(ranks: Sequence[Connection]) -> Iterator[Any]:
    """Messages until every rank has ended."""
    open_ones = list(ranks)
    while open_ones:
        ready = wait(open_ones, SILENCE_S)
        if not ready:
            raise RuntimeError(f"none of {len(ranks)} ranks was heard of for {SILENCE_S:.0f} s")
        for each in open_ones.copy():
            if each not in ready:
                continue
            try:
                kind, content = each.recv()
            except EOFError:
                raise RuntimeError(f"rank {ranks.index(each)} of {len(ranks)} ended early") from None
            if kind == "failed":
                raise RuntimeError(content)
            if kind == "ended":
                open_ones.remove(each)
            else:
                yield content


def _member(
    target: Callable[..., None], rank: int, ranks: int, backend: str, store: str, speak: Connection, arguments: Any
) -> None:
    """One rank: join the group, do the work, leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        patience = timedelta(seconds=SILENCE_S / 2)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)
        target(rank, device, lambda content: speak.send(("said", content)), *arguments)
        speak.send(("ended", rank))
    except Exception as error:
        with suppress(OSError):
            speak.send(("failed", f"rank {rank} of {ranks}: {type(error).__name__}: {error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


__all__ = ["SILENCE_S", "Say", "started"]
