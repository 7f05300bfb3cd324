"""Self-Steering Optimization in a Fabric loop of your own, sharded with FSDP2.

    python examples/fabric_loop.py --model sandbox/model --queries sandbox/train.jsonl
    python examples/fabric_loop.py --model ... --queries ... --devices 8 --precision bf16-true

Pairs, batches, scoring and objective are the library's; the loop is yours to change.
"""

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy

from sso_lightning.data import PlannedBatches, plan_batches, score_batch
from sso_lightning.losses import IPO
from sso_lightning.module import Schedule
from sso_lightning.objectives import SelfSteering
from sso_lightning.pairs import PairBuilder, tokens_of
from sso_lightning.policy import PolicyConfig, load_model, load_tokenizer, save_policy
from sso_lightning.principles import PredefinedPrinciples
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import load_queries
from sso_lightning.sampling import TransformersSampler
from sso_lightning.sharding import full, gathered, shard


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--queries", required=True, help="file of queries")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--shard-size", type=int, default=256)
    return parser.parse_args(argv)


def main(argv=None):
    given = arguments(argv)
    strategy = ModelParallelStrategy(
        lambda model, mesh: shard(model, mesh["data_parallel"]),
        data_parallel_size=given.devices,
        tensor_parallel_size=1,
    )
    fabric = Fabric(
        accelerator=given.accelerator,
        devices=given.devices,
        precision=given.precision,
        strategy=strategy,
    )
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    config = PolicyConfig(given.model)
    tokenizer = load_tokenizer(config)
    renderer = ChatRenderer(tokenizer)
    model = load_model(config).train()
    fabric.setup_module(model)  # shards `model` in place; scoring and sampling take it as it is
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=given.lr))
    objective = SelfSteering(IPO(beta=given.beta))
    sampler = TransformersSampler(given.max_new_tokens)
    principles = PredefinedPrinciples(pick="random")
    schedule, queries, losses = Schedule(), load_queries(given.queries), []

    for iteration in range(given.iterations):
        builder = PairBuilder(
            *(model, renderer, sampler, principles),
            seed=0,
            iteration=iteration,
            shard_size=given.shard_size,
        )
        with gathered(model):
            records, report = builder.build(queries, given.out / f"pairs/iteration-{iteration:02d}")
        fabric.print(f"iteration {iteration}: {report['pairs/kept']} pairs")
        turns = plan_batches(
            tokens_of(records, objective.sequences),
            batch_size=given.batch_size,
            seed=0,
            epoch=iteration,
            world=fabric.world_size,
        )
        planned = PlannedBatches(
            records, turns, objective.sequences, given.accumulate, rank=fabric.global_rank
        )
        optimizer.state.clear()  # every iteration is a training run of its own
        total = -(-len(planned) // given.accumulate)
        step_loss = torch.zeros((), device=fabric.device)
        for index in range(len(planned)):
            batch = planned[index].to(fabric.device)
            loss, _ = objective(score_batch(model, batch), batch.reference)
            loss = loss * batch.scale / given.accumulate
            fabric.backward(loss)
            step_loss += loss.detach()
            if batch.closes_step:
                for group in optimizer.param_groups:
                    group["lr"] = given.lr * schedule.factor(index // given.accumulate, total)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), given.clip)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(fabric.all_reduce(step_loss, reduce_op="mean")))
                fabric.print(f"  loss {losses[-1]:.5f}  gradient norm {float(full(norm)):.4f}")
                step_loss.zero_()
    save_policy(model, tokenizer, given.out / "export", writes=fabric.is_global_zero)
    return losses


if __name__ == "__main__":
    main()
