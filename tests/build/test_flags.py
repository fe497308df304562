"""Each flag that changes the result of training sets the right value in the objects that are built from it."""

import contextlib
import dataclasses
import re
import shutil
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from building import build_objects, write_checkpoint
from miniatures import csv_files
from runs import FOLDER, load_state, make_tree, mark
from torchvision.transforms.v2 import InterpolationMode

from configs import RECIPES
from models import load_model
from utils.config import FLAGS
from utils.data.datasets import digits, open_splits
from utils.data.reading import Reading
from utils.data.splits import fingerprint
from utils.run import checkpoint
from utils.training.precision import LEVELS

TESTS = Path(__file__).resolve().parents[1]
TREE, MIX, START = " ".join(map(str, FOLDER)), "--mixup_alpha 1 --cutmix_alpha 1", "--pretrained_dir start"
DISTILLED = "--teacher start --distillation soft --precision fp32"
FC1, BICUBIC = "blocks.0.mlp.fc1", InterpolationMode.BICUBIC


def steps(loader) -> dict:
    return {type(step).__name__: step for step in loader.transform.transforms}


def answers(teacher) -> list[float]:
    return teacher(torch.full((1, 3, 8, 8), 99))[0].tolist()


def is_of_start(o, name: str) -> bool:
    return torch.equal(o.model.state_dict()[name], torch.load("start/best.pt", weights_only=True)["model"][name])


READ = {
    "optimizer": lambda o: type(o.trainer.optimizer).__name__, "reducer": lambda o: type(o.trainer.reducer).__name__,
    "trained": lambda o: {name for name, parameter in o.model.named_parameters() if parameter.requires_grad},
    "class weights": lambda o: o.trainer.criterion.class_weights.tolist(),
    "teacher": lambda o: answers(o.trainer.criterion.teacher),
    "edits": lambda o: (sorted(o.data.edits), o.train.edit_transform.args[0] is o.data.edits),
    "edits of an epoch": lambda o: sum(map(o.trainer.criterion.attention.edited_images, range(17))),
    "block": lambda o: is_of_start(o, f"{FC1}.weight"), "head": lambda o: is_of_start(o, "head.weight"),
    "augmentation": lambda o: list(steps(o.train)),
    "gray": lambda o: ["Grayscale" in steps(loader) for loader in (o.train, o.eval)],
    "batches": lambda o: [len(batch.targets) for batch in o.data.eval_loader(o.data.splits.val)],
    "first image": lambda o: o.data.splits.train.name(0),
    "images": lambda o: tuple(len(getattr(o.data.splits, name)) for name in ("train", "val", "test")),
    "reading": lambda o: o.data.splits.train.reading,
    "fingerprint": lambda o: fingerprint(o.data.splits.train),
    "dropout": lambda o: {part.p for part in o.model.modules() if isinstance(part, torch.nn.Dropout)},
    "due": lambda o: [number for number in range(1, 101) if o.run.is_due(number)],
}


def read(o, where: str):
    """Read a value of the objects `o`. rate@N: the learning rate of update N. group:PARAMETER/KEY: of the optimizer.
    train:STEP/NAME, eval:STEP/NAME: of a step of a transform. Anything else: a function of READ, or an attribute."""
    kind, _, rest = where.replace("@", ":").partition(":")
    if kind == "rate":
        return o.trainer.settings.schedule(int(rest))
    first, _, key = rest.partition("/")
    if kind == "group":
        parameter = o.model.get_parameter(first)
        groups = o.trainer.optimizer.param_groups
        return next(group[key] for group in groups if any(each is parameter for each in group["params"]))
    if rest:
        return getattr(steps(getattr(o, kind))[first], key)
    return READ[where](o) if where in READ else attrgetter(where)(o)


