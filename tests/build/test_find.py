"""What is found out before the configuration is final (data, start weights, saved run), and its records."""

import dataclasses
import json
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch
from building import ONE_RANK, write_checkpoint
from headers import save_plain
from ranks import Ranks
from runs import FOLDER, load_state, make_tree
from start_folders import start_folder

import models
import train
from configs import architecture
from models import create_model
from models.checkpoints.opened import OpenedCheckpoint
from utils import build, distributed
from utils.build.find import check_start, license_of_start, open_data, open_start, view_of
from utils.config import ConfigError, Machine, choose, resolve
from utils.data.reading import Reading
from utils.data.splits import DataError
from utils.device import total_memory
from utils.run import checkpoint


def test_train_passes_device_and_timeout_to_the_process_group(monkeypatch, capsys):
    given = []

    def init(*arguments):
        given.append(arguments)
        raise ConfigError("no further")

    monkeypatch.setattr(distributed, "init", init)
    assert [train.main(argv) for argv in ([], ["--device", "cpu", "--rank_timeout", "77"])] == [2, 2]
    assert given == [("auto", 600), ("cpu", 77)]


def test_nodes_check_files_together(monkeypatch, capsys):
    """Before torchrun, train.sh only checks the flags themselves: a file that is missing on one node has to end the other nodes
    too."""
    for processes, code in (("2x2", 2), ("4x2", 0)):
        monkeypatch.setenv("VIT_CHECK", processes)
        assert train.main(["--pretrained_dir", "gone.npz"]) == code
    assert train.main(["--pretrained_dirr", "gone.npz"]) == 2


def test_facts_are_those_of_the_data_and_the_start(tmp_path, monkeypatch):
    facts = write_checkpoint(tmp_path / "best.pt").found.facts
    assert (facts.train_images, facts.num_classes, facts.image_sizes) == (1097, 10, ())
    assert (facts.test_is_val, facts.start_settings, facts.start_head_classes) == (False, None, None)
    sources = choose({"pretrained_dir": str(tmp_path), "test_fraction": 0.2})
    facts = build.find(sources, None, ONE_RANK).facts
    assert (facts.test_is_val, facts.start_settings["num_heads"], facts.start_head_classes) == (True, 2, 10)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda ranks, seen: [seen, (*seen[:-1], "other names")])
    with pytest.raises(DataError, match="the nodes have different data"):
        build.find(sources, None, ONE_RANK)


