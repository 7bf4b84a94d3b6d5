"""Who says that a process is one of several: flags, or a launcher's environment.

The first of these that is there:

- the flags `--coordinator=HOST:PORT --processes=N --process=I`;
- Open MPI (`OMPI_COMM_WORLD_*`) and Slurm (`srun`: `SLURM_*`);
- a TPU pod: GKE's variables (`TPU_WORKER_HOSTNAMES`, `MEGASCALE_*`) or a TPU VM's metadata server, both read by jax.

`JAX_COORDINATOR_ADDRESS`, `JAX_COORDINATOR_PORT` and `JAX_LOCAL_DEVICE_IDS` mean what they mean to jax.
"""

import dataclasses
import pathlib
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence

from folk_jax.errors import UserError

# jax's own choice of ports for Slurm and Open MPI: the last 4096.
_FIRST_PORT, _PORTS = 65535 - 2**12 + 1, 2**12
_METADATA_SECONDS = 5
_METADATA = 'http://{host}/computeMetadata/v1/instance/attributes/{key}'
_TPU_DEVICES = ('dev/accel0', 'dev/vfio/0')


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where this process stands among those of its run.

  Attributes:
    found_by: what said so, in words.
    coordinator: HOST:PORT where process 0 listens; None where jax finds this and the rest itself (TPU pods).
    processes: how many there are; None likewise.
    process: the number of this one, from 0; None likewise.
    local_devices: numbers of the GPUs of this host that are this process's; None for all.
  """

  found_by: str
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  local_devices: tuple[int, ...] | None = None


def from_flags(
  coordinator: str | None, processes: int | None, process: int | None
) -> Cluster | None:
  """The cluster that main's flags describe, or None where none of them is given.

  Raises:
    UserError: some of the three are given and some are not, an address that is none, or numbers out of range.
  """
  given = {'--coordinator': coordinator, '--processes': processes, '--process': process}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == 3:
    return None
  if missing:
    there = ', '.join(name for name in given if name not in missing)
    raise UserError(
      f'{there} without {", ".join(missing)}: give all of --coordinator=HOST:PORT --processes=N --process=I, or none'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UserError(f'--coordinator={coordinator} is no address: expected HOST:PORT of process 0')
  if processes < 1:
    raise UserError(f'--processes={processes}; expected 1 or more')
  if not 0 <= process < processes:
    raise UserError(
      f'--process={process} of --processes={processes}: expected 0 to {processes - 1}'
    )
  return Cluster('flags', coordinator, processes, process)


def with_devices(cluster: Cluster | None, numbers: Sequence[str] | None) -> Cluster | None:
  """The cluster, where this process has these GPUs of its host; None leaves it as it is.

  Raises:
    UserError: what is no number, or a process that runs alone.
  """
  if not numbers:
    return cluster
  given = f'--local_devices={",".join(numbers)}'
  if not all(number.isdigit() for number in numbers):
    raise UserError(f'{given}: expected numbers such as 0,1')
  if cluster is None:
    raise UserError(
      f'{given} is for one of several processes; one alone takes CUDA_VISIBLE_DEVICES'
    )
  return dataclasses.replace(cluster, local_devices=tuple(map(int, numbers)))


def detect(environment: Mapping[str, str], root: str = '/') -> Cluster | None:
  """The cluster that the environment describes, or None where this process runs alone.

  Args:
    environment: `os.environ`, or one like it.
    root: where the device files of TPU chips are looked for.

  Raises:
    UserError: a launcher that does not say where process 0 runs.
  """
  for look in (_open_mpi, _slurm, _gke):
    if cluster := look(environment):
      return cluster
  return _tpu_vm(environment, root)


def _port(environment: Mapping[str, str], job: int) -> int:
  return int(environment.get('JAX_COORDINATOR_PORT', _FIRST_PORT + job % _PORTS))


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
  processes = int(environment.get('OMPI_COMM_WORLD_SIZE', 1))
  if processes < 2:
    return None
  here = int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', 1))
  coordinator = environment.get('JAX_COORDINATOR_ADDRESS', '')
  # Up to version 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, the address of mpirun itself, beside process 0.
  uri = environment.get('OMPI_MCA_orte_hnp_uri', '')
  found = re.match(r'(\d+)\..*?tcp6?://\[?([^,:\]]+)', uri)
  if not coordinator and found:
    # Numbers of jobs are multiples of 2^12.
    coordinator = f'{found[2]}:{_port(environment, int(found[1]) // 2**12)}'
  if not coordinator and here == processes:
    job = zlib.crc32(environment.get('PMIX_NAMESPACE', '').encode())
    coordinator = f'127.0.0.1:{_port(environment, job)}'
  if not coordinator:
    raise UserError(
      'this Open MPI does not say where process 0 runs: mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT names it'
    )
  rank = int(environment['OMPI_COMM_WORLD_RANK'])
  local = int(environment.get('OMPI_COMM_WORLD_LOCAL_RANK', 0))
  return Cluster('Open MPI', coordinator, processes, rank, _share(environment, local, here))


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
  """Only steps of `srun` have a node list: a batch script itself, or `salloc`'s shell, runs alone."""
  processes = environment.get('SLURM_STEP_NUM_TASKS', environment.get('SLURM_NTASKS', '1'))
  if 'SLURM_STEP_NODELIST' not in environment or int(processes) < 2:
    return None
  # Steps of one job that follow each other have ports of their own.
  job = int(environment['SLURM_JOB_ID']) + int(environment.get('SLURM_STEP_ID', 0))
  coordinator = environment.get('JAX_COORDINATOR_ADDRESS') or (
    f'{first_host(environment["SLURM_STEP_NODELIST"])}:{_port(environment, job)}'
  )
  here = _tasks_here(
    environment.get('SLURM_STEP_TASKS_PER_NODE', '1'), int(environment.get('SLURM_NODEID', 0))
  )
  return Cluster(
    'Slurm',
    coordinator,
    int(processes),
    int(environment['SLURM_PROCID']),
    _share(environment, int(environment.get('SLURM_LOCALID', 0)), here),
  )


