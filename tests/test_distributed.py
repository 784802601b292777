import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from torchtitan_bio import distributed


def talk(rank):
    world = distributed.start()
    answers = {
        "sum": world.sum({"tokens": 2**40 + rank, "rows": rank}),
        "array": world.sum_array(np.full((2, 2), 0.1)).tolist(),
        "exchange": world.exchange({"rank": rank, "text": "\u00e9" * rank * 100, "none": None}),
    }
    try:
        with world.together("saving"):
            if rank == 1:
                raise OSError("disk full")
    except (OSError, RuntimeError) as error:
        answers["error"] = f"{type(error).__name__}: {error}"
    return answers


def test_ranks_agree_on_sums_messages_and_errors():
    first, second = on_ranks(2, talk)
    assert first["sum"] == second["sum"] == {"tokens": 2**41 + 1, "rows": 1}
    assert first["array"] == second["array"] == [[0.2, 0.2], [0.2, 0.2]]
    messages = [{"rank": 0, "text": "", "none": None}, {"rank": 1, "text": "\u00e9" * 100, "none": None}]
    assert first["exchange"] == second["exchange"] == messages
    assert first["error"] == "FailedElsewhere: saving failed on rank 1: disk full"
    assert second["error"] == "OSError: disk full"


def refuse(rank, broken):
    """What each rank raises where rank 2 is given numbers that do not go together and some disks are broken."""
    world = distributed.start(context_degree=2)
    try:
        with world.together("reading"):
            if rank == 2:
                distributed.degrees(8, 3, 1)
            if rank in broken:
                raise OSError("disk full")
    except (OSError, RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)[:25]


def test_what_other_ranks_hear_can_be_mended_by_a_user_where_all_that_failed_can():
    of_rank_2 = "ValueError", "data_parallel_replicate_d"
    heard = "RefusedElsewhere", "reading failed on rank 2:"
    assert on_ranks(4, refuse, []) == [heard, heard, of_rank_2, heard]
    heard, own = ("FailedElsewhere", "reading failed on rank 3:"), ("OSError", "disk full")
    assert on_ranks(4, refuse, [3]) == [heard, heard, of_rank_2, own]


def timeouts(rank):
    """Of every group that training speaks in: at the start, and once set."""
    world = distributed.start(init_timeout_s=77)
    groups = [dist.group.WORLD, *world.mesh.get_all_groups(), *world.sequence.get_all_groups()]

    def patience():
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    at_first = patience()
    distributed.set_timeout(world, 60)
    return at_first, patience()


def test_every_group_waits_as_long_as_the_config_says():
    for at_first, later in on_ranks(2, timeouts):
        assert set(at_first) == {77} and set(later) == {60}


def test_the_flight_recorder_is_on_but_what_a_user_has_set_stays(tmp_path):
    fresh, old_names = {}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "x"}
    distributed.record_flights(tmp_path, fresh)
    assert int(fresh["TORCH_FR_BUFFER_SIZE"]) > 0 and fresh["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert fresh["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    again = fresh | {"TORCH_FR_BUFFER_SIZE": "7"}
    distributed.record_flights(tmp_path / "other", again)
    assert again == fresh | {"TORCH_FR_BUFFER_SIZE": "7"}
    distributed.record_flights(tmp_path, old_names)
    assert old_names.keys() == {"TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"}


def places(rank):
    world = distributed.start(replicate_degree=1, context_degree=2)
    shared = world.sum_of_data({"tokens": 10 ** (rank // 2)})
    return world.data_rank, world.context_rank, world.mesh["shard"].size(), shared


def test_ranks_that_share_a_sequence_are_neighbours_and_count_it_once():
    assert on_ranks(4, places) == [(rank // 2, rank % 2, 4, {"tokens": 11}) for rank in range(4)]


@pytest.mark.parametrize(
    ("size", "shard", "replicate", "context", "expected"),
    [
        (8, "auto", 1, 1, (1, 8)),
        (8, "auto", 2, 1, (2, 4)),
        (8, 4, 2, 1, (2, 4)),
        (8, "auto", 2, 2, (2, 2)),
        (4, 1, 1, 4, (1, 1)),
    ],
)
def test_degrees_multiply_to_the_number_of_ranks(size, shard, replicate, context, expected):
    assert distributed.degrees(size, shard, replicate, context) == expected


@pytest.mark.parametrize(
    ("size", "shard", "replicate", "context"),
    [(8, 4, 1, 1), (8, "auto", 3, 1), (1, "auto", 2, 1), (4, "auto", 1, 3), (2, 2, 1, 2)],
)
def test_degrees_that_do_not_are_refused(size, shard, replicate, context):
    with pytest.raises(ValueError, match=f"the number of ranks, {size}"):
        distributed.degrees(size, shard, replicate, context)