def test_memory_and_cores_are_the_least_of_all_processes(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_objects", lambda ranks, own: [own, (own[0] - 1, 99), (own[0] + 1, 1)])
    own = total_memory(ONE_RANK.device)
    assert build.machine(ONE_RANK) == Machine("cpu", own - 1, 1)


def test_images_are_read_as_by_the_run_whose_head_is_kept(tmp_path):
    """For another task the data decide again how to read them. Flags win."""
    make_tree(tmp_path / "tree")
    data = ["--dataset", "folder", "--data_dir", tmp_path / "tree"]
    write_checkpoint(tmp_path / "r/best.pt", *data, "--exif", "off", "--alpha", "mask")
    start = {"dataset": "folder", "data_dir": str(tmp_path / "tree"), "pretrained_dir": str(tmp_path / "r"), "recipe": "digits"}
    for more, expected in (({}, Reading("follow")), ({"head": "keep"}, Reading("off", alpha="mask")),
                           ({"eval_only": True}, Reading("off", alpha="mask")),
                           ({"head": "keep", "exif": "follow"}, Reading("follow", alpha="mask"))):
        found = build.find(choose(start | more), None, ONE_RANK)
        assert found.splits.reading == expected and found.facts.reading == vars(expected)
        assert found.start.path == tmp_path / "r/best.pt"


def test_the_default_start_is_the_models_checkpoint():
    assert open_start("none", "ViT-Nano_2") is None
    with open_start("auto", "ViT-Nano_2") as start:
        assert start.path.name == "ViT-Nano_2-letters.npz" and start.settings is None and start.head_classes == 26


def test_a_saved_run_is_opened_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert build.saved_run({}, ONE_RANK) is None
    assert build.saved_run({"resume_path": "auto", "name": "r"}, ONE_RANK) is None
    assert "no run to resume in output/r yet: starting a new one" in capsys.readouterr().out
    write_checkpoint(Path("output/r/best.pt"))
    saved = build.saved_run({"resume_path": "output/r", "eval_only": True}, ONE_RANK)
    assert (saved.opened.path, saved.facts.step, saved.facts.train_images) == (Path("output/r/best.pt"), 0, 1097)
    assert build.find(choose({"resume_path": "output/r"}, saved.state.config), saved, ONE_RANK).start is None


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "name"), [(3, "test"), (4, "val")])
def test_a_run_of_an_earlier_version_keeps_the_name_of_its_held_out_split(tmp_path, monkeypatch, rules, name):
    """Earlier versions called a single held-out split "test", whatever its folder was called. predict.py accepts both names."""
    monkeypatch.chdir(make_tree(tmp_path / "tree").parent)
    config = write_checkpoint(tmp_path / "best.pt", *FOLDER).config
    saved = build.saved_run({"resume_path": str(tmp_path), "eval_only": True}, ONE_RANK)
    saved = dataclasses.replace(saved, state=dataclasses.replace(saved.state, rules=rules))
    splits = open_data(choose({"resume_path": str(tmp_path)}, config.to_dict()), saved)
    assert splits.val_name == name and splits.val_is_test
    opened = build.open_model(tmp_path)
    assert [opened.split(typed)[0] for typed in (None, "test", "val", "train")] == ["val", "val", "val", "train"]


def test_process_0_decides_what_is_resumed_and_a_node_that_cannot_read_it_is_named(tmp_path):
    """Another node may have been restarted without the flag, or with another value."""
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
    write_checkpoint(tmp_path / "0/output/r/best.pt")

    def work(ranks):
        os.chdir(tmp_path / str(ranks.rank))               # a separate disk
        typed = {"resume_path": "output/r"} if ranks.rank == 0 else {"name": "other", "data_dir": "here"}
        flags = build.decide_resume(typed, ranks)
        with pytest.raises(ConfigError) as caught:
            build.saved_run(flags | {"eval_only": True}, ranks)
        return flags, str(caught.value)

    with Ranks(2, work, tmp_path, nodes=True) as ranks:
        (first, line), (second, other_line) = ranks.results()
    assert first == {"resume_path": "output/r"} and second == first | {"data_dir": "here"}
    assert line == other_line
    assert line.startswith(f"--resume_path: node 1 (host {platform.node()}): cannot read output/r/best.pt: No such file")
    assert "from a shared disk" in line


# ------------------------------------------------------------------------------------ the classes of a checkpoint or a head

NUMBERS = ("10", "2", "9")                           # sorted as text
TREE = ("--dataset", "folder", "--data_dir", "tree", "--recipe", "digits")


@pytest.fixture
def numbers(tmp_path, monkeypatch) -> None:
    """Write class folders, and a run on them whose classes are sorted as text."""
    monkeypatch.chdir(tmp_path)
    make_tree(Path("tree"), NUMBERS)
    write_checkpoint(Path("run/best.pt"), *TREE, "--class_order", "text")
    model = models.load_model("run/best.pt")
    assert model.classes == list(NUMBERS)
    models.save_npz(model, "head.npz")


def saved_for(flags: dict) -> tuple:
    typed = {"resume_path": "run/best.pt", "eval_only": True, "name": "next"} | flags
    saved = build.saved_run(typed, ONE_RANK)
    sources = choose(typed, saved.state.config)
    return build.find(sources, saved, ONE_RANK), typed, saved


