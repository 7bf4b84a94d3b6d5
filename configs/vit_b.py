"""FOLK with ViT-B/16 on ImageNet-1K: 300 epochs, batch 1024 (arXiv 2409.10362; recipe of iBOT, arXiv 2111.07832).

  python -m folk_jax.main --config=configs/vit_b.py --workdir=runs/vit_b
  python -m folk_jax.main --config=configs/vit_b.py:data=folder,path=/images --workdir=runs/mine
  python -m folk_jax.main --config=configs/vit_b.py:smoke --workdir=runs/smoke          # seconds on a CPU

Fields marked [D] are our decisions where paper and code are silent; docs/fidelity.md lists them with reasons.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  arg = config_lib.parse_arg(arg, smoke=False, data='tfds', name='imagenet2012', path='')
  c = ml_collections.ConfigDict()

  c.task = 'pretrain'
  c.init_from = (
    ''  # Weights to start from, at any image size: WORKDIR, WORKDIR/best, .safetensors, .npz.
  )
  c.init_which = 'teacher'  # Of a workdir that has one; or 'student'.
  c.seed = 0
  c.batch_size = 1024  # Global, in images (a pair of views is one image), accumulation included.
  c.accumulate = 1  # Microbatches a step.
  c.image_size = 224
  c.epochs = 300  # [D] as is the batch size: the recipe is iBOT's.
  c.total_steps = 0  # Wins over epochs when set.

  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'folk'
  c.objective.filter = 'com_rcom'  # [P] Which frequencies are kept or removed; signal/filters.py.
  c.objective.portions = (
    0.005,
    0.01,
    0.05,
  )  # [P] Share of the H*W coefficients, by rank of magnitude.
  c.objective.com_probability = 0.5  # [D] Com (keeps the strongest) against RCom (removes them).
  c.objective.ranking = 'shared'  # [D] One mask for the channels; or 'per_channel'.
  c.objective.radius = 16.0  # Of the radial filters (MFM's), at 224 px; the others don't use it.
  c.objective.clamp = False  # [D] A clamp to [0, 1] zeroes half of RCom's pixels.
  c.objective.gamma = 1.0  # [D] Exponent of the frequency distance, as MFM.
  c.objective.reduce = 'per_image'  # [D] Or 'pooled', as MFM over the batch.
  c.objective.reconstruction_weight = 1.0  # [D]
  c.objective.distillation_weight = 1.0  # [D]
  c.objective.patch_weight = 0.0  # [D] iBOT-style distillation of patch tokens, same view.
  c.objective.student_temperature = 0.1
  c.objective.teacher_temperature = 0.07
  c.objective.teacher_temperature_start = 0.04
  c.objective.teacher_temperature_epochs = 30.0  # Linear from start; then constant.
  c.objective.centre_momentum = 0.9

  c.model = ml_collections.ConfigDict()
  c.model.name = 'vit'
  c.model.width = 768
  c.model.depth = 12
  c.model.heads = 12
  c.model.patch = 16
  c.model.mlp_ratio = 4.0
  c.model.drop_path = 0.1  # Student only; linear over depth.
  c.model.layer_scale = 0.0  # 0: none.
  # Recomputed in the backward pass: 'none', 'elementwise' (all but products) or 'block' (all).
  c.model.remat = 'elementwise'
  c.model.attention = 'auto'  # 'xla', 'cudnn' (NVIDIA GPUs), 'pallas' (TPUs).
  c.model.scan_unroll = 0  # Blocks a turn of the loop over layers; 0: on CPUs 1, else all.
  c.model.dtype = (
    'auto'  # Compute type: bfloat16 on TPU and GPU, float32 on CPU. Parameters, spectra, norms and
  )
  # softmaxes are float32 whatever it is.

  c.projection = ml_collections.ConfigDict()  # DINO's head, student and teacher.
  c.projection.layers = 3
  c.projection.hidden = 2048
  c.projection.bottleneck = 256
  c.projection.outputs = 8192
  c.projection.norm_last_layer = True

  c.teacher = ml_collections.ConfigDict()
  c.teacher.enabled = True
  c.teacher.momentum = 0.996
  c.teacher.momentum_final = 1.0  # Cosine, per step.

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = 'adamw'  # Or 'sgd'.
  c.optimizer.learning_rate = 5e-4  # For 256 images; scaled linearly by batch_size / 256.
  c.optimizer.final_learning_rate = 1e-6
  c.optimizer.warmup_epochs = 10.0
  c.optimizer.schedule = 'dino'  # Warm-up's convention: 'dino' or 'timm'.
  c.optimizer.weight_decay = 0.04
  c.optimizer.final_weight_decay = 0.4
  c.optimizer.decay_exclude = ()  # Names exempt from decay besides 1-d parameters.
  c.optimizer.b1 = 0.9  # AdamW's, as are the next two.
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.momentum = 0.9  # SGD's.
  c.optimizer.layer_decay = 1.0  # Of the learning rate, from a ViT's last block down; 1: none.
  c.optimizer.frozen = ()  # Top-level parameters that never move, such as ('backbone',).
  c.optimizer.clip = 3.0  # 0: none.
  c.optimizer.clip_by = 'parameter'  # As DINO's and iBOT's code; or 'global'.
  c.optimizer.freeze_last_layer_epochs = 1.0

  c.data = ml_collections.ConfigDict()
  c.data.source = arg.data
  c.data.name = arg.name
  c.data.path = arg.path
  c.data.train_split = 'train'
  c.data.test_split = ''  # The first there is of validation, val and test.
  c.data.validation = 0.0  # Share of the training split held out, for evaluation.split.
  c.data.interpolation = 'bicubic'
  c.data.test_resize = 256  # Short side before the centre crop.
  c.data.mean = (0.485, 0.456, 0.406)
  c.data.std = (0.229, 0.224, 0.225)
  c.data.workers = 16  # Processes a host; 0 decodes in threads.
  c.data.threads = 1  # In each of them.
  c.data.prefetch = 1  # Batches ahead, in each worker; docs/data.md has the memory.
  c.data.max_bad_share = 0.01  # Undecodable files are skipped; past this share the run stops.
  c.data.decode_seconds = 60.0  # A file that takes longer to decode is skipped too; 0: no limit.
  c.data.limit = 0  # Use so many samples, evenly spread; 0: all.
  c.data.images_a_class = 0  # Train on so many of each class, drawn at random; 0: all. Or:
  c.data.label_share = 0.0  # This share of each class, 1 image at least; 0: all.
  c.data.label_seed = 0  # Of that draw. With one seed the draw of 1 is inside that of 2.

  view = {
    'scale': (0.14, 1.0),  # Crop's share of the area, cut and flipped on the host ...
    'ratio': (3 / 4, 4 / 3),
    'flip': 0.5,
    'randaugment': '',  # Such as 'rand-m9-mstd0.5-inc1'; '': none.
    'brightness': 0.4,  # ... and everything from here on the device.
    'contrast': 0.4,
    'saturation': 0.2,
    'hue': 0.1,
    'jitter_probability': 0.8,
    'grayscale_probability': 0.2,
    'blur_probability': 1.0,  # [D] Blur removes what RCom asks for; kept as iBOT's recipe has it.
    'blur_sigma': (0.1, 2.0),
    'solarise_probability': 0.0,
    'solarise_threshold': 0.5,
  }
  c.views = ml_collections.ConfigDict()  # In the order of their names.
  c.views.view_1 = ml_collections.ConfigDict(view)
  c.views.view_2 = ml_collections.ConfigDict(view)
  c.views.view_2.update({'blur_probability': 0.1, 'solarise_probability': 0.2})

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.split = 'test'  # Or 'validation', a share of the training split: to choose by.
  c.evaluation.which = 'teacher'  # Or 'student'.
  c.evaluation.batch_size = 512
  c.evaluation.knn = (10, 20, 100, 200)  # Neighbours; () for no kNN.
  c.evaluation.knn_headline = (
    20  # The k reported as eval/knn_top1: fixed beforehand, never chosen by test data.
  )
  c.evaluation.knn_temperature = 0.07
  c.evaluation.linear_cached_every = (
    0  # Steps; logistic regression on frozen features too. 0: never.
  )
  c.evaluation.low_shot_every = 0  # Steps; and on few labels, of so many images a class:
  c.evaluation.low_shot_images = (1, 10)
  c.evaluation.low_shot_draws = 3
  c.evaluation.feature = 'pooled'  # Class token or ResNet's average; or 'mean_patch', 'concat'.
  c.evaluation.recalibration_images = (
    4096  # For BatchNorm's statistics, of networks that only saw filtered images.
  )
  c.evaluation.held_out_images = 2048  # For what the objective measures on them; 0: all.
  c.evaluation.at_start = True

  c.mesh = ml_collections.ConfigDict({'fsdp': 1})  # Devices over which parameters are sharded.
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 1250  # Steps; the last step is always saved.
  c.checkpoint.keep = 2
  c.checkpoint.permanent_every = 25000  # 0: none.
  c.checkpoint.best = ''  # Such as 'eval/top1' on the split 'validation': its best is kept too.
  c.checkpoint.asynchronous = True
  c.log_every = 50
  c.eval_every = 12510  # Steps; 0: only at start and end.
  c.logging = ml_collections.ConfigDict({'tensorboard': True, 'wandb': False, 'progress': True})
  c.report = True  # At the end a page of curves and pictures, <workdir>/report.html.
  c.guard = ml_collections.ConfigDict()
  c.guard.on_nonfinite = 'skip'  # A step with non-finite numbers updates nothing; or 'stop'.
  c.guard.max_skipped = 10  # Steps in a row; one more stops the run.
  c.guard.max_skipped_share = 0.01  # Of the last 1000 steps; more stop the run.
  c.guard.on_collapse = 'warn'  # Or 'stop'.
  c.guard.collapse_entropy = 0.99  # Teacher entropy / ln K above this is a uniform teacher ...
  c.guard.collapse_mean_entropy = 0.05  # ... of its mean output, below this: one output for all.
  c.guard.collapse_rank = (
    1.05  # Effective rank of the features below this is a single direction ...
  )
  c.guard.collapse_std = 0.02  # ... their spread, 1 over the whole sphere, below this one feature.
  c.guard.patience = 5  # Log points in a row.
  c.guard.spike_deviations = 12.0  # A loss so many deviations (MAD) above the median; 0: none.
  c.guard.spike_window = 256  # Of so many of the last losses.
  c.debug = False  # Checks inside the step, slow; the first that fails stops the run by name.
  c.watchdog = ml_collections.ConfigDict()
  c.watchdog.seconds = 120.0  # After so long say what the run waits for, then again; 0: never.
  # After so long end it, with status 75: start it again; 0: never. Saves, evaluations and compilation have ten times
  # as long: a tenth of the slowest of them is the least.
  c.watchdog.limit = 0.0
  c.spectral_backend = 'auto'  # Fourier transforms: 'fft', 'matmul', or 'auto' ('matmul' on TPU).
  c.profile_steps = (
    0  # So many steps, from the 11th of a start on, are traced into <workdir>/profile.
  )
  c.compilation_cache = '~/.cache/folk_jax/xla'  # '': none.

  if arg.smoke:
    smoke(c)
  return c


def smoke(c: ml_collections.ConfigDict) -> None:
  """The same code in seconds on a CPU: a small model, few steps, embedded photographs unless data is given."""
  c.batch_size, c.image_size, c.epochs, c.total_steps = 16, 32, 0, 4
  c.model.update({'width': 48, 'depth': 2, 'heads': 3, 'patch': 8, 'dtype': 'float32'})
  c.model.remat = 'none'
  c.projection.update({'hidden': 64, 'bottleneck': 32, 'outputs': 128})
  if c.data.source == 'tfds':
    c.data.source, c.data.name = 'embedded', ''
  c.data.update({'workers': 0, 'threads': 2, 'prefetch': 2, 'test_resize': 36, 'limit': 256})
  c.evaluation.update({'batch_size': 32, 'knn': (1, 20)})
  c.optimizer.warmup_epochs = 0.1
  c.checkpoint.update({'every': 2, 'permanent_every': 0})
  c.log_every, c.eval_every = 1, 0
  c.report = False
