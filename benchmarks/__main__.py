"""Ask all questions: python -m benchmarks [cpu | gpu]. Figures go to results/MACHINE.json, and from there to RESULTS.md.

With these batches and rounds the CPU part takes about forty minutes on two cores; larger machines can use more of both. Nothing
else should run meanwhile.
"""

import shlex
import subprocess
import sys
import time

from . import machine, report
from .harness import ROOT

PARTS = {
    "cpu": """
        startup
        input
        load
        attention
        attention --size 384 --batch 2
        optimizer
        checkpoint
        step --models ViT-B_16,ViT-S_16,ViT-Ti_16 --precision bf16 --rounds 5
        step --models ViT-B_16 --precision fp32 --batch 4 --rounds 5
        step --models DeiT-S_16 --precision bf16 --contenders timm,vit-pytorch,ours
        evaluation --models DeiT-S_16 --precision bf16 --contenders timm,torchvision,vit-pytorch,ours
        evaluation --models ViT-B_16,ViT-S_16 --rounds 5
        memory --contenders timm,transformers,torchvision,vit-pytorch,ours
        ddp --batch 8 --rounds 2
        end_to_end --batch 16 --rounds 2 --files 200
        step --models R50-ViT-B_16 --batch 4 --contenders timm,ours
        step --models DINOv2-B_14,DINOv3-B_16,EVA02-B_14,SigLIP-B_16 --batch 4 --contenders timm,ours
        evaluation --models DINOv2-B_14,DINOv3-B_16,EVA02-B_14,SigLIP-B_16 --contenders timm,ours
        step --models ViT-Ti_16,ViT-S_16 --precision fp32 --rounds 5
        step --models ViT-L_16 --batch 2 --contenders timm,vit-pytorch,ours
    """,
    "gpu": """
        step --device cuda --models ViT-Ti_16,ViT-S_16,ViT-B_16,ViT-L_16,R50-ViT-B_16 --batch fill --precision fp32,tf32,bf16,fp16
        step --device cuda --models ViT-B_16,ViT-L_16 --batch fill --precision bf16,fp16 --compile
        step --device cuda --models ViT-B_16,ViT-L_16 --batch fill --size 384 --precision bf16
        step --device cuda --models ViT-B_16,ViT-L_16 --batch fill --size 384 --precision bf16 --compile
        evaluation --device cuda --models ViT-B_16,ViT-L_16 --batch 256 --precision fp32,tf32,bf16,fp16
        evaluation --device cuda --models ViT-B_16,ViT-L_16 --batch 256 --precision bf16 --compile
        memory --device cuda --models ViT-B_16,ViT-L_16 --batch 64
        end_to_end --device cuda --models ViT-B_16 --batch 256 --steps 50 --files 3000
    """,
}


def main(argv: list[str]) -> int:
    part = argv[0] if argv else "cpu"
    if part not in PARTS or len(argv) > 1:
        print(f"Usage: python -m benchmarks [{' | '.join(PARTS)}]", file=sys.stderr)
        return 2
    file, failed = report.RESULTS / f"{machine.name()}.json", []
    for line in PARTS[part].strip().splitlines():
        question, *flags = shlex.split(line)
        print(f"\n=== {line.strip()}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{question}", *flags, "--json", str(file)], cwd=ROOT)
        if done.returncode:
            failed.append(line.strip())
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
    report.write()
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
