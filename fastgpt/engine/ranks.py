"""The processes of one run, and the little that they tell each other beside gradients.

Values travel as JSON in byte tensors: no pickle.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastgpt.engine.host import to_host
from fastgpt.errors import SharedError, UserError
from fastgpt.launchers import ALONE, LOOPBACK, Launch


class Ranks:
    """Collective operations over the run's processes; on one process each is the identity."""

    def __init__(self, launch: Launch = ALONE) -> None:
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.local_world_size = launch.local_world_size
        # somebody asks this rank to end the run: the next update that is begun tells it to all
        self.stop_asked = False

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        if self.world_size == 1:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()], device=self._device)
        dist.broadcast(length, 0)
        buffer = (
            data.to(self._device)
            if self.rank == 0
            else torch.empty(int(length), dtype=torch.uint8, device=self._device)
        )
        dist.broadcast(buffer, 0)
        return _decode(buffer)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        data = _encode(value).to(self._device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([data.numel()], device=self._device))
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [_decode(part[: int(n)]) for part, n in zip(parts, lengths, strict=True)]

    def gather_floats(self, values: torch.Tensor) -> torch.Tensor:
        """Stack a (n,) tensor from every rank into (world_size, n), float64 on the CPU."""
        return self.begin_to_gather(values)()

    def begin_to_gather(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The same, begun; what comes back waits for it, and on GPUs for nothing that is asked of them later."""
        values = values.detach().double()
        if self.world_size == 1:
            return to_host(values[None])
        values = values.to(self._device)
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return to_host(torch.stack(parts))

    def on_first(self, work: Callable[[], Any]) -> Any:
        """The JSON value of `work()`, which only rank 0 does; its user's error is raised on every rank."""
        outcome: dict[str, Any] = {}
        if self.rank == 0:
            try:
                outcome = {"value": work()}
            except (UserError, OSError) as problem:
                if self.world_size == 1:
                    raise
                outcome = {"problem": str(problem)}
        outcome = self.broadcast(outcome)
        if "problem" in outcome:
            raise SharedError(outcome["problem"])
        return outcome["value"]

    @property
    def _device(self) -> torch.device:
        """Where the process group's backend wants tensors."""
        if self.world_size > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def join(launch: Launch, device: torch.device, timeout_minutes: int) -> Ranks:
    """Join the run's process group (gloo on a CPU, NCCL on GPUs) and return its ranks.

    Raises:
        UserError: the ranks did not find each other.
    """
    if not dist.is_initialized():
        _tell_libraries(launch)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(minutes=timeout_minutes),
                device_id=device if device.type == "cuda" else None,
            )
        except (dist.DistStoreError, dist.DistNetworkError) as problem:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(problem).strip().partition("\n")[0]
            raise UserError(
                f"the {launch.world_size} ranks did not meet at {address} (MASTER_ADDR, MASTER_PORT): {reason}"
            ) from problem
    return Ranks(launch)


def _tell_libraries(launch: Launch) -> None:
    """What PyTorch and DeepSpeed look for in the environment, where the launcher has other names for it or none."""
    known = {
        "MASTER_ADDR": launch.master or LOOPBACK,
        "MASTER_PORT": str(launch.port or _free_port()),
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.gpu),  # by which DeepSpeed chooses a GPU
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
    }
    for variable, value in known.items():
        os.environ.setdefault(variable, value)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    """A port for a process group of one, that no launcher gave a port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.cpu().numpy()))
