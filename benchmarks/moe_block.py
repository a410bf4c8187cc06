"""One MoE block at OLMoE's width: does dropping experts save their time, does keeping all cost nothing?

    python benchmarks/moe_block.py            # some minutes; 2 GB of memory in float32
    python benchmarks/moe_block.py --quick
    python benchmarks/moe_block.py --tokens 8 32 --kept 8 4 --dtype bfloat16      # decoding a batch
    python benchmarks/moe_block.py --tokens 1 512 --only-stand-ins                # what stands in, by itself
    python benchmarks/moe_block.py --device cuda --dtype bfloat16

Builds one block with random weights (hidden 2048, 64 experts of 1024, top-8) and times it unpatched and
patched, in turns, so that a machine that slows down slows every variant alike. Prints medians and ratios to
the unpatched block. "masked" is the alternative to skipping: dropped experts get weight zero and run all the
same. "native": the router's own K set to as many, so that nothing is decided or dropped. "touched": how many
different experts the tokens of the call use. Their weights are read whatever the number of tokens, so
touched / touched by Top-8 bounds what a batch can save where reading is what takes time.

Below it, what stands in for dropped experts (4 of 8, by itself, so that the block's noise is not in it), as a
share of the unpatched block.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from common import machine, medians, print_header, print_row, seconds
from full_size import random_olmoe
from transformers import OlmoeForCausalLM

from run_bh_experiments import StandIn, patched_routing

# With an alpha that nothing can reach, BH keeps its floor, `min_k` of the 8 candidates, and drops the others.
UNREACHABLE = {"method": "bh", "alpha": 1e-30, "p_values": "flat", "max_k": 8}


@contextlib.contextmanager
def routed(model: OlmoeForCausalLM, kept: int | None, how: str) -> Iterator[None]:
    """Inside, the block keeps so many experts; None: unpatched. how: "", "masked" or "native"."""
    with contextlib.ExitStack() as stack:
        if kept is not None:
            config = {"method": "topk", "k": kept} if how == "native" else UNREACHABLE | {"min_k": kept}
            stack.enter_context(patched_routing(model, config))
        if how == "masked":
            experts = model.model.layers[0].mlp.experts
            skipping = experts.forward
            experts.forward = skipping.__wrapped__
            stack.callback(setattr, experts, "forward", skipping)  # as `patched_routing` left it
        yield


def touched(block: Any, hidden: torch.Tensor) -> int:
    """How many different experts the block runs for these tokens, as it is routed now."""
    _, weights, indices = block.gate(hidden)
    return len(indices[weights != 0].unique())


def random_stand_in(rank: int, hidden_size: int, block: Any) -> StandIn:
    """Of a rank, 0 for the mean alone, with any values: only its time counts."""
    like = block.experts.gate_up_proj
    experts = len(like)
    offset = like.new_empty(experts, hidden_size).normal_()
    if not rank:
        return StandIn(offset)
    down = like.new_empty(experts, rank, hidden_size).normal_()
    return StandIn(offset, down, like.new_empty(experts, hidden_size, rank).normal_())


def time_stand_ins(block: Any, args: argparse.Namespace) -> None:
    """Target: at most 2 % of the block."""
    print_header("stand-in", "tokens", "block, ms", "stand-in, us", "share of the block")
    for tokens in args.tokens:
        hidden = torch.randn(tokens, 2048, device=args.device, dtype=block.gate.weight.dtype)
        _, weights, indices = block.gate(hidden)
        replaced = weights.clone()
        replaced[:, :4] = 0  # the four best are kept, the other four replaced
        calls = {"block": lambda hidden=hidden: seconds(lambda: block(hidden[None]), args.device)}
        for name, rank in (("mean", 0), ("linear:16", 16)):
            stand_in = random_stand_in(rank, 2048, block)
            work = functools.partial(stand_in.output, hidden, indices, replaced)
            calls[name] = functools.partial(seconds, work, args.device)
        times = medians(calls, args.repeats, warm_up=1)
        for name in ("mean", "linear:16"):
            cells = (f"{1e3 * times['block']:.2f}", f"{1e6 * times[name]:.0f}")
            print_row(name, tokens, *cells, f"{times[name] / times['block']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512], help="tokens in a call")
    parser.add_argument("--kept", type=int, nargs="+", default=[8, 6, 4, 2], help="experts kept of 8")
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="experts back ends")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--only-stand-ins", action="store_true", help="leave out the first table")
    parser.add_argument("--quick", action="store_true", help="few repeats, 1 and 32 tokens, 8 and 4 kept")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.kept, args.repeats = [1, 32], [8, 4], 2

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = random_olmoe(1, dtype, args.device)
    block = model.model.layers[0].mlp
    print(f"{machine(args.device)}, {args.dtype}, medians of {args.repeats} calls")
    if not args.only_stand_ins:
        time_block(model, block, args)
    with torch.inference_mode():
        time_stand_ins(block, args)


def time_block(model: OlmoeForCausalLM, block: Any, args: argparse.Namespace) -> None:
    dtype = block.gate.weight.dtype
    fewer = [kept for kept in args.kept if kept < 8]
    variants = [(None, ""), *((kept, "") for kept in args.kept)]
    variants += [(kept, how) for how in ("native", "masked") for kept in fewer]
    print_header("back end", "tokens", "kept", "touched", "ms", "ratio to unpatched", "bound", "identical")
    for backend in args.experts:
        model.set_experts_implementation(backend)
        for tokens in args.tokens:
            hidden = torch.randn(1, tokens, 2048, device=args.device, dtype=dtype)
            equal = {}
            used = {}

            def timed(kept: int | None, how: str, hidden=hidden, equal=equal, used=used) -> float:
                with routed(model, kept, how):
                    equal[kept, how] = torch.equal(block(hidden), equal["own"])
                    used[kept, how] = touched(block, hidden)
                    return seconds(lambda: block(hidden), args.device)

            with torch.inference_mode():
                equal["own"] = block(hidden)
                calls = {variant: lambda v=variant, timed=timed: timed(*v) for variant in variants}
                times = medians(calls, args.repeats, warm_up=1)
            for (kept, how), spent in times.items():
                name = "unpatched" if kept is None else f"{kept}, {how}" if how else kept
                same = "" if kept is None else "yes" if equal[kept, how] else "no"
                ratio = spent / times[None, ""]
                bound = used[kept, how] / used[None, ""]
                cells = (f"{1000 * spent:.2f}", f"{ratio:.3f}", f"{bound:.3f}")
                print_row(backend, tokens, name, used[kept, how], *cells, same)


if __name__ == "__main__":
    main()
