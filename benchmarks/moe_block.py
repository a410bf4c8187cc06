"""One MoE block at OLMoE's width: does dropping experts save their time, does keeping all cost nothing?

    python benchmarks/moe_block.py            # about a minute; 2 GB of memory in float32

Builds one block from `OlmoeConfig()` with random weights and times it unpatched and patched, in turns, so
that a machine that slows down slows every variant alike. Prints medians and ratios to the unpatched block.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from run_bh_experiments import patched_routing

# With an alpha that nothing can reach, BH keeps its floor, `min_k` of the 8 candidates, and drops the others.
UNREACHABLE = {"method": "bh", "alpha": 1e-30, "p_values": "flat", "max_k": 8}


def seconds(block: torch.nn.Module, hidden: torch.Tensor) -> float:
    start = time.perf_counter()
    block(hidden)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="tokens in a call")
    parser.add_argument("--kept", type=int, nargs="+", default=[8, 6, 4, 2], help="experts kept of 8")
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="experts back ends")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = OlmoeConfig(num_hidden_layers=1, vocab_size=128, pad_token_id=0, eos_token_id=0)
    model = OlmoeForCausalLM(config).eval().to(getattr(torch, args.dtype))
    block = model.model.layers[0].mlp
    torch.nn.init.normal_(block.gate.weight, std=0.02)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {args.dtype}, medians of {args.repeats} calls\n")
    print("| back end | tokens | kept | ms | ratio to unpatched | identical |\n|" + " --- |" * 6)
    for backend in args.experts:
        model.set_experts_implementation(backend)
        for tokens in args.tokens:
            hidden = torch.randn(1, tokens, 2048, dtype=getattr(torch, args.dtype))
            configs = {kept: UNREACHABLE | {"min_k": kept} for kept in args.kept}
            times: dict[int | None, list[float]] = {kept: [] for kept in (None, *configs)}
            with torch.inference_mode():
                reference = block(hidden)
                equal = {}
                for turn in range(args.repeats + 3):
                    for kept in times:
                        if kept is None:
                            spent = seconds(block, hidden)
                        else:
                            with patched_routing(model, configs[kept]):
                                equal[kept] = torch.equal(block(hidden), reference)
                                spent = seconds(block, hidden)
                        if turn >= 3:  # the first turns warm up
                            times[kept].append(spent)
            base = median(times[None])
            for kept, spent in times.items():
                name, same = kept or "unpatched", "" if kept is None else "yes" if equal[kept] else "no"
                cells = (
                    backend,
                    tokens,
                    name,
                    f"{1000 * median(spent):.2f}",
                    f"{median(spent) / base:.3f}",
                    same,
                )
                print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
