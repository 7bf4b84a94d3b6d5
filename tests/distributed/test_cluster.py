"""Who says that a process is one of several: every launcher's environment, and the flags."""

import dataclasses
import http.server
import re
import socket
import threading

import pytest

from folk_jax.distributed import cluster as cluster_lib
from folk_jax.distributed.cluster import Cluster, detect, first_host, from_flags, with_devices
from folk_jax.errors import UserError

SLURM = {
  'SLURM_JOB_ID': '4097',
  'SLURM_STEP_ID': '0',
  'SLURM_STEP_NODELIST': 'gpu[003-004]',
  'SLURM_STEP_NUM_TASKS': '2',
  'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
  'SLURM_PROCID': '1',
  'SLURM_NODEID': '1',
  'SLURM_LOCALID': '0',
}
A_GPU_EACH = SLURM | {
  'SLURM_STEP_NUM_TASKS': '8',
  'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
  'SLURM_PROCID': '6',
  'SLURM_LOCALID': '2',
}
OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_MCA_orte_hnp_uri': '8192.0;tcp://10.96.0.1,10.148.0.1:34911',
}


@pytest.mark.parametrize(
  'environment, expected',
  [
    # Port 61440 + (4097 + 0) mod 4096, as jax chooses it.
    (SLURM, Cluster('Slurm', 'gpu003:61441', 2, 1, None)),
    (SLURM | {'SLURM_STEP_ID': '3'}, Cluster('Slurm', 'gpu003:61444', 2, 1, None)),
    (SLURM | {'JAX_COORDINATOR_PORT': '77'}, Cluster('Slurm', 'gpu003:77', 2, 1, None)),
    (SLURM | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, Cluster('Slurm', 'a:1', 2, 1, None)),
    # Four tasks on a host of four GPUs, all visible to each: the third takes number 2.
    (A_GPU_EACH, Cluster('Slurm', 'gpu003:61441', 8, 6, (2,))),
    (A_GPU_EACH | {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, Cluster('Slurm', 'gpu003:61441', 8, 6, (4, 5))),
    # No list of what is visible, and Slurm's own number.
    (A_GPU_EACH | {'SLURM_GPUS_ON_NODE': '8'}, Cluster('Slurm', 'gpu003:61441', 8, 6, (4, 5))),
    # Bound by Slurm to a GPU of its own.
    (A_GPU_EACH | {'CUDA_VISIBLE_DEVICES': '2'}, Cluster('Slurm', 'gpu003:61441', 8, 6, None)),
    (A_GPU_EACH | {'JAX_LOCAL_DEVICE_IDS': '2'}, Cluster('Slurm', 'gpu003:61441', 8, 6, None)),
    # A batch script itself, or the shell of salloc, is no step: it runs alone. So does a step of one task.
    ({k: v for k, v in SLURM.items() if 'STEP' not in k} | {'SLURM_NTASKS': '2'}, None),
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),
    # Number of the job 8192 / 2^12.
    (OPEN_MPI, Cluster('Open MPI', '10.96.0.1:61442', 4, 3, (1,))),
    # mpirun inside a Slurm job: its daemons are Slurm's tasks, the processes are its own.
    (SLURM | OPEN_MPI, Cluster('Open MPI', '10.96.0.1:61442', 4, 3, (1,))),
    (OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '0'}, Cluster('GKE')),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, Cluster('GKE')),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
    ({}, None),
  ],
)  # fmt: skip
def test_launchers(environment, expected, tmp_path):
  assert detect(environment, root=str(tmp_path)) == expected


def test_open_mpi_5_on_one_host_and_on_several(tmp_path):
  here = {k: v for k, v in OPEN_MPI.items() if 'MCA' not in k} | {'PMIX_NAMESPACE': 'prterun-7@1'}
  with pytest.raises(UserError, match='-x JAX_COORDINATOR_ADDRESS=HOST:PORT names it'):
    detect(here, root=str(tmp_path))
  found = [
    detect(here | {'OMPI_COMM_WORLD_LOCAL_SIZE': '4', 'OMPI_COMM_WORLD_RANK': rank})
    for rank in '03'
  ]
  assert [one.process for one in found] == [0, 3]
  # All derive one address, without a word between them.
  assert found[0].coordinator == found[1].coordinator
  assert re.fullmatch(r'127\.0\.0\.1:6\d{4}', found[0].coordinator)


