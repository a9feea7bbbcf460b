"""How the processes of a job share a run: its logical shards, and that every process has loaded the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from retrograd.core.engine import Blocks
from retrograd.core.step import Engine, State
from retrograd.data.pairs import PairStream
from retrograd.data.stream import DataStream
from retrograd.lm.model import CausalLM
from retrograd.parallel.group import Group, here
from retrograd.parallel.pieces import Pieces
from retrograd.parallel.shard import ByBlock, Sharded, release
from retrograd.parallel.split import Split
from retrograd.query.proof import prove_answers
from retrograd.runs.arithmetic import Arithmetic
from retrograd.settings.tasks import tasks_on_the_way
from retrograd.settings.train import RunConfig

__all__ = ["in_pieces", "logical_shards", "prove_while_whole", "refuse_unequal", "shared"]


def logical_shards(
    asked: int | None, begun: Arithmetic | None, group: Group, run: Path | None, replicas: int = 1
) -> int:
    """The logical shards of a run: those it was begun with, else those asked for, else one for each process.

    Raises:
        ValueError: If a run that was begun has others, or they cannot be dealt out evenly, with the worlds that can; or
            the processes cannot be so many replicas.
    """
    if group.world > 1 and group.world % replicas:  # one process has all whole, as with --parallel shard
        able = ", ".join(str(n) for n in range(1, group.world + 1) if group.world % n == 0)
        raise ValueError(
            f"--replicas is {replicas} and this job has {group.world} processes: each replica is as many processes, "
            f"which have the pieces of all parameters. Take --replicas {able}; the bits are the same with each."
        )
    if begun is not None and asked not in (None, begun.shards):
        raise ValueError(
            f"{run} was begun with {begun.shards} logical shards, now --shards is {asked}: sums over rows would be "
            "taken in another order, and replay needs the same bits. Leave --shards out, use another folder, or "
            "--overwrite to start afresh."
        )
    shards = begun.shards if begun is not None else asked or group.world
    if shards % group.world:
        able = ", ".join(str(n) for n in range(1, shards + 1) if shards % n == 0)
        known = f"{run} was begun with" if begun is not None else "there are to be"
        raise ValueError(
            f"{known} {shards} logical shards and this job has {group.world} processes, which cannot share them "
            f"evenly: sums over rows would be taken in another order, with other bits. Take {able} processes "
            f"(torchrun --nproc-per-node), or use another folder with --shards {group.world}."
        )
    return shards


def shared(engine: Engine, shards: int, group: Group, stream: DataStream | PairStream) -> Engine:
    """The engine over the logical shards of a run; itself where there is one."""
    return engine if shards == 1 else Split(engine, shards, group, _unit(stream))


def in_pieces(
    engine: Engine,
    shards: int,
    group: Group,
    stream: DataStream | PairStream,
    model: CausalLM,
    initial: State,
    replicas: int = 1,
    *,
    keep: bool = False,
) -> Sharded:
    """The engine over logical shards of a model whose parameters lie in pieces; the whole ones are let go of.

    Args:
        replicas: Copies of the pieces.
        keep: Do not let go of them.
    """
    lying = Pieces(initial.params, shards, group, replicas)
    kind = ByBlock if isinstance(engine, Blocks) else Sharded
    found = kind(engine, shards, group, _unit(stream), lying=lying, first=lying.own(initial.params))
    if not keep and not hasattr(model.module, "merge_and_unload"):  # adapters are small, and merged in place
        own = [x for x in model.module.parameters() if x.requires_grad]
        release(*initial.params.values(), *model.params.values(), *own)
    return found


def prove_while_whole(config: RunConfig, model: CausalLM) -> None:
    """Prove how a model is asked on the way, where it is to lie in pieces: there is no whole one to prove then.

    Raises:
        ValueError: If it cannot be asked so.
    """
    asks = config.parallel == "shard" and here().world > 1 and here().rank == 0
    if asks and any(task.form != "text" for task in tasks_on_the_way(config.evaluate).values()):
        prove_answers(model)


def _unit(stream: DataStream | PairStream) -> int:
    """Rows that stay together."""
    return stream.unit if isinstance(stream, PairStream) else 1


def refuse_unequal(group: Group, hashes: dict[str, str], arithmetic: Arithmetic) -> None:
    """Refuse ranks that have other rows, weights or code than rank 0, or that compute otherwise.

    Raises:
        ValueError: On rank 0, with the first such rank and what differs.
    """
    own = {**hashes, **{name: str(value) for name, value in dataclasses.asdict(arithmetic).items()}}
    for rank, found in enumerate(group.collected(own)):
        apart = [f"{name}: {value} on rank 0, {found.get(name)} there" for name, value in own.items()
                 if found.get(name) != value]  # fmt: skip
        if apart:
            lines = "\n  ".join(apart)
            raise ValueError(
                f"rank {rank} has not loaded what rank 0 has:\n  {lines}\nThe gradient would be of no one model. Give "
                "every rank the same files, libraries and kind of processor."
            )
