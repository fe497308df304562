"""Collective operations on several processes and on one; errors of one process are raised on all."""

import errno
import operator
import platform
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from torch import nn

from utils import distributed, process
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.splits import ArrayImages
from utils.data.transforms import eval_transform, normalize
from utils.training import evaluation
from utils.training.precision import FP32

TOP = operator.itemgetter("images", "accuracy", "top2", "top3", "top4", "top5")
CPU = torch.device("cpu")
ONE_RANK = distributed.Ranks(0, 1, 0, 1, CPU)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def evaluated(ranks, images: int, batch_size: int = 8, **more) -> dict:
    split = digits("").val
    split = ArrayImages(split.images[:images], split.targets[:images])
    loader = data.eval_loader(split, transform=eval_transform((8, 8)), batch_size=batch_size, rank=ranks.rank,
                              world_size=ranks.size, num_workers=0, pin_memory=False)
    metrics = evaluation.evaluate(network(), loader, lambda images: normalize(images, (0.5,) * 3, (0.5,) * 3), FP32, ranks, 10,
                                  confusion=True, **more)
    return metrics and vars(metrics)


def check_equal(found: dict, expected: dict) -> None:
    assert TOP(found) == TOP(expected) and torch.equal(found["confusion"], expected["confusion"])
    for name in ("loss", "true_probability", "calibration_error"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


class Refusal(ValueError):
    """A user error."""


def refuse(who, ranks):
    if ranks.rank in who:
        raise Refusal(f"rank {ranks.rank} refuses")
    return f"done by {ranks.rank}"


def outcome(function) -> str:
    try:
        return str(function())
    except Refusal as error:
        return f"Refusal: {error}"


def one_after_the_other(ranks, folder: Path) -> bool:
    """Return whether the second process finds what the first one writes"""
    place = folder / "slowly written"

    def write_or_read():
        if ranks.local_rank == 0:
            time.sleep(0.3)
            place.write_text("x")
        return place.exists()

    return distributed.local_main_first(ranks, write_or_read)


def scenarios(ranks: distributed.Ranks, folder: Path) -> dict:
    parts = distributed.all_gather(torch.tensor([ranks.rank, 5]), ranks)
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, ranks.rank + 3.0)
    distributed.broadcast_weights(model, ranks)
    return {
        "ranks": (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, ranks.is_main, str(ranks.device)),
        "sum": distributed.all_reduce_sum(torch.tensor([1, 10 ** 15 + ranks.rank])).tolist(),
        "parts": [part.tolist() for part in parts],
        "objects": distributed.all_gather_objects(ranks, {"rank": ranks.rank}),
        "weights": model.weight.unique().tolist(),
        "stopped evaluation": [evaluated(ranks, 101, stop_requested=lambda rank=rank: ranks.rank == rank) for rank in range(3)],
        "main": outcome(lambda: distributed.broadcast_from_main(ranks, lambda: refuse([], ranks))),
        "main refused": outcome(lambda: distributed.broadcast_from_main(ranks, lambda: refuse([0], ranks))),
        "first": [outcome(lambda who=who: distributed.local_main_first(ranks, lambda: refuse(who, ranks)))
                  for who in ([], [0], [1], [0, 1])],
        "one after the other": one_after_the_other(ranks, folder),
        "at the end": torch.distributed.barrier() or "together",
    }


@pytest.mark.slow
def test_error_on_only_one_node_names_the_node(tmp_path):
    """A file may be missing on one node. An error on all nodes names none."""
    def scenario(ranks):
        return [outcome(lambda who=who: distributed.local_main_first(ranks, lambda: refuse(who, ranks))) for who in ([1], [0, 1])]

    def with_a_disk_of_its_own(ranks):
        if ranks.rank == 1:
            raise OSError(errno.EIO, "Input/output error", "/data/x")

    def scenario_of_disks(ranks):
        with pytest.raises(ValueError, match="node 1") as caught:
            distributed.local_main_first(ranks, lambda: with_a_disk_of_its_own(ranks))
        return process.classify_error(caught.value)

    single = f"node 1 (host {platform.node()})"
    for number, (work, expected) in enumerate([
            (scenario, [f"Refusal: {single}: rank 1 refuses", "Refusal: rank 0 refuses"]),
            (scenario_of_disks, (f"{single}: /data/x: Input/output error", 2))]):
        (tmp_path / str(number)).mkdir()
        with Ranks(2, work, tmp_path / str(number), nodes=True) as both:
            assert both.results() == [expected] * 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Return the results of the two ranks"""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(2, lambda ranks: scenarios(ranks, folder), folder) as both:
        return both.results()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.slow
def test_values_of_two_processes(ranks):
    assert [each["ranks"] for each in ranks] == [(0, 2, 0, 2, True, "cpu"), (1, 2, 1, 2, False, "cpu")]
    for each in ranks:
        assert each["sum"] == [2, 2 * 10 ** 15 + 1] and each["parts"] == [[0, 5], [1, 5]]
        assert each["objects"] == [{"rank": 0}, {"rank": 1}] and each["weights"] == [3.0]
        assert each["at the end"] == "together"


@pytest.mark.slow
@pytest.mark.contract("P15", "an evaluation counts every image once, whatever the processes and the batch size")
def test_evaluation_is_exact_for_any_number_of_processes(tmp_path, tries, figure):
    """With numbers of images that are no multiple of the processes, fewer images than processes, and batches of all sizes"""
    cases = [(images, batch_size) for images in (1, 2, 3, 7, 64, 101, 200) for batch_size in (1, 8, 33, 500)][::tries(3, 1)]
    single, sizes = [evaluated(ONE_RANK, *case) for case in cases], (2, 3, 4, 5)[1:tries(2, 4)]
    for size in sizes:
        with Ranks(size, lambda ranks: [evaluated(ranks, *case) for case in cases], tmp_path) as several:
            for each in several.results():
                for found, expected, case in zip(each, single, cases):
                    check_equal(found, expected)
                    assert found["images"] == found["confusion"].sum() == case[0]
    figure("evaluations on several processes", len(cases) * len(sizes))


@pytest.mark.slow
def test_evaluation_stopped_on_one_process_is_stopped_on_all(ranks):
    for each in ranks:
        assert each["stopped evaluation"][:2] == [None, None] and each["stopped evaluation"][2]["images"] == 101


@pytest.mark.slow
def test_functions_run_on_rank_0_or_first_on_one_process_per_node(ranks):
    assert [each["main"] for each in ranks] == ["done by 0"] * 2
    assert [each["main refused"] for each in ranks] == ["Refusal: rank 0 refuses"] * 2
    refusals = [f"Refusal: rank {rank} refuses" for rank in (0, 1, 0)]
    assert [each["first"] for each in ranks] == [["done by 0", *refusals], ["done by 1", *refusals]]
    assert [each["one after the other"] for each in ranks] == [True, True]


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with distributed.init("cpu") as ranks, distributed.watch(ranks, lambda: "step 1"):
        assert ranks == ONE_RANK and ranks.is_main and not torch.distributed.is_initialized()
        model = network()
        assert distributed.wrap(model, ranks, half_gradients=True) is model
        assert distributed.all_reduce_sum(torch.tensor(3)) == 3
        with distributed.no_sync(model) as nothing:
            assert nothing is None
        for run in (distributed.broadcast_from_main, distributed.local_main_first):
            assert outcome(lambda run=run: run(ranks, lambda: refuse([], ranks))) == "done by 0"
            assert outcome(lambda run=run: run(ranks, lambda: refuse([0], ranks))) == "Refusal: rank 0 refuses"
