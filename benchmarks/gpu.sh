#!/usr/bin/env bash
# All GPU figures in one go, printed as tables to paste into RESULTS.md. Needs a CUDA build of torch, about
# 30 GB of GPU memory, and 15 GB of disk under $TMPDIR for a model of OLMoE's full shape with random weights.
#
#     PYTHON=.venv/bin/python benchmarks/gpu.sh | tee gpu.md
#     PYTHON=.venv/bin/python benchmarks/gpu.sh --quick     # on a CPU, small: does every step work?
#
# What it is to show: the suite below 90 s; BH at 4 experts not slower than Top-8 at batch 1 and 32; which of
# skipping (a number of experts alone), masked and native is fastest in a block. The suite is the default one,
# 60 experiments; its time is from the start of the first experiment to that of the last, with scoring. Random
# weights: quality figures of that run mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
device=cuda
block=(--tokens 1 32 512 --repeats 51)
selection=()
decoding=(--new-tokens 64 --repeats 9)
model=()
suite=()
batches=(1 32)
if [[ ${1:-} == --quick ]]; then
    device=cpu
    block=(--quick --experts grouped_mm)
    selection=(--quick --tokens 1 512)
    decoding=(--quick --layers 1)
    model=(--layers 1)
    suite=(--max-tokens 2 --configs topk_8,bh_moderate --max-windows 4)
    batches=(1 2)
elif [[ $# -gt 0 ]]; then
    echo "$0 $*: only --quick is known" >&2
    exit 2
else
    "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA GPU here; try --quick"'
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda)'
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

printf '\n## MoE block: skipping (compacted) against masked and native, stand-ins\n\n'
"$python" benchmarks/moe_block.py --device $device --dtype bfloat16 "${block[@]}"

printf '\n## Selection\n\n'
"$python" benchmarks/selection.py --device $device --dtype bfloat16 "${selection[@]}"

for batch in "${batches[@]}"; do
    printf '\n## Decoding, full size, batch %s\n\n' $batch
    "$python" benchmarks/full_size.py --device $device --batch $batch "${decoding[@]}"
done

printf '\n## The suite, full size\n\n'
"$python" benchmarks/full_size.py --device $device --save "$folder/model" "${model[@]}"
start=$(date +%s)
"$python" run_bh_experiments.py --model "$folder/model" --output "$folder/results" --device $device \
    --dtype bfloat16 "${suite[@]}"
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

printf '\n## Batches of prompts through the script\n\n'
"$python" run_bh_experiments.py --model "$folder/model" --output "$folder/results" --device $device \
    --dtype bfloat16 "${suite[@]}" --generate-batch "${batches[1]}"
sed -n '/^### Throughput of a batch/,/^##/p' "$folder/results/REPORT.md"
