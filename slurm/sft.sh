#!/bin/bash
# Trains a recipe as a Slurm job, on one node or many. To be submitted from the root of this repository:
#
#   sbatch --gres=gpu:1 slurm/sft.sh accelerate_configs/single_gpu.yaml recipes/dolly_gpt2.yaml
#   sbatch --nodes=2 --gres=gpu:8 slurm/sft.sh accelerate_configs/zero3.yaml recipes/dolly_gpt2.yaml training.seed=1
#   slurm/sft.sh --check --nodes=2 --gres=gpu:8 -- accelerate_configs/zero3.yaml recipes/dolly_gpt2.yaml
#
# Arguments: accelerate config, recipe, overrides; a recipe of preferences is trained by src/dpo.py. Options of sbatch
# win over the #SBATCH lines. A process for each GPU of a node; without GPUs --ntasks-per-node of them. --check asks,
# before queueing, whether recipe and run folder are right and whether Slurm would take the job. Time limit, preemption
# and dead nodes: docs/slurm.md.
#SBATCH --job-name=sft
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -uo pipefail # not -e: how training ended is read below

say() { echo "slurm/sft.sh: $*" >&2; }
die() { say "$*"; exit 2; }

PATH=$PWD/.venv/bin:$PATH # what `make` installed, where it did
[ -f src/sft.py ] || die "submit it from the root of the repository; there is no src/sft.py in $PWD"
is_check=
if [ "${1:-}" = --check ]; then
  shift
  is_check=yes options=()
  if [[ " $* " = *" -- "* ]]; then
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
  fi
fi
[ $# -ge 2 ] || die "arguments are an accelerate config, a recipe, and overrides; found: $*"
[ -f "$1" ] || die "there is no accelerate config $1"
config=$1
shift
if [ $is_check ]; then
  [ -w logs ] || die "there is no folder $PWD/logs to write to, where Slurm opens the log: mkdir logs"
  processes=$(slurm/count_processes "${options[@]}")
  script=$(PYTHONPATH=src python -m finetuning.training_script "$@") || exit 2
  python "$script" --check --config_file "$config" --num_processes "$processes" "$@" || exit 2
  sbatch --test-only "${options[@]}" "$0" "$config" "$@"
  exit
fi
[ -n "${SLURM_JOB_ID:-}" ] || die "submit it: sbatch slurm/sft.sh $config $*"

# The number of one task of an array is that of the whole array too: what is done to it would be done to all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-$SLURM_JOB_ID}

# Every process leaves here how it ended: accelerate's launchers turn each exit code into 1.
export EXIT_CODES=$PWD/logs/.$SLURM_JOB_ID
rm -rf "$EXIT_CODES" && mkdir -p "$EXIT_CODES" || exit 1
stopped=$EXIT_CODES.stopped # a file that says where it was stopped last
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$stopped"

main_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below those that Linux hands out (from 32768), and not one that follows from the job's number.
port=$((15000 + $(od -An -N2 -tu2 /dev/urandom) % 15000))
while (: <"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
launch=(--config_file "$config" --num_machines "$SLURM_JOB_NUM_NODES" --quiet
  --main_process_ip "$main_node" --main_process_port "$port")
# For one node accelerate gives c10d no address: every job would meet at port 29400.
[ "$SLURM_JOB_NUM_NODES" = 1 ] || launch+=(--rdzv_backend c10d)

# Near the time limit Slurm tells this shell (--signal); when it preempts, everyone (SIGTERM). Training alone may act on
# it: a launcher that did would kill its processes 30 s later, in the middle of a large checkpoint. So launchers start
# with both signals ignored, and torch's is told to set no handler for them; training sets its own.
trap 'scancel --signal=USR1 "$job"' USR1
trap : TERM
export PET_SIGNALS_TO_HANDLE=SIGINT TASKS_PER_NODE=$SLURM_NTASKS_PER_NODE
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-60} # s between two lines of a progress bar: a log is no terminal

left=$(squeue --noheader --jobs "$job" --format %L)
if [[ $left =~ ^[0-4]:[0-9]{2}$ ]]; then
  say "only $left until the time limit; training is told to stop 120 s before it, or as --signal says"
fi
say "job $job, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
read -ra srun_options <<<"${SRUN_OPTIONS:-}"
# Node number, GPUs and CPUs differ from node to node, so they expand there. srun does not inherit the job's CPUs.
# shellcheck disable=SC2016
srun "${srun_options[@]}" --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 bash -c '
    trap "" USR1 TERM
    # gloo would ask the name of the node, which may stand for 127.0.1.1; a route to another node knows better.
    peer=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$SLURMD_NODENAME" | head -n 1)
    address=$([ -z "$peer" ] || getent ahostsv4 "$peer" | head -n 1 | cut -d " " -f 1)
    interface=$([ -z "$address" ] || ip -o route get "$address" 2>/dev/null | sed -n "s/.* dev \([^ ]*\).*/\1/p")
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    processes=${SLURM_GPUS_ON_NODE:-$TASKS_PER_NODE}
    threads=$((SLURM_CPUS_PER_TASK / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads ? threads : 1))}
    launch=("${@:2:$1}") && shift $(($1 + 1))
    script=$(${CONTAINER:-} env PYTHONPATH=src python -m finetuning.training_script "$@") || exit 1
    exec ${CONTAINER:-} accelerate launch --machine_rank "$SLURM_NODEID" \
      --num_processes $((processes * SLURM_NNODES)) "${launch[@]}" "$script" "$@"' - ${#launch[@]} "${launch[@]}" "$@" &
