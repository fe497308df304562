"""Two processes do what one does; errors of one reach the other; devices that are not there."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from utils import data, distributed, engine
from utils.augment import normalise
from utils.distributed import DeviceError, World
from utils.optim import build_optimizer
from utils.precision import FP32, LEVELS, LossScaler

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
PATIENCE = 60        # seconds until a rank that waits for nobody gives up: the tests then fail instead of hanging
STEPS = 20

# -------------------------------------------------------------------------------- what each of two ranks does


def to_input(images):
    return normalise(images, (0.5,) * 3, (0.5,) * 3)


def network(dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 10))


def make_trainer(model, wrapped, world, row, micro_steps) -> engine.Trainer:
    optimizer = build_optimizer("sgd", model.parameters(), 0.1, 0.0)
    return engine.Trainer(wrapped, optimizer, LossScaler(row, CPU), row, world, to_input, batch_size=32,
                          micro_steps=micro_steps, max_grad_norm=1.0, seed=1)


def batches(world, micro_steps):
    """Those of this rank, of 20 steps of 32 digits each"""
    digits = data.digits("").train
    order = data.StepOrder(len(digits), 32, micro_steps * world.size, world.rank, world.size, 5, 0, STEPS)
    return iter(data.train_loader(digits, order, img_size=(8, 8), augmentation="crop", can_flip=False, seed=5, num_workers=0,
                                  pin_memory=False))


def trained(world, row=FP32, micro_steps=1, dropout=0.0) -> dict:
    model, own = network(dropout), batches(world, micro_steps)
    trainer = make_trainer(model, distributed.wrap(model, world, row.half_gradients), world, row, micro_steps)
    reports = [trainer.train_step(own, 0.1) for _ in range(STEPS)]
    return {"losses": [report.loss for report in reports], "norms": [report.grad_norm for report in reports],
            "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()])}


def times_sent(world, micro_steps: int) -> int:
    """How often one step sends gradients"""
    model, sent = network(), []
    wrapped = distributed.wrap(model, world)

    def count(_, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    make_trainer(model, wrapped, world, FP32, micro_steps).train_step(batches(world, micro_steps), 0.1)
    return len(sent)


def evaluated(world, images: int) -> dict:
    split = data.digits("").val
    split = data.ArrayImages(split.images[:images], split.labels[:images])
    loader = data.eval_loader(split, batch_size=8, img_size=(8, 8), rank=world.rank, world_size=world.size, num_workers=0,
                              pin_memory=False)
    report = engine.evaluate(network(), loader, to_input, FP32, world, 10, confusion=True)
    return {"images": report.images, "top1": report.top1, "top5": report.top5, "loss": report.loss,
            "confusion": report.confusion}


class Refusal(ValueError):
    """Stands for the errors of this program."""


def refuse(ranks, world, log=None):
    if log is not None:
        log.append(world.rank)
    if world.rank in ranks:
        raise Refusal(f"rank {world.rank} refuses")
    return f"done by {world.rank}"


def outcome(function) -> str:
    try:
        return str(function())
    except Refusal as error:
        return f"Refusal: {error}"


def one_after_the_other(world, folder: Path) -> bool:
    """Whether what the first process writes is there for the second"""
    place = folder / "slowly written"

    def write_or_read():
        if world.local_rank == 0:
            time.sleep(0.3)
            place.write_text("x")
        return place.exists()

    return distributed.first_on_node(world, write_or_read)


def scenarios(world: World, folder: Path) -> dict:
    log = []
    return {
        "world": (world.rank, world.size, world.local_rank, world.local_size, world.is_main, str(world.device)),
        "sum": distributed.sum_over_ranks(torch.tensor([1, 10 ** 15 + world.rank])).tolist(),
        "plain": trained(world),
        "dropout": trained(world, dropout=0.5),
        "O1": trained(world, LEVELS["O1"]),
        "O2": trained(world, LEVELS["O2"]),
        "sent by 1 micro-step": times_sent(world, 1),
        "sent by 4 micro-steps": times_sent(world, 4),
        "evaluation of 101": evaluated(world, 101),
        "evaluation of 1": evaluated(world, 1),
        "on_main": outcome(lambda: distributed.on_main(world, lambda: refuse([], world, log))),
        "on_main ran on": list(log),
        "on_main refused": outcome(lambda: distributed.on_main(world, lambda: refuse([0], world))),
        "first_on_node": outcome(lambda: distributed.first_on_node(world, lambda: refuse([], world))),
        "first_on_node refused by 0": outcome(lambda: distributed.first_on_node(world, lambda: refuse([0], world))),
        "first_on_node refused by 1": outcome(lambda: distributed.first_on_node(world, lambda: refuse([1], world))),
        "first_on_node refused by both": outcome(lambda: distributed.first_on_node(world, lambda: refuse([0, 1], world))),
        "one after the other": one_after_the_other(world, folder),
        "at the end": torch.distributed.barrier() or "together",
    }


def rank(number: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    world = distributed.start("cpu", PATIENCE)
    try:
        torch.save(scenarios(world, folder), folder / f"{number}.pt")
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the two ranks report"""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = multiprocessing.spawn(rank, (port, folder), nprocs=2, join=False)
    deadline = time.monotonic() + 4 * PATIENCE
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{number}.pt") for number in (0, 1)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------- two processes

