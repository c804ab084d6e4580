"""Lightning's DistributedDataParallel for processes that run already."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy

from convext.mnist.processes import World


def trainer_arguments(world: World) -> dict:
    """What Lightning's Trainer needs to know of the processes."""
    if world.size == 1:
        return {"devices": 1}
    return {
        "strategy": _RunningProcesses(cluster_environment=_Environment(world)),
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "use_distributed_sampler": False,  # BatchLoader does it
    }


class _RunningProcesses(DDPStrategy):
    """Lightning's ddp for processes that run already."""

    def _configure_launcher(self) -> None:
        """Has none. Lightning's would start this command anew, and set the number of threads."""


class _Environment(ClusterEnvironment):
    """Tells Lightning which of the processes this is."""

    creates_processes_externally = True
    main_address = ""  # the process group exists already
    main_port = 0

    def __init__(self, world: World) -> None:
        self._world = world

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.rank // self._world.local_size
