#!/usr/bin/env bash
# Build for a GPU, check that the GPU is really used, run the GPU tests and the benchmark, and write
# one report.
#
#   scripts/gpu_check.sh [--backend cuda|vulkan|rocm] [--model FILE.gguf|NAME] [--out DIR]
#                        [--lengths 8192,16384,...] [-- OPTIONS]
#
# Without --backend the first is taken whose compiler is there. Needs a C++ compiler, Python 3.10 or
# newer, and for CUDA nvcc, for Vulkan glslc and its headers, for ROCm hipcc. Everything lands in DIR
# (default results/gpu): the environment with llama-cpp-python compiled for the GPU, the logs, and
# report.md. OPTIONS go to `bench`. Run again, it keeps the environment and goes on where it was
# stopped. Exit code 0: all went well; 1: a step failed, report.md says which; 2: it cannot be run here.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/results/gpu
model=
backend=
lengths=8192,16384,32768,65536

die() {
    echo "error: $1" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --backend | --model | --out | --lengths)
            (($# > 1)) || die "$1 needs a value"
            case $1 in
                --backend) backend=$2 ;;
                --model) model=$2 ;;
                --out) out=$2 ;;
                --lengths) lengths=$2 ;;
            esac
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

# What compiles for a backend.
compiler() {
    case $1 in
        cuda) echo nvcc ;;
        vulkan) echo glslc ;;
        rocm) echo hipcc ;;
        *) die "unknown backend $1; use cuda, vulkan or rocm" ;;
    esac
}

# What a machine says of its GPUs, as far as it can.
gpus() {
    case $backend in
        cuda)
            nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv
            nvcc --version | tail -n 2
            ;;
        vulkan) vulkaninfo --summary ;;
        rocm) rocminfo | grep -E '^ *(Name|Marketing Name):' ;;
    esac
}

if [[ -z $backend ]]; then
    for one in cuda rocm vulkan; do
        if command -v "$(compiler "$one")" >/dev/null; then
            backend=$one
            break
        fi
    done
    [[ -n $backend ]] || die "no nvcc, hipcc or glslc: install CUDA's toolkit, ROCm or Vulkan's SDK"
fi
needed=$(compiler "$backend") || exit 2
command -v "$needed" >/dev/null || die "no $needed: install what --backend $backend compiles with"
if [[ $backend == cuda ]]; then
    command -v nvidia-smi >/dev/null || die "no nvidia-smi: this machine has no NVIDIA driver"
    [[ -n $(nvidia-smi -L 2>/dev/null) ]] || die "nvidia-smi finds no GPU"
fi
command -v python3 >/dev/null || die "no python3: install Python 3.10 or newer"

mkdir -p "$out"
out=$(cd "$out" && pwd)
report=$out/report.md
failed=0

export LASERKV_GGUF_VENV=$out/venv
case $backend in
    cuda) switch=-DGGML_CUDA=on ;;
    vulkan) switch=-DGGML_VULKAN=on ;;
    rocm) switch=-DGGML_HIP=on ;;
esac
export CMAKE_ARGS="$switch${CMAKE_ARGS:+ $CMAKE_ARGS}"
python=$LASERKV_GGUF_VENV/bin/python
chosen=()
if [[ -n $model ]]; then
    if [[ -e $model ]]; then
        model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model")
    fi
    chosen=(--model "$model")
fi
cd "$root"

# step NAME COMMAND...: runs it, shows and logs what it says, and notes in the report how it ended.
step() {
    local name=$1 code=0
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.log" || code=$?
    {
        echo
        if ((code)); then echo "## $name: FAILED (exit code $code)"; else echo "## $name: ok"; fi
        echo
        echo '```'
        tail -n 60 "$out/$name.log"
        echo '```'
    } >>"$report"
    ((code == 0)) || failed=1
    return "$code"
}