@pytest.mark.slow
def test_two_processes_know_their_places(ranks):
    assert [each["world"] for each in ranks] == [(0, 2, 0, 2, True, "cpu"), (1, 2, 1, 2, False, "cpu")]
    assert [each["sum"] for each in ranks] == [[2, 2 * 10 ** 15 + 1]] * 2
    assert [each["at the end"] for each in ranks] == ["together"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("what", "micro_steps", "dropout"), [("plain", 1, 0.0), ("plain", 2, 0.0), ("dropout", 2, 0.5)],
                         ids=["as one batch", "as two micro-batches", "as two micro-batches with dropout"])
def test_two_processes_train_as_one(ranks, one_thread, what, micro_steps, dropout):
    alone = trained(ALONE, micro_steps=micro_steps, dropout=dropout)
    distance = (alone["weights"] - torch.cat([p.detach().flatten() for p in network().parameters()])).norm()
    for each in ranks:
        got = each[what]
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        torch.testing.assert_close(got["weights"], alone["weights"], rtol=0, atol=1e-5)
        assert (got["weights"] - alone["weights"]).norm() < 1e-5 * distance
    assert ranks[0][what]["losses"] == ranks[1][what]["losses"]
    assert torch.equal(ranks[0][what]["weights"], ranks[1][what]["weights"])


@pytest.mark.slow
def test_half_gradients_cross_the_network_at_O2_alone(ranks, one_thread):
    """Two roundings in place of one: other weights than O1's, close to them; on one process nothing is sent."""
    first, second = ranks[0]["O1"]["weights"], ranks[0]["O2"]["weights"]
    distance = (first - torch.cat([p.detach().flatten() for p in network().parameters()])).norm()
    assert 0 < (first - second).norm() < 0.02 * distance
    assert torch.equal(second, ranks[1]["O2"]["weights"])
    assert ranks[0]["O2"]["losses"] == pytest.approx(ranks[0]["O1"]["losses"], rel=0.01)
    assert torch.equal(trained(ALONE, LEVELS["O1"])["weights"], trained(ALONE, LEVELS["O2"])["weights"])


@pytest.mark.slow
def test_gradients_are_sent_once_a_step(ranks):
    for each in ranks:
        assert each["sent by 1 micro-step"] == each["sent by 4 micro-steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("images", [101, 1])
def test_evaluation_on_two_processes_is_that_on_one(ranks, one_thread, images):
    alone = evaluated(ALONE, images)
    for each in ranks:
        got = each[f"evaluation of {images}"]
        assert (got["images"], got["top1"], got["top5"]) == (images, alone["top1"], alone["top5"])
        assert torch.equal(got["confusion"], alone["confusion"]) and got["confusion"].sum() == images
        assert got["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.slow
def test_on_main(ranks):
    assert [each["on_main"] for each in ranks] == ["done by 0"] * 2
    assert [each["on_main ran on"] for each in ranks] == [[0], []]
    assert [each["on_main refused"] for each in ranks] == ["Refusal: rank 0 refuses"] * 2


@pytest.mark.slow
def test_first_on_node(ranks):
    assert [each["first_on_node"] for each in ranks] == ["done by 0", "done by 1"]
    assert [each["first_on_node refused by 0"] for each in ranks] == ["Refusal: rank 0 refuses"] * 2
    assert [each["first_on_node refused by 1"] for each in ranks] == ["Refusal: rank 1 refuses"] * 2
    assert [each["first_on_node refused by both"] for each in ranks] == ["Refusal: rank 0 refuses"] * 2
    assert [each["one after the other"] for each in ranks] == [True, True]


# -------------------------------------------------------------------------------------------------- one process

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def no_gpu(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_one_process_needs_no_group(no_gpu):
    with distributed.group() as world:
        assert world == ALONE and world.is_main and not torch.distributed.is_initialized()
        model = network()
        assert distributed.wrap(model, world, half_gradients=True) is model
        assert distributed.sum_over_ranks(torch.tensor(3)) == 3
        with distributed.without_sync(model) as nothing:
            assert nothing is None
        assert outcome(lambda: distributed.on_main(world, lambda: refuse([], world))) == "done by 0"
        assert outcome(lambda: distributed.on_main(world, lambda: refuse([0], world))) == "Refusal: rank 0 refuses"
        assert outcome(lambda: distributed.first_on_node(world, lambda: refuse([], world))) == "done by 0"
        assert outcome(lambda: distributed.first_on_node(world, lambda: refuse([0], world))) == "Refusal: rank 0 refuses"


@pytest.mark.parametrize(("device", "visible", "words"), [
    ("cuda", None, "--device cuda"), ("cuda", "0", "--device cuda"), ("auto", "0", "GPUS=0 asks"),
    ("auto", "1,2", "GPUS=1,2 asks")])
def test_a_gpu_that_is_not_there_is_told(monkeypatch, no_gpu, device, visible, words):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=words) as told:
        distributed.start(device)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("device", "visible"), [("auto", None), ("auto", ""), ("auto", "-1"), ("cpu", "0"), ("cpu", None)])
def test_the_cpu_where_nobody_asked_for_a_gpu(monkeypatch, no_gpu, device, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.start(device) == ALONE


def test_devices_where_there_are_gpus(two_gpus):
    assert distributed.start("auto").device == distributed.start("cuda").device == torch.device("cuda", 0)
    assert distributed.start("cpu").device == CPU


def test_more_processes_than_gpus_are_told(monkeypatch, two_gpus):
    for name, value in zip(TORCHRUN, "0303"):
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match="3 processes on this node but 2 GPUs: set NPROC=2"):
        distributed.start("auto")
