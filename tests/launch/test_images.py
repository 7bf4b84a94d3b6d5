"""The manifest for GKE and the Dockerfiles: what they hold, and that it fits the checkout."""

import ast
import pathlib
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUBMIT = ROOT / 'launch' / 'gke' / 'submit.sh'
FLAGS = ('--config=configs/vit_b.py:data=folder,path="/a b,c"', r'--workdir=gs://bucket/a\b')

# Fields that JobSet's v1alpha2 and Kubernetes' batch/v1 and v1 know, of those that a manifest here may use. An API
# server drops a field that it does not know without a word, or refuses it: a typo must not wait for one.
KNOWN = {
  '': {'apiVersion', 'kind', 'metadata', 'spec'},
  'metadata': {'name', 'namespace', 'annotations', 'labels'},
  'spec': {'failurePolicy', 'network', 'replicatedJobs', 'successPolicy', 'suspend', 'ttlSecondsAfterFinished'},
  'spec.failurePolicy': {'maxRestarts', 'restartStrategy', 'rules'},
  'spec.failurePolicy.rules': {'name', 'action', 'onJobFailureReasons', 'targetReplicatedJobs'},
  'spec.replicatedJobs': {'name', 'replicas', 'template', 'groupName', 'dependsOn'},
  'spec.replicatedJobs.template': {'metadata', 'spec'},
  'spec.replicatedJobs.template.spec': {
    'activeDeadlineSeconds', 'backoffLimit', 'completionMode', 'completions', 'parallelism', 'podFailurePolicy',
    'template',
  },
  'spec.replicatedJobs.template.spec.podFailurePolicy': {'rules'},
  'spec.replicatedJobs.template.spec.podFailurePolicy.rules': {'action', 'onExitCodes', 'onPodConditions'},
  'spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes': {'containerName', 'operator', 'values'},
  'spec.replicatedJobs.template.spec.template': {'metadata', 'spec'},
  'spec.replicatedJobs.template.spec.template.spec': {
    'containers', 'dnsPolicy', 'hostNetwork', 'nodeSelector', 'restartPolicy', 'serviceAccountName',
    'terminationGracePeriodSeconds', 'tolerations', 'volumes',
  },
  'spec.replicatedJobs.template.spec.template.spec.containers': {
    'name', 'image', 'command', 'args', 'env', 'ports', 'resources', 'securityContext', 'volumeMounts',
  },
  'spec.replicatedJobs.template.spec.template.spec.containers.ports': {'containerPort', 'name', 'protocol'},
  'spec.replicatedJobs.template.spec.template.spec.containers.resources': {'limits', 'requests'},
  'spec.replicatedJobs.template.spec.template.spec.containers.securityContext': {'privileged'},
  'spec.replicatedJobs.template.spec.template.spec.containers.volumeMounts': {'name', 'mountPath', 'readOnly'},
  'spec.replicatedJobs.template.spec.template.spec.tolerations': {'key', 'operator', 'value', 'effect'},
  'spec.replicatedJobs.template.spec.template.spec.volumes': {
    'name',
    'emptyDir',
    'persistentVolumeClaim',
  },
  'spec.replicatedJobs.template.spec.template.spec.volumes.persistentVolumeClaim': {
    'claimName',
    'readOnly',
  },
  'spec.replicatedJobs.template.spec.template.spec.volumes.emptyDir': {'medium', 'sizeLimit'},
}  # fmt: skip
# Their keys are anybody's.
FREE = ('annotations', 'nodeSelector', 'limits', 'requests')


def unknown_fields(node: object, path: str = '') -> list[str]:
  if isinstance(node, list):
    return [found for item in node for found in unknown_fields(item, path)]
  if not isinstance(node, dict) or path.rsplit('.', 1)[-1] in FREE:
    return []
  found = [f'{path}.{key}' for key in node if key not in KNOWN.get(path, ())]
  for key, value in node.items():
    found += unknown_fields(value, f'{path}.{key}'.lstrip('.'))
  return found