# (flags, {where to read: expected value}, flags that are set in both runs: with and without the first).
ROWS = [
    ("--optimizer sgd --momentum 0.5", {"optimizer": "SGD", "group:head.weight/momentum": 0.5}, ""),
    ("--optimizer adam", {"optimizer": "Adam"}, ""),
    ("--optimizer adamw", {"optimizer": "AdamW"}, "--optimizer sgd"),
    ("--head_learning_rate 2e-3", {"group:head.weight/lr_scale": 2}, ""),
    ("--layer_decay 0.5", {"group:cls_token/lr_scale": 0.25, f"group:{FC1}.weight/lr_scale": 0.5}, ""),
    ("--train_layers head", {"trained": {"head.weight", "head.bias"}}, ""),
    ("--freeze [!h]*", {"trained": {"head.weight", "head.bias"}}, ""),
    ("--weight_decay 0.5", {f"group:{FC1}.weight/weight_decay": 0.5, f"group:{FC1}.bias/weight_decay": 0.5}, ""),
    ("--decay_on matrices", {f"group:{FC1}.bias/weight_decay": 0}, "--weight_decay 0.5"),
    ("--ema_decay 0.5", {"trainer.ema.decay": 0.5}, ""),
    # In the recipe of digits 10 of 100 updates are warm-up, to 1e-3. An epoch has 1,097 / 64 = 17 steps.
    ("--decay_type linear --learning_rate 0.5 --min_learning_rate 0.1 --warmup_learning_rate 0.2 --warmup_steps 20 "
     "--num_steps 50", {"rate@0": 0.2, "rate@10": 0.35, "rate@20": 0.5, "rate@26": 0.42, "rate@50": 0.1,
                       "data.sampler.stop": 50}, ""),
    ("--num_epochs 2 --warmup_epochs 1", {"rate@1": 1e-3 / 17, "rate@17": 1e-3, "rate@34": 0.0, "data.sampler.stop": 34}, ""),
    ("--decay_type constant", {"rate@100": 1e-3}, ""),
    ("--decay_milestones 20,30", {"rate@21": 1e-4, "rate@31": 1e-5}, "--decay_type step --decay_milestones 40"),
    ("--train_batch_size 32 --gradient_accumulation_steps 4 --max_grad_norm 0.25 --non_finite skip",
     {"trainer.settings.batch_size": 32, "data.sampler.batch_size": 32, "trainer.settings.micro_steps": 4,
      "data.sampler.micro_size": 8, "trainer.settings.max_grad_norm": 0.25, "trainer.settings.non_finite": "skip"}, ""),
    ("--seed 7", {"trainer.settings.seed": 7, "data.sampler.seed": 7, "train.seed": 7, "trainer.criterion.mixer.seed": 7}, MIX),
    ("--exact", {"reducer": "ExactReducer"}, ""),
    ("--precision tf32", {"built.precision.name": "tf32"}, "--precision fp32"),
    ("--precision fp32", {"built.precision.name": "fp32"}, "--precision bf16"),
    ("--precision bf16", {"built.precision.name": "bf16 autocast"}, "--precision fp32"),
    ("--fp16 --fp16_opt_level O1 --loss_scale 128", {"built.precision": LEVELS["O1"], "trainer.scaler.fixed": 128}, ""),
    ("--fp16_opt_level O3", {"built.precision": LEVELS["O3"], "model.head.weight.dtype": torch.float16}, "--fp16"),
    ("--label_smoothing 0.25 --class_weights 2,3,1,5,1,1,1,1,1,1",
     {"trainer.criterion.label_smoothing": 0.25, "class weights": [2, 3, 1, 5, *[1] * 6]}, ""),
    ("--class_weights balanced", {"class weights": (109.7 / np.bincount(digits("").train.targets)).tolist()}, ""),
    ("--distillation hard --teacher start --distillation_alpha 0.25", {
        "trainer.criterion.distillation": "hard", "trainer.criterion.alpha": 0.25, "model.distilling": True}, ""),
    ("--distillation soft", {"trainer.criterion.distillation": "soft"}, "--teacher start --distillation hard"),
    ("--distillation_temperature 3", {"trainer.criterion.temperature": 3}, DISTILLED),
    ("--teacher other", {"teacher": lambda: answers(lambda images: load_model("other/best.pt")(images / 127.5 - 1))}, DISTILLED),
    ("--teacher turned", {"teacher": lambda: answers(lambda images: load_model("turned/best.pt")(images / 127.5 - 1).flip(1))},
     DISTILLED),                                                                            # its classes in another order
    ("--attention_edits edits --attention_loss_weight 20 --sigmoid_attention 1", {
        "edits": ([3, 9], True), "edits of an epoch": 2, "trainer.criterion.attention.weight": 20,
        "model.sigmoid_layers": (1,)}, START),
    ("--pretrained_dir start", {"block": True}, ""),
    ("--head keep", {"head": True}, START),
    ("--mixup_alpha 0.5 --cutmix_alpha 0.25 --mix_probability 0.75 --mix_switch_probability 0.125 --mix_off_steps 10",
     {"trainer.criterion.mixer.mixup_alpha": 0.5, "trainer.criterion.mixer.cutmix_alpha": 0.25,
      "trainer.criterion.mixer.probability": 0.75, "trainer.criterion.mixer.cutmix_probability": 0.125,
      "trainer.criterion.mixer.stop_at": 90}, MIX),
    ("--augmentation crop_flip --crop_scale 0.5 --rotation 20 --color_jitter 0.25 --randaugment_ops 3 --randaugment_magnitude 4 "
     "--random_erasing 0.25",
     {"augmentation": ["RandomResizedCrop", "RandomHorizontalFlip", "ToPILImage", "RandomRotation", "ColorJitter", "RandAugment",
                       "PILToTensor", "RandomErasing"],
      "train:RandomResizedCrop/scale": (0.5, 1), "train:RandomRotation/degrees": [-20, 20], "train:RandAugment/num_ops": 3,
      "train:ColorJitter/saturation": (0.75, 1.25), "train:RandAugment/magnitude": 4, "train:RandomErasing/p": 0.25}, TREE),
    ("--augmentation crop_flip", {"augmentation": ["RandomResizedCrop", "PILToTensor"]}, ""),      # no mirrored digits
    ("--augmentation pad --crop_padding 2", {"train:RandomCrop/padding": [2, 2, 2, 2]}, ""),
    ("--interpolation bicubic", {"train:Resize/interpolation": BICUBIC, "eval:Resize/interpolation": BICUBIC}, ""),
    ("--eval_crop 0.5 --eval_batch_size 100", {"eval:ResizeToCover/size": (16, 16), "batches": [100, 100]}, ""),
    ("--num_workers 3 --bad_images skip", {"train.num_workers": 3, "eval.num_workers": 3, "train.bad_images": "skip"}, ""),
    ("--dataset folder", {"data.splits.classes": ("ant", "bee")}, "--recipe digits"),
    ("--data_dir wood", {"data.splits.classes": ("cat", "dog")}, TREE),
    ("--class_order text", {"data.splits.classes": ("10", "2")}, "--dataset folder --data_dir numbers --recipe digits"),
    ("--path_column other --label_column kind --image_dir small", {
        "first image": "small/b.png", "data.splits.classes": ("p", "q")}, "--dataset csv --data_dir lists --recipe digits"),
    ("--exif off --intensity_range 0,1023 --alpha mask", {"reading": Reading("off", (0, 1023), "mask")}, TREE),
    ("--val_fraction 0.25", {"images": (16, 4, 20), "data.splits.val_is_drawn": True}, TREE),
    ("--test_fraction 0.25", {"images": (1347, 450, 450)}, ""),
    ("--split_seed 5", {"fingerprint": fingerprint(open_splits("digits", "", test_fraction=0.25, split_seed=5).train)},
     "--test_fraction 0.25"),
    ("--model_type MAE-B_16", {"model.config.classifier": "patch_mean"}, ""),
    ("--img_size 16x24 --patch_size 4 --hidden_size 32 --mlp_dim 64 --num_heads 4 --num_layers 3 --in_channels 1 "
     "--classifier gap --mean 0.25 --std 0.125,0.25,0.375 --dropout_rate 0.25 --attention_dropout_rate 0.125 "
     "--drop_path_rate 0.5",
     {"model.img_size": (16, 24), "train:Resize/size": [16, 24], "eval:Resize/size": [16, 24], "dropout": {0.25},
      "model.patch_embed.proj.weight.shape": (32, 1, 4, 4), f"model.{FC1}.weight.shape": (64, 32), "model.grid": (4, 6),
      "model.blocks.0.attn.num_heads": 4, "gray": [True, True], "model.blocks.2.drop_path.p": 0.5,
      "model.blocks.0.attn.attend.dropout_rate": 0.125, "model.num_prefix_tokens": 0,
      "model.config.mean": (0.25,), "model.config.std": (0.25,), "model.config.channel_std": (0.125, 0.25, 0.375)}, ""),
    ("--test once --eval_every 30 --save_every 40", {"due": [30, 40, 60, 80, 90, 100], "data.evaluated_before.name": "val"}, ""),
]
# Flags that do not change the result of training, or whose effect needs a run: the test that shows their effect.
ELSEWHERE = {
    "build/test_flags.py::test_every_recipe_becomes_objects": ["recipe"],
    "build/test_find.py::test_train_passes_device_and_timeout_to_the_process_group": ["device", "rank_timeout"],
    "system/test_train.py::test_where_and_how_often_a_run_writes": ["name", "output_dir", "log_dir", "keep_checkpoints"],
    "system/test_train.py::test_eval_only_repeats_the_evaluation_and_writes_nothing": ["eval_only"],
    "system/test_train.py::test_an_image_and_its_mirror_image_are_evaluated_together": ["tta"],
    "system/test_train.py::test_tables_by_class_and_the_training_accuracy_are_written": ["eval_train", "confusion_matrix"],
    "system/test_train.py::test_unreadable_images_stop_the_run_or_are_skipped": ["max_bad_images"],
    "system/test_train.py::test_a_compiled_run_learns_the_same": ["compile"],
    "system/test_train.py::test_profile_writes_a_trace": ["profile"],
    "system/test_train.py::test_wandb_gets_the_metrics_and_its_key_reaches_no_file": ["wandb"],
    "system/test_resuming.py::test_a_finished_run_trains_nothing_and_reports_its_result_again": ["resume_path"],
    "system/test_resuming.py::test_what_override_lets_change": ["override"],
}
# Where the values of a recipe are read.
LANDS = {"weight_decay": "group:head.weight/weight_decay", "train_batch_size": "trainer.settings.batch_size",
         "max_grad_norm": "trainer.settings.max_grad_norm", "label_smoothing": "trainer.criterion.label_smoothing",
         "mixup_alpha": "trainer.criterion.mixer.mixup_alpha", "random_erasing": "train:RandomErasing/p",
         "in_channels": "model.config.in_channels", "dropout_rate": "model.config.dropout_rate",
         "drop_path_rate": "model.blocks.1.drop_path.p", "num_steps": "data.sampler.stop"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Make data, a checkpoint to start from, another one as a teacher, and edits. Return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("home"))
        make_tree(Path("tree"), images=10)
        make_tree(Path("data"))
        make_tree(Path("wood"), ("cat", "dog"))
        make_tree(Path("numbers"), ("10", "2"))
        rows = "".join(f"{name}.png,xy{number % 2},{'pq'[number % 2]},{other}.png\n" for number, (name, other) in enumerate(
            zip("abcd", "bcda")))
        text = f"image,label,kind,other\n{rows}"
        csv_files(Path("lists"), train=text, val=text)
        csv_files(Path("lists/small"))
        write_checkpoint(Path("start/best.pt"), "--seed", 5)
        write_checkpoint(Path("other/best.pt"), "--seed", 3)
        shutil.copytree("other", "turned")
        turned = load_state("turned/best.pt")
        checkpoint.save(Path("turned/best.pt"), dataclasses.replace(turned, classes=turned.classes[::-1]))
        mark(Path("edits"), [3, 9])
        return Path.cwd()