def first_host(nodes: str) -> str:
  """The first of Slurm's short list: `gpu[003-010,12]-ib,login1` is `gpu003-ib`."""
  found = re.match(r'([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)', nodes)
  return ''.join(part or '' for part in found.groups())


def _tasks_here(tasks: str, node: int) -> int:
  """How many tasks node number `node` has: Slurm writes `2(x3),1` for 2, 2, 2, 1."""
  counts = []
  for part in tasks.split(','):
    count, times = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part.strip()).groups()
    counts += [int(count)] * int(times or 1)
  return counts[min(node, len(counts) - 1)]


def _share(environment: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
  """The GPUs of a process that is number `local` of the `here` on its host; None: all that it sees."""
  if here < 2 or environment.get('JAX_LOCAL_DEVICE_IDS'):
    return None
  listed = environment.get('CUDA_VISIBLE_DEVICES', environment.get('ROCR_VISIBLE_DEVICES'))
  on_node = int(environment.get('SLURM_GPUS_ON_NODE') or here)
  visible = len([name for name in listed.split(',') if name]) if listed is not None else on_node
  if visible < max(here, on_node) or visible <= _gpus_per_task(environment):
    return None  # Its launcher has bound each task to GPUs of its own.
  if visible % here:
    raise UserError(
      f'{here} tasks on this host cannot share its {visible} GPUs evenly: start as many tasks as GPUs, or one'
    )
  share = visible // here
  return tuple(range(local * share, (local + 1) * share))


def _gpus_per_task(environment: Mapping[str, str]) -> int:
  """What `srun --gpus-per-task` asked for, such as 2, a100:2 or a100:1,h100:1; 0 where it did not."""
  asked = environment.get('SLURM_GPUS_PER_TASK')
  counts = [part.rpartition(':')[2] for part in asked.split(',')] if asked else []
  return sum(int(count) if count.isdigit() else 1 for count in counts)


def _gke(environment: Mapping[str, str]) -> Cluster | None:
  hosts = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES', ''))
  slices = int(environment.get('MEGASCALE_NUM_SLICES') or 1)
  return Cluster('GKE') if slices > 1 or ',' in hosts else None


def _tpu_vm(environment: Mapping[str, str], root: str) -> Cluster | None:
  """A TPU VM is asked how many it belongs to; a machine without TPU chips is asked nothing."""
  if environment.get('TPU_SKIP_MDS_QUERY') or environment.get('TPU_WORKER_HOSTNAMES'):
    return None
  if not any((pathlib.Path(root) / device).exists() for device in _TPU_DEVICES):
    return None
  server = environment.get('GCE_METADATA_IP', 'metadata.google.internal')
  hosts = _metadata(server, 'worker-network-endpoints')
  slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", _metadata(server, 'tpu-env'))
  several = ',' in hosts or (slices is not None and int(slices[1]) > 1)
  return Cluster('the TPU VM') if several else None


def _metadata(server: str, key: str) -> str:
  """An attribute of this machine, or '' where there is no such attribute or no such server."""
  request = urllib.request.Request(
    _METADATA.format(host=server, key=key), headers={'Metadata-Flavor': 'Google'}
  )
  try:
    # Past proxies: the server is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_METADATA_SECONDS) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ''