def test_an_evaluation_keeps_the_order_of_its_checkpoint_on_any_data(numbers):
    for number, name in enumerate(("2", "10")):
        (Path("few/val") / name).mkdir(parents=True)
        Path("tree/val", name, "0.png").rename(Path("few/val", name, f"{number}.png"))
    Path("lists").mkdir()
    Path("lists/train.csv").write_text("../tree/train/2/0.png,2\n../tree/train/9/0.png,9\n")
    Path("lists/val.csv").write_text("../tree/train/9/1.png,9\n../tree/train/2/2.png,2\n")
    for flags, targets in (({}, None), ({"data_dir": "few"}, [0, 1]), ({"dataset": "csv", "data_dir": "lists"}, [2, 1]),
                           ({"data_dir": "tree/train"}, [0] * 6 + [1] * 6 + [2] * 6)):
        found, typed, saved = saved_for(flags)
        assert found.splits.classes == NUMBERS and found.facts.num_classes == 3
        assert targets is None or found.splits.test.targets.tolist() == targets
        config = resolve(typed, found.facts, saved.facts)
        assert config.dataset == flags.get("dataset", "folder") and config.test_fraction == 0
    make_tree(Path("wasps"), ("2", "wasp"), splits=("val",))
    with pytest.raises(DataError, match=r"the checkpoint has 3 classes \(10, 2, 9\), but not wasp"):
        saved_for({"data_dir": "wasps"})


def test_a_run_that_is_resumed_keeps_its_classes_and_no_fewer(numbers):
    assert saved_for({"eval_only": False})[0].splits.classes == NUMBERS
    shutil.rmtree("tree/train/9")
    with pytest.raises(DataError, match="but 9 is missing here: not the same task"):
        saved_for({"eval_only": False})
    with pytest.raises(ConfigError, match="--dataset"):
        saved_for({"eval_only": False, "dataset": "csv"})


def test_the_held_out_fraction_of_a_run_does_not_apply_to_other_images(numbers):
    write_checkpoint(Path("run/best.pt"), *TREE, "--val_fraction", 0.5)
    shutil.copytree("tree", "moved")
    make_tree(Path("other"), NUMBERS, images=4)
    state = load_state("run/best.pt")
    checkpoint.save(Path("run/best.pt"), dataclasses.replace(state, data=saved_for({})[0].fingerprint))
    assert [len(saved_for({"data_dir": place})[0].splits.train) for place in ("tree", "moved", "other")] == [9, 9, 12]
    assert "these are not the images of the run" in saved_for({"data_dir": "other"})[0].splits.notes[-1]
    assert len(saved_for({"data_dir": "other", "val_fraction": 0.25})[0].splits.train) == 9


def test_a_head_that_names_no_classes_needs_their_order(numbers):
    flags = {"dataset": "folder", "data_dir": "tree", "recipe": "digits", "pretrained_dir": "head.npz", "eval_only": True}
    size = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1, "patch_size": 4}
    found = build.find(choose(flags), None, ONE_RANK)
    assert found.facts.class_orders == ("2, 9, 10", "10, 2, 9") and not found.facts.start_names_classes
    with pytest.raises(ConfigError, match=r"does not name its classes.*--class_order text \(10, 2, 9\).*number \(2, 9, 10\)"):
        resolve(flags | size, found.facts)
    for order in ("text", "number"):
        assert resolve(flags | size | {"class_order": order}, found.facts).class_order == order
    named = build.find(choose(flags | {"pretrained_dir": "run"}), None, ONE_RANK)
    assert named.splits.classes == NUMBERS and named.facts.start_names_classes
    make_tree(Path("words"), ("a", "b", "c"))
    found = build.find(choose(flags | {"data_dir": "words"}), None, ONE_RANK)
    assert resolve(flags | size | {"data_dir": "words"}, found.facts).head == "keep"