def test_gpus_that_tasks_cannot_share(tmp_path):
  with pytest.raises(UserError, match='4 tasks on this host cannot share its 6 GPUs evenly'):
    detect(A_GPU_EACH | {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5'}, root=str(tmp_path))


@pytest.mark.parametrize(
  'visible, slurm, share',
  [
    # The second of two tasks on a host. All of its GPUs are visible to both: it takes the second half.
    ('0,1,2,3', {'ON_NODE': '4'}, (2, 3)),
    ('0,1,2,3', {}, (2, 3)),
    (None, {'ON_NODE': '4'}, (2, 3)),
    # --gpus-per-task=2 --gpu-bind=none: still all.
    ('0,1,2,3', {'ON_NODE': '4', 'PER_TASK': '2'}, (2, 3)),
    # Fewer than the host has: Slurm has bound each task to its own, with numbers of the host or of the task.
    ('2,3', {'ON_NODE': '4', 'PER_TASK': '2'}, None),
    ('0,1', {'ON_NODE': '4', 'PER_TASK': '2'}, None),
    ('2,3', {'ON_NODE': '4'}, None),
    # Where the number of the host is missing, or is the task's own.
    ('2,3', {'PER_TASK': '2'}, None),
    ('0,1', {'ON_NODE': '2', 'PER_TASK': 'a100:2'}, None),
    ('0,1', {'ON_NODE': '2', 'PER_TASK': 'a100:1,h100'}, None),
    # What a step of the job's half sees, all of it visible to both.
    ('0,1', {'ON_NODE': '2'}, (1,)),
    ('1', {'ON_NODE': '1'}, None),
  ],
)
def test_who_has_which_gpus_under_slurm(visible, slurm, share):
  two = SLURM | {'SLURM_STEP_TASKS_PER_NODE': '2', 'SLURM_NODEID': '0', 'SLURM_LOCALID': '1'}
  environment = two | {f'SLURM_GPUS_{name}': number for name, number in slurm.items()}
  if visible is not None:
    environment['CUDA_VISIBLE_DEVICES'] = visible
  assert detect(environment).local_devices == share


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('node1', 'node1'),
    ('node1,node2', 'node1'),
    ('node[001-015],login1', 'node001'),
    ('node[7,9-12]', 'node7'),
    ('gpu[03-10]-ib,x', 'gpu03-ib'),
    ('a-1-[2-3]', 'a-1-2'),
  ],
)
def test_first_of_slurms_node_list(nodes, first):
  assert first_host(nodes) == first


def test_tasks_of_each_node():
  assert [cluster_lib._tasks_here('2(x3),1', node) for node in range(4)] == [2, 2, 2, 1]


@pytest.fixture
def metadata_server():
  """A TPU VM's metadata server: `serve({key: text})` gives its HOST:PORT."""
  servers = []

  def serve(attributes: dict[str, str]) -> str:
    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        key = self.path.rsplit('/', 1)[-1]
        good = key in attributes and self.headers['Metadata-Flavor'] == 'Google'
        self.send_response(200 if good else 404)
        self.end_headers()
        self.wfile.write(attributes.get(key, '').encode())

      def log_message(self, *_):
        pass

    servers.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler))
    threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    return f'127.0.0.1:{servers[-1].server_port}'

  yield serve
  for server in servers:
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
  'attributes, several',
  [
    ({'worker-network-endpoints': 'n:0:10.0.0.1,n:1:10.0.0.2'}, True),
    ({'worker-network-endpoints': 'n:0:10.0.0.1'}, False),
    ({'worker-network-endpoints': 'n:0:10.0.0.1', 'tpu-env': "A: 'x'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
    ({'worker-network-endpoints': 'n:0:10.0.0.1', 'tpu-env': "MEGASCALE_NUM_SLICES: '1'\n"}, False),
    ({}, False),
  ],
)  # fmt: skip
def test_a_tpu_vm_asks_whether_it_is_one_of_several(attributes, several, metadata_server, tmp_path):
  server = {'GCE_METADATA_IP': metadata_server(attributes)}
  # Without chips nobody is asked.
  assert detect(server, root=str(tmp_path)) is None
  (tmp_path / 'dev').mkdir()
  (tmp_path / 'dev' / 'accel0').touch()
  expected = Cluster('the TPU VM') if several else None
  assert detect(server, root=str(tmp_path)) == expected
  assert detect(server | {'TPU_SKIP_MDS_QUERY': '1'}, root=str(tmp_path)) is None


def test_a_machine_with_such_a_device_and_no_such_server(tmp_path):
  (tmp_path / 'dev' / 'vfio').mkdir(parents=True)
  (tmp_path / 'dev' / 'vfio' / '0').touch()
  with socket.create_server(('127.0.0.1', 0)) as closed:
    port = closed.getsockname()[1]
  assert detect({'GCE_METADATA_IP': f'127.0.0.1:{port}'}, root=str(tmp_path)) is None


def test_flags():
  assert from_flags(None, None, None) is None
  assert from_flags('a:1', 2, 1) == Cluster('flags', 'a:1', 2, 1, None)
  assert from_flags('[::1]:1', 2, 0).coordinator == '[::1]:1'


def test_local_devices():
  slurm = detect(A_GPU_EACH)
  assert with_devices(slurm, None) == slurm and with_devices(None, None) is None
  assert with_devices(slurm, ['0', '3']) == dataclasses.replace(slurm, local_devices=(0, 3))
  with pytest.raises(UserError, match='--local_devices=0,a: expected numbers such as 0,1'):
    with_devices(slurm, ['0', 'a'])
  with pytest.raises(UserError, match='is for one of several processes'):
    with_devices(None, ['0'])


@pytest.mark.parametrize(
  'given, words',
  [
    (('a:1', 2, None), '--coordinator, --processes without --process: give all of'),
    ((None, None, 0), '--process without --coordinator, --processes: give all of'),
    (('a', 2, 0), '--coordinator=a is no address: expected HOST:PORT'),
    (('a:99999', 2, 0), 'is no address'),
    (('a:1', 0, 0), '--processes=0; expected 1 or more'),
    (('a:1', 2, 2), '--process=2 of --processes=2: expected 0 to 1'),
    (('a:1', 2, -1), '--process=-1 of --processes=2: expected 0 to 1'),
  ],
)
def test_flags_that_do_not_fit(given, words):
  with pytest.raises(UserError, match=re.escape(words)):
    from_flags(*given)
