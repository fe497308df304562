"""Training step: forward, backward, clip, SGD with momentum. Ours against the peers at equal precision and batch.

python -m benchmarks.step --models ViT-B_16 --precision fp32,bf16

In float32 two more of ours run: with bf16 inside the matrix products (--precision fp32_bf16_matmul gives that to everybody),
and what train.py does where no precision is asked for.
"""

import sys

from . import harness
from .harness import OURS, Contender

FILLING = (2048, 1024, 512, 256, 128, 64, 32, 16, 8)      # batches that `fill` tries


def contenders(question: str, row: dict, batch: int, given: dict, side: int) -> list[Contender]:
    """question: the functions of this name in peers.py and ours.py; side: of the matrices of the limit"""
    from . import peers

    shared = {"row": row, "batch": batch, **given}
    found = [Contender(name, f"benchmarks.peers:{question}", shared | {"peer": name})
             for name in peers.MODELS if peers.of(name, row)]
    found.append(Contender(OURS, f"benchmarks.ours:{question}", shared, "ours"))
    if given["precision"] == "fp32":
        others = {"bf16 in matmuls": "fp32_bf16_matmul", "default": "default"}
        found += [Contender(f"{OURS} ({name})", f"benchmarks.ours:{question}", shared | {"precision": precision}, "ours")
                  for name, precision in others.items()]
    matmul = {key: given[key] for key in ("device", "threads", "precision")} | {"side": side}
    return [*found, Contender("matmul", "benchmarks.conditions:matmul", matmul, "limit")]


def ask(question: str, word: str, share: float, options) -> None:
    """Every model at every precision, one record each. share: of the work of a training step."""
    from utils.run.profiling import SIDE

    from .ours import flops, row_of

    side = 64 if options.quick else SIDE[options.device]
    with harness.stage(options.quick) as where:
        for model in options.models.split(","):
            row = row_of(model, options.size or None)
            operations = flops(row) * share
            for precision in options.precision.split(","):
                given = {"precision": precision, "device": options.device, "compiled": options.compile,
                         "threads": options.threads}
                batches = FILLING if options.batch == "fill" else [int(options.batch)]
                for batch in batches:
                    group = harness.choose_contenders(contenders(question, row, batch, given, side), options.contenders)
                    try:
                        costs = harness.measure(group, where, rounds=options.rounds)
                        break
                    except harness.Failed as error:
                        if batch == batches[-1] or "out of memory" not in str(error).lower():
                            raise
                        where.close()
                # The limit is that of the precision: a contender with another one has no share of it.
                work = {each.name: operations * batch for each in group if each.given["precision"] == precision}
                work["matmul"] = 2 * side ** 3
                title = f"{word} {model} {row['size']} {precision} {options.device}{' compiled' if options.compile else ''}"
                harness.report(harness.record(
                    title, group, costs, baseline="timm", unit="seconds a step", work=work,
                    settings={"batch": batch, "threads": options.threads or "all", "rounds": options.rounds}), options.json)


def small(options) -> None:
    """--quick"""
    if options.quick:
        options.models, options.size, options.batch, options.threads = "ViT-Nano_2", 8, "2", 1


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, flags=["compile"], models="ViT-B_16", batch="8", size=224, precision="fp32,bf16",
                              device="cpu", threads=0, rounds=3, contenders="")
    small(options)
    ask("training_step", "step", 1, options)


if __name__ == "__main__":
    sys.exit(main())
