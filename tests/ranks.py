"""A standing group of gloo processes, so that a hundred checks on 2 or 4 ranks pay for the imports once."""

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta


def _serve(rank, world_size, port, pipe):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch
    import torch.distributed as dist
    from torch.distributed import device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # Each group polls in a thread of its own, and hundreds of them take the machine: equal meshes are one, others go.
    meshes, init_device_mesh = {}, device_mesh.init_device_mesh

    def mesh_once(device_type, mesh_shape, *, mesh_dim_names=None):
        key = device_type, mesh_shape, mesh_dim_names
        if key not in meshes:
            meshes[key] = init_device_mesh(device_type, mesh_shape, mesh_dim_names=mesh_dim_names)
        return meshes[key]

    device_mesh.init_device_mesh = mesh_once  # before any module of ours is imported here
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            continue  # and this process will soon be ended
        dist.barrier()
        kept = {dist.group.WORLD, *(group for mesh in meshes.values() for group in mesh.get_all_groups())}
        for group in [each for each in dist.distributed_c10d._world.pg_map if each not in kept]:
            dist.destroy_process_group(group)
    dist.destroy_process_group()


class Group:
    """Processes that wait for functions to run; one failure ends the group, because its collectives may be out of step."""

    def __init__(self, world_size):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, args, timeout_s):
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died: exit code {self.processes[rank].exitcode}") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


GROUPS: dict[int, Group] = {}


def on_ranks(world_size, function, *args, timeout_s=120):
    """function(rank, *args) on every rank of a gloo group; the list of what each returned, in rank order."""
    group = GROUPS.get(world_size) or GROUPS.setdefault(world_size, Group(world_size))
    try:
        return group.run(function, args, timeout_s)
    except BaseException:
        group.close()
        del GROUPS[world_size]
        raise
