"""What a test cluster's folder of state has in it before its daemons start."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

NODES = ("c1", "c2", "c3")

SLURM_CONF = """\
ClusterName=colddiff
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
StateSaveLocation={state}/spool/slurmctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/run/slurmctld.pid
SlurmdPidFile={state}/run/%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/%n.log
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides

# Memory is a resource, and a job that takes more than it asked for is killed within seconds.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill,UsePss

JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

# Tests wait for these.
SlurmdTimeout=10
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={state}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations

GresTypes=gpu
NodeName=c[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{c1},{c2},{c3}] CPUs=2 \
RealMemory=6000 Gres=gpu:2
PartitionName=low Nodes=c[1-3] Default=YES PriorityTier=1
PartitionName=high Nodes=c[1-3] PriorityTier=10 PreemptMode=OFF MaxTime=02:00:00
"""
GRES_CONF = "NodeName=c[1-3] Name=gpu File={state}/run/gpu[0-1] Flags=nvidia_gpu_env\n"
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser=root
LogFile={state}/log/slurmdbd.log
PidFile={state}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""
DATABASE_SQL = """\
CREATE DATABASE slurm;
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';
"""
FILES = {
    "etc/slurm.conf": SLURM_CONF,
    "etc/gres.conf": GRES_CONF,
    "etc/slurmdbd.conf": SLURMDBD_CONF,
    "etc/database.sql": DATABASE_SQL,
}


def write_files(state: Path) -> dict[str, int]:
    """Write a new folder of state in place of an old cluster's; the daemons' ports."""
    for folder in ("etc", "run", "log", "munge", "spool", "mariadb"):
        shutil.rmtree(state / folder, ignore_errors=True)
        (state / folder).mkdir(parents=True)
    for node in NODES:
        (state / "spool" / node).mkdir()
    ports = free_ports("slurmctld", "slurmdbd", "mariadb", *NODES)
    password, host = secrets.token_hex(16), socket.gethostname().split(".")[0]
    for name, template in FILES.items():
        path = state / name
        path.touch(mode=0o644 if name == "etc/slurm.conf" else 0o600)
        path.write_text(template.format(state=state, host=host, password=password, **ports))
    key = state / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for gpu in ("gpu0", "gpu1"):  # Slurm wants a device as a GPU, and never opens it
        os.mknod(state / "run" / gpu, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    return ports


def free_ports(*names: str) -> dict[str, int]:
    """A free port of this machine for each name.

    Below the range of outgoing connections, which could else take a port while its node is dead.
    """
    ports: dict[str, int] = {}
    while len(ports) < len(names):
        port = 17000 + secrets.randbelow(10000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in ports.values():
                ports[names[len(ports)]] = port
    return ports
