"""Published checkpoints by name: names, URLs, existing files, AugReg's table."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import reference

from configs import MODELS
from models import ModelError, find_checkpoint
from models.checkpoints.hub import published_file
from models.checkpoints.published import (
    META_FILES,
    PUBLISHED,
    VIEWS,
    check_published_reachable,
    license_of,
    published_name,
    published_url,
    published_view,
    recommended_file,
)

AUGREG = "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"

# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name, canonical", [
    ("ViT-B_16", "imagenet21k/ViT-B_16"),
    ("ViT-B_16.npz", "imagenet21k/ViT-B_16"),
    ("imagenet21k+imagenet2012/R50-ViT-B_16", "imagenet21k+imagenet2012/R50+ViT-B_16"),
    (AUGREG, AUGREG),
    *((f"augreg/{name}-i1k-300ep-lr_0.001-aug_{tail}-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",) * 2 for name, tail in (
        ("B_16", "strong2-wd_0.1-do_0.1"), ("B_32", "medium2-wd_0.1-do_0.1"))),
    ("augreg/S_16", "augreg/S_16"),                           # the recommended one
    ("gsam/ViT-S_32-gap-norep.npz", "gsam/ViT-S_32-gap-norep"),
    ("deit/deit_small_patch16_224", "deit/deit_small_patch16_224-cd65a155"),
    ("deit/deit_small_patch16_224-cd65a155.pth", "deit/deit_small_patch16_224-cd65a155"),
    ("cait/XS24_384.pth", "cait/XS24_384"),
    ("deit3/deit_3_huge_224_21k_v1.pth", "deit3/deit_3_huge_224_21k_v1"),
    ("ViT-Ti_16", "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),         # the model's start
    ("DeiT-S_16", "deit/deit_small_patch16_224-cd65a155"), ("DINOv2-g_14-reg", "dinov2/dinov2_vitg14_reg4_pretrain"),
    ("DINOv3-S_16", "timm/vit_small_patch16_dinov3.lvd1689m"),
    *((name, None) for name in (                              # sizes of other folders, parts of names, ways out of the folder
        "sam/R50+ViT-B_16", "elsewhere/ViT-B_16", "augreg/../ViT-B_16", "augreg/S_17", "deit_huge_patch16_224",
        "deit/deit_small_patch16_224-00000000.pth", "deit/XS24_384", "mae/pretrain/mae_pretrain_vit_base.pth", "")),
])
def test_names_become_canonical(name, canonical):
    assert published_name(name) == canonical


@pytest.mark.parametrize("name", [f"{folder}/{file}" for folder, files in PUBLISHED.items() for file in files])
def test_every_name_of_the_table_is_canonical_and_has_a_model(name):
    assert published_name(name) == name
    assert name.split("/")[1].replace("+", "-").removesuffix("-224").removesuffix("-gap-norep") in MODELS


def our_row(folder: str, file: str) -> str:
    if folder == "cait":
        return f"CaiT-{file.partition('_')[0]}"
    size = {"tiny": "Ti_16", "medium": "M_16", "dinov2": "", "small": "S_16", "base": "B_16", "large": "L_16", "huge": "H_14"}
    size = next(ours for theirs, ours in size.items() if theirs in file)
    if folder in ("deit3", "dinov2"):
        return published_file(f"{folder}/{file}").model
    return f"MAE-{size}" if folder == "mae" else f"DeiT-{size}{'-distilled' if 'distilled' in file else ''}"


def test_every_name_of_meta_has_its_own_model_and_file():
    names = [(folder, file) for folder, files in META_FILES.items() for file in files]
    assert all(published_name("/".join(name)) == "/".join(name) and our_row(*name) in MODELS for name in names)
    assert len({remote for files in META_FILES.values() for remote, _ in files.values()}) == len(names)


@pytest.mark.parametrize("name, url", [
    ("imagenet21k/ViT-B_16", "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"),
    ("imagenet21k+imagenet2012/R50+ViT-B_16",
     "https://storage.googleapis.com/vit_models/imagenet21k%2Bimagenet2012/R50%2BViT-B_16.npz"),
    (AUGREG, f"https://storage.googleapis.com/vit_models/{AUGREG}.npz"),
    ("deit/deit_base_patch16_224-b5f2ef4d", "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"),
    ("dinov2/dinov2_vits14_reg4_pretrain",
     "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
    ("cait/M36_384", "https://dl.fbaipublicfiles.com/deit/M36_384.pth"),
    ("mae/mae_pretrain_vit_huge", "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge.pth"),
])
def test_urls_of_canonical_names(name, url, monkeypatch):
    monkeypatch.delenv("VIT_CHECKPOINT_URL", raising=False)
    monkeypatch.delenv("VIT_META_URL", raising=False)
    assert published_url(name) == url


def test_a_mirror_has_the_same_files(monkeypatch):
    monkeypatch.setenv("VIT_CHECKPOINT_URL", "http://mirror/vit")
    monkeypatch.setenv("VIT_META_URL", "http://mirror/meta/")
    assert published_url("imagenet21k/R50+ViT-B_16") == "http://mirror/vit/imagenet21k/R50%2BViT-B_16.npz"
    assert published_url("mae/mae_pretrain_vit_base") == "http://mirror/meta/mae/pretrain/mae_pretrain_vit_base.pth"


# ------------------------------------------------------------------------------------------------- what is here


@pytest.mark.parametrize("name, present, found", [
    ("imagenet21k/ViT-B_16", ["weights/imagenet21k/ViT-B_16.npz", "weights/ViT-B_16.npz"], 0),
    ("ViT-B_16", ["weights/ViT-B_16.npz", "weights/sam/ViT-B_16.npz"], 0),    # put there by hand
    ("ViT-B_16", ["ViT-B_16", "weights/imagenet21k/ViT-B_16.npz"], 0),        # an existing path wins
    ("R50-ViT-B_16", ["weights/imagenet21k/R50+ViT-B_16.npz"], 0),
    ("sam/ViT-B_16", ["weights/ViT-B_16.npz", "weights/sam/ViT-B_16.npz"], 1),
    ("deit/deit_base_patch16_224", ["weights/deit/deit_base_patch16_224-b5f2ef4d.pth"], 0),
    ("cait/S24_224.pth", ["weights/cait/S24_224.pth"], 0),
])
def test_an_existing_file_is_not_downloaded(folder, tmp_path, put, name, present, found):
    paths = [put(tmp_path / path) for path in present]
    assert find_checkpoint(name).resolve() == paths[found]


def test_a_file_put_there_by_hand_is_only_the_default_folder_s(server, folder, put):
    put(folder / "ViT-B_16.npz")
    server.content = archive()
    assert find_checkpoint("sam/ViT-B_16") == folder / "sam" / "ViT-B_16.npz" and len(server.requests) == 1


def test_the_usual_folder_is_checkpoint(folder, tmp_path, put, monkeypatch):
    monkeypatch.delenv("VIT_CHECKPOINT_DIR")
    path = put(tmp_path / "checkpoint" / "imagenet21k" / "ViT-B_16.npz")
    assert find_checkpoint("ViT-B_16").resolve() == path


@pytest.mark.parametrize("name, message", [
    ("weights/mine.npz", "it is no published name. MODEL_ZOO"), ("ViT-B_17", "it is no published name. Did you mean ViT-B_16"),
    ("imagenet21k/ViT-S_16", "imagenet21k has no published file of that name: it has"),
    ("deit/deit_huge", "deit has no published file of that name: it has")])
def test_text_that_is_neither_a_file_nor_a_name_is_refused(folder, name, message):
    with pytest.raises(ModelError, match=f"no checkpoint at {name}, and {message}") as error:
        find_checkpoint(name)
    assert "\n" not in str(error.value) and not folder.exists()


# ------------------------------------------------------------------------------------------------ Meta's files


def test_meta_s_files_come_from_its_server_with_their_suffix(server, folder):
    server.content = (reference.TORCH / "mae_pretrain_enc.pth").read_bytes()
    path = find_checkpoint("cait/S24_224")
    assert path == folder / "cait" / "S24_224.pth" and path.read_bytes() == server.content
    assert [request[0] for request in server.requests] == ["/meta/deit/S24_224.pth"]


@pytest.mark.parametrize("name, remote, algorithm", [
    ("deit/deit_tiny_patch16_224", "deit/deit_tiny_patch16_224-a1311bcf.pth", "sha256"),
    ("mae/mae_pretrain_vit_base", "mae/pretrain/mae_pretrain_vit_base.pth", "md5")])
def test_the_publisher_s_checksum_is_checked(server, folder, monkeypatch, name, remote, algorithm):
    server.content = (reference.TORCH / "deit_tiny.pth").read_bytes()
    with pytest.raises(ModelError, match=f"/meta/{re.escape(remote)} .the .* file does not match the publisher's") as error:
        find_checkpoint(name)
    assert f"put it at {folder / name.split('/')[0] / remote.split('/')[-1]}" in str(error.value)
    digits = hashlib.new(algorithm, server.content).hexdigest()[:8]
    file = remote.split("/")[-1].removesuffix(".pth")
    monkeypatch.setitem(META_FILES[name.split("/")[0]], file, (remote, f"{algorithm}:{digits}"))
    assert find_checkpoint(name) == folder / name.split("/")[0] / remote.split("/")[-1]


# -------------------------------------------------------------------------------------------- AugReg's table

# The columns of the published table, and some of its rows (the values of other columns made up).
COLUMNS = ("name,ds,epochs,lr,aug,wd,do,sd,best_val,final_val,final_test,adapt_ds,adapt_lr,adapt_steps,adapt_resolution,"
           "adapt_final_val,adapt_final_test,params,infer_samples_per_sec,filename,adapt_filename")
BEST = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"


def line(name: str, ds: str, final_val, file: str) -> str:
    return f"{name},{ds},300,0.001,x,0.1,0,0,0.99,{final_val},0.99,cifar100,0.01,500,224,0.99,0.99,1,1,{file},{file}--cifar100"


LINES = [
    line("S/16", "i21k", 0.41, "S_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"),
    line("S/16", "i21k", 0.47, BEST),
    line("S/16", "i21k", 0.47, BEST),                                     # a row for every fine-tuning
    line("S/16", "i1k", 0.80, "S_16-i1k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),      # another task
    line("S/16", "i21k_30", 0.60, "S_16-i21k-30ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),
    line("S/16", "i21k", "", "S_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"),
    line("S/16", "i21k", "nan", "S_16-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"),
    line("R26+S/32", "i21k", 0.49, "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),
    line("S/32", "i21k", 0.52, "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"),
    line("R+Ti/16", "i21k", 0.3, "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    line("Ti/16", "i21k", 0.31, "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
]
TABLE = "\n".join([COLUMNS, *LINES, ""]).encode()


@pytest.mark.parametrize("size, file", [
    ("S_16", BEST), ("S_32", "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"),
    ("R26_S_32", "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),
    ("R_Ti_16", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    ("Ti_16", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0")])
def test_the_recommended_file_is_the_best_of_its_size_on_imagenet_21k(tmp_path, put, size, file):
    assert recommended_file(put(tmp_path / "index.csv", TABLE), size) == file


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.ones(3))
    return stream.getvalue()


def test_a_size_downloads_the_table_once_and_its_file(server, folder):
    server.files["/vit_models/augreg/index.csv"], server.content = TABLE, archive()
    path = find_checkpoint("augreg/S_16")
    assert path == folder / "augreg" / f"{BEST}.npz" and path.read_bytes() == server.content
    assert (folder / "augreg" / "index.csv").read_bytes() == TABLE
    find_checkpoint("augreg/Ti_16")
    find_checkpoint("augreg/S_16")
    assert [request[0].split("/")[-1].split("-")[0] for request in server.requests] == ["index.csv", "S_16", "Ti_16"]


@pytest.mark.parametrize("content, message", [
    (COLUMNS.encode(), "lists no file of S_16 trained on i21k; delete it"),
    (COLUMNS.encode() + b"\n" + line("S/16", "i21k", 0.5, "S_16-../../../etc/passwd").encode(), "lists no file of S_16"),
    (b"something,else\n1,2\n", "not AugReg's table, or damaged .KeyError.*delete it to download it again"),
    (TABLE.replace(b"0.41", b"best"), "not AugReg's table, or damaged .ValueError"),
    (TABLE[:-1000] + b"S/16,i21k", "not AugReg's table, or damaged .AttributeError"),
])
def test_a_damaged_table_is_reported(folder, put, content, message):
    path = put(folder / "augreg" / "index.csv", content)
    with pytest.raises(ModelError, match=message) as error:
        find_checkpoint("augreg/S_16")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_each_folder_has_its_publisher_s_evaluation():
    """As in MODEL_ZOO.md; any other file has none."""
    assert set(VIEWS) == {*PUBLISHED, *META_FILES, "augreg"}
    for file, crop in (("sam/ViT-B_16.npz", 0.0), ("x/deit/deit_tiny_patch16_224-a1311bcf.pth", 0.875),
                       ("cait/S24_224.pth", 1.0), ("deit3/deit_3_base_224_21k.pth", 1.0),
                       ("deit3/deit_3_base_224_1k.pth", 0.9), ("dinov2/dinov2_vits14_pretrain.pth", 1.0),
                       ("augreg/S_16.npz", 0.0)):
        assert published_view(Path(file))["eval_crop"] == crop
    assert all(published_view(Path(file)) == {} for file in ("ViT-B_16.npz", "deit/mine.pth", "r/best.pt"))


def test_licenses_are_those_of_published_files():
    for name, words in (("ViT-B_16", "Apache-2.0"), ("checkpoint/deit/deit_tiny_patch16_224-a1311bcf.pth", "Apache-2.0"),
                        ("mae/mae_pretrain_vit_base", "CC-BY-NC-4.0"), ("output/mine", ""), ("x/ViT-B_16.npz", "")):
        assert license_of(name) == license_of(Path(name)) == words


def test_a_server_is_asked_about_missing_files(server, folder, put, monkeypatch):
    """A refusal is left to the download."""
    check_published_reachable("sam/ViT-B_16")
    assert server.requests == [] and not folder.exists()
    monkeypatch.setenv("VIT_CHECKPOINT_URL", "http://127.0.0.1:9/vit")
    with pytest.raises(ModelError, match=r"could not download http://127.0.0.1:9/vit/sam/ViT-B_16.npz .Connection refused.; "):
        check_published_reachable("sam/ViT-B_16")
    put(folder / "sam/ViT-B_16.npz")
    check_published_reachable("sam/ViT-B_16")
