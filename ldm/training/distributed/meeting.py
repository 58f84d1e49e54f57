"""How processes that are started together find each other in a store that may hold what others have left.

`torchrun` keeps one store for all its restarts. Without what is done here, a process could read the address
of one that was killed, or take a signal of the processes before for one of those that run now.
"""

from __future__ import annotations

import hashlib
import secrets
import time

import torch.distributed as dist

PAUSE = 0.05  # seconds between looks at the store


def own_part(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """Return a part of a store that only the processes that are started now write to.

    Each process states a random name. The first one proposes the list of names, again whenever one has
    changed, until every process has found its own name in it.

    Args:
        store: The store of all processes.
        rank: Number of this process, from 0.
        size: Number of processes.
        seconds: How long to wait for the others.

    Raises:
        TimeoutError: If the others do not come.
    """
    own, end = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"ldm/name-{rank}", own)
    agreed = ""
    while time.monotonic() < end:
        if rank == 0:
            names = [own, *(store.get(f"ldm/name-{other}").decode() for other in range(1, size))]
            store.set("ldm/names", " ".join(names))
        else:
            names = store.get("ldm/names").decode().split()
        key = "ldm/" + hashlib.sha256(" ".join(names).encode()).hexdigest()[:32]
        if len(names) == size and names[rank] == own and key != agreed:
            agreed = key
            store.add(f"{key}/agreed", 1)
        if rank == 0 and store.add(f"{key}/agreed", 0) == size:
            store.set(f"{key}/begun", "yes")
        if agreed and store.check([f"{agreed}/begun"]):
            return dist.PrefixStore(agreed, store)
        time.sleep(PAUSE)
    raise TimeoutError(f"process {rank} of {size}: the others have not come within {seconds:.0f} seconds")