step=$!
while kill -0 $step 2>/dev/null; do wait $step; done # a signal ends `wait` early
wait $step
code=$?

# Lines of "code time reason", one of each process. 75: it was asked to stop, and can resume. A process that was killed
# had left a 1 at first. Any end but 0 and 75 wins; where all are 0, a signal that came after them changes nothing.
ends=$(cat "$EXIT_CODES"/* 2>/dev/null)
rm -rf "$EXIT_CODES"
read -r failed _ reason < <(grep -Ev '^(0|75) ' <<<"$ends" | sort -g -k 2)
is_stopped=$(grep '^75 ' <<<"$ends")
if [ -z "$is_stopped$failed" ] && { [ $code = 0 ] || [ -n "$ends" ]; }; then
  rm -f "$stopped"
  say "finished"
  exit 0
fi
# Slurm may have ended the job: preempted or with a dead node, it is queued again by Slurm; cancelled, nobody wants it.
# (srun waits for the processes of a dead node until Slurm has noticed.) No answer: the controller is busy.
state=$(squeue --noheader --jobs "$job" --format %T)
if [ -n "$state" ] && [ "$state" != RUNNING ]; then
  say "ended by Slurm: $state"
  exit "${failed:-75}"
fi
if [ -n "$failed" ] || [ -z "$is_stopped" ]; then
  say "failed, and is not queued again: ${reason:-see above}"
  exit "${failed:-$code}"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:=100}" ]; then
  say "stopped, and is not queued again after $MAX_RESTARTS restarts (MAX_RESTARTS); the same command resumes"
  exit 75
fi
# Stopped twice at the same step, it would be stopped there for ever.
place=$(grep -oE 'after step [0-9]+|before the first step' <<<"$is_stopped" | sort | tail -n 1)
if [ -n "$place" ] && [ "$place" = "$(cat "$stopped" 2>/dev/null)" ]; then
  say "stopped again $place, and is not queued again: it needs a longer --time, or a later --signal"
  exit 75
fi
echo "$place" >"$stopped"
say "stopped; it is queued again and will resume"
for pause in 0 30 60; do # here too the controller may be busy
  sleep $pause
  scontrol requeue "$job" && break
done
exit 75
