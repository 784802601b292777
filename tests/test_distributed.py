import numpy as np
import pytest
from ranks import on_ranks

from torchtitan_bio import distributed


def talk(rank):
    world = distributed.start()
    answers = {
        "sum": world.sum({"tokens": 2**40 + rank, "rows": rank}),
        "array": world.sum_array(np.full((2, 2), 0.1)).tolist(),
        "any": world.any_true(rank == 1),
        "all": world.all_true(rank == 1),
        "broadcast": world.broadcast({"name": "step-\u00e9", "none": None} if rank == 0 else None),
        "gather": world.gather({"rank": rank, "text": "x" * rank * 100}),
    }
    distributed.set_timeout(world, 30)
    try:
        with world.together("saving"):
            if rank == 1:
                raise OSError("disk full")
    except (OSError, ValueError) as error:
        answers["error"] = f"{type(error).__name__}: {error}"
    return answers


def test_ranks_agree_on_sums_messages_and_errors():
    first, second = on_ranks(2, talk)
    assert first["sum"] == second["sum"] == {"tokens": 2**41 + 1, "rows": 1}
    assert first["array"] == second["array"] == [[0.2, 0.2], [0.2, 0.2]]
    assert first["any"] and second["any"] and not first["all"] and not second["all"]
    assert first["broadcast"] == second["broadcast"] == {"name": "step-\u00e9", "none": None}
    assert first["gather"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 100}] and second["gather"] is None
    assert first["error"] == "ValueError: saving failed on rank 1: disk full"
    assert second["error"] == "OSError: disk full"


@pytest.mark.parametrize(
    ("size", "shard", "replicate", "expected"), [(8, "auto", 1, (1, 8)), (8, "auto", 2, (2, 4)), (8, 4, 2, (2, 4))]
)
def test_degrees_multiply_to_the_number_of_ranks(size, shard, replicate, expected):
    assert distributed.degrees(size, shard, replicate) == expected


@pytest.mark.parametrize(("size", "shard", "replicate"), [(8, 4, 1), (8, "auto", 3), (1, "auto", 2)])
def test_degrees_that_do_not_are_refused(size, shard, replicate):
    with pytest.raises(ValueError, match=f"not the number of ranks, {size}"):
        distributed.degrees(size, shard, replicate)