# What llama.cpp itself says after loading: which layers are on the GPU, and where the cache lies.
# shellcheck disable=SC2329  # called by step
check_offload() {
    "$python" - "$model" <<'PY'
import sys

from laserkv_gguf import models
from laserkv_gguf.llama import devices
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Model



def gpus():
    return [device for device in devices.listed() if device.kind in ("gpu", "igpu")]


assert gpus(), f"llama.cpp sees no GPU, only {[d.name for d in devices.listed()]}"
before = sum(device.free for device in gpus())
with Model(models.find(sys.argv[1] or None)) as model, Context(model, 8192) as context:
    after = sum(device.free for device in gpus())
    print(f"{model.path.name}: {model.offloaded_layers} of {model.layers + 1} layers on the GPU")
    print("model buffers, bytes:", model.buffers)
    print("context buffers, bytes:", context.buffers)
    print(f"GPU memory in use for them: {before - after} bytes")
    assert model.offloaded_layers == model.layers + 1, "not all layers were offloaded"
    on_gpu = {n: size for n, size in context.buffers.items() if not n.startswith("CPU")}
    cache = sum(size for name, size in on_gpu.items() if name.endswith(" KV"))
    assert abs(cache - context.kv_bytes) < 2**20, f"{cache} of {context.kv_bytes} bytes of cache"
    # some devices say that all of their memory is free, whatever lies in it
    if all(device.free == device.total for device in gpus()):
        print("this device does not report what is free")
    else:
        assert before - after >= context.kv_bytes, "the GPU's memory did not fill"
PY
}

# The same of every run of the benchmark, from what it wrote.
# shellcheck disable=SC2329  # called by step
check_bench() {
    "$python" - "$out/bench/bench.json" <<'PY'
import json
import sys

result = json.load(open(sys.argv[1], encoding="utf-8"))
model = result["model"]
assert model["offloaded_layers"] == model["layers"] + 1, "not all layers were offloaded"
for row in result["rows"]:
    name = f"{row['document_tokens']} tokens, {row['policy']}"
    if "error" in row:
        print(f"{name}: {row['error']}")
        continue
    cache = {n: size for n, size in row["buffers"].items() if n.endswith(" KV")}
    assert cache and not any(n.startswith("CPU") for n in cache), f"{name}: cache in {cache}"
    if row["device_memory_bytes"]:  # 0: the device does not report it
        filled = row["device_memory_bytes"] >= row["kv_bytes"]
        assert filled, f"{name}: the GPU's memory did not fill"
    spent = row["prefill_seconds"]
    scoring = sum(row.get(f"{step}_seconds") or 0 for step in ("score", "select"))
    print(
        f"{name}: first token {row['first_token_seconds']:.2f} s, "
        f"{row['decode_tokens_per_second'] or 0:.1f} tok/s, "
        f"GPU memory {(row['device_memory_bytes'] or 0) / 2**20:.0f} MiB, scoring {scoring / spent:.1%} "
        f"of prefill; full ÷ this: first token {row['ratios']['first_token_seconds'] or 0:.2f}, "
        f"decode {row['ratios'].get('decode_seconds_per_token') or 0:.2f}"
    )
PY
}

{
    echo "# GPU check, $backend, $(date -u +%Y-%m-%d)"
    echo
    echo '```'
    gpus || echo "(nothing to ask about the GPU)"
    git rev-parse HEAD 2>/dev/null || true
    echo '```'
} >"$report"

# Without these two nothing else says anything.
step build python3 scripts/environment.py --extra test || exit 1
step offload check_offload || exit 1

step tests "$python" -m pytest -m gpu -v tests/test_gpu.py tests/test_device.py || true

# Positions stay original: beyond the model's trained length answers mean nothing, speed does.
if step bench "$python" -m laserkv_gguf bench ${chosen[@]+"${chosen[@]}"} --lengths "$lengths" \
    --positions original --probe-cost --out "$out/bench" "$@"; then
    step figures check_bench || true
    {
        echo
        # its headings go one level down
        sed 's/^#/##/' "$out/bench/bench.md"
    } >>"$report"
fi

echo
if ((failed)); then echo "a step FAILED: see $report"; else echo "all went well: see $report"; fi
exit "$failed"
