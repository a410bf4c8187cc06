#!/usr/bin/env bash
# All GPU figures in one go, printed as tables to paste into RESULTS.md. Needs a CUDA build of torch, about
# 30 GB of GPU memory, and 15 GB of disk under $TMPDIR for a model of OLMoE's full shape with random weights.
#
#     PYTHON=.venv/bin/python benchmarks/gpu.sh | tee gpu.md
#
# The suite is the default one, 60 experiments; its time is from the start of the first experiment to that of
# the last, with scoring. Random weights: quality figures of that run mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA GPU here"'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda)'

printf '\n## MoE block: skipping (compacted) against masked dispatch\n\n'
"$python" benchmarks/moe_block.py --device cuda --dtype bfloat16 --tokens 1 32 512 --repeats 51

printf '\n## Selection\n\n'
"$python" benchmarks/selection.py --device cuda --dtype bfloat16

printf '\n## Decoding, full size\n\n'
"$python" benchmarks/full_size.py --device cuda --new-tokens 64 --repeats 9

printf '\n## The suite, full size\n\n'
"$python" benchmarks/full_size.py --device cuda --save "$folder/model"
start=$(date +%s)
"$python" run_bh_experiments.py --model "$folder/model" --output "$folder/results" --device cuda
echo "whole command: $(($(date +%s) - start)) s"
"$python" - "$folder/results" <<'END'
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, ".")
from run_bh_experiments import Results

results = Results.read(Path(sys.argv[1]))
frame = results.generation
print(f"{results}, {results.num_failed} failed")
print(f"generation: {frame['inference_time_sec'].sum():.1f} s in all")
begun = [datetime.fromisoformat(moment) for moment in frame["timestamp"]]
print(f"from the first experiment's start to the last one's: {(max(begun) - min(begun)).seconds} s")
columns = ["avg_experts_per_token", "tokens_per_sec", "decode_sec_per_token", "peak_memory_gb"]
print(frame.groupby("config_name", sort=False)[columns].median().round(4).to_string())
END
tail -n 20 "$folder/results/experiment_log.txt"