@pytest.fixture
def unread(tmp_path, monkeypatch) -> Path:
    """A data set whose class folders are empty: it cannot be opened."""
    monkeypatch.chdir(tmp_path)
    for folder in ("train/ant", "train/bee", "val/ant", "val/bee"):
        Path("unread", folder).mkdir(parents=True)
    return Path("unread")


def test_a_teacher_is_opened_before_the_data(tmp_path, unread):
    """Any file can be a teacher. If it cannot be used, this is reported before the data are read."""
    nowhere = {"dataset": "folder", "data_dir": str(unread), "distillation": "soft", "pretrained_dir": "none"}
    save_plain(create_model(architecture(2, 40, 80, 2, 1, img_size=8), 10), tmp_path / "x.pth")
    for teacher, more, words in ((tmp_path / "none", {}, "--teacher: no checkpoint at"),
                                 (tmp_path / "x.pth", {}, "Add --num_heads .of the student, and of such a teacher.")):
        with pytest.raises(ConfigError, match=words):
            build.find(choose(nowhere | {"teacher": str(teacher)} | more), None, ONE_RANK)
    sources = choose({"dataset": "digits", "pretrained_dir": "none", "distillation": "soft", "teacher": str(tmp_path / "x.pth"),
                      "num_heads": 4})
    found = build.find(sources, None, ONE_RANK)
    assert found.teacher.model.config.num_heads == 4
    count = sum(value.numel() for value in torch.load(tmp_path / "x.pth", weights_only=True).values())
    assert found.facts.teacher_parameters == count, "it is in memory too"
    assert build.find(dataclasses.replace(sources, teacher=None), None, ONE_RANK).facts.teacher_parameters == 0
    assert choose({"distillation": "soft", "teacher": "x", "eval_only": True}).teacher is choose({}).teacher is None


def test_facts_of_a_file_of_another_program(tmp_path):
    save_plain(create_model(architecture(2, 40, 80, 2, 1, img_size=12), 10), tmp_path / "x.pth")
    facts = build.find(choose({"pretrained_dir": str(tmp_path / "x.pth")}), None, ONE_RANK).facts
    assert facts.start_row == {"model_type": "ViT-Nano_2", "in_channels": 3, "patch_size": 2, "hidden_size": 40, "mlp_dim": 80,
                               "num_layers": 1, "img_size": 12, "names_img_size": False}
    assert (facts.start_settings, facts.start_head_classes) == (None, 10)


def test_the_classifier_in_config_json_is_a_fact(tmp_path):
    """Also if the file has more arrays, such as a SigLIP that is to be used without its pooling."""
    start = start_folder(tmp_path / "x", "SigLIP")
    said = json.loads((start / "config.json").read_text())
    for uses, classifier in ((True, "attention"), (False, "mean")):
        said["vision_config"]["vision_use_head"] = uses
        (start / "config.json").write_text(json.dumps(said))
        facts = build.find(choose({"pretrained_dir": str(start)}), None, ONE_RANK).facts
        assert facts.start_row["classifier"] == classifier


