"""Counts the machine instructions of the inner loops of dual_kl's kernels, without a GPU.

    python tools/count_sass.py [--source csrc/cuda/dual_kl.cu] [--sm 90] [--blocks] [kernel]...

A kernel is a regular expression for demangled names. The table has a line for each inner loop that
reads 16 bytes at once, named by its address. `all` counts its instructions. `hot` counts those on
the shortest path round the loop with most of its 16-byte accesses, which excludes softcap, scale,
other dtypes and ends of rows; these are also counted by class. A pair is a logit of each model.
Outside of loops the path is the shortest one with most exponentials, shuffles, barriers and such
loops. A row is a thread's part of one: `--groups` of 8 pairs, as in 128256 logits on 256 threads in
8 blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE, STDOUT, run
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GROUP = 8
ALU = "LOP3 PRMT SEL ISETP IADD3 SHF LEA MOV PLOP3 FSEL FSET FSETP IMAD SHL IABS VIADD R2UR"
CLASSES = {
    **{name: name for name in ("MUFU", "FFMA", "FADD", "FMUL")},
    "max": r"[FHV]I?MNMX",
    "ALU": rf"U?({ALU.replace(' ', '|')})\b",
    "LDS": r"LDS|STS",
    "copy": r"LDGSTS|LDGDEPBAR|UBLKCP",
    "LDG/STG": r"(LD|ST)G?\b",
    "other": r"",
}
WIDE = re.compile(r"(LDGSTS|LDS|LDG|LD|STG|ST)\b.*\.128\b")
EXCHANGE = re.compile(r"MUFU\.EX2|SHFL|BAR|UCGABAR|SYNCS")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


class Block(NamedTuple):
    opcodes: list[str]
    after: list[int]


class Way(NamedTuple):
    marks: frozenset[object] = frozenset()
    length: float = 0
    blocks: tuple[int, ...] = ()


def blocks_of(function: str) -> dict[int, Block]:
    """Return the reachable basic blocks by address, in topological order except for loops."""
    code: dict[int, Block] = {}
    starts: set[int] = set()
    lines = [(int(a, 16), guard, op, rest) for a, guard, op, rest in LINE.findall(function)]
    for (address, guard, opcode, rest), (behind, *_) in pairwise(lines):
        after = [behind]
        if opcode.startswith(("BRA", "EXIT", "RET")):
            target = [int(rest.split("0x")[-1], 16)] if opcode.startswith("BRA") else []
            conditional = guard or (target and re.match(r"!?U?[PR]", rest))
            after = [behind, *target] if conditional else target
            starts |= {behind, *target}
        code[address] = Block([opcode], after)
    blocks: dict[int, Block] = {}
    for address, (opcodes, after) in code.items():
        if address in starts or not blocks:
            block = blocks[address] = Block([], [])
        block.opcodes.extend(opcodes)
        block.after[:] = after
    order: dict[int, Block] = {}
    seen: set[int] = set()

    def visit(address: int) -> None:
        seen.add(address)
        for following in blocks[address].after:
            if following not in seen:
                visit(following)
        order[address] = blocks[address]

    visit(next(iter(blocks)))
    return dict(reversed(order.items()))


def loops_of(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """Return the blocks of each loop, by its first block."""
    loops: dict[int, set[int]] = {}
    before = set()
    for last, block in blocks.items():
        before.add(last)
        for header in before & set(block.after):
            body, todo = loops.setdefault(header, {header}), [last]
            while todo:
                if (a := todo.pop()) not in body:
                    body.add(a)
                    todo += [b for b in blocks if a in blocks[b].after]
    return loops


def best_way(blocks: dict[int, Block], steps: dict[int, Way], end: int | None) -> Way:
    """Return the shortest forward path with most marks, from the first of `steps` to `end`."""
    place = {a: n for n, a in enumerate(a for a in blocks if a in steps)}
    best: dict[int | None, Way] = {next(iter(place)): Way()}
    for a in (a for a in place if a in best):
        way, step = best.pop(a), steps[a]
        way = Way(way.marks | step.marks, way.length + step.length, way.blocks + step.blocks)
        for b in blocks[a].after or (None,):
            if b == end or (b is not None and place.get(b, -1) > place[a]):
                best[b] = max(way, best.get(b, way), key=lambda w: (len(w.marks), -w.length))
    return best[end]


def rows_of(name: str, function: str, groups: float, show: bool) -> Iterator[list[str]]:
    """Return the table's rows of a kernel, without its name."""
    blocks = blocks_of(function)
    loops = loops_of(blocks)
    in_loops = {a for body in loops.values() for a in body}

    def opcodes(addresses: Iterable[int]) -> list[str]:
        return [opcode for a in addresses for opcode in blocks[a].opcodes]

    def wide(*addresses: int) -> Counter[str]:
        return Counter(m[1] for m in map(WIDE.match, opcodes(addresses)) if m)

    def row(label: str, every: Iterable[int], hot: Iterable[int], *pairs: object) -> list[str]:
        kinds = [next(c for c, p in CLASSES.items() if re.match(p, o)) for o in opcodes(hot)]
        numbers, found = [len(opcodes(every)), len(kinds), *(pairs or ("", ""))], Counter(kinds)
        return [label, *map(str, numbers), *(str(found[c]) for c in CLASSES)]

    def step(a: int, marks: Iterable[object]) -> Way:
        return Way(frozenset(marks), len(blocks[a].opcodes), (a,))

    outer = dict.fromkeys(blocks, Way())
    for a in set(blocks) - in_loops:
        outer[a] = step(a, [(a, n) for n, o in enumerate(blocks[a].opcodes) if EXCHANGE.match(o)])
    for header in sorted(h for h in loops if not (loops[h] - {h}) & set(loops)):  # inner ones
        body = loops[header]
        way = best_way(blocks, {a: step(a, ((a, kind) for kind in wide(a))) for a in body}, header)
        loads = max((n for kind, n in wide(*way.blocks).items() if kind[:2] == "LD"), default=0)
        bits = re.search(r"(?<=Float)\d+", name)  # of a logit; elsewhere exponentials tell
        exps = opcodes(way.blocks).count("MUFU.EX2")
        if not (pairs := loads * 64 // int(bits[0]) if bits else exps // 16 * GROUP):
            continue
        if wide(*way.blocks)["LDS"]:  # others are for what shared memory does not hold
            outer[header] = Way(frozenset([header]), groups * GROUP * way.length / pairs)
        yield row(f"{header:#x}", body, way.blocks, pairs, f"{way.length / pairs:.1f}")
        for a in sorted(body) if show else ():
            after = " ".join(f"{b:#x}" for b in blocks[a].after)
            yield row(f"{'hot' if a in way.blocks else 'rare'} {a:#x}", [a], [a], "to", after)
    way = best_way(blocks, outer, None)
    yield row("outside", set(blocks) - in_loops, way.blocks)
    share = f"{len(opcodes(way.blocks)) / way.length:.0%} outside"
    yield ["a row", "", f"{way.length:.0f}", f"{groups * GROUP:.1f}", share, *[""] * len(CLASSES)]


def output_of(program: str, *arguments: str) -> str:
    """Return the output of a program on the PATH or in Triton's package."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else ""
    command = [shutil.which(program) or shutil.which(program, path=str(folder)) or program]
    done = run([*command, *arguments], stdout=PIPE, stderr=STDOUT, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(f"{program}: {done.stdout}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", nargs="*", default=["rows_kernel"])
    parser.add_argument("--source", default=str(ROOT / "csrc/cuda/dual_kl.cu"))
    parser.add_argument("--sm", default="90")
    parser.add_argument("--blocks", action="store_true", help="also the blocks of each loop")
    parser.add_argument("--groups", type=float, default=128256 / GROUP / 8 / 256, help="a thread")
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)  # of blocks_of
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"-arch=sm_{options.sm}", "-std=c++17", f"-I{ROOT / 'csrc/include'}"]
        flags += ["-Xptxas=-v", "-cubin", "-o", f"{folder}/cubin"]
        report = output_of("nvcc", *flags, options.source)
        listing = output_of("cuobjdump", "-sass", f"{folder}/cubin")
    print("| kernel | loop | all | hot | pairs | a pair |", " | ".join(CLASSES), "|")
    print("|---" * (6 + len(CLASSES)) + "|")
    for function in listing.split("Function : ")[1:]:
        mangled = function.split()[0]
        plain = re.compile(r"\(anonymous namespace\)::|\w+::|^void |\(leaf.*\n")
        name = plain.sub("", output_of("c++filt", mangled))
        if not all(re.search(kernel, name) for kernel in options.kernels):
            continue
        used = rf"for {mangled}\n.*?(\d+ bytes spill stores).*\n.*?(\d+ registers)"
        title = ", ".join([name, *(re.findall(used, report) or [()])[0]])
        for row in rows_of(name, function, options.groups, options.blocks):
            print(f"| {' | '.join([title, *row])} |")
            title = ""
    return 0


if __name__ == "__main__":
    sys.exit(main())
