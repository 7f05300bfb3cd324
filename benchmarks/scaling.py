"""Where the time of an iteration goes on 8, 64 and 512 GPUs: arithmetic, not a measurement.

    python benchmarks/scaling.py

Every assumption is a constant below, with its source; change one and run again. The parts:

* sampling: a decoding step reads the weights and the keys and values of its rows once, while the
  host takes a fixed time; processes draw whole shards of queries, so the last round may be part
  empty, and a shard of `ROWS` answers decodes until its longest is done;
* scoring and training: products of the tokens that are really computed (shared prompts once), at
  `MFU` of the peak; a step of FSDP2 moves the weights twice and the gradients once, behind the
  products as far as these take longer; DDP with LoRA moves the adapters' gradients once;
* the rest: loading, gathering for sampling, checkpoints and the export.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

# NVIDIA H100 SXM data sheet: dense bfloat16, memory, NVLink in one direction
PEAK, MEMORY_BANDWIDTH, NVLINK = 989e12, 3.35e12, 450e9
# one 400 Gb/s adapter per GPU, as in a DGX H100; eight GPUs a node
NETWORK, PER_NODE = 50e9, 8
# assumed: what a kernel library reaches; reading a decoding step's bytes, and moving gradients
MFU, READS, LINKS = 0.40, 0.60, 0.80
# measured on the slow CPU of `sampling.md`: 31 ms a step for 28 layers of no width; a GPU's host
# is assumed twice as fast
HOST = 0.0155
# assumed: a shared file system, in all
DISK = 5e9

# Qwen2-7B: its config.json
PARAMETERS, LAYERS, KEY_HEADS, HEAD_WIDTH, VOCABULARY, WIDTH = 7.616e9, 28, 4, 128, 152064, 3584
ADAPTERS = 40.4e6  # rank 16 on every linear layer but the head
# assumed lengths in tokens: query, principle, answer (mean, and longest of some hundred), and
# how many queries
QUERY, PRINCIPLE, ANSWER, LAST, QUERIES = 100, 150, 400, 1200, 60_000
BATCH = 256  # records of a step, as in the 2025 paper
ROWS, SHARD, MICRO = 96, 256, 16_384  # sampler.max_rows, pairs.shard_size, model.max_tokens


@dataclass(frozen=True)
class Way:
    """How the weights are trained."""

    name: str
    sharded: bool
    trained: float

    def step_bytes(self) -> float:
        """What a process sends and gets in one forward and backward pass."""
        if self.sharded:  # bfloat16 weights twice, float32 gradients once
            return PARAMETERS * (2 + 2 + 4)
        return 2 * 4 * self.trained  # all-reduce


WAYS = (
    Way("LoRA, ddp", sharded=False, trained=ADAPTERS),
    Way("all weights, fsdp2", sharded=True, trained=PARAMETERS),
)


def tree_tokens() -> int:
    """Tokens of a record's six sequences, each prompt once."""
    return 3 * QUERY + 2 * PRINCIPLE + 6 * ANSWER


def link(gpus: int) -> float:
    """Bytes a second between the processes of a ring."""
    return LINKS * (NVLINK if gpus <= PER_NODE else NETWORK)


def sampling(gpus: int, shard: int) -> tuple[float, float]:
    """Seconds, and the share of them in which a process has nothing to do."""
    cache = 2 * LAYERS * KEY_HEADS * HEAD_WIDTH * 2  # bytes of a token's keys and values
    context = QUERY + PRINCIPLE * 2 / 3 + ANSWER / 2
    reads = (PARAMETERS * 2 + ROWS * context * cache) / (READS * MEMORY_BANDWIDTH)
    step = max(HOST, reads)  # the host prepares a step's kernels while the device runs them
    answers = 3 * shard
    # slots are refilled until the last ROWS answers, which decode down to the longest of them
    steps = max(0, answers - ROWS) * ANSWER / ROWS + LAST
    shards = math.ceil(QUERIES / shard)
    rounds = math.ceil(shards / gpus)
    prefill = answers * (QUERY + PRINCIPLE) * 2 * PARAMETERS / (MFU * PEAK)
    seconds = rounds * (steps * step + prefill)
    return seconds, 1 - shards / (rounds * gpus)


def scoring(gpus: int) -> float:
    """Seconds of the pass that stores all log-probabilities."""
    tokens = tree_tokens() + 2 * ANSWER  # (x, yo) and (x-, y-) for the filter and the report
    return QUERIES * tokens * 2 * PARAMETERS / (MFU * PEAK * gpus)


def training(gpus: int, way: Way) -> tuple[float, float, float]:
    """Seconds of an iteration, seconds of products and of traffic in one step."""
    records = max(1, BATCH // gpus)  # of a process; more processes than records make a larger batch
    tokens = records * tree_tokens()
    # forward, backward to the activations, to the trained weights, and recomputation
    products = 2 * PARAMETERS * tokens * (3 + (way.trained == PARAMETERS)) / (MFU * PEAK)
    passes = math.ceil(tokens / MICRO)
    ring = (gpus - 1) / gpus
    # without synchronisation DDP sends once per step, however many passes it takes
    traffic = ring * way.step_bytes() * (passes if way.sharded else 1) / link(gpus)
    step = max(products, traffic)
    return step * math.ceil(QUERIES / (records * gpus)), products, traffic


def rest(gpus: int, way: Way) -> float:
    """Seconds of loading, gathering and saving."""
    nodes = math.ceil(gpus / PER_NODE)
    load = PARAMETERS * 2 * nodes / DISK  # each node reads the files once, then its page cache
    gather = PARAMETERS * 2 / link(gpus) if way.sharded else 0.0
    save = (way.trained * 4 * 3) / DISK
    return load + gather + save


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", type=int, nargs="+", default=[SHARD, 64], help="queries a shard")
    given = parser.parse_args()
    columns = ["", "GPUs", "shard", "sample h", "score h", "train h", "rest h", "together h"]
    columns += ["speed-up", "a step: products s, traffic s", "idle in sampling"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for way in WAYS:
        first = 0.0
        for gpus in (8, 64, 512):
            for shard in given.shard:
                sample, idle = sampling(gpus, shard)
                train, products, traffic = training(gpus, way)
                parts = [sample, scoring(gpus), train, rest(gpus, way)]
                whole = sum(parts) / 3600
                first = first or whole
                hours = " | ".join(f"{part / 3600:.2f}" for part in [*parts, whole * 3600])
                print(
                    f"| {way.name} | {gpus} | {shard} | {hours} | {first / whole:.1f}x |"
                    f" {products:.2f}, {traffic:.2f} | {idle:.0%} |"
                )


if __name__ == "__main__":
    main()
