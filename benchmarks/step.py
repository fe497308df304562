"""Training step: forward, backward, clip, SGD with momentum. Ours and the peers with the same precision and batch.

python -m benchmarks.step --models ViT-B_16 --precision fp32,bf16

In float32 ours runs two more times: with bf16 inside the matrix products (--precision fp32_bf16_matmul does that for all
contenders), and with the default precision of train.py.
"""

import sys

from . import harness
from .harness import OURS, Contender

FILLING = (2048, 1024, 512, 256, 128, 64, 32, 16, 8)      # batches that `fill` tries


def contenders(question: str, row: dict, batch: int, given: dict, side: int) -> list[Contender]:
    """Return the contenders of a question.

    question: the name of the functions in peers.py and ours.py; side: of the matrices of the limit.
    """
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


def measure_models(question: str, word: str, fraction: float, options) -> None:
    """Measure every model with every precision, and report one record for each.

    fraction: of the operations of a training step.
    """
    from utils.run.profiling import SIDE

    from .ours import flops, row_of

    side = 64 if options.quick else SIDE[options.device]
    with harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            row = row_of(model, options.size or None)
            operations = flops(row) * fraction
            for precision in options.precision.split(","):
                given = {"precision": precision, "device": options.device, "compiled": options.compile,
                         "threads": options.threads}
                batches = FILLING if options.batch == "fill" else [int(options.batch)]
                for batch in batches:
                    group = harness.choose_contenders(contenders(question, row, batch, given, side), options.contenders)
                    try:
                        costs = harness.measure(group, pool, rounds=options.rounds)
                        break
                    except harness.Failed as error:
                        if batch == batches[-1] or "out of memory" not in str(error).lower():
                            raise
                        pool.close()
                # The limit is measured in this precision: contenders with another one have no fraction of it.
                work = {each.name: operations * batch for each in group if each.given["precision"] == precision}
                work["matmul"] = 2 * side ** 3
                title = f"{word} {model} {row['size']} {precision} {options.device}{' compiled' if options.compile else ''}"
                harness.report(harness.record(
                    title, group, costs, baseline="timm", unit="seconds a step", work=work,
                    settings={"batch": batch, "threads": options.threads or "all", "rounds": options.rounds}), options.json)


def shrink_if_quick(options) -> None:
    """With --quick: take a tiny model."""
    if options.quick:
        options.models, options.size, options.batch, options.threads = "ViT-Nano_2", 8, "2", 1


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, flags=["compile"], models="ViT-B_16", batch="8", size=224, precision="fp32,bf16",
                              device="cpu", threads=0, rounds=3, contenders="")
    shrink_if_quick(options)
    measure_models("training_step", "step", 1, options)


if __name__ == "__main__":
    sys.exit(main())
