"""A real Slurm on one machine: slurmctld, several slurmd, munge, fake GPUs; nothing is left of it after `down`.

    python -m tests.cluster.minislurm up|down|status

Debian packages are installed when they are missing (root). CPUs, memory and GPUs of the nodes are bookkeeping: one host
plays all of them (slurmd -N), so jobs compete for its real cores. Only processes that `up` started are stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
"""Where Slurm looks without SLURM_CONF, which the executor plugin strips from the environment of its inner srun."""
GPU = "h200"
DELAY_S, SETTLED_S = 121.0, 5.0
"""How long Slurm lets a requeued job wait, and how long it is left alone before that is lifted. A node that a job is taken
from revokes the job's credentials; started again within that second, it is refused ("Job credential revoked") and counts as
failed. Seen: 9 of 10 jobs ended so when restarted at once, none in 750 restarts after 4 s or more."""

CONF = """
ClusterName=errata
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
DefMemPerCPU=200
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
"""
PARTITIONS = """
PartitionName=cpu Nodes={cpu} Default=YES MaxTime=1-00:00:00 PriorityTier=1
PartitionName=gpu Nodes={gpu} MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes={all} MaxTime=1-00:00:00 PriorityTier=100 PreemptMode=OFF
"""


def install() -> None:
    """Make sure that Slurm's programs are there.

    Raises:
        RuntimeError: they are not, and this is not root, or the packages cannot be had.
    """
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if os.geteuid() != 0:
        raise RuntimeError("Slurm is not installed, and only root can install it")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed:\n{done.stderr}")


@dataclass
class MiniSlurm:
    """The cluster whose files are in `folder`."""

    folder: Path
    cpu_nodes: int = 16
    gpu_nodes: int = 2
    port: int = 17000

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes."""
        return [*(f"cpu{n}" for n in range(1, self.cpu_nodes + 1)), *(f"gpu{n}" for n in range(1, self.gpu_nodes + 1))]

    def up(self) -> None:
        """Install, configure, start, and wait until every node is idle.

        Raises:
            RuntimeError: it does not come up; the daemons' logs are in the message.
        """
        install()
        self._write()
        munge = [f"--{name}={self.folder}/{path}" for name, path in {
            "key-file": "munge.key", "socket": "run/munge.sock", "pid-file": "run/munged.pid",
            "log-file": "log/munged.log", "seed-file": "run/munge.seed",
        }.items()]  # fmt: skip
        subprocess.run(["munged", *munge, "--force"], check=True, capture_output=True)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        if not wait(lambda: len(self.idle()) == len(self.nodes), 60):
            logs = "\n".join(path.read_text()[-2000:] for path in (self.folder / "log").glob("*.log"))
            raise RuntimeError(f"Slurm did not come up:\n{logs}")

    def down(self) -> None:
        """Cancel everything, stop the daemons, remove the files."""
        for job in self.jobs():
            self.run("scancel", job)
        wait(lambda: not self.jobs(), 20)
        pids = [int(path.read_text()) for path in (self.folder / "run").glob("*.pid")]
        daemons = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        for daemon in daemons:
            daemon.terminate()
        _, stubborn = psutil.wait_procs(daemons, timeout=10)
        for process in [*stubborn, *self._left_over()]:
            _kill(process)
        if DEFAULT_CONF.is_symlink() and DEFAULT_CONF.readlink() == self.folder / "slurm.conf":
            DEFAULT_CONF.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left_over(self) -> list[psutil.Process]:
        """Processes of jobs that outlived them: a nested Snakemake can hang in its own SIGTERM handler, and what left its
        job's process tree is found by cgroups alone, which `proctrack/linuxproc` has not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "SLURM_JOB_ID" in environment and environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                    found.append(process)
        return found

    def _write(self) -> None:
        for name in ("state", "log", "run", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        host = socket.gethostname().split(".")[0]
        lines = [CONF.format(folder=self.folder, host=host, port=self.port)]
        gres = []
        for number, node in enumerate(self.nodes, 1):
            has_gpus = node.startswith("gpu")
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + number} CPUs=8 "
                f"RealMemory=16000 {f'Gres=gpu:{GPU}:4' if has_gpus else ''}"
            )
            gres += [f"NodeName={node} Name=gpu Type={GPU} File={self.folder}/gpu[0-3]"] if has_gpus else []
        names = {"cpu": f"cpu[1-{self.cpu_nodes}]", "gpu": f"gpu[1-{self.gpu_nodes}]"}
        lines.append(PARTITIONS.format(**names, all=",".join(names.values())))
        # A test that loses its node disturbs no other: every cpu node is a partition of its own, and twice two others are.
        lines += [f"PartitionName={node} Nodes={node} MaxTime=1-00:00:00" for node in self.nodes[: self.cpu_nodes]]
        last = self.cpu_nodes
        for name, first in {"pair": last - 1, "spare": last - 3}.items() if last > 3 else ():
            lines.append(f"PartitionName={name} Nodes=cpu[{first}-{first + 1}] MaxTime=1-00:00:00")
        (self.folder / "slurm.conf").write_text("\n".join(lines))
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        for number in range(4):  # must be character devices; these are /dev/null
            device = self.folder / f"gpu{number}"
            if not device.exists():
                subprocess.run(["mknod", device, "c", "1", "3"], check=True)
        if DEFAULT_CONF.exists() and DEFAULT_CONF.resolve() != (self.folder / "slurm.conf").resolve():
            raise RuntimeError(f"{DEFAULT_CONF} is there: this machine has a Slurm of its own, or another test's")
        DEFAULT_CONF.parent.mkdir(parents=True, exist_ok=True)
        DEFAULT_CONF.unlink(missing_ok=True)
        DEFAULT_CONF.symlink_to(self.folder / "slurm.conf")

    def start_controller(self) -> None:
        """Start slurmctld."""
        subprocess.run(["slurmctld", "-f", self.folder / "slurm.conf"], check=True, capture_output=True)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        subprocess.run(["slurmd", "-N", node, "-f", self.folder / "slurm.conf"], check=True, capture_output=True)

    def lose_node(self, node: str) -> None:
        """What a power cut does: the daemon and every process of every job on the node are gone."""
        daemon = psutil.Process(int((self.folder / "run" / f"slurmd.{node}.pid").read_text()))
        steps = [p for p in psutil.process_iter() if _is_step_of(p, node, self)]
        for process in [daemon, *steps, *(child for step in steps for child in step.children(recursive=True))]:
            _kill(process)

    def stop_daemon(self, node: str) -> None:
        """Only the slurmd dies; jobs on the node live on."""
        os.kill(int((self.folder / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def run(self, *command: str) -> str:
        """The output of a Slurm command; empty when it fails."""
        return subprocess.run(command, capture_output=True, text=True).stdout

    def is_down(self, node: str) -> bool:
        """Whether Slurm takes a node for lost."""
        return "DOWN" in self.node_state(node)

    def node_state(self, node: str) -> str:
        """What Slurm says of a node: a base state and flags."""
        words = self.run("scontrol", "show", "node", node, "-o").split()
        return next((word for word in words if word.startswith("State=")), "")

    def idle(self) -> set[str]:
        """Nodes that can take jobs."""
        return set(self.run("sinfo", "-hN", "-t", "idle,mix,alloc", "-o", "%N").split())

    def jobs(self, states: str = "PENDING,RUNNING,COMPLETING,SUSPENDED") -> dict[str, str]:
        """{job: rule} of jobs in some states."""
        lines = self.run("squeue", "-h", "-t", states, "-o", "%i|%k").splitlines()
        return {job: rule_of(comment) for job, comment in (line.split("|", 1) for line in lines)}

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job, "-o").split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def start_now(self) -> None:
        """Lift the two minutes that Slurm lets a requeued job wait, but for the first seconds."""
        for job in self.jobs("PENDING"):
            shown = self.field(job, "EligibleTime")
            eligible = datetime.fromisoformat(shown).timestamp() if shown[:1].isdigit() else 0.0
            if 0 < eligible - time.time() <= DELAY_S - SETTLED_S:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def rule_of(comment: str) -> str:
    """`train` from `rule_train_wildcards_…`."""
    return comment.split("_wildcards_")[0].removeprefix("rule_")


def wait(condition: Callable[[], object], seconds: float, every: float = 0.2) -> bool:
    """Whether `condition` became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def _is_step_of(process: psutil.Process, node: str, slurm: MiniSlurm) -> bool:
    """Whether a process is the slurmstepd of a job's step on `node`."""
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    if not name.startswith("slurmstepd: ["):
        return False
    job = name.removeprefix("slurmstepd: [").split(".")[0]
    return slurm.field(job, "NodeList") == node


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def main() -> None:
    """Bring it up, take it down, or show it."""
    slurm = MiniSlurm(Path("/tmp/errata-minislurm"))
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in ("up", "down", "status"):
        sys.exit(__doc__)
    if command == "status":
        print(slurm.run("sinfo"), slurm.run("squeue"), sep="\n")
    else:
        {"up": slurm.up, "down": slurm.down}[command]()


if __name__ == "__main__":
    main()
