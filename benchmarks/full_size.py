"""Tokens per second of OLMoE-1B-7B's full shape with random weights: does BH decode faster than Top-8?

    python benchmarks/full_size.py                     # 16 layers in bfloat16: 14 GB of memory, ten minutes
    python benchmarks/full_size.py --quick             # 2 layers: does it work?
    python benchmarks/full_size.py --device cuda
    python benchmarks/full_size.py --save FOLDER       # only write such a model, with the embedded tokenizer

Greedy decoding from one prompt (`--batch B`: from B, together), prefill not counted. The variants take turns
within one run: the model as it is; patched with its own Top-8 (only recorded); BH whose floor is 8, so that
it decides and then keeps all; native Top-4, the bound; BH at `--means` experts on average, with the flat null
and the alpha that the script's `match_experts` finds on the very text that is decoded; its mean while
decoding is printed. The same with each expert's mean output standing in for what is dropped. An empirical
null would need more text, and means nothing with random weights: this is about time only.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import EMBEDDED, clock, machine, medians, olmoe_config, print_header, print_row
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, OlmoeForCausalLM

import run_bh_experiments as bh

FREE_FOR_REST = 1.5e9  # bytes for everything but the weights


def free_bytes(device: str) -> float:
    """Memory that can be taken now; infinite where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), torch.inf
    )


def random_olmoe(layers: int, dtype: torch.dtype, device: str) -> OlmoeForCausalLM:
    """OLMoE-1B-7B's shape with `layers` layers and seeded random weights, made in place.

    With fewer layers the vocabulary is smaller alike, so that each part keeps its share of a token's time; it
    holds the embedded model's tokens.
    """
    config = olmoe_config(num_hidden_layers=layers, vocab_size=max(4096, 50304 * layers // 16))
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(dtype)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if needed + FREE_FOR_REST > (free := free_bytes(device)):
        raise SystemExit(
            f"{layers} layers need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: fewer --layers"
        )
    model.to_empty(device=device)
    # Normal with standard deviation 0.02, as initialised. One long stretch of noise is laid over all weights
    # again and again, because drawing 7 billion numbers takes minutes. Its length divides no tensor's.
    torch.manual_seed(0)
    noise = torch.empty(2**24 + 43, dtype=dtype, device=device).normal_(std=0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                for part in parameter.view(-1).split(len(noise)):
                    part.copy_(noise[: len(part)])
                noise = noise.roll(12345)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are no weights
    return model.eval()


class Clock:
    """A logits processor that only notes when each token was about to be chosen."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(clock())
        return scores


def decode(model: OlmoeForCausalLM, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy text [B, S + n], and seconds per step after the prefill."""
    clock = Clock(ids.device.type)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=1, eos_token_id=0
    )
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, generation_config=settings, logits_processor=[clock])
    return text, (clock.times[-1] - clock.times[0]) / (new_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--means", type=float, nargs="+", default=[4, 5], help="experts that BH keeps on average"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, help="rows that are decoded together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="2 layers, 2 repeats of 4 tokens after 4")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write the model there and do nothing else"
    )
    args = parser.parse_args()
    if args.quick:
        args.layers, args.repeats = min(args.layers, 2), 2
        args.new_tokens, args.prompt = 4, 4

    start = time.perf_counter()
    model = random_olmoe(args.layers, getattr(torch, args.dtype), args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    taken = time.perf_counter() - start
    print(
        f"{machine(args.device)}, {args.dtype}, {args.layers} layers, {size / 1e9:.2f} B parameters made in"
    )
    how = f"medians of {args.repeats} runs of {args.new_tokens} tokens after a prompt of {args.prompt}"
    print(f"{taken:.0f} s; {how}, batch {args.batch}")
    if args.save:
        model.save_pretrained(args.save)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(args.save)
        print(f"saved in {args.save}")
        return

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (args.batch, args.prompt), generator=generator).to(
        args.device
    )
    text, _ = decode(model, ids, args.new_tokens)
    calibration = bh.record_routers(model, [text], outputs=True)
    # Of so few decisions the mean moves in steps; no closer match than one step of each can be asked for.
    decisions = calibration.logits.shape[0] * calibration.logits.shape[1]
    bh.MATCHING_ERROR = max(bh.MATCHING_ERROR, 8 / decisions)
    flat = {"method": "bh", "p_values": "flat", "max_k": 8}
    variants: dict[str, Any] = {
        "unpatched Top-8": None,
        "Top-8, recorded": {"method": "topk", "k": 8},
        "BH, floor 8: all kept": {**flat, "alpha": 0.5, "min_k": 8},
        "native Top-4": {"method": "topk", "k": 4},
    }
    for mean in args.means:
        matched = bh.match_experts("bh", flat, mean, calibration)
        variants[f"BH at {mean:g}, alpha = {matched['alpha']:.4f}"] = matched
        variants[f"the same, `stand_in: mean`, at {mean:g}"] = matched | {"stand_in": "mean"}
    layers = bh.find_moe_layers(model)
    experts = dict.fromkeys(variants, 8.0)

    def timed(name: str) -> float:
        if variants[name] is None:
            return decode(model, ids, args.new_tokens)[1]
        with bh.patched_routing(model, variants[name], calibration, layers) as recorder:
            spent = decode(model, ids, args.new_tokens)[1]
        experts[name] = recorder.total().row()["avg_experts_per_token"]
        return spent

    times = medians({name: lambda n=name: timed(n) for name in variants}, args.repeats, warm_up=1)
    print_header("routing", "experts, mean", "tokens/s", "ratio to unpatched")
    base = times["unpatched Top-8"]
    for name, spent in times.items():
        print_row(name, f"{experts[name]:.2f}", f"{args.batch / spent:.2f}", f"{base / spent:.2f}")


if __name__ == "__main__":
    main()
