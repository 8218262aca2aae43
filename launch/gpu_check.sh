#!/usr/bin/env bash
# Checks and measures one GPU, the most important first, in some minutes. Without one, it does the same
# in small on the CPU.
#
#   launch/gpu_check.sh [OUT]
#
# Each part's results are added to OUT/PART.jsonl (OUT: gpu_check) when it ends, its messages to
# OUT/PART.log. A part that fails or takes too long does not stop the others; the exit status is 1 if one
# did. Variables:
#   PYTHON   the Python that has the packages (python3): jax for the GPU, flax, optax, orbax-checkpoint,
#            transformers, ml_collections; for the rivals also torch and sentence-transformers
#   PARTS    what to run, in order:
#              agree     scores and gradients against the CPU's, bfloat16 against float32
#              joint     the joint step, BERT base, lists of 32, MS MARCO's lengths, against PyTorch
#              encode    passages to vectors and pairs to scores, against sentence-transformers
#              profile   the joint step's ten longest operations
#              exact     exact search over 1,000,000 x 768, against torch
#              minilm    the joint step in MiniLM's shape, against PyTorch
#              lists128  the joint step, lists of 128
#              full      the joint step, every input at its full length, against PyTorch
#   VERSUS   "" leaves the rivals out (--vs torch where PyTorch is installed)
#   LIMIT    most seconds of a part (240)
#   TOTAL    most seconds of all (480)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT="${1:-gpu_check}"
PYTHON="${PYTHON:-python3}"
LIMIT="${LIMIT:-240}"
TOTAL="${TOTAL:-480}"
PARTS="${PARTS:-agree joint encode profile exact minilm lists128 full}"
"$PYTHON" -c 'import torch, sentence_transformers' 2>/dev/null && with_rivals="--vs torch" || with_rivals=""
read -r -a versus <<<"${VERSUS-$with_rivals}"
mkdir -p "$OUT"
# The profile reads the joint step's program from here.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUT/.compiled}"

if nvidia-smi >/dev/null 2>&1; then
  base=(--shape bert-base) small=(--shape minilm)
  few=(--config.joint.batch=2 --config.joint.list_size=8 --passages 256)
  lists=(--config.joint.batch=8 --config.joint.list_size=32)
  long=(--config.joint.batch=2 --config.joint.list_size=128)
  many=(--passages 16384 --rounds 3) vectors=(--vectors 1000000 --queries 2048) steps=6
else
  base=(--shape bert-tiny --config.model.dtype=float32) small=("${base[@]}")
  few=(--config.joint.batch=2 --config.joint.list_size=4 --passages 256)
  lists=("${few[@]}") long=("${few[@]}") many=(--passages 256 --rounds 1)
  vectors=(--vectors 20000 --queries 64) steps=1
fi

# run PART BENCHMARK ARGUMENTS: a benchmark with the models and lengths of configs/msmarco.py.
failed=0
run() {
  local part="$1" benchmark="$2" started=$SECONDS left=$((TOTAL - SECONDS))
  shift 2
  if [ "$left" -le 0 ]; then
    failed=1
    echo "$part: not run, TOTAL=$TOTAL seconds are over"
    return
  fi
  local command=("$PYTHON" -m rqv2_jax.bench "$benchmark" --config configs/msmarco.py)
  command+=(--config.model.remat=dots "$@" --json "$OUT/$part.jsonl")
  if timeout $((left < LIMIT ? left : LIMIT)) "${command[@]}" >"$OUT/$part.log" 2>&1; then
    echo "$part: done in $((SECONDS - started)) s"
  else
    failed=1
    echo "$part: failed or stopped after $((SECONDS - started)) s: $(tail -n 1 "$OUT/$part.log")"
  fi
}

# PyTorch needs the memory that JAX does not take.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.3}"
for part in $PARTS; do
  case "$part" in
    agree) run agree agree "${base[@]}" --lengths msmarco "${few[@]}" ;;
    joint) run joint joint "${base[@]}" --lengths msmarco "${lists[@]}" --steps "$steps" "${versus[@]}" ;;
    encode) run encode encode "${base[@]}" --lengths msmarco "${many[@]}" "${versus[@]}" ;;
    profile) run profile profile "${base[@]}" --lengths msmarco "${lists[@]}" --steps $((steps + 2)) ;;
    exact) run exact exact "${base[@]}" "${vectors[@]}" "${versus[@]}" ;;
    minilm) run minilm joint "${small[@]}" --lengths msmarco "${lists[@]}" --steps "$steps" "${versus[@]}" ;;
    lists128) run lists128 joint "${base[@]}" --lengths msmarco "${long[@]}" --steps "$steps" ;;
    full) run full joint "${base[@]}" --lengths full "${lists[@]}" --steps "$steps" "${versus[@]}" ;;
    *)
      failed=1
      echo "$part: there is no such part"
      ;;
  esac
done
exit "$failed"
