"""Milliseconds a micro-batch, with and without torch.compile: `python -m models.train.speed`."""

import sys
import time

import torch
from tokenizers import Tokenizer

from models.train.corpus import SCHEDULE, Encoder, micro_batch
from models.train.network import TinyQwen2VL
from models.train.train import FOLDER, Weights, loss_of


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    batches = [micro_batch(encoder, f"speed/{i}", kind) for i, kind in enumerate(SCHEDULE[:7])]
    batches = [batch.each(lambda t: t.to(device)) for batch in batches]
    ms = {}
    for compiled in (False, True):
        model = TinyQwen2VL(816).to(device)
        weights = Weights(model, device)
        if compiled:
            for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
                block.compile(dynamic=True)
        begun = time.perf_counter()
        for round_number in range(4):
            started = time.perf_counter()
            for batch in batches:
                loss_of(model, batch).backward()
            host = time.perf_counter() - started
            weights.step(1e-4)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - started
            print(
                f"compiled={compiled} round={round_number} host={host:.2f} took={took:.2f} s",
                flush=True,
            )
        ms[compiled] = took / len(batches) * 1000
        print(
            f"compiled={compiled}: {ms[compiled]:.0f} ms a micro-batch; {time.perf_counter() - begun:.0f} s in all",
            flush=True,
        )
    sys.exit(0 if ms[True] < 0.75 * ms[False] else 1)


if __name__ == "__main__":
    main()
