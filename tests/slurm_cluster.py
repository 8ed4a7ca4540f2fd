"""A real Slurm on this machine: a controller and nodes with their own processes and network.

A node is a set of Linux namespaces around a slurmd, so `localhost` of one is not that of another,
as on real machines; files are shared by all. CPUs and memory are declared, not enforced, and a GPU
is a link to /dev/null. It needs root and the Debian packages in PACKAGES, starts in a second and
ends with the process that started it.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")

NODES, CPUS, GPUS = 6, 4, 2
# main: where most jobs run. low and urgent: a job of the latter takes the node from one of the
# former. fragile: nodes that are switched off, and a spare.
PARTITIONS = {"main": "node[1-2]", "low": "node3", "urgent": "node3", "fragile": "node[4-6]"}

# cred_expire: seconds a requeued job waits (else 120). SlurmdTimeout: seconds after which a dead
# node is noticed (else 300); the rest of the job notices it before. sched_*, *_delay: jobs start at
# once. config_overrides: nodes may declare more than the machine has.
SETTINGS = """\
ClusterName=test
SlurmctldHost=controller(10.77.0.254)
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=40
ReturnToService=2
MinJobAge=86400
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs={cpus} CoresPerSocket={cpus} \\
  RealMemory=8000 Gres=gpu:{gpus}
"""

CONTROLLER = """
echo controller >/proc/sys/kernel/hostname
mount --bind "$1/hosts" /etc/hosts
ip link set lo up && ip link add bridge type bridge && ip link set bridge up
ip addr add 10.77.0.254/24 dev bridge
slurmctld -D & wait $!
"""
# The shell stays the first process of the namespace: slurmd would not reap what its jobs leave.
NODE = """
echo "$2" >/proc/sys/kernel/hostname
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip link show eth0; do sleep 0.02; done >/dev/null 2>&1
ip addr add "$3/24" dev eth0 && ip link set eth0 up
slurmd -D -N "$2" & wait $!
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of virtual nodes needs root"
    without = [
        program
        for program in PROGRAMS
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if without:
        return f"{', '.join(without)} not found; apt-get install {' '.join(PACKAGES)}"
    try:
        subprocess.run(
            ["unshare", "-nmupf", "--mount-proc", "mount", "-t", "tmpfs", "none", "/dev/shm"],
            check=True,
        )
    except subprocess.CalledProcessError:
        return "namespaces are refused here (a container without CAP_SYS_ADMIN?)"
    return None


class Cluster:
    """Started by `running_cluster`; its commands are Slurm's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def start(self) -> None:
        self.configure()
        munge = [
            f"--{name}={self.folder}/munge.{name.split('-')[0]}"
            for name in ("key-file", "socket", "pid-file")
        ]
        munge += [f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log"]
        self.spawn("munge", "munged", "--foreground", "--force", *munge)
        self.spawn_apart("controller", CONTROLLER)
        wait_for("the controller", lambda: self.succeeds("scontrol", "ping"))
        for number in range(1, NODES + 1):
            self.power_on(f"node{number}")
        wait_for("the nodes", self.is_idle)

    def configure(self) -> None:
        files = {
            "hosts": "127.0.0.1 localhost\n10.77.0.254 controller\n",
            "gres.conf": "",
            "cgroup.conf": "",
        }
        files["slurm.conf"] = SETTINGS.format(folder=self.folder, nodes=NODES, cpus=CPUS, gpus=GPUS)
        for tier, (name, nodes) in enumerate(PARTITIONS.items()):
            default = "YES" if tier == 0 else "NO"
            files["slurm.conf"] += (
                f"PartitionName={name} Nodes={nodes} Default={default} PriorityTier={tier + 1}\n"
            )
        for number in range(1, NODES + 1):
            files["hosts"] += f"10.77.0.{number} node{number}\n"
        for number in range(GPUS):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        files["gres.conf"] = (
            f"NodeName=node[1-{NODES}] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        )
        files["cgroup.conf"] = (
            "CgroupPlugin=cgroup/v1\n"  # named, not used: else slurmd looks for one and may refuse
        )
        for name, text in files.items():
            (self.folder / name).write_text(text)
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)

    def spawn(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("a")
        command = ("setpriv", "--pdeathsig", "KILL", *command)  # nothing outlives the tests
        self.processes[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def spawn_apart(self, name: str, script: str, *arguments: str) -> None:
        """Runs the script in namespaces of its own, which end with it."""
        apart = ("unshare", "-nmupf", "--mount-proc", "--kill-child", "bash", "-c")
        self.spawn(name, *apart, script, "-", str(self.folder), *arguments)
        ours = os.readlink("/proc/self/ns/net")
        namespace = f"/proc/{self.processes[name].pid}/ns/net"
        wait_for(f"the namespaces of {name}", lambda: os.readlink(namespace) != ours)

    def power_on(self, node: str) -> None:
        number = int(node.removeprefix("node"))
        self.spawn_apart(node, NODE, node, f"10.77.0.{number}")
        # The same address after a power cycle, or the other nodes would send to the old one for a
        # while.
        link = f"link add {node} type veth peer name eth0 address 02:51:00:00:00:{number:02x}"
        self.run("ip", *link.split(), "netns", str(self.processes[node].pid))
        self.run("ip", "link", "set", node, "master", "bridge", "up")

    def power_off(self, node: str) -> None:
        """All processes of the node end at once, as does its end of the network cable."""
        process = self.processes.pop(node)
        process.kill()
        process.wait()
        wait_for(f"the end of {node}", lambda: not self.succeeds("ip", "link", "show", node))

    def beside_the_controller(self, *command: str) -> subprocess.Popen:
        """Starts a command that nodes reach at 10.77.0.254; it ends with the cluster."""
        inside = ["nsenter", "--net", "--target", str(self.processes["controller"].pid), *command]
        self.processes[command[1]] = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
        return self.processes[command[1]]

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()

    def run(self, *command: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
        """Runs a command where the controller can be reached."""
        inside = ["nsenter", "--net", "--target", str(self.processes["controller"].pid), *command]
        done = subprocess.run(
            inside, env=self.environment, capture_output=True, text=True, timeout=600, **kwargs
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done

    def succeeds(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def is_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format", "%N %t").stdout.split("\n")
        return len({line for line in states if line.endswith(" idle")}) == NODES

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    folder = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # short: a path to a socket has 107 characters at most
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