@pytest.mark.parametrize(("words", "values", "others"), ROWS, ids=[row[0].replace("--", "")[:60] for row in ROWS])
def test_a_flag_sets_its_value_in_the_objects(home, monkeypatch, words, values, others):
    monkeypatch.chdir(home)
    objects = [build_objects(*text.split()) for text in (f"{others} {words}", others)]
    for where, expected in values.items():
        value, expected = read(objects[0], where), expected() if callable(expected) else expected
        rounds = isinstance(expected, float) or (isinstance(expected, list) and isinstance(expected[0], float))
        assert value == (pytest.approx(expected, rel=1e-4) if rounds else expected), where
        with contextlib.suppress(AttributeError, KeyError, TypeError, StopIteration):          # without the flag it may not exist
            assert read(objects[1], where) != value, f"{where} is the same without the flag"


def test_each_flag_has_a_test():
    here = set(re.findall(r"--(\w+)", " ".join(row[0] for row in ROWS)))
    assert sorted([*here, *(flag for flags in ELSEWHERE.values() for flag in flags)]) == sorted(FLAGS)
    for file, test in (name.split("::") for name in ELSEWHERE):
        assert f"def {test}(" in (TESTS / file).read_text(), test


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_becomes_objects(recipe):
    objects, row = build_objects("--recipe", recipe, "--num_layers", 2), RECIPES[recipe]
    assert type(objects.trainer.optimizer).__name__.lower() == row.get("optimizer", "adamw")
    for name in LANDS.keys() & row.keys():
        assert read(objects, LANDS[name]) == pytest.approx(row[name]), name
