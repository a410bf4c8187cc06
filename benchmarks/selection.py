"""What deciding costs: BH selection against the softmax and top-k that the router does anyway.

    python benchmarks/selection.py                  # about two minutes
    python benchmarks/selection.py --quick          # a quarter of it, less steady
    python benchmarks/selection.py --device cuda --dtype bfloat16

A stand-in router holds ready logits and does what OLMoE's does after its linear layer: softmax in float32,
top-k, cast. It is patched by the script itself (`patched_routing`), with the empirical null and its tables.
"count" is scores, sort and table compare alone; "selection" is all that BH adds in the seam: scores, count,
floor and cap, zero weights. It is the patched router's time minus the unpatched one's and minus the
recorder's, which a static Top-k patch has as well. All take turns; ratios are to the unpatched router.

How often a rare case comes up depends on the logits. They are those of the embedded model on text that it
wrote, and of a real OLMoE where `--logits` names a file with some ([layers, tokens, experts], repeated with
noise). 128 experts are the logits of two tokens side by side, 8 the first 8 of 64.
The last table is T = 1 as a share of the MoE block's time at OLMoE's width.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import EMBEDDED, machine, medians, olmoe_config, print_header, print_row, seconds
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import run_bh_experiments as bh

BH = {"method": "bh", "alpha": 0.05, "p_values": "empirical"}


class StoredRouter(nn.Module):
    """OLMoE's router after its linear layer: the hidden states are the logits."""

    def __init__(self, num_experts: int, top_k: int):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, num_experts))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices = torch.softmax(logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return logits, weights.to(logits.dtype), indices


class StoredExperts(nn.Module):
    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return hidden


class StoredBlock(nn.Module):
    """The least that `patched_routing` takes for a MoE model."""

    _can_record_outputs = {"router_logits": StoredRouter}

    def __init__(self, num_experts: int, top_k: int):
        super().__init__()
        self.gate, self.experts = StoredRouter(num_experts, top_k), StoredExperts()

    def forward(self, input_ids: Tensor, **ignored: Any) -> None:
        """For `find_moe_layers`, which looks at what router and experts do with eight tokens."""
        logits = torch.randn(input_ids.numel(), self.gate.num_experts).to(self.gate.weight)
        _, weights, indices = self.gate(logits)
        self.experts(logits, indices, weights)


def embedded_logits() -> Tensor:
    """Router logits of the embedded model's middle layer on its own text: [N, 64]."""
    model, tokenizer = bh.load_model(str(EMBEDDED), torch.device("cpu"), torch.float32)
    return bh.calibrate(model, tokenizer).logits[1]


def sample_logits(path: Path) -> Tensor:
    """Logits of a file, all layers together, repeated to 8,192 tokens with noise of 0.2 spreads: [N, E]."""
    logits = torch.from_numpy(np.load(path)["logits"]).float().flatten(0, 1)
    rows = torch.randint(len(logits), (8192,))
    return logits[rows] + 0.2 * logits.std(-1, keepdim=True)[rows] * torch.randn(8192, logits.shape[-1])


def selection_times(logits: Tensor, tokens: int, own_k: int, args: Any) -> Mapping[str, float]:
    """Median seconds of the router unpatched, of the count alone, and of what BH adds in the seam."""
    calibration = bh.Calibration(logits[None], logits.topk(own_k).indices.to(torch.int16)[None])
    rows = logits[torch.randint(len(logits), (tokens,))].to(args.device, getattr(torch, args.dtype))
    block = StoredBlock(logits.shape[-1], own_k).to(args.device, rows.dtype)
    layers = bh.find_moe_layers(block)
    config = bh.resolve_config("bh", BH | {"max_k": own_k})
    null = calibration.null(0, config["temperature"])
    rule = bh.RULES[config["method"]]

    def count() -> Tensor:
        return rule.count(bh.Gates(bh.gate_scores(rows), null), config)

    def timed(routing: Mapping[str, Any] | None) -> float:
        if routing is None:
            return seconds(lambda: block.gate(rows), args.device)
        with bh.patched_routing(block, routing, calibration, layers):
            block.gate(rows)  # the first call after a patch is slower
            return seconds(lambda: block.gate(rows), args.device)

    calls = {
        "own": lambda: timed(None),
        "count": lambda: seconds(count, args.device),
        "recorder": lambda: timed({"method": "topk", "k": own_k}),
        "patched": lambda: timed(config),
    }
    times = medians(calls, args.repeats)
    return {**times, "selection": times["patched"] - times["recorder"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512, 8192])
    parser.add_argument("--logits", type=Path, help=".npz file with real router logits under `logits`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--quick", action="store_true", help="a quarter of repeats and text")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.quick:
        args.repeats, bh.CALIBRATION_SEQUENCES = args.repeats // 4 + 1, bh.CALIBRATION_SEQUENCES // 4

    embedded = embedded_logits()
    sources = [
        ("embedded model", embedded, 8),
        ("embedded model", torch.cat([embedded, embedded.flip(0)], dim=-1), 8),
        ("embedded model", embedded[:, :8], 2),
    ]
    if args.logits:
        sources.insert(1, ("OLMoE", sample_logits(args.logits), 8))
    print(f"{machine(args.device)}, {args.dtype}, medians of {args.repeats}, alpha = {BH['alpha']}")
    print_header("logits", "E", "own k", "T", "softmax + top-k, us", "count, ratio", "selection, ratio")
    alone = None
    with torch.inference_mode():
        for name, logits, own_k in sources:
            for tokens in args.tokens:
                times = selection_times(logits, tokens, own_k, args)
                if tokens == 1 and alone is None:
                    alone = times["selection"]
                own = times["own"]
                ratios = (f"{times[part] / own:.2f}" for part in ("count", "selection"))
                print_row(name, logits.shape[-1], own_k, tokens, f"{1e6 * own:.0f}", *ratios)
        if alone is not None:
            print_header("MoE block at OLMoE's width, T = 1", "block, ms", "selection, us", "share")
            for dtype in (torch.float32, torch.bfloat16):
                block = (
                    OlmoeSparseMoeBlock(olmoe_config(experts_implementation="eager"))
                    .to(args.device, dtype)
                    .eval()
                )
                for parameter in block.parameters():
                    parameter.normal_(std=0.02)
                hidden = torch.randn(1, 1, 2048, device=args.device, dtype=dtype)
                calls = {dtype: lambda h=hidden, b=block: seconds(lambda: b(h), args.device)}
                taken = medians(calls, args.repeats)[dtype]
                name = str(dtype).removeprefix("torch.")
                print_row(name, f"{1e3 * taken:.2f}", f"{1e6 * alone:.0f}", f"{alone / taken:.1%}")


if __name__ == "__main__":
    main()
