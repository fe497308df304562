"""Published files on the hub: the table and its names, and a local hub that redirects, refuses and lacks files."""

import hashlib
import json

import file_server
import pytest

import configs
from models import ModelError, find_checkpoint
from models.checkpoints import hub
from models.checkpoints.download import DownloadError
from models.checkpoints.published import check_published_reachable, license_of, published_name

REPOSITORY = "timm/vit_small_patch16_dinov3.lvd1689m"
TREE = f"/hub/{REPOSITORY}/resolve/main/"
CONFIG = json.dumps({"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {}}).encode()


WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture
def published(server):
    """Put the repository on the hub."""
    server.files = {f"{TREE}config.json": CONFIG, f"{TREE}model.safetensors": WEIGHTS}
    server.refusals = dict.fromkeys((TREE + name for name in ("model.safetensors.index.json", "pytorch_model.bin")), (404, {}))
    return server


def fails(name: str = REPOSITORY) -> str:
    with pytest.raises(ModelError) as error:
        find_checkpoint(name)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("typed", "repository", "model"), [
    ("vit_small_patch14_reg4_dinov2.lvd142m", "timm/vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2-S_14-reg"),
    ("vit_base_patch16_siglip_224", "timm/vit_base_patch16_siglip_224.v2_webli", "SigLIP-B_16"),           # timm's default tag
    ("timm/vit_base_patch16_siglip_224", "timm/vit_base_patch16_siglip_224.v2_webli", "SigLIP-B_16"),
    ("hf_hub:timm/vit_base_patch16_siglip_224.webli", "timm/vit_base_patch16_siglip_224.webli", "SigLIP-B_16"),
    ("vit_base_patch16_lingbot", "belfner/vit_base_patch16_lingbot.robbyant", "LingBot-B_16"),        # not timm's own
    ("vit_base_patch32_clip_quickgelu_224.openai", "timm/vit_base_patch32_clip_quickgelu_224.openai", "CLIP-B_32"),
    ("vit_base_patch32_clip_224.openai", "timm/vit_base_patch32_clip_224.openai", "OpenCLIP-B_32"),
    ("facebook/dinov2-small", "facebook/dinov2-small", "DINOv2-S_14"),
    ("https://huggingface.co/google/siglip2-base-patch16-224", "google/siglip2-base-patch16-224", "SigLIP-B_16"),
    ("EVA02-B_14", "timm/eva02_base_patch14_224.mim_in22k", "EVA02-B_14"),
    ("facebook/something-new", "facebook/something-new", None),                 # of a known publisher
    ("hf-hub:someone/something", "someone/something", None),
    *((name, None, None) for name in (
        "someone/something", "output/run", "hf-hub:someone", "hf-hub:a/../b", "timm", "", "facebook/", "facebook/a/b"))])
def test_names_give_repositories_and_models(folder, typed, repository, model):
    assert hub.repository_of(typed) == published_name(typed) == repository
    known = hub.published_file(typed)
    assert (known and known.model) == model


def test_the_table_is_consistent():
    files = hub.table()
    assert len({file.name for file in files}) == len(files) > 500
    assert all(file.parameters > 0 and 224 <= file.pixels <= 896 and file.classes >= 0 for file in files)
    assert all(hub.ID.fullmatch(file.repository) for file in files if file.repository)
    assert all(published_name(file.name) == (file.place or file.name) for file in files)


def test_every_model_starts_from_a_file_of_its_own_size():
    models = {file.model for file in hub.table()} - {""}
    assert models == set(configs.MODELS) - {"ViT-Nano_2"}                     # its file is embedded
    assert {model: hub.published_file(model).pixels for model in models} == {
        model: configs.MODELS[model].img_size for model in models}


def test_licenses_are_those_of_the_repositories():
    for name, words in ((REPOSITORY, "dinov3-license"), (f"x/checkpoint/{REPOSITORY}/model.safetensors", "dinov3-license"),
                        ("vit_base_patch32_clip_224.metaclip_400m", "cc-by-nc-4.0"), ("MAE-B_16", "CC-BY-NC-4.0"),
                        ("facebook/dinov2-small", "apache-2.0"), ("facebook/something-new", ""), ("hf-hub:a/b", "")):
        assert license_of(name) == words


def test_an_unsupported_model_is_refused_before_the_download(folder):
    for name, words in (("beitv2_base_patch16_224", "has positions relative to each pair of patches"),
                        ("apple/mobileclip_b_timm", "its architecture is not supported")):
        assert words in fails(name)
        with pytest.raises(ModelError, match=words):
            check_published_reachable(published_name(name))


# ------------------------------------------------------------------------------------------------------------- download


def test_a_repository_is_downloaded_once_with_its_config(published, folder):
    path = find_checkpoint("vit_small_patch16_dinov3")
    assert path == folder / REPOSITORY / "model.safetensors" and path.read_bytes() == WEIGHTS
    assert sorted(file.name for file in path.parent.iterdir()) == ["config.json", "model.safetensors"]
    asked = len(published.requests)
    assert find_checkpoint("DINOv3-S_16") == path and len(published.requests) == asked
    check_published_reachable(REPOSITORY)
    assert len(published.requests) == asked and {token for _, token in published.tokens} == {None}


def test_a_repository_of_transformers_has_its_preprocessor_and_older_weights(published, folder):
    tree = "/hub/facebook/dinov2-small/resolve/main/"
    published.files = {f"{tree}config.json": b'{"model_type": "dinov2"}', f"{tree}preprocessor_config.json": b'{"size": 224}',
                       f"{tree}pytorch_model.bin": b"PK\x03\x04"}
    published.refusals = {f"{tree}model.safetensors": (404, {"X-Error-Code": "EntryNotFound"})}
    assert find_checkpoint("facebook/dinov2-small").name == "pytorch_model.bin"
    assert (folder / "facebook/dinov2-small/preprocessor_config.json").is_file()


def test_one_repository_with_two_names_gives_two_architectures(published, folder):
    """timm keeps the weights of both in one repository, whose config.json names only one. Also if put there by hand."""
    tree = "/hub/timm/vit_huge_patch14_clip_224.dfn5b/resolve/main/"
    config = b'{"architecture": "vit_huge_patch14_clip_224", "pretrained_cfg": {"tag": "dfn5b"}}'
    published.files = {f"{tree}config.json": config, f"{tree}model.safetensors": WEIGHTS}
    quick, exact = find_checkpoint("CLIP-H_14"), find_checkpoint("vit_huge_patch14_clip_224.dfn5b")
    said = [json.loads((path.parent / "config.json").read_bytes())["architecture"] for path in (quick, exact)]
    assert said == ["vit_huge_patch14_clip_quickgelu_224", "vit_huge_patch14_clip_224"] and quick != exact
    (quick.parent / "config.json").write_bytes(config)
    assert b"quickgelu" in (find_checkpoint("CLIP-H_14").parent / "config.json").read_bytes()
    assert license_of(quick) == "apple-ascl" and hub.page_of(published_name("CLIP-H_14")).endswith("clip_224.dfn5b")


def test_a_token_is_sent_only_to_its_server(published, folder, monkeypatch):
    """The hub sends weights from another server, with the digest in its own answer."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    with file_server.running() as other:
        other.content = WEIGHTS
        elsewhere = f"http://127.0.0.1:{other.server_port}/cdn"
        digest = {"X-Linked-Etag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'}
        published.redirects = {f"{TREE}config.json": (f"{TREE}moved", {}), f"{TREE}model.safetensors": (elsewhere, digest)}
        published.files[f"{TREE}moved"] = CONFIG
        assert find_checkpoint(REPOSITORY).read_bytes() == WEIGHTS
        assert other.tokens == [("/cdn", None)]
    assert published.tokens == [(TREE + name, "Bearer hf_secret") for name in ("config.json", "moved", "model.safetensors")]


def test_the_digest_of_the_hub_is_checked(published, folder):
    published.redirects = {f"{TREE}model.safetensors": (f"{TREE}moved", {"X-Linked-Etag": f'"{"0" * 64}"'})}
    published.files[f"{TREE}moved"] = published.files[f"{TREE}model.safetensors"]
    assert "does not match the server's SHA-256" in fails()
    assert not list((folder / REPOSITORY).glob("model.safetensors")) + list((folder / REPOSITORY).glob("*.part"))


@pytest.mark.parametrize(("status", "token", "code", "words"), [
    (401, "", "GatedRepo", f"or only for signed-in accounts (401). Accept the terms at {hub.HUB}/{REPOSITORY} if"),
    (401, "", "", "and set HF_TOKEN to a token of your account. Or put its model.safetensors and config.json into "),
    (403, "hf_x", "GatedRepo", f"refuses access to the account of HF_TOKEN (403). Accept the terms at {hub.HUB}/{REPOSITORY} "),
    (401, "hf_x", "", "or check the token"),
    (401, "hf_x", "RepoNotFound", "no such repository, or HF_TOKEN has no access to it (401)")])
def test_refusals_of_the_hub_say_what_to_do(published, folder, monkeypatch, status, token, code, words):
    monkeypatch.setenv("HF_TOKEN", token)
    published.refusals |= {f"{TREE}model.safetensors": (status, {"X-Error-Code": code})}
    message = fails()
    assert message.startswith(f"{REPOSITORY}: the hub ") and words in message and str(folder / REPOSITORY) in message
    assert "hf_x" not in message
    if not code:                                    # known before the data are read
        with pytest.raises(ModelError, match=f"HF_TOKEN .{status}.|{status}.*HF_TOKEN"):
            check_published_reachable(REPOSITORY)


def test_missing_files_of_the_hub_are_named(published, folder):
    published.refusals |= dict.fromkeys(published.files, (404, {}))
    check_published_reachable(REPOSITORY)           # its weights may have the older name
    assert "no such repository, or it lacks config.json and model.safetensors or pytorch_model.bin (404 from http://" in fails()
    del published.refusals[f"{TREE}config.json"]
    published.refusals.pop(f"{TREE}model.safetensors.index.json")
    published.files[f"{TREE}model.safetensors.index.json"] = b"{}"
    assert "its weights are in several files (model.safetensors.index.json)" in fails()


def test_an_unreachable_hub_is_reported(folder):
    both = (f"(Connection refused); download config.json and model.safetensors from {hub.HUB}/{REPOSITORY} on another machine, "
            f"and put both into {folder / REPOSITORY}")
    assert both in fails()
    with pytest.raises(DownloadError, match=r"Connection refused.*put both into"):
        check_published_reachable(REPOSITORY)


@pytest.mark.reference
def test_the_table_agrees_with_timm():
    """In repositories, sizes, licenses, heads, and the tag for a name without one."""
    registry = pytest.importorskip("timm.models._registry")
    files = [file for file in hub.table() if "/" not in file.name]
    assert len(files) > 400
    for file in files:
        theirs = registry.get_pretrained_cfg(file.name)
        assert file.repository == (theirs.hf_hub_id or file.repository), file.name
        assert (file.pixels, file.license) == (theirs.input_size[-1], theirs.license or ""), file.name
        assert file.classes == theirs.num_classes, file.name
        arch = file.name.partition(".")[0]
        if hub.published_file(arch).name == file.name:
            assert registry.get_pretrained_cfg(arch).tag == file.name.partition(".")[2], file.name