def test_a_missing_split_is_reported_before_a_download_fails(tmp_path, monkeypatch, unread):
    monkeypatch.setenv("VIT_CHECKPOINT_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("VIT_CHECKPOINT_URL", "http://127.0.0.1:9/vit")                   # nothing answers there
    typed = {"recipe": "vit-paper", "dataset": "folder"}
    for more, words in (({"data_dir": "unread/train"}, "no train/ and val/ .*VAL_FRACTION=0.2"),
                        ({"data_dir": "gone"}, "no such folder"), ({"data_dir": "unread", "dataset": "csv"}, "no csv file"),
                        ({"data_dir": "unread/train", "dataset": "imagenet"}, "no train/ and val/")):
        with pytest.raises(DataError, match=words):
            build.find(choose(typed | more), None, ONE_RANK)
    with pytest.raises(ConfigError, match="could not download"):
        build.find(choose(typed | {"data_dir": "unread/train", "val_fraction": 0.2}), None, ONE_RANK)


def test_a_failed_download_is_reported_before_images_are_read(tmp_path, monkeypatch, unread):
    """In one line: which file, from which URL, where to put it, and how to start a run without it."""
    monkeypatch.setenv("VIT_CHECKPOINT_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("VIT_CHECKPOINT_URL", "http://127.0.0.1:9/vit")                   # nothing answers there
    for flags, file, then in (({}, "imagenet21k/ViT-B_16.npz", ". Or start"),
                              ({"pretrained_dir": "augreg/S_16"}, "augreg/index.csv", ", and then the file that it names")):
        with pytest.raises(ConfigError) as caught:
            build.find(choose({"dataset": "folder", "recipe": "vit-paper", "data_dir": "unread"} | flags), None, ONE_RANK)
        line = str(caught.value)
        assert line.startswith(f"--pretrained_dir: could not download http://127.0.0.1:9/vit/{file} (Connection refused); ")
        assert f"put it at {tmp_path / 'weights' / file}{then}" in line and "(--pretrained_dir FILE, PRETRAINED_DIR)" in line
        assert "\n" not in line
    for start in ("none", "ViT-B_16.npz", str(tmp_path / "x.npz")):                     # no file is downloaded
        if start != "none":
            (tmp_path / Path(start).name).touch()
        monkeypatch.chdir(tmp_path)
        assert check_start(start, "ViT-B_16") is None


def test_the_license_of_start_weights_is_passed_on(tmp_path):
    """By a run that started from them, of this or an earlier version, and by its export."""
    assert license_of_start(None) == ""
    state = create_model("ViT-Nano_2", 3).state_dict()
    for file in ("mine.pth", "mae/mae_pretrain_vit_base.pth"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        torch.save(state, tmp_path / file)
    write_checkpoint(tmp_path / "r/best.pt")
    run = checkpoint.open_run_checkpoint(tmp_path / "r/best.pt").state()
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
    checkpoint.save(tmp_path / "new/best.pt", dataclasses.replace(run, license="dinov3-license"))
    old = run.config | {"pretrained_dir": "mae/mae_pretrain_vit_base"}
    checkpoint.save(tmp_path / "old/best.pt", dataclasses.replace(run, config=old))
    found = {}
    for file in ("mine.pth", "mae/mae_pretrain_vit_base.pth", "r/best.pt", "new/best.pt", "old/best.pt"):
        with OpenedCheckpoint(tmp_path / file) as start:
            found[file] = license_of_start(start)
    assert list(found.values()) == ["", "CC-BY-NC-4.0", "", "dinov3-license", "CC-BY-NC-4.0"]


def test_the_preprocessing_of_start_weights_is_found(tmp_path, monkeypatch):
    """From the run, from the settings of a published file, or not at all."""
    write_checkpoint(tmp_path / "r/best.pt", "--eval_crop", 0.9)
    state = create_model("ViT-Nano_2", 3).state_dict()
    (tmp_path / "deit").mkdir()
    for file in ("mine.pth", "deit/deit_small_patch16_224-cd65a155.pth"):
        torch.save(state, tmp_path / file)
    views = []
    for file in ("r/best.pt", "mine.pth", "deit/deit_small_patch16_224-cd65a155.pth"):
        with OpenedCheckpoint(tmp_path / file) as start:
            views.append(view_of(start))
    assert views == [
        {"interpolation": "bilinear", "eval_crop": 0.9, "img_size": 8, "by": "their run"},
        {"img_size": 8, "by": "their publisher", "unknown_mean": True},
        {"interpolation": "bicubic", "eval_crop": 0.875, "img_size": 8, "by": "their publisher", "unknown_mean": False}]
    with OpenedCheckpoint(build.opened.ROOT / build.opened.EMBEDDED) as start:
        assert not view_of(start)["unknown_mean"]
