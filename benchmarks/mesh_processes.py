"""Whether several processes of one host, a device each, compute what one device does."""

import pathlib
import tempfile

import mesh_equality
import numpy as np
import one_process
import several_processes

import jax_flashmla

Shards = list[dict[str, np.ndarray]]


def run(count: int, *, quick: bool) -> Shards:
    """What ``count`` processes found; nothing for none.

    Call it before this process uses its GPUs: it may take all of their memory.

    Args:
        count: Processes.
        quick: On CPUs, with two devices each.
    """
    if not count:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        return several_processes.run(count, path, cpu_devices=2 if quick else None)


def check(found: Shards) -> list[dict]:
    """Compares with one device: bits of each process's requests, else the tests' tolerances."""
    entries = []
    for name in one_process.PROGRAMS:
        shards = [(key.split("/"), shard) for each in found for key, shard in each.items()]
        shards = [(key, shard) for key, shard in shards if key[0] == name]
        outs = [x for x in shards if x[0][1] == "out"]
        lses = {tuple(key[2:]): shard for key, shard in shards if key[1] == "lse"}
        wrong = []
        for (_, _, begin, device), out in outs:
            got = out, lses[begin, device]
            wrong += _faults(name, got, int(begin))[:1]
        entries.append(
            {
                "what": f"decode, {name} over {len(found)} processes",
                "kind": "processes",
                "devices": int(found[0]["devices"]),
                "passed": len(outs) - len(wrong),
                "total": len(outs),
                "wrong": wrong,
            }
        )
    return entries


def _faults(name: str, got: tuple[np.ndarray, np.ndarray], begin: int) -> list[str]:
    data, shape = one_process.data(), one_process.shape()
    if name == "pages":
        return mesh_equality.judged(got, data, shape)
    q_latent, q_rope, pool, table, lengths = data.arrays()
    rows = slice(begin, begin + len(got[0]))
    alone = jax_flashmla.mla_decode(
        *(q_latent[rows], q_rope[rows], pool, table[rows], lengths[rows]),
        softmax_scale=shape.softmax_scale,
        num_sm_parts=one_process.PARTS,
    )
    same = all(mesh_equality.same_bits(x, y) for x, y in zip(got, alone, strict=True))
    return [] if same else [f"request {begin}: other bits than one device alone"]
