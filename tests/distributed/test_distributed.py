"""Two processes do what one does; errors of one reach the other; devices that are not there."""

import operator
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import nn

from configs import architecture
from models import create_model, record_patch_logits
from utils import distributed
from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.mixup import Mixer
from utils.data.splits import ArrayImages
from utils.data.transforms import eval_transform, normalise, train_transform
from utils.distributed import DeviceError, World
from utils.training import evaluation
from utils.training import trainer as engine
from utils.training.criterion import AttentionSupervision, Criterion
from utils.training.ema import Ema
from utils.training.exact import ExactReducer
from utils.training.optimizer import build_optimizer
from utils.training.precision import FP32, LEVELS, LossScaler, warm_up

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
STEPS = 20
TOP = operator.itemgetter("accuracy", "top2", "top3", "top4", "top5")

# -------------------------------------------------------------------------------- what each of two ranks does


def to_input(images):
    return normalise(images, (0.5,) * 3, (0.5,) * 3)


def network(dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 10))


def half_frozen_with_two_heads() -> nn.Module:
    """DeiT whose embeddings and first block are not trained"""
    torch.manual_seed(0)
    model = create_model(architecture(4, 16, 32, 2, 2, img_size=8, distilled=True), 10)
    model.distilling = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.depth_of(name) > 1)
    return model


def make_trainer(model, wrapped, world, row, micro_steps, optimizer=None, criterion=None, rate=0.1, non_finite="stop",
                 **more) -> engine.Trainer:
    settings = engine.StepSettings(32, micro_steps, 1.0, 1, lambda update: rate, non_finite)
    return engine.Trainer(wrapped, optimizer or build_optimizer("sgd", model.parameters(), rate), criterion or Criterion(),
                          LossScaler(row, CPU), row, world, to_input, settings, **more)


PLAIN = train_transform("crop", (8, 8))
EVERYTHING = train_transform("crop_flip", (8, 8), crop_scale=0.5, rotation=15.0, color_jitter=0.3, randaugment_ops=2,
                             random_erasing=0.7)


def mixer() -> Mixer:
    return Mixer(10, 32, 7, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8, stop_at=STEPS - 3)


def order_of(world, micro_steps, start=0) -> data.StepOrder:
    """Those of this rank, of 20 steps of 32 digits each"""
    return data.StepOrder(len(digits("").train), 32, micro_steps * world.size, world.rank, world.size, 5, start, STEPS)


def batches(world, micro_steps, transform=PLAIN, num_workers=0, start=0, **more):
    return iter(data.train_loader(digits("").train, order_of(world, micro_steps, start), transform=transform, seed=5,
                                  num_workers=num_workers, pin_memory=False, **more))


def taught(images):
    weight = torch.randn(192, 10, generator=torch.Generator().manual_seed(3)) / 50
    return images.float().flatten(1) @ weight


def trained(world, row=FP32, micro_steps=1, dropout=0.0, everything=False, model=None) -> dict:
    """`everything`: augmented and mixed images, smoothed and weighed labels, a teacher, and an average of the weights"""
    model, more = model or network(dropout), {}
    own = batches(world, micro_steps, EVERYTHING if everything else PLAIN)
    if everything:
        criterion = Criterion(0.1, torch.linspace(0.5, 2, 10), mixer(), "soft", taught, 0.3, 2.0)
        more = {"criterion": criterion, "ema": Ema(model, 0.8)}
    trainer = make_trainer(model, distributed.wrap(model, world, row.half_gradients), world, row, micro_steps, **more)
    reports = [trainer.train_step(own)[0] for _ in range(STEPS)]
    models = {"weights": model} | ({"average": more["ema"].model} if more else {})
    return {"losses": [report.loss for report in reports], "norms": [report.grad_norm for report in reports],
            "accuracies": [report.accuracy for report in reports],
            **{name: torch.cat([parameter.detach().flatten() for parameter in each.parameters()])
               for name, each in models.items()}}


