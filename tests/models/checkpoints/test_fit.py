"""What of a file is left out, what a new task brings, and the words for what does not fit."""

import torch
from filling import load, random_model, refused
from originals import KINDS, arrays_of, dinov3, in_memory, tiny

from models import create_model


def test_biases_that_are_zeros_may_be_left_out(tmp_path):
    """Those of Meta's own DINOv3, for the row whose queries and values have none, as in timm."""
    model, without = random_model(KINDS["dinov3"].row), tiny("DINOv3-S_16")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    zeros = {name: torch.zeros_like(value) if name.endswith(("q_bias", "v_bias")) else value for name, value in state.items()}
    torch.save(dinov3(zeros), tmp_path / "x.pth")
    report = load(tmp_path / "x.pth", without, "zero").load_report
    assert "biases of queries and values, all zeros, are left out" in report.notes
    assert "blocks.0.attn.qkv.bias" in report.left_out
    torch.save(dinov3(state), tmp_path / "x.pth")
    refused("arrays that the model lacks: blocks.0.attn.qkv.bias", load, tmp_path / "x.pth", without, "zero")


def test_another_pooling_than_the_file_s_is_new_or_left_out():
    siglip = KINDS["timm_siglip"].row
    with_pool = in_memory(arrays_of("timm_siglip", random_model(siglip)))
    report = create_model(siglip, 3, pretrained=with_pool, classifier="mean").load_report
    assert "its pooling by attention is left out (--classifier attention uses it)" in report.notes
    assert "attn_pool.kv.weight" in report.left_out
    gap = in_memory(arrays_of("timm_siglip_gap", random_model(KINDS["timm_siglip_gap"].row)))
    torch.manual_seed(0)
    model = create_model(siglip, 3, pretrained=gap)
    assert "new: attn_pool, head.bias, head.weight" in str(model.load_report) and len(model.load_report.fresh) == 15
    assert model.attn_pool.latent.std() > 0.01 and model.attn_pool.kv.weight.std() > 0.01
    assert model.attn_pool.norm.weight.unique().tolist() == [1] and not model.attn_pool.mlp.fc1.bias.any()
    refused("lacks: attn_pool", create_model, siglip, 3, pretrained=gap, head="keep")
    for lost in ("attn_pool.latent", "attn_pool.kv.weight"):                    # a part of it is no other pooling
        rest = arrays_of("timm_siglip", random_model(siglip))
        del rest[lost]
        refused(f"needs arrays that the file lacks: {lost}; ", create_model, siglip, 3, pretrained=in_memory(rest))


def test_a_file_of_another_kind_says_of_which():
    dinov2, plain = in_memory(arrays_of("timm_dinov2_reg", random_model(KINDS["timm_dinov2_reg"].row))), tiny("ViT-B_16")
    message = refused("it has register tokens: use the --model_type of its family", create_model, plain, 3, pretrained=dinov2)
    assert "reg_token" in message
    vit = in_memory(dict(random_model(plain).state_dict()))
    refused("it has no register tokens: use another --model_type", create_model, KINDS["timm_dinov2_reg"].row, 3, pretrained=vit)
    clip = in_memory(arrays_of("timm_clip", random_model(KINDS["timm_clip"].row)))
    refused("it has a norm before the blocks, as CLIP and PE", create_model, plain, 3, pretrained=clip)
    dinov3_file = in_memory(arrays_of("timm_dinov3", random_model(KINDS["timm_dinov3"].row)))
    refused("it has register tokens", create_model, plain, 3, pretrained=dinov3_file)


def test_grey_images_need_a_bias_of_the_patches():
    """It takes up the means of the colours, where these differ, as CLIP's do."""
    row = KINDS["timm_clip"].row
    file = in_memory(arrays_of("timm_clip", random_model(row)))
    refused("its patch kernel has no bias, which would take up the means of its colors: use 3 channels", create_model, row, 3,
            pretrained=file, in_channels=1)
    alike = create_model(row, 3, pretrained=file, in_channels=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert alike.patch_embed.proj.weight.shape == (48, 1, 8, 8)
