#!/bin/bash
# Trains one recipe many times, each time with the overrides of another line of a text file. On the login node:
#
#   slurm/array.sh --gres=gpu:1 -- accelerate_configs/single_gpu.yaml recipes/dolly_gpt2.yaml slurm/learning_rates.txt
#   slurm/array.sh --check -- accelerate_configs/single_gpu.yaml recipes/dolly_gpt2.yaml slurm/learning_rates.txt
#
# Options of sbatch, --array=1-8%2 among them, come before --; then accelerate config, recipe, file, overrides of every
# run. Line N is trained by array task N as slurm/sft.sh would, into outputs/learning_rates/N; after the last one
# src/compare.py makes a table and a plot. Empty lines and comments (#) do not count; words are quoted as in a shell.
# --check submits nothing and asks of each line what slurm/sft.sh --check asks. Without Slurm: src/sweep.py.
#SBATCH --job-name=array
#SBATCH --output=logs/%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

die() { echo "slurm/array.sh: $*" >&2; exit 2; }

is_check=
if [ "${1:-}" = --check ]; then is_check=yes && shift; fi
options=()
if [[ " $* " = *" -- "* ]]; then
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
fi
[ $# -ge 3 ] || die "arguments are an accelerate config, a recipe, a file of overrides, and overrides; found: $*"
config=$1 recipe=$2 file=$3 name=${3##*/}
name=${name%.*}
shift 3
[ -f "$file" ] || die "there is no file $file"
mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$file")
[ ${#lines[@]} -gt 0 ] || die "$file has no overrides"

# Sets `run` to the arguments of slurm/sft.sh for line $1. xargs takes a line apart as a shell would.
run_of() {
  local words
  words=$(xargs -rn 1 printf '%s\n' <<<"${lines[$1 - 1]}" 2>&1) || die "line '${lines[$1 - 1]}' of $file: $words"
  mapfile -t run <<<"$words"
  run=("$config" "$recipe" "training.output_dir=outputs/$name/$1" "${@:2}" "${run[@]}")
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  [[ $SLURM_ARRAY_TASK_ID -ge 1 && $SLURM_ARRAY_TASK_ID -le ${#lines[@]} ]] ||
    die "--array goes from 1 to ${#lines[@]}, the lines of $file; there is no line $SLURM_ARRAY_TASK_ID"
  run_of "$SLURM_ARRAY_TASK_ID" "$@"
  exec bash slurm/sft.sh "${run[@]}"
fi
[ -z "${SLURM_JOB_ID:-}" ] || die "is run on the login node and submits itself"
for number in $(seq ${#lines[@]}); do run_of "$number" "$@"; done # each can be taken apart
if [ $is_check ]; then
  PATH=$PWD/.venv/bin:$PATH
  processes=$(slurm/count_processes "${options[@]}")
  python src/sweep.py --check --num_processes "$processes" "$config" "$recipe" "$file" "$@" || exit 2
  sbatch --test-only "${options[@]}" slurm/array.sh "$config" "$recipe" "$file" "$@"
  exit
fi
array=$(sbatch --parsable --array="1-${#lines[@]}" "${options[@]}" slurm/array.sh "$config" "$recipe" "$file" "$@")
echo "array job ${array%%;*}: ${#lines[@]} runs in outputs/$name"
where=() # the job of the table goes where the array goes, without its GPUs
set -- "${options[@]}"
while [ $# -gt 0 ]; do
  case $1 in
    --account=* | --partition=* | --qos=* | -[Apq]?*) where+=("$1") ;;
    --account | --partition | --qos | -[Apq]) where+=("$1" "$2") && shift ;;
  esac
  shift
done
table=$(sbatch --parsable --job-name=compare --output=logs/%x-%j.out "${where[@]}" \
  --dependency="afterany:${array%%;*}" \
  --wrap "COLUMNS=160 PATH=\$PWD/.venv/bin:\$PATH python src/compare.py outputs/$(printf %q "$name")")
echo "then job ${table%%;*}: logs/compare-${table%%;*}.out"