def trained_on_edits(world, micro_steps=1) -> dict:
    """Of images that are cropped and mirrored, every seventh has an edit: some steps have few, some micro-batches none."""
    torch.manual_seed(0)
    model = create_model(architecture(2, 16, 32, 2, 2, img_size=8), 10, sigmoid_attention="all")
    generator = np.random.default_rng(0)
    edits = {index: Edit("", "", generator.random((4, 4), np.float32), generator.random((4, 4)) < 0.7)
             for index in range(0, 1097, 7)}
    order = order_of(world, micro_steps)
    attention = AttentionSupervision(20.0, lambda: record_patch_logits(model),
                                     lambda step: sum(key.index in edits for key in order.keys_of(step)))
    own = batches(world, micro_steps, train_transform("crop_flip", (8, 8), crop_scale=0.5), edits=edits, grid=(4, 4))
    trainer = make_trainer(model, distributed.wrap(model, world), world, FP32, micro_steps,
                           criterion=Criterion(attention=attention))
    reports = [trainer.train_step(own)[0] for _ in range(STEPS)]
    return {"losses": [report.loss for report in reports], "attention": [report.attention_loss for report in reports],
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
    make_trainer(model, wrapped, world, FP32, micro_steps).train_step(batches(world, micro_steps))
    return len(sent)


def skipping(world, exact: bool) -> dict:
    """Rank 1's gradient is NaN in steps 2 and 3, its loss infinite in step 5 of 6; all are skipped."""
    model, reports = network(), []
    trainer = make_trainer(model, model if exact else distributed.wrap(model, world), world, FP32, 1, non_finite="skip",
                           reducer=ExactReducer(model, world) if exact else None, ema=Ema(model, 0.5),
                           requests=lambda: (world.rank, 1))

    def spoil(gradient):
        return gradient * float("nan") if world.rank == 1 and trainer.step in (1, 2) else gradient

    def prepare(images):
        return to_input(images) * (1e38 if world.rank == 1 and trainer.step == 4 else 1)

    model[1].weight.register_hook(spoil)
    trainer.normalize, own = prepare, batches(world, 1)
    weights = []
    for _ in range(6):
        reports.append(trainer.train_step(own)[0])
        models = (model, trainer.ema.model)
        weights.append(torch.cat([parameter.detach().flatten() for each in models for parameter in each.parameters()]))
    return {"skipped": [report.skipped for report in reports], "requests": [tuple(report.requests) for report in reports],
            "counts": tuple(trainer.progress), "weights": torch.stack(weights)}


def evaluated(world, images: int, batch_size: int = 8, **more) -> dict:
    split = digits("").val
    split = ArrayImages(split.images[:images], split.labels[:images])
    loader = data.eval_loader(split, transform=eval_transform((8, 8)), batch_size=batch_size, rank=world.rank,
                              world_size=world.size, num_workers=0, pin_memory=False)
    report = evaluation.evaluate(network(), loader, to_input, FP32, world, 10, confusion=True, **more)
    return report and vars(report)


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
        "everything": trained(world, dropout=0.5, everything=True),
        "two heads": trained(world, micro_steps=2, everything=True, model=half_frozen_with_two_heads()),
        "edits": trained_on_edits(world, micro_steps=2),
        "O1": trained(world, LEVELS["O1"]),
        "O2": trained(world, LEVELS["O2"]),
        "skips": skipping(world, exact=False),
        "exact skips": skipping(world, exact=True),
        "sent by 1 micro-step": times_sent(world, 1),
        "sent by 4 micro-steps": times_sent(world, 4),
        "evaluation of 101": evaluated(world, 101),
        "evaluation of 1": evaluated(world, 1),
        "stopped evaluation": [evaluated(world, 101, stop_requested=lambda rank=rank: world.rank == rank) for rank in range(3)],
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the two ranks report"""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(2, lambda world: scenarios(world, folder), folder) as both:
        return both.results()


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
@pytest.mark.parametrize(("what", "micro_steps", "dropout"), [
    ("plain", 1, 0.0), ("plain", 2, 0.0), ("dropout", 2, 0.5), ("everything", 2, 0.5)],
    ids=["as one batch", "as two micro-batches", "as two micro-batches with dropout",
         "with dropout, augmented and mixed images, a teacher, an average"])
def test_two_processes_train_as_one(ranks, one_thread, what, micro_steps, dropout):
    alone = trained(ALONE, micro_steps=micro_steps, dropout=dropout, everything=what == "everything")
    distance = (alone["weights"] - torch.cat([p.detach().flatten() for p in network().parameters()])).norm()
    for each in ranks:
        got = each[what]
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert got["accuracies"] == alone["accuracies"]
        for name in {"weights", "average"} & set(alone):
            torch.testing.assert_close(got[name], alone[name], rtol=0, atol=1e-5)
        assert (got["weights"] - alone["weights"]).norm() < 1e-5 * distance
    assert ("average" in alone) == (what == "everything")
    assert ranks[0][what]["losses"] == ranks[1][what]["losses"]
    assert torch.equal(ranks[0][what]["weights"], ranks[1][what]["weights"])


@pytest.mark.slow
def test_two_processes_train_two_heads_and_half_a_model_as_one(ranks):
    alone = trained(ALONE, micro_steps=2, everything=True, model=half_frozen_with_two_heads())
    start = torch.cat([parameter.detach().flatten() for parameter in half_frozen_with_two_heads().parameters()])
    frozen = torch.cat([torch.full((parameter.numel(),), not parameter.requires_grad)
                        for parameter in half_frozen_with_two_heads().parameters()])
    for each in ranks:
        got = each["two heads"]
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name in ("weights", "average"):
            torch.testing.assert_close(got[name], alone[name], rtol=0, atol=1e-5)
            assert torch.equal(got[name][frozen], start[frozen]) and (got[name] != start)[~frozen].float().mean() > 0.99
    assert torch.equal(ranks[0]["two heads"]["weights"], ranks[1]["two heads"]["weights"])


@pytest.mark.slow
def test_two_processes_learn_edits_as_one(ranks, one_thread):
    alone = trained_on_edits(ALONE)
    assert alone["attention"][-1] < alone["attention"][0]
    for each in ranks:
        assert each["edits"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert each["edits"]["attention"] == pytest.approx(alone["attention"], rel=1e-5)
        torch.testing.assert_close(each["edits"]["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert torch.equal(ranks[0]["edits"]["weights"], ranks[1]["edits"]["weights"])


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
        assert got["images"] == images and TOP(got) == TOP(alone)
        assert torch.equal(got["confusion"], alone["confusion"]) and got["confusion"].sum() == images
        for name in ("loss", "true_probability", "calibration_error"):
            assert got[name] == pytest.approx(alone[name], rel=1e-6)


@pytest.mark.slow
@pytest.mark.contract("P15", "an evaluation counts every image once, whatever the processes and the batch size")
def test_evaluation_is_exact_for_any_number_of_processes(tmp_path, tries, figure, one_thread):
    """Images that do not divide by the processes, fewer images than processes, batches of all sizes"""
    cases = [(images, batch_size) for images in (1, 2, 3, 7, 64, 101, 200) for batch_size in (1, 8, 33, 500)][::tries(3, 1)]
    alone, sizes = [evaluated(ALONE, *case) for case in cases], (2, 3, 4, 5)[1:tries(2, 4)]
    for size in sizes:
        with Ranks(size, lambda world: [evaluated(world, *case) for case in cases], tmp_path) as several:
            for each in several.results():
                for got, expected, case in zip(each, alone, cases):
                    assert (got["images"], TOP(got)) == (case[0], TOP(expected))
                    assert torch.equal(got["confusion"], expected["confusion"])
                    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    figure("evaluations on several processes", len(cases) * len(sizes))


@pytest.mark.slow
def test_an_evaluation_that_one_process_stops_is_stopped_on_all(ranks):
    for each in ranks:
        assert each["stopped evaluation"][:2] == [None, None] and each["stopped evaluation"][2]["images"] == 101


@pytest.mark.slow
@pytest.mark.contract("P11", "a loss or gradient that is not finite on one process is skipped on all")
def test_one_process_that_is_not_finite_skips_the_update_of_all(ranks, figure):
    for kind in ("skips", "exact skips"):
        for each in ranks:
            got = each[kind]
            assert got["skipped"] == [False, True, True, False, True, False] and got["counts"] == (6, 3, 0)
            assert got["requests"] == [(1.0, 2.0, 0.0)] * 6 and got["weights"].isfinite().all()
            assert [bool((after != before).any()) for before, after in zip(got["weights"], got["weights"][1:])] == [
                False, False, True, False, True]
        assert torch.equal(ranks[0][kind]["weights"], ranks[1][kind]["weights"])
    figure("steps with NaN or infinity on one of two processes", 6)


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


# ----------------------------------------------------------------------- ranks, workers and restarts, bit for bit


def part_of_a_run(world, steps: int, file: Path, killed: bool = False) -> dict:
    """Goes on from `file` if it is there, for some steps; then saves there, and dies if `killed`"""
    model = half_frozen_with_two_heads()
    optimizer, done = build_optimizer("adamw", model.parameters(), 1e-3), 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    wrapped = distributed.wrap(model, world)
    warm_up(wrapped, torch.zeros(2, 3, 8, 8), FP32)
    criterion = Criterion(0.1, None, mixer(), "soft", taught, 0.3, 2.0)
    trainer = make_trainer(model, wrapped, world, FP32, 2, optimizer, criterion, 1e-3, progress=engine.Progress(done, done))
    own = batches(world, 2, start=done)
    for _ in range(steps):
        trainer.train_step(own)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": trainer.step}
    if world.is_main:
        torch.save(state, file)
    if killed:
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    return state


@pytest.mark.slow
@pytest.mark.contract("P3", "a run on several processes that is killed and resumed is, bit for bit, the run that was not")
def test_a_run_on_many_processes_is_resumed_bit_for_bit(tmp_path, tries, figure):
    """From three on the order in which ranks are added decides bits; it has to be the same in every life of a process."""
    kills = 0
    for size, cuts in [(4, (3, 3)), (8, (1, 5)), (4, (1, 1, 4)), (8, (4, 2))][:tries(1, 4)]:
        with Ranks(size, lambda world: part_of_a_run(world, 6, tmp_path / "whole"), tmp_path) as several:
            whole = several.results()[0]
        for number, steps in enumerate(cuts, 1):
            killed = number < len(cuts)
            with Ranks(size, lambda world, steps=steps, killed=killed: part_of_a_run(world, steps, tmp_path / "parts", killed),
                       tmp_path) as several:
                assert several.wait() == [-9 if killed else 0] * size
                kills += killed
        parts = torch.load(tmp_path / "parts")
        assert parts["step"] == whole["step"] == 6
        for name, weight in whole["model"].items():
            assert torch.equal(parts["model"][name], weight), name
        assert str(parts["optimizer"]) == str(whole["optimizer"])
        (tmp_path / "whole").unlink()
        (tmp_path / "parts").unlink()
    figure("kills of runs on four and eight processes", kills)


def mixed_steps(ranks=1, micro_steps=1, num_workers=0, start=0) -> list[tuple[torch.Tensor, ...]]:
    """Of each step the images, augmented and mixed, their targets and their labels, put together over ranks and micro-steps"""
    parts = [batches(World(rank, ranks, rank, ranks, CPU), micro_steps, EVERYTHING, num_workers, start) for rank in range(ranks)]
    steps, mix = [], mixer()
    for step in range(start, STEPS):
        mixed = []
        for own in parts:
            for batch in (next(own) for _ in range(micro_steps)):
                key = batch.keys[0]
                assert key.step == step
                mixed.append((*mix(batch.images.float(), batch.targets, key.step, key.micro * len(batch.keys)), batch.targets))
        steps.append(tuple(map(torch.cat, zip(*mixed))))
    return steps


@pytest.fixture(scope="module")
def steps_of_one():
    return mixed_steps()


@pytest.mark.parametrize("cut", [
    {"num_workers": 2}, {"ranks": 2}, {"ranks": 2, "micro_steps": 2, "num_workers": 2}, {"micro_steps": 4}, {"start": 5},
    {"start": 5, "ranks": 4, "micro_steps": 2}], ids=str)
def test_seed_and_step_alone_decide_what_a_step_sees(steps_of_one, cut):
    found = mixed_steps(**cut)
    assert len(found) == STEPS - cut.get("start", 0)
    for got, expected in zip(found, steps_of_one[-len(found):]):
        assert all(torch.equal(one, other) for one, other in zip(got, expected))


def test_no_step_sees_what_another_sees(steps_of_one):
    images, targets, _ = zip(*steps_of_one)
    assert len({each.numpy().tobytes() for step in images for each in step}) == 32 * STEPS
    shares = [each.amax(dim=1) for each in targets]
    assert all((share < 1).any() for share in shares[:-3]) and all((share == 1).all() for share in shares[-3:])


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