def render(*options: str) -> dict:
  done = subprocess.run(
    ['bash', SUBMIT, 'render', '--name=folk', '--image=r/folk:tpu', *options, '--', *FLAGS],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '@' not in re.sub('#.*', '', done.stdout), 'a @WORD@ is left'
  return yaml.safe_load(done.stdout)


def pod_of(manifest: dict) -> dict:
  return manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


@pytest.mark.parametrize(
  'options, accelerator, topology, slices, hosts, chips',
  [
    (('--topology=4x4',), 'tpu-v5-lite-podslice', '4x4', 1, 4, '4'),
    (('--type=v5p', '--topology=2x2x4', '--slices=3'), 'tpu-v5p-slice', '2x2x4', 3, 4, '4'),
    (('--type=v6e', '--topology=2x4', '--chips-a-host=8'), 'tpu-v6e-slice', '2x4', 1, 1, '8'),
    (('--type=v4', '--topology=4x4x8'), 'tpu-v4-podslice', '4x4x8', 1, 32, '4'),
  ],
)
def test_a_slice_is_a_job_and_a_host_is_a_pod(options, accelerator, topology, slices, hosts, chips):
  manifest = render(*options)
  assert unknown_fields(manifest) == []
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  (jobs,) = manifest['spec']['replicatedJobs']
  job, pod = jobs['template']['spec'], pod_of(manifest)
  assert (jobs['replicas'], job['parallelism'], job['completions']) == (slices, hosts, hosts)
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': accelerator,
    'cloud.google.com/gke-tpu-topology': topology,
  }
  (container,) = pod['containers']
  assert container['resources'] == {
    'requests': {'google.com/tpu': chips},
    'limits': {'google.com/tpu': chips},
  }


def test_the_run_gets_its_flags_as_they_were_given():
  (container,) = pod_of(render('--topology=4x4'))['containers']
  cache = f'{FLAGS[1].replace("--workdir", "--config.compilation_cache")}/compilation_cache'
  assert container['args'] == [*FLAGS, cache]


def test_a_mistake_ends_it_and_anything_else_restarts_it():
  manifest = render('--topology=4x4', '--restarts=7')
  policy = manifest['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7
  (rule,) = policy['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  (rule,) = job['podFailurePolicy']['rules']
  # Kubernetes takes such a policy from pods that are not restarted in place alone.
  assert pod_of(manifest)['restartPolicy'] == 'Never' and job['backoffLimit'] == 0
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes'] == {
    'containerName': pod_of(manifest)['containers'][0]['name'],
    'operator': 'In',
    'values': [2, 130],
  }


def test_spot_is_asked_for_by_name():
  label = 'cloud.google.com/gke-spot'
  assert label not in pod_of(render('--topology=4x4'))['nodeSelector']
  assert pod_of(render('--topology=4x4', '--spot'))['nodeSelector'][label] == 'true'


def test_data_come_from_a_claim():
  volumes = {one['name']: one for one in pod_of(render('--topology=4x4'))['volumes']}
  assert volumes['data'] == {'name': 'data', 'emptyDir': {}}
  manifest = render('--topology=4x4', '--data-claim=in1k')
  assert unknown_fields(manifest) == []
  assert pod_of(manifest)['volumes'][-1]['persistentVolumeClaim']['claimName'] == 'in1k'
  mounts = pod_of(manifest)['containers'][0]['volumeMounts']
  assert {'name': 'data', 'mountPath': '/data', 'readOnly': True} in mounts


def test_an_unknown_field_is_found():
  manifest = render('--topology=4x4')
  pod_of(manifest)['containers'][0]['volumeMount'] = []
  assert [found.rsplit('.', 1)[-1] for found in unknown_fields(manifest)] == ['volumeMount']


def extras() -> set[str]:
  tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
  (table,) = [
    node.value
    for node in tree.body
    if isinstance(node, ast.Assign) and node.targets[0].id == 'EXTRAS'
  ]
  return {key.value for key in table.keys}


@pytest.mark.parametrize('name, extra', [('gpu', 'gpu'), ('tpu', 'tpu')])
def test_an_image_holds_what_a_run_needs(name, extra):
  text = (ROOT / 'launch' / 'docker' / f'Dockerfile.{name}').read_text(encoding='utf-8')
  (installed,) = re.findall(r"-e '\.\[([\w,]+)\]'", text)
  assert extra in installed.split(',') and set(installed.split(',')) <= extras()
  assert (
    'ENTRYPOINT ["python", "-m", "folk_jax.main"]' in text
  )  # no shell between SIGTERM and the run
  sources = [
    source
    for line in re.findall(r'^COPY (.*)$', text, re.MULTILINE)
    for source in line.split()[:-1]
  ]
  assert '.' in sources
  ignored = (ROOT / '.dockerignore').read_text(encoding='utf-8').splitlines()
  for source in sources:
    assert (ROOT / source).exists()
    assert source == '.' or f'!{source.split("/")[0]}' in ignored
  # Everything is left out but what is named, and that is there.
  named = [line[1:] for line in ignored if line.startswith('!')]
  assert ignored[1] == '*' and {'folk_jax', 'configs'} < set(named)
  assert all((ROOT / one).exists() for one in named)
